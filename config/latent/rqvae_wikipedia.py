"""Text autoencoder of Wikipedia, 15,497,792 parameters: 4 tokens become 6 codes of 512, 13.5 bits a token."""

base = "../wikipedia/common.py"
model = "autoencoder"
latent_factor = 4
latent_dim = 128
codebook_size = 512
codebook_levels = 6
n_encoder_layer = 4
n_decoder_layer = 18
n_head = 5
n_embd = 160
quantize_after = 500
