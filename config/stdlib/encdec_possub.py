"""Encoder-decoder with position subtraction."""

base = "encdec_plain.py"
pos_sub = "plain"
