"""What the numbers runs share: pairs of at most 88 bytes, one CPU."""

dataset = "numbers"
block_size = 88
batch_size = 32  # pairs
max_iters = 5000
warmup_iters = 100
learning_rate = 2e-3
min_lr = 1e-4
eval_interval = 500
eval_iters = 10
log_interval = 50
