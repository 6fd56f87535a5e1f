"""Decoder-only baseline of 1.1 M parameters on the tokens of quickstart.py."""

base = "stdlib/baseline.py"
batch_size = 4
max_iters = 2400
eval_interval = 600
log_interval = 100
