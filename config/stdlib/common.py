"""What the stdlib runs share: the source of Python's standard library as bytes, 4,000 steps of 2,048 tokens, one CPU."""

dataset = "stdlib"
block_size = 256
bias = False
dropout = 0.0
batch_size = 8  # x 256 tokens = 2,048 tokens a step
gradient_accumulation_steps = 1
max_iters = 4000
warmup_iters = 100
learning_rate = 2e-3
min_lr = 2e-4
eval_interval = 500
eval_iters = 25
log_interval = 50
