"""Prior over the codes of rqvae_stdlib.py, about 1.1 M parameters. Up to an hour on two CPU cores."""

base = "../stdlib/common.py"
model = "rq_transformer"
autoencoder = "out/latent/rqvae_stdlib"
n_spatial_layer = 5
n_depth_layer = 1
n_head = 4
n_embd = 108
code_offsets = 4
