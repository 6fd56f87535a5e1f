"""Encoder-decoder with position subtraction. Published: train 2.979, val 3.381."""

base = "encdec_plain.py"
pos_sub = "plain"
