"""
The auto-regressive encoder-decoder language model, in one file.

Departures from GPT-2 (a decoder-only stack of pre-norm blocks with tied embeddings and learned positions):

1. Two stacks. A *masked* encoder of E blocks reads the tokens causally and leaves h_t, a state that knows x_0..x_t:
       e_t = dropout(wte[x_t] + wpe[t]);   h = encoder(e)                                    (no final LayerNorm)
   A decoder of D blocks starts from d = W h (the bridge; `bridge_init`) and predicts x_{t+1}. Each of its blocks has three parts,
       d += self_attn(ln_1(d));   d += cross_attn(q = ln_cross_q(d), k,v = ln_cross_kv(h));   d += mlp(ln_2(d))
   and every layer looks at the same raw h. Cross-attention is causal too: position t sees h_0..h_t. So the whole model is
   auto-regressive, one forward pass trains all positions, and *everything* can be cached when sampling.
2. Embedding loss (training only). u_t = LN_h(h_t) is asked to resemble the running mean of the embeddings it has read,
       m_t = mean(a_0..a_t), a = LN_e(e):      mse: mean (m - u)^2      cosine: mean 1 - (cos(m, u) + 1) / 2
                                               log_cosine: mean -log((cos(m, u) + 1) / 2)
3. Position subtraction. The tied output layer compares the last state with pure token embeddings, while the input layer
   added positions to them; so the embedding of the predicted position is subtracted before the logits:
       logits_t = wte (ln_f(d_t) - wpe[t+1])                        (`ln`: another LayerNorm after the subtraction)
4. Options the original left open: E != D, rotary positions (Su et al. 2021, arXiv:2104.09864), dropout.
   With rotary positions nothing is added to the embeddings; subtraction then has a learned table of its own, `wpe_next`,
   whose row t belongs to position t+1 and which is used nowhere else. A `window` limits self-attention to the last positions.
5. A compression head, if wanted, puts quantized latents in the place of h in cross-attention: latent/compression.py.

Shapes: B batch, T tokens of this call, S keys (cached ones first), C width, H heads, D head width, V vocabulary.
"""

import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import torch
import torch.nn as nn
from torch.nn import functional as F

from kernels import Dropout, LayerNorm, at_least_float32, attention, head_logits, head_loss, rotary_angles, rotate, running_sum


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) for a setting that cannot work."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class EncoderDecoderConfig:
    vocab_size: int = 256  # number of token ids; train.py takes it from the data set unless given
    block_size: int = 256  # longest context, tokens
    n_encoder_layer: int = 3  # blocks in the masked encoder
    n_decoder_layer: int = 3  # blocks in the decoder
    n_head: int = 4  # self-attention heads
    n_cross_head: int = 4  # cross-attention heads
    n_embd: int = 128  # width C
    bias: bool = False  # biases in linear layers and LayerNorms
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, in training only
    position: Literal["learned", "rope"] = "learned"  # a table added to the input, or rotary keys and queries
    pos_sub: Literal["none", "plain", "ln"] = "none"  # subtract the next position's embedding before the logits
    decoder_order: Literal["self_first", "cross_first"] = "self_first"  # which attention comes first in a decoder block
    bridge_ln: bool = False  # LayerNorm in front of the bridge
    bridge_init: Literal["identity"] | None = None  # weights W of the bridge at first: I; none: N(0, 0.02), as other linears
    decoder_pos_emb: bool = False  # add the next position's embedding to the decoder's input
    embedding_loss: Literal["none", "mse", "cosine", "log_cosine"] = "none"  # pull encoder states to the mean embedding
    embedding_loss_weight: float = 1.0  # its factor in the total loss
    embedding_loss_detach: Literal["encoder", "embedding", "none"] = "encoder"  # which side gets no gradient from it
    embedding_loss_ln: Literal["input", "average", "none"] = "input"  # LN_e before the running mean, after it, or not at all
    embedding_loss_ln_affine: bool = True  # False: LN_e and LN_h have neither gain nor bias
    window: int = 0  # self-attention sees only so many positions, its own included; 0 = all
    # compression head: cross-attention sees quantized latents, each of latent_factor tokens, see latent/compression.py
    latent_factor: int = 0  # tokens S per latent, a power of two; 0 = no head, cross-attention sees the encoder states
    latent_dim: int = 64  # width of a latent
    codebook_size: int = 512  # codes K of a level
    codebook_levels: int = 4  # levels D; a latent says D log2(K) bits
    commitment_weight: float = 0.0  # factor of the commitment loss: latent/compression.py, point 5

    def __post_init__(self):
        check_fields(self, "vocab_size", "block_size", "n_encoder_layer", "n_decoder_layer", "n_head", "n_cross_head", "n_embd")
        require(self.embedding_loss_weight >= 0.0, f"embedding_loss_weight={self.embedding_loss_weight} must not be negative")
        clash = self.decoder_pos_emb and self.position != "learned"
        require(not clash, f"decoder_pos_emb=True adds a position embedding, but position={self.position} has none; use position=learned")
        if self.latent_factor != 0:
            from latent.compression import quantizer_config

            quantizer_config(self)  # raises as well
        else:
            warn_ignored(self, ("latent_dim", "codebook_size", "codebook_levels", "commitment_weight"), "latent_factor=0, no head")
        if self.embedding_loss == "none":
            warn_ignored(self, [key for key in vars(self) if key.startswith("embedding_loss_")], "embedding_loss=none")


def warn_ignored(config, keys: Iterable[str], because: str) -> None:
    """Warn of settings that were given, although nothing looks at them."""
    if given := [key for key in keys if getattr(config, key) != getattr(type(config), key)]:
        warnings.warn(f"{', '.join(given)} without effect: {because}", stacklevel=1)  # always this line, so that Python shows it once


def check_fields(config, *sizes: str) -> None:
    """Raise ValueError for what any model's config can have wrong: sizes below 1, unknown words, heads, dropout, window."""
    for key in sizes:
        require(getattr(config, key) >= 1, f"{key}={getattr(config, key)}: at least 1 is needed")
    for field in fields(config):
        value, kinds = getattr(config, field.name), (field.type, *get_args(field.type))
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        known = not words or value in words or (value is None and type(None) in kinds)
        require(known, f"{field.name}={value}: choose one of {', '.join(words)}")
    for key in {"n_head", "n_cross_head"}.intersection(sizes):
        C, heads = config.n_embd, getattr(config, key)
        require(C % heads == 0, f"n_embd={C} is not divisible by {key}={heads}; choose a divisor of n_embd")
    require(0.0 <= config.dropout < 1.0, f"dropout={config.dropout}: a probability in [0, 1) is needed")
    window = getattr(config, "window", 0)
    require(window >= 0, f"window={window}: a number of positions is needed, or 0 for all")


# ----------------------------------------------------------------------------------------------------------------------
# blocks, shared by every model of the project; stepper.py computes them in its own way, padding.py knows the layout of their weights


class LayerCache:
    """Keys and values of one attention layer, (2, B, H, capacity, D), allocated when the first ones arrive."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kv: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor, start: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, H, T, D) at slots start..start+T-1; return all S = start + T of them (static: S = capacity)."""
        if self.kv is None:
            B, H, _, D = k.shape
            self.kv = torch.zeros(2, B, H, self.capacity, D, dtype=k.dtype, device=k.device)
        if isinstance(start, torch.Tensor):
            slots = start + torch.arange(k.size(2), device=k.device)
            return self.kv[0].index_copy_(2, slots, k), self.kv[1].index_copy_(2, slots, v)
        end = start + k.size(2)
        assert end <= self.capacity, f"cache of {self.capacity} slots cannot hold {end}"
        self.kv[0, :, :, start:end], self.kv[1, :, :, start:end] = k, v
        return self.kv[0, :, :, :end], self.kv[1, :, :, :end]


class Cache:
    """
    What a model has computed for the first `length` tokens: keys and values of all its attention layers, encoder self,
    decoder self and cross alike. All of them are causal, so all of them only ever grow by appending, and one length and one slot
    numbering serve all of them, except cross-attention to latents (latent/compression.py). Passed to forward(), never stored.
    A static one counts in a tensor on its device and always shows all slots, under a mask: no shape changes from step to
    step, which is what torch.compile and CUDA graphs need. Whoever uses one has to see to it that the tokens fit.
    """

    def __init__(self, n_layer_cache: int, capacity: int, static_on: torch.device | None = None):
        self.layers = [LayerCache(capacity) for _ in range(n_layer_cache)]
        self.capacity = capacity
        self.length = 0 if static_on is None else torch.zeros((), dtype=torch.int64, device=static_on)
        self.states = None  # with a compression head: the encoder states, from which it goes on

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens, of a cache that is not static."""
        assert 0 <= length <= self.length, f"cannot truncate a cache of {self.length} tokens to {length}"
        self.length = length

    def keep(self, length: int, start: int, count: int) -> None:
        """Keep the first `length` tokens and, moved up after them, the `count` tokens from slot `start` on. Not of a static cache."""
        assert self.states is None or count == 0 or start == length, "latents are made of consecutive tokens"
        assert 0 <= length <= start and start + count <= self.length, f"{length=} {start=} {count=} of {self.length} tokens"
        for layer in self.layers if count and start > length else ():
            layer.kv[..., length : length + count, :] = layer.kv[..., start : start + count, :].clone()  # the two may overlap
        self.length = length + count


@dataclass
class Context:
    """What all attention layers of one forward pass share."""

    mask: torch.Tensor | None  # bool (T, S) or (B, 1, T, S), True = may look; None: the causal square, or one token that sees all
    causal: bool  # mask is None and T == S: let the kernel mask
    rotary: dict[int, tuple[torch.Tensor, torch.Tensor]]  # head width -> cos, sin; empty with learned positions
    start: int | torch.Tensor  # tokens in the cache before this call
    dropout: float  # of attention weights
    key_rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None  # of keys that stand elsewhere than the queries


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context, cache: LayerCache | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, with positions and mask of the context: q, k, v (B, H, T, D), cached keys first -> (B, T, H D)."""
    rotary = context.rotary.get(q.size(-1))
    if rotary is not None and (cache is not None or context.key_rotary):
        q, k, rotary = rotate(q, rotary), rotate(k, (context.key_rotary or context.rotary)[k.size(-1)]), None
    if cache is not None:
        k, v = cache.append(k, v, context.start)  # (B, H, S, D)
    y = attention(q, k, v, context.mask, context.causal, context.dropout, rotary)
    return y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)


def split_heads(x: torch.Tensor, n_head: int) -> torch.Tensor:
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)


class SelfAttention(nn.Module):
    def __init__(self, width: int, n_head: int, bias: bool, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)  # q, k, v
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, context: Context, cache: LayerCache | None = None) -> torch.Tensor:
        q, k, v = (split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.dropout(self.c_proj(attend(q, k, v, context, cache)))


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from a memory h: encoder states, or in latent/ latents or a prefix."""

    def __init__(self, width: int, n_head: int, bias: bool, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.c_q = nn.Linear(width, width, bias=bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=bias)  # k, v
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, h: torch.Tensor, context: Context, cache: LayerCache | None = None) -> torch.Tensor:
        q = split_heads(self.c_q(x), self.n_head)
        k, v = (split_heads(part, self.n_head) for part in self.c_kv(h).chunk(2, dim=-1))
        return self.dropout(self.c_proj(attend(q, k, v, context, cache)))


class MLP(nn.Module):
    def __init__(self, width: int, bias: bool, dropout: float):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """GPT-2's pre-norm block: the encoder's layer, and the whole of the decoder-only baseline."""

    def __init__(self, width: int, n_head: int, bias: bool, dropout: float):
        super().__init__()
        self.ln_1 = LayerNorm(width, bias=bias)
        self.attn = SelfAttention(width, n_head, bias, dropout)
        self.ln_2 = LayerNorm(width, bias=bias)
        self.mlp = MLP(width, bias, dropout)

    def forward(self, x: torch.Tensor, context: Context, cache: LayerCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), context, cache)
        return x + self.mlp(self.ln_2(x))


class DecoderBlock(nn.Module):
    """A block that also looks at a memory h under `cross_context`: the encoder states of the positions up to its own, or latents."""

    def __init__(self, width: int, n_head: int, n_cross_head: int, bias: bool, dropout: float, cross_first: bool):
        super().__init__()
        self.cross_first = cross_first
        self.ln_1 = LayerNorm(width, bias=bias)
        self.attn = SelfAttention(width, n_head, bias, dropout)
        self.ln_cross_q = LayerNorm(width, bias=bias)
        self.ln_cross_kv = LayerNorm(width, bias=bias)
        self.cross_attn = CrossAttention(width, n_cross_head, bias, dropout)
        self.ln_2 = LayerNorm(width, bias=bias)
        self.mlp = MLP(width, bias, dropout)

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, context: Context, cross_context: Context,
        self_cache: LayerCache | None = None, cross_cache: LayerCache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if not self.cross_first:
            x = x + self.attn(self.ln_1(x), context, self_cache)
        x = x + self.cross_attn(self.ln_cross_q(x), self.ln_cross_kv(h), cross_context, cross_cache)
        if self.cross_first:
            x = x + self.attn(self.ln_1(x), context, self_cache)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------
# what every causal language model of the project does alike


class CausalModel(nn.Module):
    """
    The plumbing between tokens and blocks: positions, masks, caches, initialisation and counting. A model built on it sets `config`,
    `n_layer_cache` (attention layers to cache) and `head_widths` if it uses make_cache and place, and calls `initialize` when built.
    """

    window = 0  # positions that self-attention sees, its own included; 0 = all
    side_by_side = True  # whether training passes may run at once: False where, dropout aside, they draw numbers or collect statistics
    reconstructs = False  # whether it predicts tokens that it sees, so that its loss is no language model's
    writes_blocks = False  # whether it writes codes first, and then several tokens at once
    evaluation_dropout = 0.0  # of attention weights outside training: see evaluate.py

    def make_cache(self, capacity: int | None = None, static: bool = False) -> Cache:
        """An empty cache for `capacity` tokens (default: block_size), to be passed to forward()."""
        static_on = next(self.parameters()).device if static else None
        return Cache(self.n_layer_cache, capacity or self.config.block_size, static_on)

    def place(
        self, idx: torch.Tensor, cache: Cache | None = None, positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None, windowed: bool = True,
    ) -> tuple[torch.Tensor, Context]:  # fmt: skip
        """
        Absolute positions (T,) of the tokens idx (B, T), and the context their attention layers share. Where `positions` and
        `mask` are given, token i of this call stands at positions[i] and sees the keys where mask[i] (T, S) is True, in the window.
        """
        T, config = idx.size(1), self.config
        start = cache.length if cache is not None else 0
        static = isinstance(start, torch.Tensor)
        if positions is None:
            if not static and start + T > config.block_size:
                raise ValueError(f"{start + T} tokens do not fit into the context of block_size={config.block_size}")
            positions = start + torch.arange(T, device=idx.device)
        window = self.window if windowed else 0
        # is_causal would align its triangle with the *first* key, which is wrong after a cache: there the mask is written out
        if window > 0 or (mask is None and (static or (start > 0 and T > 1))):
            cached = torch.arange(cache.capacity if static else start, device=idx.device)  # a token's slot is its position
            behind = positions[:, None] - (cached if static else torch.cat((cached, positions)))  # (T, S)
            mask = behind >= 0 if mask is None else mask
            mask = mask & (behind < window) if window > 0 else mask
        rotary = {width: rotary_angles(positions, width) for width in self.head_widths} if config.position == "rope" else {}
        dropout = config.dropout if self.training else self.evaluation_dropout
        return positions, Context(mask, causal=mask is None and start == 0, rotary=rotary, start=start, dropout=dropout)

    @torch.no_grad()
    def initialize(self, stacks: list[nn.ModuleList]) -> None:
        """N(0, 0.02) for linears and embeddings; N(0, 0.02 / sqrt(2 n)) for the residual projections of a stack of n blocks."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for stack in stacks:
            for name, parameter in stack.named_parameters():
                if name.endswith("c_proj.weight"):
                    nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * len(stack)))

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; by default without the tables of positions (that of tokens counts: it is the output layer too)."""
        return sum(p.numel() for name, p in self.named_parameters() if not (non_embedding and "wpe" in name))

    def flops_per_token(self) -> int:
        """
        Floating-point operations to train on one token of a full context, forward and backward, counted as nanoGPT counts
        (PaLM, arXiv:2204.02311, appendix B): 6 N, and 12 C T for each attention layer, masked-out products included.
        """
        return 6 * self.get_num_params() + 12 * self.config.n_embd * self.config.block_size * self.n_layer_cache


# ----------------------------------------------------------------------------------------------------------------------
# the encoder-decoder


class EmbeddingLoss(nn.Module):
    """Departure 2 above: how far the encoder states are from the running mean of the embeddings they have read."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        # gain AND bias whatever config.bias says: the published loss has them, and it is through them that it is solved
        norm = functools.partial(LayerNorm, config.n_embd, elementwise_affine=config.embedding_loss_ln_affine)
        self.ln_embedding = norm() if config.embedding_loss_ln != "none" else None
        self.config, self.ln_encoder = config, norm()

    def forward(self, e: torch.Tensor, h: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Mean loss, unweighted, of input embeddings e and encoder states h, both (B, T, C), where `counted` (B, T) is True."""
        config, e, h = self.config, at_least_float32(e), at_least_float32(h)
        e = e.detach() if config.embedding_loss_detach == "embedding" else e
        h = h.detach() if config.embedding_loss_detach == "encoder" else h
        if config.embedding_loss_ln == "input":
            e = self.ln_embedding(e)
        count = torch.arange(1, e.size(1) + 1, device=e.device, dtype=e.dtype)
        m = running_sum(e) / count[:, None]  # m_t = mean(a_0..a_t)
        if config.embedding_loss_ln == "average":
            m = self.ln_embedding(m)
        u = self.ln_encoder(h)
        if config.embedding_loss == "mse":
            losses = (m - u).square().sum(-1) / config.n_embd  # no mean: padding.py may have put zeros behind the channels
        else:
            similarity = (F.cosine_similarity(m, u, dim=-1) + 1) / 2  # in [0, 1]; 0 for exactly opposite vectors
            losses = 1 - similarity if config.embedding_loss == "cosine" else -similarity.clamp_min(1e-8).log()
        return torch.where(counted, losses, 0.0).sum() / counted.sum()


class EncoderDecoder(CausalModel):
    """See the top of this file. Parameter names are part of the checkpoint format."""

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config, self.window = config, config.window
        C, learned = config.n_embd, config.position == "learned"
        self.n_layer_cache = config.n_encoder_layer + 2 * config.n_decoder_layer
        self.head_widths = {C // config.n_head, C // config.n_cross_head}
        self.wte = nn.Embedding(config.vocab_size, C)  # also the output layer
        next_position = config.pos_sub != "none" or config.decoder_pos_emb
        self.wpe = nn.Embedding(config.block_size + next_position, C) if learned else None
        self.wpe_next = nn.Embedding(config.block_size, C) if next_position and not learned else None
        self.dropout = Dropout(config.dropout)
        block = (C, config.n_head, config.bias, config.dropout)
        self.encoder = nn.ModuleList(Block(*block) for _ in range(config.n_encoder_layer))
        self.ln_bridge = LayerNorm(C, bias=config.bias) if config.bridge_ln else None
        self.bridge = nn.Linear(C, C, bias=config.bias)
        block = (C, config.n_head, config.n_cross_head, config.bias, config.dropout, config.decoder_order == "cross_first")
        self.decoder = nn.ModuleList(DecoderBlock(*block) for _ in range(config.n_decoder_layer))
        self.ln_f = LayerNorm(C, bias=config.bias)
        self.ln_pos_sub = LayerNorm(C, bias=config.bias) if config.pos_sub == "ln" else None
        self.embedding_loss = EmbeddingLoss(config) if config.embedding_loss != "none" else None
        self.compression = None
        if config.latent_factor > 0:
            from latent.compression import CompressionHead

            self.compression, self.side_by_side = CompressionHead(config), False
            self.after_step, self.summarize = self.compression.quantizer.step, self.compression.summarize  # hooks: checkpoint.py
            self.measure = functools.partial(self.compression.measure, self)
        self.initialize([self.encoder, self.decoder])
        if config.bridge_init == "identity":
            nn.init.eye_(self.bridge.weight)
        for block in self.decoder if self.compression is not None else ():
            nn.init.zeros_(block.cross_attn.c_proj.weight)  # training begins without the latents, which mean nothing yet

    def make_cache(self, capacity: int | None = None, static: bool = False) -> Cache:
        cache = super().make_cache(capacity, static)
        return cache if self.compression is None else self.compression.extend(cache, self.config.n_encoder_layer)

    def encode(
        self, idx: torch.Tensor, positions: torch.Tensor, context: Context, layers: list[LayerCache] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input embeddings e and encoder states h, both (B, T, C), of tokens idx (B, T); `layers` are the caches of the blocks."""
        e = self.wte(idx) if self.wpe is None else self.wte(idx) + self.wpe(positions)
        h = e = self.dropout(e)
        for i, block in enumerate(self.encoder):
            h = block(h, context, layers[i] if layers is not None else None)
        return e, h

    def next_position(self, positions: torch.Tensor) -> torch.Tensor:
        """Embedding (T, C) of the position after each, the one whose token is predicted."""
        return self.wpe(positions + 1) if self.wpe is not None else self.wpe_next(positions)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: Cache | None = None,
        positions: torch.Tensor | None = None, mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:  # fmt: skip
        """
        idx (B, T) token ids -> logits (B, T, V) and no losses; with targets (B, T), -1 = not counted, no logits but the
        losses by name: `total` (to minimise), `token` (nats per token) and, in training, `embedding`, `commitment` (unweighted).
        With a cache, idx are the tokens after those already in it, and they are appended to it.
        """
        assert self.compression is None or (positions is None and mask is None), "latents are made of consecutive tokens"
        positions, context = self.place(idx, cache, positions, mask)
        E, layers = len(self.encoder), cache.layers if cache is not None else [None] * self.n_layer_cache
        e, h = self.encode(idx, positions, context, layers[:E])
        if self.compression is not None:
            memory, cross_context, quantizer_losses = self.compression(h, positions, context, cache, targets)
        else:  # a window limits self-attention only
            memory = h
            cross_context = context if self.window == 0 else self.place(idx, cache, positions, mask, windowed=False)[1]
        x = self.bridge(h if self.ln_bridge is None else self.ln_bridge(h))
        if self.config.decoder_pos_emb:
            x = x + self.next_position(positions)
        for block, self_cache, cross_cache in zip(self.decoder, layers[E::2], layers[E + 1 :: 2]):  # a decoder block has two
            x = block(x, memory, context, cross_context, self_cache, cross_cache)
        x = self.ln_f(x)
        if self.config.pos_sub != "none":
            x = x - self.next_position(positions)
        if self.ln_pos_sub is not None:
            x = self.ln_pos_sub(x)
        if cache is not None:
            cache.length += idx.size(1)
        if targets is None:
            return head_logits(x, self.wte.weight), {}
        loss = head_loss(x, self.wte.weight, targets)
        losses = {"token": loss, "total": loss}
        if self.embedding_loss is not None and self.training:
            losses["embedding"] = self.embedding_loss(e, h, targets >= 0)  # a mean over targets, too
            losses["total"] = losses["token"] + self.config.embedding_loss_weight * losses["embedding"]
        if self.compression is not None and self.training:
            losses["commitment"] = quantizer_losses["commitment"]
            losses["total"] = losses["total"] + self.config.commitment_weight * losses["commitment"]
        return None, losses

    def flops_per_token(self) -> int:
        """As counted above, less what the head needs only once for each latent."""
        return super().flops_per_token() - (0 if self.compression is None else round(self.compression.spared_flops(self)))

    def embedding_loss_report(self, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """
        What the embedding loss does to the model on idx and targets (B, T), in evaluation mode: its value; mean gain and norm of the
        bias of its two LayerNorms, how far the biases are apart; norm of the gradient of weight * loss in token and position table.
        """
        assert not self.training, "dropout would change what is reported"
        tables = {"wte": self.wte.weight} | ({"wpe": self.wpe.weight} if self.wpe is not None else {})
        with torch.enable_grad():
            loss = self.embedding_loss(*self.encode(idx, *self.place(idx)), targets >= 0)
            grads = torch.autograd.grad(self.config.embedding_loss_weight * loss, list(tables.values()), allow_unused=True)
        report = {f"embedding_grad_{name}": 0.0 if grad is None else grad.norm().item() for name, grad in zip(tables, grads)}
        norms = {name[3:]: norm for name, norm in self.embedding_loss.named_children() if norm.weight is not None}  # of ln_...
        for name, norm in norms.items():
            report |= {f"gain_{name}": norm.weight.mean().item(), f"bias_{name}": norm.bias.norm().item()}
        if len(norms) == 2:
            report["bias_distance"] = (norms["embedding"].bias - norms["encoder"].bias).norm().item()
        return report | {"embedding_loss": loss.item()}
