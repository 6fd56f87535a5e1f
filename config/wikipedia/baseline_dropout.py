"""Decoder-only baseline with dropout. Published: train 3.174, val 3.406, but with attention dropout on in evaluation."""

base = "baseline.py"
dropout = 0.2
