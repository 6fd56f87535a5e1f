"""Decoder-only baseline with dropout. Evaluated without it, which the original did not do."""

base = "baseline.py"
dropout = 0.2
