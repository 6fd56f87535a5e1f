"""Encoder-decoder, 13 + 13 blocks, without embedding loss and position subtraction. Published: train 3.043, val 3.413."""

base = "common.py"
model = "encoder_decoder"
n_encoder_layer = 13
n_decoder_layer = 13
n_head = 5
n_cross_head = 10
n_embd = 150
