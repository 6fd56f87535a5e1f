"""Encoder-decoder of GPT-2's width, 5 + 5 blocks: 121,786,368 parameters."""

base = "common.py"
model = "encoder_decoder"
n_encoder_layer = 5
n_decoder_layer = 5
n_head = 12
n_cross_head = 12
n_embd = 768
pos_sub = "plain"
