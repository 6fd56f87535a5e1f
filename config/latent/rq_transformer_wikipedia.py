"""Prior over the codes of rqvae_wikipedia.py at the size of the published runs, about 17.6 M parameters."""

base = "../wikipedia/common.py"
model = "rq_transformer"
autoencoder = "out/latent/rqvae_wikipedia"
n_spatial_layer = 8
n_depth_layer = 1
n_head = 6
n_embd = 384
dropout = 0.1
