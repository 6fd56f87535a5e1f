"""Decoder-only baseline a little smaller than the encoder-decoder (0.9%), one layer deeper: 1,080,684 parameters."""

base = "common.py"
model = "decoder_only"
n_layer = 5
n_head = 4
n_embd = 132
