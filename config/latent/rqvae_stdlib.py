"""Text autoencoder of the standard library's bytes: 4 bytes become 4 codes of 512, 9 bits a byte. An hour on two CPU cores."""

base = "../stdlib/common.py"
model = "autoencoder"
latent_factor = 4
latent_dim = 64
codebook_size = 512
codebook_levels = 4
n_encoder_layer = 1
n_decoder_layer = 3
n_head = 4
n_embd = 128
quantize_after = 200
max_iters = 16000
eval_interval = 1000
