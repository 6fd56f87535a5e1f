"""Decoder-only baseline of 1.1 M parameters on the tokens of quickstart.py."""
base = "stdlib/baseline.py"
position = "rope"
batch_size = 4
learning_rate = 3e-3
min_lr = 3e-4
grad_clip = 1.0
max_iters = 2000
eval_interval = 500
eval_sample_tokens = 120  # what it writes by then is printed
eval_sample_prompt = "def "
log_interval = 100
