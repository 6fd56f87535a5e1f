"""Smaller decoder-only baseline, 15,441,192 parameters. Published: train 2.958, val 3.416."""

base = "common.py"
model = "decoder_only"
n_layer = 26
n_head = 12
n_embd = 156
