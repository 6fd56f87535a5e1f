"""Prior over the codes of rqvae_stdlib_8.py, about 1.1 M parameters: a spatial step and 4 depth steps for 8 bytes."""

base = "rq_transformer_stdlib.py"
autoencoder = "out/latent/rqvae_stdlib_8"
code_vectors = "codebook"  # with fewer codes a byte a table of its own brings nothing: results/REPORT.md, section 7
n_spatial_layer = 4
n_embd = 116
max_iters = 10000  # of half the stacks
