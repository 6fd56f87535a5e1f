"""Numbers to English words: 4 bytes become one code."""

base = "numbers_8.py"
latent_factor = 4
