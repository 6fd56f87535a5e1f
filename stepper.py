"""
A few tokens of one text at a time, on a CPU: the cached forward pass of a model on packed weights.

At this size a general forward pass of one token spends most of its time around the arithmetic: modules, shapes, kernels that
are started for a handful of numbers, weights that come from memory at a fraction of its speed. A stepper computes the same from
the same cache, with weights packed once:

- a product with one vector is a batched product of the two halves of the matrix. That uses two threads, and even with one is faster
  than MKL's matrix-vector product, which reads weights that are in no cache at a third of the speed. It adds the residual too;
- 1 / sqrt(D) is folded into the weights of the queries, and gain and bias of ln_cross_kv into those of the cross-attention keys and
  values. What is left of that LayerNorm is the same in all decoder layers, so one product gives the keys and values of all of them;
- under bfloat16 autocast all weights but the output layer's are stored in bfloat16, and everything between the products is float32;
  if asked, all weights are stored in 8 bits.

Shapes: n rows (tokens of this step), C width, H heads, D head width, S keys (cached ones and the new), V vocabulary.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

from baseline_transformer.model import DecoderOnly
from kernels import rotary_angles
from latent.rq_transformer import RQTransformer
from model import Block, Cache, CrossAttention, DecoderBlock, EncoderDecoder, LayerCache, SelfAttention


def can_step(model: torch.nn.Module) -> bool:
    """Whether there is a stepper for this model on its device: none for windows and compression heads."""
    if not isinstance(model, (DecoderOnly, EncoderDecoder, RQTransformer)) or next(model.parameters()).device.type != "cpu":
        return False
    return model.window == 0 and getattr(model, "compression", None) is None


class Pace:
    """
    How many threads steps of one token take: one or all, whichever was faster in the first 32 steps, or 0.1 s of them, tried in turns.
    Threads wait for each other at every product. On idle cores two are up to 1.6 times as fast as one; where other programs use
    the cores each wait may take milliseconds, and a step on two threads 3 to 80 times as long. The result is the same bit for bit.
    """

    def __init__(self):
        self.turns, self.seconds, self.steps = [1, torch.get_num_threads()], [0.0, 0.0], 0

    @property
    def threads(self) -> int:
        """Of the next step."""
        return self.turns[self.steps % len(self.turns)]

    def took(self, seconds: float) -> None:
        """A step has been made."""
        self.seconds[self.steps % 2] += seconds
        self.steps += 1
        tried = self.steps % 2 == 0 and (self.steps == 32 or (self.steps >= 4 and max(self.seconds) > 0.1))
        if tried and len(self.turns) == 2:
            self.turns = [min(zip(self.seconds, self.turns))[1]]


@contextlib.contextmanager
def stepping(pace: Pace | None = None) -> Iterator[None]:
    """
    What all steps run in: no gradients, no autocast (Product has its own dtypes), and no oneDNN, whose start takes 9 to 26
    microseconds a call: for a few hundred numbers torch's own gelu and products in bfloat16 are several times as fast. All threads,
    or as many as `pace` says: for steps of one token, as products of several are the same on any number of them up to rounding only.
    """
    onednn, all_threads = torch._C._get_mkldnn_enabled(), torch.get_num_threads()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags would set more than this, and warn
    torch.set_num_threads(all_threads if pace is None else pace.threads)
    began = time.perf_counter()
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            yield
        if pace is not None:
            pace.took(time.perf_counter() - began)
    finally:
        torch.set_num_threads(all_threads)
        torch._C._set_mkldnn_enabled(onednn)


class Product:
    """W x + b for rows x (n, in); W (out, in) may be several stacked matrices."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.out, self.bias = weight.size(0), bias
        if self.out % 2:  # then with a row of zeros
            weight = F.pad(weight, (0, 0, 0, 1))
        self.weight = weight.contiguous()
        self.halves = self.weight.unflatten(0, (2, -1))  # (2, out / 2, in)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(0) > 1:
            y = x @ self.weight.T
        else:  # the layout of x, a row of a transposed matrix, matters for speed: (1, in) -> (2, in, 1)
            y = torch.bmm(self.halves, x.expand(2, 1, -1).mT).view(1, -1)
        return y[:, : self.out] if self.out % 2 else y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x) if self.bias is None else self.multiply(x) + self.bias

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + W x + b."""
        if self.bias is not None or self.out % 2 or x.size(0) > 1:
            return residual + self(x)
        return torch.baddbmm(residual.view(2, -1, 1), self.halves, x.expand(2, 1, -1).mT).view(1, -1)


class RoundedProduct(Product):
    """A Product with W in bfloat16 or in 8 bits, and x rounded to bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.bias, self.scale, self.padding = bias, None, (0, 0)
        if dtype == torch.int8:  # each row in steps of 1/127 of its largest weight
            self.scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).to(torch.bfloat16)
            weight = (weight / self.scale[:, None]).round()
            self.padding = (0, -weight.size(1) % 32)  # zeros: at other widths the operator reads beyond the end of a row
        self.weight = F.pad(weight, self.padding).to(dtype).contiguous()
        self.input = torch.zeros(1, self.weight.size(1), dtype=torch.bfloat16)  # of one row, padded
        self.inside, self.row = self.input[:, : weight.size(1)], self.input[0]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(0) == 1:
            self.inside.copy_(x)
            rows = self.input
        else:
            rows = F.pad(x, self.padding).bfloat16()
        if self.scale is not None:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        elif x.size(0) == 1:
            y = torch.mv(self.weight, self.row).view(1, -1)
        else:
            y = rows @ self.weight.T
        return y.type_as(x)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual + self(x)


class Norm:
    """LayerNorm of rows, without the calls around it."""

    def __init__(self, norm: torch.nn.LayerNorm):
        self.weight, self.bias, self.shape = norm.weight, norm.bias, norm.weight.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, 1e-5)


class Place(NamedTuple):
    """Where the rows of a step stand, and what they see."""

    start: int  # slots start..stop-1 of the cache
    stop: int
    positions: slice | torch.Tensor  # (n,)
    bias: torch.Tensor | None  # (n, S) -inf where a row does not see a key; None: all rows see all, each other too
    rotary: dict[int, tuple[torch.Tensor, torch.Tensor]]  # head width -> cos, sin (3, 1, n, D), see Rotation


class Rotation:
    """Rotary embedding of queries, keys and values at once: kernels.rotate for the first two; values stay as they are."""

    def __init__(self, block_size: int, head_width: int, dtype: torch.dtype):
        half = head_width // 2
        cos, sin = rotary_angles(torch.arange(block_size), head_width)  # (T, D // 2)
        self.cos = torch.ones(3, 1, block_size, head_width, dtype=dtype)  # an odd head width leaves its last channel as it is
        self.sin = torch.zeros_like(self.cos)
        self.cos[:2, :, :, : 2 * half] = torch.cat((cos, cos), -1)
        self.sin[:2, :, :, : 2 * half] = torch.cat((-sin, sin), -1)
        channels = torch.arange(head_width)
        self.partner = torch.cat((channels[half : 2 * half], channels[:half], channels[2 * half :]))

    def at(self, positions: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos[:, :, positions], self.sin[:, :, positions]


class Layers:
    """Blocks of model.py, packed: rows of one text through all of them."""

    def __init__(self, blocks: torch.nn.ModuleList, rotary_length: int, weight_dtype: torch.dtype | None = None):
        """rotary_length: positions, where they are rotary; else 0. Weights are packed in the dtype of autocast unless one is given."""
        first = blocks[0].attn
        self.state_dtype = first.c_attn.weight.dtype
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.weight_dtype = weight_dtype or (torch.bfloat16 if half else self.state_dtype)
        widths = {part.c_proj.in_features // part.n_head for part in (first, getattr(blocks[0], "cross_attn", first))}
        self.rotations = {width: Rotation(rotary_length, width, self.state_dtype) for width in (widths if rotary_length else ())}
        self.blocks = [self.pack(block) for block in blocks]

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
        if self.weight_dtype in (torch.bfloat16, torch.int8):
            return RoundedProduct(weight, bias, self.weight_dtype)
        return Product(weight, bias)

    def linear(self, linear: torch.nn.Linear) -> Product:
        return self.product(linear.weight, linear.bias)

    def queries_first(self, linear: torch.nn.Linear, n_head: int) -> Product:
        """The product of a packed linear layer whose first C rows are queries, these divided by sqrt(D)."""
        C = linear.in_features
        scale = torch.ones(linear.out_features, dtype=self.state_dtype)
        scale[:C] = 1 / math.sqrt(C // n_head)
        return self.product(linear.weight * scale[:, None], None if linear.bias is None else linear.bias * scale)

    def pack_attention(self, layer: SelfAttention | CrossAttention, queries: torch.nn.Linear, norm: torch.nn.LayerNorm) -> tuple:
        return Norm(norm), self.queries_first(queries, layer.n_head), self.linear(layer.c_proj), layer.n_head

    def pack(self, block: Block | DecoderBlock) -> dict[str, tuple]:
        """The parts of a block in the order in which they run."""
        mlp = (Norm(block.ln_2), self.linear(block.mlp.c_fc), self.linear(block.mlp.c_proj))
        own = self.pack_attention(block.attn, block.attn.c_attn, block.ln_1)
        if not isinstance(block, DecoderBlock):
            return {"self": own, "mlp": mlp}
        cross = self.pack_attention(block.cross_attn, block.cross_attn.c_q, block.ln_cross_q)
        return {"cross": cross, "self": own, "mlp": mlp} if block.cross_first else {"self": own, "cross": cross, "mlp": mlp}

    # ------------------------------------------------------------------------------------------------------------------

    def place(self, start: int, n: int, positions: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> Place:
        """n rows after `start` ones; their positions (n,) if they are not their slots; mask (n, S) True = sees, None: all."""
        where = slice(start, start + n) if positions is None else positions
        bias = None if mask is None else torch.zeros(mask.shape, dtype=self.state_dtype).masked_fill_(~mask, -math.inf)
        rotary = {width: rotation.at(where) for width, rotation in self.rotations.items()}
        return Place(start, start + n, where, bias, rotary)

    def turn(self, x: torch.Tensor, place: Place, part: int | slice = slice(None)) -> torch.Tensor:
        """Queries, keys and values (3, H, n, D), or a part of the three, with their positions, if they are rotary."""
        if not place.rotary:
            return x
        cos, sin = place.rotary[x.size(-1)]
        return torch.addcmul(x * cos[part], x[..., self.rotations[x.size(-1)].partner], sin[part])

    def write(self, cache: LayerCache, kv: torch.Tensor, place: Place) -> None:
        """Put keys and values (2, H, n, D) into their slots of a layer's cache."""
        if cache.kv is None:
            cache.kv = kv.new_zeros(2, 1, kv.size(1), cache.capacity, kv.size(3))
        elif cache.kv.dtype != self.state_dtype:  # filled under autocast
            cache.kv = cache.kv.to(self.state_dtype)
        cache.kv[:, 0, :, place.start : place.stop] = kv

    def attend(self, q: torch.Tensor, cache: LayerCache, place: Place) -> torch.Tensor:
        """q (H, n, D), scaled, over all keys and values of a layer so far -> (n, C)."""
        k, v = cache.kv.select(1, 0).narrow(2, 0, place.stop).unbind()  # (H, S, D)
        scores = torch.bmm(q, k.mT) if place.bias is None else torch.baddbmm(place.bias, q, k.mT)  # (H, n, S)
        y = torch.bmm(scores.softmax(-1), v)  # (H, n, D)
        return y.view(1, -1) if y.size(1) == 1 else y.transpose(0, 1).flatten(1)

    def self_attention(self, parts: tuple, x: torch.Tensor, cache: LayerCache, place: Place) -> torch.Tensor:
        norm, c_attn, c_proj, n_head = parts
        qkv = c_attn(norm(x)).view(x.size(0), 3, n_head, -1).permute(1, 2, 0, 3)  # (3, H, n, D)
        qkv = self.turn(qkv, place)
        self.write(cache, qkv[1:], place)
        return c_proj.add_to(x, self.attend(qkv[0], cache, place))

    def cross_attention(self, parts: tuple, x: torch.Tensor, cache: LayerCache, place: Place) -> torch.Tensor:
        norm, c_q, c_proj, n_head = parts
        q = c_q(norm(x)).view(x.size(0), n_head, -1).transpose(0, 1)  # (H, n, D)
        return c_proj.add_to(x, self.attend(self.turn(q, place, 0), cache, place))

    def mlp(self, parts: tuple, x: torch.Tensor) -> torch.Tensor:
        norm, c_fc, c_proj = parts
        return c_proj.add_to(x, F.gelu(c_fc(norm(x))))

    def __call__(
        self, x: torch.Tensor, place: Place, own: list[LayerCache], cross: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """Rows x (n, C) -> (n, C). They go into the caches of self-attention; those of cross-attention have them already."""
        for i, block in enumerate(self.blocks):
            for name, parts in block.items():
                if name == "self":
                    x = self.self_attention(parts, x, own[i], place)
                elif name == "cross":
                    x = self.cross_attention(parts, x, cross[i], place)
                else:
                    x = self.mlp(parts, x)
        return x


class Memory:
    """What cross-attention of all decoder layers keeps of an encoder state: their keys and values, by one product."""

    def __init__(self, decoder: torch.nn.ModuleList, layers: Layers):
        folded = [self.fold(block.ln_cross_kv, block.cross_attn.c_kv) for block in decoder]
        bias = None if folded[0][1] is None else torch.cat([b for _, b in folded])
        self.product = layers.product(torch.cat([w for w, _ in folded]), bias)  # (2 C layers, C)
        self.layers, self.n_head = layers, decoder[0].cross_attn.n_head

    def fold(self, norm: torch.nn.LayerNorm, linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias that do to a vector of mean 0 and variance 1 what norm's gain and bias, then linear, would."""
        bias = linear.bias
        if norm.bias is not None:
            bias = F.linear(norm.bias, linear.weight, bias)
        return linear.weight * norm.weight, bias

    def __call__(self, h: torch.Tensor, place: Place, caches: list[LayerCache]) -> None:
        """Put h (n, C) into the caches."""
        normed = torch.layer_norm(h, h.shape[1:], None, None, 1e-5)
        kv = (
            self.product(normed).view(h.size(0), len(caches), 2, self.n_head, -1).permute(1, 2, 3, 0, 4)
        )  # (layers, 2, H, n, D)
        for cache, pair in zip(caches, self.layers.turn(kv, place, slice(1, 3))):
            self.layers.write(cache, pair, place)


# ----------------------------------------------------------------------------------------------------------------------
# models


class Stepper:
    """`stepper(tokens, cache)` appends tokens to the cache of a text, and gives the logits after them."""

    def __init__(self, model: EncoderDecoder | DecoderOnly, int8: bool = False):
        """int8: weights of all products in 8 bits. That is another model, about a percent off in each product, and a faster one."""
        assert can_step(model), f"no stepper for {type(model).__name__}"
        self.config = config = model.config
        rotary = config.block_size if config.position == "rope" else 0
        packing = (rotary, torch.int8 if int8 else None)
        self.encoder = None
        if isinstance(model, EncoderDecoder):
            parts, self.wte = model, model.wte.weight
            self.encoder, self.decoder = Layers(model.encoder, *packing), Layers(model.decoder, *packing)
            self.memory = Memory(model.decoder, self.decoder)
            self.ln_bridge = None if model.ln_bridge is None else Norm(model.ln_bridge)
            self.bridge = self.decoder.linear(model.bridge)
        else:
            parts, self.wte = model.transformer, model.lm_head.weight
            self.decoder = Layers(parts.h, *packing)
        self.ln_f = Norm(parts.ln_f)
        self.ln_pos_sub = Norm(parts.ln_pos_sub) if config.pos_sub == "ln" else None
        self.head = self.decoder.product(self.wte) if int8 else Product(self.wte, None)  # in float32: kernels.head_logits
        self.wpe = None if rotary else parts.wpe.weight
        self.wpe_next = None
        if config.pos_sub != "none" or getattr(config, "decoder_pos_emb", False):
            self.wpe_next = parts.wpe_next.weight if rotary else parts.wpe.weight[1:]  # row t: position t + 1
        self.pace = Pace()

    def __call__(
        self, tokens: list[int], cache: Cache, positions: torch.Tensor | None = None, mask: torch.Tensor | None = None,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """
        One token, or n with positions (n,) and a mask (n, S) of what they see; they are appended to the cache. Gives the logits (n, V)
        after them, or after those rows of them that are to be `read`.
        """
        with stepping(self.pace if len(tokens) == 1 else None):
            here, own, cross = self.decoder.place(cache.length, len(tokens), positions, mask), cache.layers, None
            x = self.wte[torch.tensor(tokens)]  # (n, C)
            if self.wpe is not None:
                x = x + self.wpe[here.positions]
            if self.encoder is not None:
                E = len(self.encoder.blocks)
                own, cross = cache.layers[E::2], cache.layers[E + 1 :: 2]  # a decoder layer has two
                x = self.encoder(x, here, cache.layers[:E])
                self.memory(x, here, cross)
                x = self.bridge(x if self.ln_bridge is None else self.ln_bridge(x))
                if self.config.decoder_pos_emb:
                    x = x + self.wpe_next[here.positions]
            x = self.ln_f(self.decoder(x, here, own, cross))
            if self.config.pos_sub != "none":
                x = x - self.wpe_next[here.positions]
            if self.ln_pos_sub is not None:
                x = self.ln_pos_sub(x)
            cache.length += len(tokens)
            return self.head(x if read is None else x[read])
