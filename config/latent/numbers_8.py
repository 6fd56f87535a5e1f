"""Numbers to English words, 493,568 parameters: 8 bytes become one code, and all bytes are decoded at once."""

base = "numbers_common.py"
model = "latent_transformer"
task = "pairs"
target_size = 80  # the longest answer has 72 bytes and an end; the longest number 6, and its tab
latent_factor = 8
n_layer = 2
n_decoder_layer = 2
n_head = 4
n_embd = 64
bottleneck = "vq"
latent_dim = 32
codebook_size = 256
startup_steps = 200  # decoder and codes are learned within these
quantize_after = 300
freeze_codes_after = 2000
