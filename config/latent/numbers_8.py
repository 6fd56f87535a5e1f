"""Numbers to English words (data/pairs/prepare.py --numbers): 8 bytes become one code, all bytes are decoded at once."""

base = "numbers_common.py"
model = "latent_transformer"
task = "pairs"
target_size = 80  # the longest answer has 72 bytes and an end
latent_factor = 8
bottleneck = "vq"
codebook_size = 512
startup_steps = 500
quantize_after = 500
