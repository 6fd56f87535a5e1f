"""Shapes of the models that are timed, with random weights, where no run is given."""

PUBLISHED = {  # config/wikipedia/encdec_plain.py and baseline.py
    "encoder_decoder": dict(n_encoder_layer=13, n_decoder_layer=13, n_head=5, n_cross_head=10, n_embd=150),
    "decoder_only": dict(n_layer=26, n_head=10, n_embd=160),
}
STDLIB = {  # config/stdlib/encdec_plain.py and baseline.py
    "encoder_decoder": dict(n_encoder_layer=2, n_decoder_layer=2, n_head=4, n_cross_head=8, n_embd=136),
    "decoder_only": dict(n_layer=4, n_head=4, n_embd=148),
}
