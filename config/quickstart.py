"""Encoder-decoder of 1.1 M parameters, a few minutes on two CPU cores; the other half is quickstart_baseline.py."""

base = "stdlib/encdec_plain.py"
pos_sub = "plain"
batch_size = 4
max_iters = 2400
eval_interval = 600
log_interval = 100
