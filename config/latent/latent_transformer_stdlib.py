"""Text in targets of 16 bytes, 1,051,920 parameters: 4 bytes become 4 codes of 512, the 16 codes are predicted one by one."""

base = "../stdlib/common.py"
model = "latent_transformer"
task = "text"
target_size = 16
latent_factor = 4
n_layer = 3
n_decoder_layer = 2
n_head = 4
n_embd = 80
bottleneck = "rq"
latent_dim = 64
codebook_size = 512
codebook_levels = 4
startup_steps = 500
quantize_after = 500
max_iters = 6000
eval_interval = 1000
