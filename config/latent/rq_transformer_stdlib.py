"""Prior over the codes of rqvae_stdlib.py, 1,295,676 parameters: a spatial step and 4 depth steps for 4 bytes."""

base = "../stdlib/common.py"
model = "rq_transformer"
autoencoder = "out/latent/rqvae_stdlib"
code_vectors = "learned"  # 0.18 bits per byte better than the codebook's: results/REPORT.md, section 7
n_spatial_layer = 5
n_depth_layer = 1
n_head = 4
n_embd = 108
code_offsets = 4
batch_size = 40  # x 256 tokens = 10,240 tokens or 2,560 stacks of codes a step
max_iters = 6000
eval_interval = 1000
eval_iters = 5  # x 40 = the 200 windows of the other stdlib runs
