"""
Encoder-decoder with a compression head, 1,132,736 parameters and codebooks: self-attention sees 16 bytes in each layer, what lies
further back comes through latents of 8 bytes. summary.json has the loss without them (val_loss_latents_zeroed). Minutes on a
CPU core. Its rivals: --latent_factor=0 (all encoder states in the place of latents), and --window=0 as well; and --codebook_size=2
--codebook_levels=1 (one bit a latent: results/REPORT.md, section 7).
"""

base = "../quickstart.py"
n_embd = 128
window = 16
latent_factor = 8
latent_dim = 64
codebook_size = 512
codebook_levels = 4
max_iters = 4000
