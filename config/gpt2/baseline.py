"""GPT-2 small, decoder-only: 123,551,232 parameters."""

base = "common.py"
model = "decoder_only"
n_layer = 12
n_head = 12
n_embd = 768
