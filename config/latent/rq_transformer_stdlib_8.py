"""Prior over the codes of rqvae_stdlib_8.py, 1,297,692 parameters: a spatial step and 4 depth steps for 8 bytes."""

base = "rq_transformer_stdlib.py"
autoencoder = "out/latent/rqvae_stdlib_8"
n_spatial_layer = 4
n_embd = 116
max_iters = 10000  # of half the stacks
