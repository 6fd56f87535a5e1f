"""Encoder-decoder of 1.1 M parameters with rotary positions, a few minutes on two CPU cores. Its rival: quickstart_baseline.py."""
base = "stdlib/encdec_plain.py"
position = "rope"  # learns about twice as fast as a position table in runs this short
batch_size = 4
learning_rate = 3e-3
min_lr = 3e-4
grad_clip = 1.0  # large gradients of the first hundred steps cost 0.1 nats at the end: results/REPORT.md, section 6
bridge_init = "identity"  # 0.1 to 0.2 nats lower at the end than with random weights: section 8
max_iters = 2000
eval_interval = 500
eval_sample_tokens = 120  # what it writes by then is printed
eval_sample_prompt = "def "
log_interval = 100
