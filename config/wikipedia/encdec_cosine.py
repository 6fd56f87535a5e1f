"""Encoder-decoder with the cosine embedding loss. Published: train 2.993, val 3.387."""

base = "encdec_plain.py"
embedding_loss = "cosine"
