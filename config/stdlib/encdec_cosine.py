"""Encoder-decoder with the cosine embedding loss."""

base = "encdec_plain.py"
embedding_loss = "cosine"
