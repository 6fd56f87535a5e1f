"""Decoder-only baseline, 16,036,800 parameters. Published: train 2.937, val 3.424."""

base = "common.py"
model = "decoder_only"
n_layer = 26
n_head = 10
n_embd = 160
