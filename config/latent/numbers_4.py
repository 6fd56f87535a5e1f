"""Numbers to English words, 481,024 parameters: 4 bytes become one code."""

base = "numbers_8.py"
latent_factor = 4
freeze_codes_after = 600
