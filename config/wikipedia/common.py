"""What the eight published runs share: 38.3 M training tokens of Wikipedia, 160,000 tokens a step, 9,000 steps."""

dataset = "wikipedia"
block_size = 200
bias = False
dropout = 0.0
batch_size = 50
gradient_accumulation_steps = 16  # x 50 x 200 = 160,000 tokens a step
micro_batch_size = "auto"  # on a GPU as many sequences at a time as fit, and so fewer, larger products
max_iters = 9000
learning_rate = 9e-4
min_lr = 9e-5
warmup_iters = 300
lr_decay_iters = 700000  # so the rate stays within 0.1% of its peak
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 0.0
eval_interval = 500
eval_iters = 200
