"""
One block of S tokens of one text at a time, on a CPU: the steps of an RQTransformer and of its autoencoder's decoder, with the packed
weights of stepper.py.

Shapes: D levels, K codes of a level, Z latent width, C width, S tokens of a block, V vocabulary.
"""

import torch
from torch.nn import functional as F

from latent.autoencoder import Autoencoder
from latent.rq_transformer import RQTransformer
from model import Cache
from stepper import Layers, Norm, Pace, Product, stepping


class BlockWriter:
    """`writer(codes, cache)` appends one block of S tokens to a text: what Autoencoder.decode does, from the codes of all levels."""

    def __init__(self, model: Autoencoder):
        config = model.config
        self.S, self.books = config.latent_factor, model.quantizer.vectors()
        self.layers = Layers(model.decoder, config.block_size if config.position == "rope" else 0)
        linear, refine = self.layers.linear, model.refine_decoder
        self.refine = Norm(refine.norm), linear(refine.c_fc), linear(refine.c_proj)
        self.from_latent = linear(model.from_latent)
        self.up = [(linear(layer.dense), Norm(layer.norm)) for layer in model.up.layers]
        self.wpe = None if model.wpe_decoder is None else model.wpe_decoder.weight
        self.ln_f, self.head = Norm(model.ln_f), Product(model.wte.weight, None)  # float32: kernels.head_logits

    @stepping()
    def __call__(self, codes: list[int], cache: Cache) -> torch.Tensor:
        """Codes of one block after those in the cache -> logits (S, V)."""
        z = sum(book[code] for book, code in zip(self.books, codes))[None]  # (1, Z)
        norm, c_fc, c_proj = self.refine
        gate, value = c_fc(norm(z)).chunk(2, dim=-1)
        x = self.from_latent(c_proj.add_to(z, F.silu(gate) * value))  # (1, C)
        for dense, norm in self.up:  # each doubles the rows
            x = (x[:, None] + norm(dense(x.relu()).view(-1, 2, x.size(1)))).flatten(0, 1)  # (r, 2, C) -> (2r, C)
        here = self.layers.place(cache.length, self.S)
        if self.wpe is not None:
            x = x + self.wpe[here.positions]
        x = self.layers(x, here, cache.layers)
        cache.length += self.S
        return self.head(self.ln_f(x))


class CodeStepper:
    """The steps of an RQTransformer: see `states` and `code_logits` there; and of its autoencoder's decoder."""

    def __init__(self, model: RQTransformer, table: torch.Tensor):
        """table (D, K, C): model.table()."""
        config = model.config
        self.table, self.wpe = table.type_as(model.wpe_depth), model.wpe_depth  # autocast leaves the table in half precision
        self.spatial, self.depth = Layers(model.spatial.blocks, config.blocks), Layers(model.depth.blocks, 0)
        self.from_sum = None if model.from_sum is None else self.depth.linear(model.from_sum)
        self.heads = [(Norm(norm), Product(linear.weight, linear.bias)) for norm, linear in model.heads]
        self.spatial_pace, self.depth_pace = Pace(), Pace()
        packed = model.autoencoder is not None and model.autoencoder.trunk is None
        self.write = BlockWriter(model.autoencoder) if packed else None

    def embed(self, codes: list[int]) -> torch.Tensor:
        """Sum (1, C) of the vectors of the first codes of a stack."""
        return sum(level[code] for level, code in zip(self.table, codes))[None]

    def state(self, stack: list[int], cache: Cache) -> torch.Tensor:
        """The spatial state h (1, C) after one more stack, which is appended to the cache (that holds the start at least)."""
        with stepping(self.spatial_pace):
            h = self.spatial(self.embed(stack), self.spatial.place(cache.length, 1), cache.layers)
        cache.length += 1
        return h

    def logits(self, h: torch.Tensor, codes: list[int], cache: Cache) -> torch.Tensor:
        """Logits (1, K) of the code after the first `codes` of a stack, all but the last of which are in the cache."""
        level = cache.length
        assert level == len(codes), f"{len(codes)} codes, but the cache holds {level} steps"
        norm, head = self.heads[level]
        with stepping(self.depth_pace):
            x = h.type_as(self.wpe) if level == 0 else self.from_sum(self.embed(codes))
            x = self.depth(x + self.wpe[level], self.depth.place(level, 1), cache.layers)
            cache.length += 1
            return head(norm(x))
