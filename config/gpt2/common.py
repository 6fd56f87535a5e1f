"""GPT-2's size and nanoGPT's schedule for it: 491,520 tokens a step on FineWeb; made for one or several large GPUs."""

dataset = "fineweb"
block_size = 1024
bias = False
batch_size = 12
gradient_accumulation_steps = 40  # shared by all processes: 1, 2, 4, 5, 8, ... of them
max_iters = 20000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 700
grad_clip = 1.0
eval_interval = 1000
eval_iters = 100
