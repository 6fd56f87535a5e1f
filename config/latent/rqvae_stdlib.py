"""Text autoencoder, 1,066,752 parameters: 4 bytes become 4 codes of 512, 9 bits a byte."""

base = "../stdlib/common.py"
model = "autoencoder"
latent_factor = 4
encoder_context = "block"  # codes that know what stands before them are harder to predict: results/REPORT.md, section 7
latent_dim = 64
codebook_size = 512
codebook_levels = 4
n_encoder_layer = 1
n_decoder_layer = 3
n_head = 4
n_embd = 128
quantize_after = 200  # by then the latents say the bytes, and codes can be made of them
max_iters = 13000
eval_interval = 1000
