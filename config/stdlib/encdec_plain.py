"""Encoder-decoder, 1,090,856 parameters, without embedding loss and position subtraction."""

base = "common.py"
model = "encoder_decoder"
n_encoder_layer = 2
n_decoder_layer = 2
n_head = 4
n_cross_head = 8  # twice the self-attention heads, as in the published runs
n_embd = 136
