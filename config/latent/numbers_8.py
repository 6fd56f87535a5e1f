"""Numbers to English words, 526,336 parameters: 8 bytes become one code, and all bytes are decoded at once."""

base = "numbers_common.py"
model = "latent_transformer"
task = "pairs"
target_size = 80  # the longest answer has 72 bytes and an end; the longest number 6, and its tab
latent_factor = 8
n_layer = 4  # the prior does the arithmetic of lengths, over 18 positions; the decoder has 80
n_decoder_layer = 1
n_head = 4
n_embd = 64
bottleneck = "vq"
latent_dim = 32
codebook_size = 256
startup_steps = 200  # decoder and codes are learned within these
quantize_after = 300
freeze_codes_after = 1000  # from here on the prior learns quickly: see dev/LOG.md
