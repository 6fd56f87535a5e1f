"""Decoder-only baseline of the encoder-decoder's depth, 1,090,612 parameters."""

base = "common.py"
model = "decoder_only"
n_layer = 4
n_head = 4
n_embd = 148
