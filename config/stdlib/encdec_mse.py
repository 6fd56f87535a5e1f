"""Encoder-decoder with the MSE embedding loss."""

base = "encdec_plain.py"
embedding_loss = "mse"
