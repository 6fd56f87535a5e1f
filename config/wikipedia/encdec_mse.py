"""Encoder-decoder with the MSE embedding loss. Published: train 2.998, val 3.385."""

base = "encdec_plain.py"
embedding_loss = "mse"
