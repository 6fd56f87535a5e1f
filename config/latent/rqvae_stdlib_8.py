"""Text autoencoder, 1,443,968 parameters: 8 bytes become 4 codes of 512, 4.5 bits a byte. Less than an hour on two CPU cores."""

base = "rqvae_stdlib.py"
latent_factor = 8
latent_dim = 128
n_encoder_layer = 2
n_decoder_layer = 2
quantize_after = 500
max_iters = 12500
min_lr = 2e-5  # the last steps gain most, as the codes come to rest
