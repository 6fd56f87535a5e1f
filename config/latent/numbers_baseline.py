"""Numbers to English words, one byte after the other, 530,628 parameters: the auto-regressive rival of numbers_8.py."""

base = "numbers_common.py"
model = "decoder_only"
position = "rope"
n_layer = 6
n_head = 6
n_embd = 84
