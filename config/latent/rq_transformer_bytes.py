"""What learned codes have to be compared with: codes are the bytes, and a spatial and 4 depth steps write 4; 1,074,492 parameters."""

base = "rq_transformer_stdlib.py"
autoencoder = None
latent_factor = 4
code_offsets = 1  # nothing is stored: windows of the text begin anywhere
