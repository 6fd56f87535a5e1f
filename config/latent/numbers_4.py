"""Numbers to English words, 448,256 parameters: 4 bytes become one code."""

base = "numbers_8.py"
latent_factor = 4
