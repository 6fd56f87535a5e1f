"""Encoder-decoder with the MSE embedding loss, weight 8, and position subtraction: the published winner."""

base = "encdec_plain.py"
embedding_loss = "mse"
embedding_loss_weight = 8.0
pos_sub = "plain"
