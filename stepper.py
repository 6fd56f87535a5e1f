"""
One step of one text at a time, on a CPU: the cached forward pass of a model as matrix-vector products.

At this size a general forward pass of one token spends most of its time around the arithmetic: modules, shapes, kernels that
are started for a handful of numbers. A stepper computes the same from the same cache, with weights packed once:

- a product with a vector adds up columns or takes inner products of rows, whichever the shape makes faster, and adds the
  residual on the way;
- 1 / sqrt(D) is folded into the queries' weights, and LayerNorm's gains in front of the cross-attention keys and values into
  theirs: all decoder layers read the same normalized encoder state, so one product gives the keys and values of all of them;
- under bfloat16 autocast, weights are stored in bfloat16 and everything between the products is float32; in 8 bits, if asked:
  what a step costs is above all reading the weights.

Shapes: C width, H heads, D head width, S keys (cached ones and the new one), V vocabulary.
"""

import math

import torch
from torch.nn import functional as F

from baseline_transformer.model import DecoderOnly
from kernels import LayerNorm, rotary_angles
from latent.rq_transformer import RQTransformer
from model import Block, Cache, CrossAttention, DecoderBlock, EncoderDecoder, LayerCache, SelfAttention


def can_step(model: torch.nn.Module) -> bool:
    """Whether there is a stepper for this model on its device: none for windows and compression heads."""
    if not isinstance(model, (DecoderOnly, EncoderDecoder, RQTransformer)) or next(model.parameters()).device.type != "cpu":
        return False
    return isinstance(model, RQTransformer) or (model.window == 0 and getattr(model, "compression", None) is None)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """F.gelu without the library that torch starts for it, which takes 40 microseconds for a few hundred numbers."""
    return x * torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5)


class Product:
    """y = W x + b of vectors; W (out, in) may be several stacked matrices."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        self.bias, self.dtype, self.scale = bias, dtype, None
        if dtype == torch.int8:  # each row in steps of 1/127 of its largest weight; the operator multiplies with bfloat16
            step = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
            self.padding = (0, -weight.size(1) % 32)  # zeros: at other widths the operator reads beyond the end of a row
            self.weight = F.pad((weight / step[:, None]).round().to(torch.int8), self.padding).contiguous()
            self.scale = step.to(torch.bfloat16)
        elif dtype == torch.bfloat16:
            self.weight = weight.contiguous().to(dtype)
        else:  # measured: the long side of a matrix should be the one that is contiguous in memory
            columns = weight.size(0) >= weight.size(1)
            self.weight = (weight.t().contiguous().t() if columns else weight.contiguous()).to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is not None:
            y = torch._weight_int8pack_mm(F.pad(x, self.padding)[None].to(torch.bfloat16), self.weight, self.scale)[0].to(
                x.dtype
            )
        elif self.dtype == x.dtype:
            y = torch.mv(self.weight, x)
        else:
            y = torch.mv(self.weight, x.to(self.dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + W x + b."""
        if self.dtype == x.dtype and self.bias is None:
            return torch.addmv(residual, self.weight, x)
        return residual + self(x)


class Norm:
    """LayerNorm of a vector, without the calls around it."""

    def __init__(self, norm: LayerNorm):
        self.weight, self.bias, self.shape = norm.weight, norm.bias, (norm.width,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, 1e-5)


class Rotation:
    """Rotary embedding of one position at a time: model.rotate with the angles of all positions at hand."""

    def __init__(self, block_size: int, head_width: int, like: torch.Tensor):
        half = head_width // 2
        cos, sin = rotary_angles(torch.arange(block_size), head_width)  # (T, D // 2)
        rest = head_width - 2 * half  # 1 channel that is not rotated, if the width is odd
        self.cos = torch.cat((cos, cos, torch.ones(block_size, rest)), -1).to(like)  # (T, D)
        self.sin = torch.cat((-sin, sin, torch.zeros(block_size, rest)), -1).to(like)
        channels = torch.arange(head_width)
        self.partner = torch.cat((channels[half : 2 * half], channels[:half], channels[2 * half :]))

    def __call__(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """x (..., D) turned to its position."""
        return torch.addcmul(x * self.cos[position], x[..., self.partner], self.sin[position])


class Layers:
    """Blocks of model.py, packed: one vector at a time through all of them."""

    def __init__(self, blocks: torch.nn.ModuleList, rotary_length: int, weight_dtype: torch.dtype | None = None):
        """rotary_length: positions, where they are rotary; else 0. Weights are packed in the dtype of autocast unless one is given."""
        first = blocks[0].attn
        self.state_dtype = first.c_attn.weight.dtype
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.weight_dtype = weight_dtype or (torch.bfloat16 if half else self.state_dtype)
        widths = {part.c_proj.in_features // part.n_head for part in (first, getattr(blocks[0], "cross_attn", first))}
        like = torch.empty(0, dtype=self.state_dtype)
        self.rotations = {width: Rotation(rotary_length, width, like) for width in (widths if rotary_length else ())}
        self.blocks = [self.pack(block) for block in blocks]

    def product(self, linear: torch.nn.Linear) -> Product:
        return Product(linear.weight, linear.bias, self.weight_dtype)

    def queries_first(self, linear: torch.nn.Linear, n_head: int) -> Product:
        """The product of a packed linear layer whose first C rows are queries, these divided by sqrt(D)."""
        C = linear.in_features
        scale = torch.ones(linear.out_features, dtype=self.state_dtype)
        scale[:C] = 1 / math.sqrt(C // n_head)
        return Product(linear.weight * scale[:, None], None if linear.bias is None else linear.bias * scale, self.weight_dtype)

    def pack_attention(self, layer: SelfAttention | CrossAttention, queries: torch.nn.Linear, norm: LayerNorm) -> tuple:
        return Norm(norm), self.queries_first(queries, layer.n_head), self.product(layer.c_proj), layer.n_head

    def pack(self, block: Block | DecoderBlock) -> dict[str, tuple]:
        """The parts of a block in the order in which they run."""
        mlp = (Norm(block.ln_2), self.product(block.mlp.c_fc), self.product(block.mlp.c_proj))
        own = self.pack_attention(block.attn, block.attn.c_attn, block.ln_1)
        if not isinstance(block, DecoderBlock):
            return {"self": own, "mlp": mlp}
        cross = self.pack_attention(block.cross_attn, block.cross_attn.c_q, block.ln_cross_q)
        return {"cross": cross, "self": own, "mlp": mlp} if block.cross_first else {"self": own, "cross": cross, "mlp": mlp}

    # ------------------------------------------------------------------------------------------------------------------

    def turn(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Queries or keys (..., D) with their position, if it is rotary."""
        return self.rotations[x.size(-1)](x, position) if self.rotations else x

    def write(self, cache: LayerCache, kv: torch.Tensor, position: int) -> None:
        """Put keys and values (2, H, D) into a slot of a layer's cache."""
        if cache.kv is None:
            cache.kv = kv.new_zeros(2, 1, kv.size(1), cache.capacity, kv.size(2))
        elif cache.kv.dtype != self.state_dtype:  # filled under autocast
            cache.kv = cache.kv.to(self.state_dtype)
        cache.kv[:, 0, :, position] = kv

    def attend(self, q: torch.Tensor, cache: LayerCache, n: int) -> torch.Tensor:
        """q (H, D), scaled, over the first n keys and values of a layer -> (C,)."""
        k, v = cache.kv[:, 0, :, :n]  # (H, S, D)
        weights = torch.bmm(q[:, None], k.mT).softmax(-1)  # (H, 1, S)
        return torch.bmm(weights, v).view(-1)

    def self_attention(self, parts: tuple, x: torch.Tensor, cache: LayerCache, position: int) -> torch.Tensor:
        norm, c_attn, c_proj, n_head = parts
        qkv = c_attn(norm(x)).view(3, n_head, -1)  # (3, H, D)
        if self.rotations:
            qkv = torch.cat((self.turn(qkv[:2], position), qkv[2:]))
        self.write(cache, qkv[1:], position)
        return c_proj.add_to(x, self.attend(qkv[0], cache, position + 1))

    def cross_attention(self, parts: tuple, x: torch.Tensor, cache: LayerCache, position: int) -> torch.Tensor:
        norm, c_q, c_proj, n_head = parts
        q = self.turn(c_q(norm(x)).view(n_head, -1), position)  # (H, D)
        return c_proj.add_to(x, self.attend(q, cache, position + 1))

    def mlp(self, parts: tuple, x: torch.Tensor) -> torch.Tensor:
        norm, c_fc, c_proj = parts
        return c_proj.add_to(x, gelu(c_fc(norm(x))))

    def __call__(
        self, x: torch.Tensor, position: int, own: list[LayerCache], cross: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """x (C,) at a position -> (C,). It goes into the caches of self-attention; those of cross-attention have it already."""
        for i, block in enumerate(self.blocks):
            for name, parts in block.items():
                if name == "self":
                    x = self.self_attention(parts, x, own[i], position)
                elif name == "cross":
                    x = self.cross_attention(parts, x, cross[i], position)
                else:
                    x = self.mlp(parts, x)
        return x


class Memory:
    """What cross-attention of all decoder layers keeps of an encoder state: their keys and values, by one product."""

    def __init__(self, decoder: torch.nn.ModuleList, layers: Layers):
        folded = [self.fold(block.ln_cross_kv, block.cross_attn.c_kv) for block in decoder]
        bias = None if folded[0][1] is None else torch.cat([b for _, b in folded])
        self.product = Product(torch.cat([w for w, _ in folded]), bias, layers.weight_dtype)  # (n 2C, C)
        self.layers, self.n_head = layers, decoder[0].cross_attn.n_head

    def fold(self, norm: LayerNorm, linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias that do to a vector of mean 0 and variance 1 what norm's gain and bias, then linear, would."""
        bias = linear.bias
        if norm.bias is not None:
            bias = F.linear(norm.bias, linear.weight, bias)
        return linear.weight * norm.weight, bias

    def __call__(self, h: torch.Tensor, position: int, caches: list[LayerCache]) -> None:
        """Put h (C,) into the caches."""
        normed = torch.layer_norm(h, h.shape, None, None, 1e-5)
        kv = self.product(normed).view(len(caches), 2, self.n_head, -1)  # (layers, 2, H, D)
        if self.layers.rotations:
            kv = torch.stack((self.layers.turn(kv[:, 0], position), kv[:, 1]), dim=1)
        for cache, pair in zip(caches, kv):
            self.layers.write(cache, pair, position)


# ----------------------------------------------------------------------------------------------------------------------
# models


class Stepper:
    """`stepper(token, cache)` appends one token to the cache of a text, and gives the logits (V,) of the next."""

    def __init__(self, model: EncoderDecoder | DecoderOnly, int8: bool = False):
        """int8: weights of all products in 8 bits. That is another model, within a percent in each product, and a faster one."""
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
            self.bridge = self.decoder.product(model.bridge)
        else:
            parts, self.wte = model.transformer, model.lm_head.weight
            self.decoder = Layers(parts.h, *packing)
        self.ln_f = Norm(parts.ln_f)
        self.ln_pos_sub = Norm(parts.ln_pos_sub) if config.pos_sub == "ln" else None
        self.head = Product(self.wte, None, self.decoder.weight_dtype)
        self.wpe = None if rotary else parts.wpe.weight
        self.wpe_next = None
        if config.pos_sub != "none" or getattr(config, "decoder_pos_emb", False):
            self.wpe_next = parts.wpe_next.weight if rotary else parts.wpe.weight[1:]  # row t: position t + 1

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)
    def __call__(self, token: int, cache: Cache) -> torch.Tensor:
        position, own, cross = cache.length, cache.layers, None
        x = self.wte[token]
        if self.wpe is not None:
            x = x + self.wpe[position]
        if self.encoder is not None:
            E = len(self.encoder.blocks)
            own, cross = cache.layers[E::2], cache.layers[E + 1 :: 2]  # a decoder layer has two
            x = self.encoder(x, position, cache.layers[:E])
            self.memory(x, position, cross)
            x = self.bridge(x if self.ln_bridge is None else self.ln_bridge(x))
            if self.config.decoder_pos_emb:
                x = x + self.wpe_next[position]
        x = self.ln_f(self.decoder(x, position, own, cross))
        if self.config.pos_sub != "none":
            x = x - self.wpe_next[position]
        if self.ln_pos_sub is not None:
            x = self.ln_pos_sub(x)
        cache.length += 1
        return self.head(x)


class CodeStepper:
    """The two kinds of steps of an RQTransformer: see `states` and `code_logits` there."""

    def __init__(self, model: RQTransformer, table: torch.Tensor):
        """table (D, K, C): model.table()."""
        config = model.config
        self.table, self.wpe = table, model.wpe_depth
        self.spatial, self.depth = Layers(model.spatial.blocks, config.blocks), Layers(model.depth.blocks, 0)
        self.from_sum = None if model.from_sum is None else self.depth.product(model.from_sum)
        self.heads = [(Norm(norm), self.depth.product(linear)) for norm, linear in model.heads]

    def embed(self, codes: list[int]) -> torch.Tensor:
        """Sum (C,) of the vectors of the first codes of a stack."""
        x = self.table[0, codes[0]]
        for level, code in enumerate(codes[1:], start=1):
            x = x + self.table[level, code]
        return x

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)
    def state(self, stack: list[int], cache: Cache) -> torch.Tensor:
        """The spatial state h (C,) behind one more stack, which is appended to the cache (that holds the start at least)."""
        h = self.spatial(self.embed(stack), cache.length, cache.layers)
        cache.length += 1
        return h

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)
    def logits(self, h: torch.Tensor, codes: list[int], cache: Cache) -> torch.Tensor:
        """Logits (K,) of the code behind the first `codes` of a stack, all but the last of which are in the cache."""
        level = cache.length
        assert level == len(codes), f"{len(codes)} codes, but the cache holds {level} steps"
        x = h if level == 0 else self.from_sum(self.embed(codes))
        x = self.depth(x + self.wpe[level], level, cache.layers)
        cache.length += 1
        norm, head = self.heads[level]
        return head(norm(x))
