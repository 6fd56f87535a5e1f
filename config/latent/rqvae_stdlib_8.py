"""Text autoencoder of the standard library's bytes: 8 bytes become 4 codes of 512, 4.5 bits a byte. An hour on two CPU cores."""

base = "rqvae_stdlib.py"
latent_factor = 8
latent_dim = 128
