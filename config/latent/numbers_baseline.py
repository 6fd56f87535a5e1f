"""Numbers to English words, one byte after the other: the auto-regressive rival of numbers_4.py and numbers_8.py."""

base = "numbers_common.py"
model = "decoder_only"
position = "rope"
