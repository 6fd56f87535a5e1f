"""
The latent transformer (Kaiser et al. 2018, arXiv:1803.03382): the target y becomes a sequence of codes S times shorter, a prior
predicts the codes one by one from the text x before it, and all tokens of y are decoded from them at once. Autoencoder, latent
prior and decoder, in the paper's letters:

    ae:  y -> residual convolutions -> self-attention -> strided convolutions -> bottleneck: codes, z_q
    lp:  [x | codes] -> causal blocks -> logits of each next code, and the states h of x
    ad:  z_q, h -> log2(S) times (residual convolution, attention to h, twice as long) -> decoder blocks -> logits of y

1. The prior is one causal stack over the prefix and the codes, so it steps through a cache like any model. Code i of a target
   that starts at position s stands at s + i; the prior's states h of x serve `ad` as memory. `ae` sees y alone: that attention to x gains
   nothing is a finding of arXiv:1805.11063.
2. The decoder blocks are causal over positions that are all known at once, the upsampled vectors, so they run in parallel. In the
   first `startup_steps` they are fed true tokens, shifted right, where upsampled vectors would be: `target` all of them, as in the
   paper, so that they train as a language model would; `mix` a share that falls to none. Evaluation never does this.
3. task=pairs: a row is x SEP y EOS and y is what has targets. x stands right-aligned in the first block_size - target_size
   positions (rotary angles are relative, so nothing depends on the padding). Blocks of S tokens without a token of y have no
   codes: a code K, "end", says so, and its nats are paid for.
   task=text: a row is text, cut into targets of target_size tokens; each is predicted from all text before it. All of them are
   computed in one pass, under masks: they see the prefix up to their own start, and each other not at all. In training the first
   cut is random. Sampling puts the decoded tokens, not their codes, in front of the next target.
4. In evaluation `token` is an upper bound of the negative log-likelihood, nats of codes and end plus nats of the tokens given
   the codes: the codes are a function of the text (see rq_transformer.py, point 4).

Shapes: B batch, T tokens of a row, P prefix, J targets of a row, N tokens of a target, S tokens of a latent, M = N / S latents of a
target, D levels, n = M D codes of a target, K codes of a level, Z latent width, C width, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from kernels import Dropout, at_least_float32, head_logits, head_loss, rotary_angles
from latent import bottleneck as bottlenecks
from latent.quantize import code_counts, code_usage, warn_too_late
from latent.resample import CausalDownsample, ResidualConvBlock, UpLayer, doublings
from model import Block, Cache, CausalModel, Context, CrossAttention, DecoderBlock, check_fields, require, warn_ignored


@dataclass(frozen=True)
class LatentTransformerConfig:
    vocab_size: int = 256  # number of token ids; train.py takes it from the data set unless given
    block_size: int = 256  # text: longest context, tokens; pairs: prefix and target together
    task: Literal["pairs", "text"] = "text"  # y for x, or the next target_size tokens again and again
    target_size: int = 64  # tokens N of a target, a multiple of latent_factor; pairs: of the longest y with its end
    latent_factor: int = 8  # tokens S of a latent, a power of two
    n_layer: int = 3  # causal blocks over prefix and codes
    n_decoder_layer: int = 2  # blocks of the parallel decoder
    n_head: int = 4  # attention heads of all
    n_embd: int = 96  # width C
    bias: bool = False  # biases in linear layers, convolutions and LayerNorms
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, in training only
    # warm-up of the decoder
    startup_steps: int = 500  # steps in which it is fed true tokens; 0 = none
    startup: Literal["mix", "target"] = "mix"  # a falling share of its positions, or all of them
    # codes: latent/bottleneck.py explains them
    bottleneck: Literal["vq", "rq", "dvq", "gumbel", "semhash"] = "vq"  # how latents become codes
    latent_dim: int = 64  # width Z of a latent
    codebook_size: int = 512  # codes K of a level
    codebook_levels: int = 1  # rq: levels D, dvq: slices
    commitment_weight: float = 0.25  # vq, rq, dvq: of the commitment loss in the total
    codebook_decay: float = 0.99  # vq, rq, dvq: weight of the past in the moving averages, per step
    quantize_after: int = 300  # vq, rq, dvq: steps of training without codes before k-means makes the codebooks
    freeze_codes_after: int = 0  # steps after which the codes of a text stay as they are, for the prior's sake; 0 = never
    gumbel_temperature: float = 0.2  # gumbel: at the end, from 1.2
    gumbel_noise: float = 0.5  # gumbel: at the end, from 0
    gumbel_hard: bool = False  # gumbel: one code with a straight-through gradient, not a mixture
    anneal_steps: int = 3000  # gumbel: steps from the first to the last temperature and noise
    usage_weight: float = 0.02  # gumbel: of the loss that wants all codes used, in the total

    def __post_init__(self):
        check_fields(self, "vocab_size", "block_size", "target_size", "n_layer", "n_decoder_layer", "n_head", "n_embd")
        for key in ("startup_steps", "quantize_after", "freeze_codes_after"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative")
        require(
            self.bottleneck in ("gumbel", "semhash") or self.freeze_codes_after == 0 or self.freeze_codes_after > self.quantize_after,
            f"freeze_codes_after={self.freeze_codes_after} is not beyond quantize_after={self.quantize_after}: the codebooks would "
            "never be made of data; raise it",
        )
        require(self.latent_dim >= 2, f"latent_dim={self.latent_dim}: at least 2, as LayerNorm leaves nothing of one channel")
        doublings(self.latent_factor)
        require(
            self.target_size % self.latent_factor == 0,
            f"target_size={self.target_size} is not a multiple of latent_factor={self.latent_factor}, but a target is cut into "
            "latents of that many tokens; choose another target_size",
        )
        if self.task == "pairs":
            require(
                self.target_size < self.block_size,
                f"target_size={self.target_size} leaves no room for x in block_size={self.block_size}; raise block_size",
            )
        else:
            require(
                self.block_size % self.target_size == 0,
                f"block_size={self.block_size} is not a multiple of target_size={self.target_size}, the targets it is cut into",
            )
        bottlenecks.check(self)
        averages = ("commitment_weight", "codebook_decay", "quantize_after")
        gumbel = ("gumbel_temperature", "gumbel_noise", "gumbel_hard", "anneal_steps", "usage_weight")
        ignored = {"gumbel": averages, "semhash": averages + gumbel}.get(self.bottleneck, gumbel)
        warn_ignored(self, ignored, f"bottleneck={self.bottleneck}")

    @property
    def latents(self) -> int:
        """Latents M of a target."""
        return self.target_size // self.latent_factor

    @property
    def prefix_size(self) -> int:
        """Tokens P of the longest prefix."""
        return self.block_size - (self.target_size if self.task == "pairs" else 0)


class LatentTransformer(CausalModel):
    """See the top of this file. Parameter names are part of the checkpoint format."""

    writes_blocks, side_by_side = True, False

    def __init__(self, config: LatentTransformerConfig):
        super().__init__()
        self.config = config
        C, Z, S, D, K = config.n_embd, config.latent_dim, config.latent_factor, config.codebook_levels, config.codebook_size
        self.n_layer_cache = config.n_layer
        self.head_width = C // config.n_head
        block = (C, config.n_head, config.bias, config.dropout)
        self.wte = nn.Embedding(config.vocab_size, C)  # of x, y and the output layer
        self.dropout = Dropout(config.dropout)
        # ae
        self.convolutions = nn.ModuleList(ResidualConvBlock(C, bias=config.bias) for _ in range(2))
        self.encoder = nn.ModuleList([Block(*block)])
        self.down = CausalDownsample(C, S, kernel=2, keep_partial=True, bias=config.bias)
        self.to_latent = nn.Linear(C, Z, bias=config.bias)
        self.ln_latent = nn.LayerNorm(Z, elementwise_affine=False)  # one scale for the bottleneck, see autoencoder.py
        self.bottleneck = bottlenecks.make(config)
        # lp
        self.code_embedding = nn.Embedding(D * K, C)  # of all levels, one table after the other
        self.blocks = nn.ModuleList(Block(*block) for _ in range(config.n_layer))
        self.ln_code = nn.LayerNorm(C, bias=config.bias)
        ends = config.task == "pairs"  # the first code of a latent may be K: there is no such latent
        self.heads = nn.ModuleList(nn.Linear(C, K + (ends and d == 0), bias=config.bias) for d in range(D))
        # ad
        steps = range(doublings(S))
        self.from_latent = nn.Linear(Z, C, bias=config.bias)
        self.up_convolutions = nn.ModuleList(ResidualConvBlock(C, bias=config.bias) for _ in steps)
        self.up_norms = nn.ModuleList(nn.LayerNorm(C, bias=config.bias) for _ in steps)
        self.up_attention = nn.ModuleList(CrossAttention(*block) for _ in steps)
        self.up_layers = nn.ModuleList(UpLayer(C, config.bias) for _ in steps)
        self.ln_memory = nn.LayerNorm(C, bias=config.bias) if S > 1 else None  # with S = 1 nothing is upsampled
        self.decoder = nn.ModuleList(
            DecoderBlock(C, config.n_head, *block[1:], cross_first=False) for _ in range(config.n_decoder_layer)
        )
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # optimizer steps so far
        self.was_frozen = False  # see `frozen`
        self.initialize([self.encoder, self.blocks, self.decoder])

    def context(
        self, positions: torch.Tensor, mask: torch.Tensor | None, keys: torch.Tensor | None = None, start: int = 0
    ) -> Context:
        """Of queries at positions (T,) that see keys at `keys` (S,), by default the same, where mask (..., T, S) is True (None: all)."""
        rotary = {self.head_width: rotary_angles(positions, self.head_width)}
        key_rotary = None if keys is None else {self.head_width: rotary_angles(keys, self.head_width)}
        dropout = self.config.dropout if self.training else 0.0
        return Context(mask, causal=False, rotary=rotary, start=start, dropout=dropout, key_rotary=key_rotary)

    # ------------------------------------------------------------------------------------------------------------------
    # rows to prefixes and targets

    def split(
        self, idx: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """
        Rows idx (B, T) and targets (B, T) -> prefix (B, P), real (B, P) or None (all of it), the positions (J,) at which targets
        start, and y (B, J, N), -1 where there is no token.
        """
        config, device = self.config, idx.device
        N, T = config.target_size, idx.size(1)
        if config.task == "pairs":
            P, last = config.prefix_size, (targets >= 0).int().argmax(1, keepdim=True)  # place of SEP
            column = last - (P - 1) + torch.arange(P, device=device)
            y = F.pad(targets, (0, N), value=-1).gather(1, last + torch.arange(N, device=device))
            return idx.gather(1, column.clamp(min=0)), column >= 0, torch.tensor([P], device=device), y[:, None]
        place = torch.arange(T, device=device) + (torch.randint(N, (), device=device) if self.training else 0)
        y = F.pad(targets, (0, N), value=-1).gather(1, place.expand_as(targets)).unflatten(1, (-1, N))
        return idx, None, place[::N] + 1, y

    # ------------------------------------------------------------------------------------------------------------------
    # ae, lp, ad

    def ae(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets y (B, J, N), -1 after their end -> latents (B, J, M, Z), and which of them are real (B, J, M)."""
        rows = y.flatten(0, 1)  # (B, J, N) -> (B J, N)
        mask, N = rows >= 0, rows.size(1)
        x = self.dropout(self.wte(rows.clamp(min=0)))
        for convolution in self.convolutions:
            x = convolution(x, mask)
        positions = torch.arange(N, device=y.device)
        # padding sees itself: a row of the mask that is empty would be NaN
        context = self.context(positions, mask[:, None, None] | torch.eye(N, dtype=torch.bool, device=y.device))
        for block in self.encoder:
            x = block(x, context)
        x, real = self.down(x, mask)
        return self.ln_latent(self.to_latent(x)).unflatten(0, y.shape[:2]), real.unflatten(0, y.shape[:2])

    def embed_codes(self, codes: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Vectors (..., n, C) of flat codes (..., n), number `first` of a target and those after it; those of -1 mean nothing."""
        level = (first + torch.arange(codes.size(-1), device=codes.device)) % self.config.codebook_levels
        return self.code_embedding(codes.clamp(min=0) + self.config.codebook_size * level)

    def lp(
        self, prefix: torch.Tensor, real: torch.Tensor | None, starts: torch.Tensor, codes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Prefix (B, P) and codes (B, J, M, D) of the targets that start at `starts` (J,) -> the states h (B, P, C) of the prefix,
        and the states (B, J, M, D, C) that predict each code.
        """
        P, (J, M, D) = prefix.size(1), codes.shape[1:]
        before = M * D - 1  # codes of a target that another one follows
        device, own = prefix.device, torch.arange(before, device=prefix.device)
        embedded = self.embed_codes(codes.flatten(2)[..., :before])  # (B, J, M, D) -> (B, J, M D) -> (B, J, before, C)
        x = torch.cat((self.wte(prefix), embedded.flatten(1, 2)), dim=1)  # (B, P + J before, C)
        place = torch.arange(P, device=device)
        positions = torch.cat((place, (starts[:, None] + own).flatten()))  # (P + J before,)
        target = torch.cat((place.new_full((P,), -1), torch.arange(J, device=device).repeat_interleave(before)))  # -1: the prefix
        sight = torch.cat((place, (starts - 1).repeat_interleave(before)))  # the last token of the prefix that each one sees
        mask = (target == target[:, None]) & (positions <= positions[:, None])
        mask = mask | ((target == -1) & (positions <= sight[:, None]))
        if real is not None:
            keys = F.pad(real, (0, J * before), value=True)[:, None, None]  # (B, 1, 1, P + J before)
            mask = mask & keys | torch.eye(len(mask), dtype=torch.bool, device=device)
        x, context = self.dropout(x), self.context(positions, mask)
        for block in self.blocks:
            x = block(x, context)
        h, states = x[:, :P], x[:, P:].unflatten(1, (J, before))  # (B, P, C) and (B, J before, C) -> (B, J, before, C)
        states = torch.cat((h[:, starts - 1][:, :, None], states), dim=2)  # the first code follows the prefix's last token
        return h, states.unflatten(2, (M, D))  # (B, J, M D, C) -> (B, J, M, D, C)

    def read(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The stack of lp() over vectors x (B, n, C) after those in the cache, one target at a time -> states (B, n, C)."""
        positions = cache.length + torch.arange(x.size(1), device=x.device)
        mask = None  # one vector sees all
        if x.size(1) > 1:
            mask = torch.arange(cache.length + x.size(1), device=x.device) <= positions[:, None]
        context = self.context(positions, mask, start=cache.length)
        for block, layer in zip(self.blocks, cache.layers):
            x = block(x, context, layer)
        cache.length += x.size(1)
        return x

    def code_logits(self, state: torch.Tensor, level: int) -> torch.Tensor:
        """State (..., C) that predicts a code of this level -> logits (..., K), or (..., K + 1) where "end" is possible."""
        return head_logits(self.ln_code(state), self.heads[level].weight, self.heads[level].bias)

    def ad(
        self, z: torch.Tensor, latent_real: torch.Tensor, h: torch.Tensor, real: torch.Tensor | None, starts: torch.Tensor,
        fed: torch.Tensor | None = None, where_fed: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """
        Latents z (B, J, M, Z), real where latent_real (B, J, M), of targets that start at `starts` (J,) after the prefix of
        states h (B, P, C), real (B, P) -> states (B, J, M S, C) for the output layer. In the warm-up the decoder gets the tokens
        fed (B, J, M S) instead of what the latents say, at the positions where_fed (B, J, M S).
        """
        J, L, place = z.size(1), z.size(2), torch.arange(h.size(1), device=h.device)
        memory, seen = h if self.ln_memory is None else self.ln_memory(h), place < starts[:, None]  # (J, P)

        def to_memory(length: int, stride: int) -> tuple[torch.Tensor, Context]:
            """Positions (J length,) of queries that stand `stride` tokens apart in each target, and the context in which they see h."""
            positions = (starts[:, None] + stride * torch.arange(length, device=h.device)).flatten()
            visible = seen.repeat_interleave(length, dim=0)  # (J length, P)
            visible = visible if real is None else visible & real[:, None, None]  # (B, 1, J length, P)
            return positions, self.context(positions, visible, keys=place)

        x, mask, stride = self.from_latent(z).flatten(0, 1), latent_real.flatten(0, 1), self.config.latent_factor  # (B J, L, C), (B J, L)
        for convolution, norm, attention, up in zip(
            self.up_convolutions, self.up_norms, self.up_attention, self.up_layers
        ):  # x (B J, L, C)
            x = convolution(x, mask)
            query = norm(x).unflatten(0, (-1, J)).flatten(1, 2)  # (B J, L, C) -> (B, J, L, C) -> (B, J L, C)
            x = x + attention(query, memory, to_memory(L, stride)[1]).unflatten(1, (J, L)).flatten(0, 1)  # back to (B J, L, C)
            x = up(x)  # (B J, 2 L, C)
            mask, L, stride = mask.repeat_interleave(2, dim=1), 2 * L, stride // 2
        x = x.unflatten(0, (-1, J))  # (B, J, L, C); what is not real is after all that is, out of the decoder's sight
        if fed is not None:
            x = torch.where(where_fed[..., None], self.dropout(self.wte(fed)), x)
        positions, context = to_memory(L, 1)
        target = torch.arange(J, device=h.device).repeat_interleave(L)
        own = self.context(positions, (target == target[:, None]) & (positions <= positions[:, None]))
        x = x.flatten(1, 2)  # (B, J L, C)
        for layer in self.decoder:
            x = layer(x, h, own, context)
        return self.ln_f(x).unflatten(1, (J, L))  # (B, J L, C) -> (B, J, L, C)

    # ------------------------------------------------------------------------------------------------------------------
    # losses

    def warm_up(
        self, prefix: torch.Tensor, starts: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The tokens before those of y (B, J, N), and where the decoder is fed them; None where it never is."""
        if not self.training or self.config.startup_steps == 0:
            return None, None
        share = (1 - self.steps / self.config.startup_steps).clamp(min=0.0)
        if self.config.startup == "target":
            share = (share > 0).to(share.dtype)
        where_fed = torch.rand(y.shape, device=y.device) < share
        return torch.cat((prefix[:, starts - 1][..., None], y[..., :-1].clamp(min=0)), dim=-1), where_fed

    def sums(
        self, idx: torch.Tensor, targets: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        """
        `code_nats` (D,), of them `end_nats`, `token_nats` and what they are counted over, `codes`, `tokens`; the losses of the
        bottleneck; and the codes (B, J, M, D). Arguments as in forward().
        """
        config = self.config
        prefix, real, starts, y = self.split(idx, targets)
        half = torch.is_autocast_enabled(idx.device.type) and not self.frozen  # what is frozen depends on no other row of a batch
        with torch.autocast(idx.device.type, enabled=half), torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            latent, latent_real = self.ae(y)
        with torch.autocast(idx.device.type, enabled=False):  # codes are chosen in float32
            z, codes, losses = self.bottleneck(at_least_float32(latent), latent_real, self.steps)
        h, states = self.lp(prefix, real, starts, codes)
        labels, is_end = list(codes.unbind(-1)), torch.zeros_like(latent_real)  # (B, J, M)
        if config.task == "pairs":  # "end" stands after the last latent, where there is room for it
            is_end = (latent_real.sum(-1, keepdim=True) == torch.arange(config.latents, device=idx.device)) & (y[..., :1] >= 0)
            labels[0] = torch.where(is_end, config.codebook_size, labels[0])
        nats = []
        for d, label in enumerate(labels):
            logits = self.code_logits(states[..., d, :], d).flatten(0, 2)
            nats.append(F.cross_entropy(logits, label.flatten(), ignore_index=-1, reduction="none"))
        x = self.ad(z, latent_real, h, real, starts, *self.warm_up(prefix, starts, y))
        tokens = (y >= 0).sum()
        mean = head_loss(x.flatten(0, 1), self.wte.weight, y.flatten(0, 1))
        sums = {
            "code_nats": torch.stack(nats).sum(-1), "end_nats": torch.where(is_end.flatten(), nats[0], 0.0).sum(),
            "codes": (codes >= 0).sum(), "tokens": tokens,
            "token_nats": torch.where(tokens > 0, mean * tokens, 0.0),  # nothing at all has no mean
        }  # fmt: skip
        return sums, losses, codes

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[None, dict[str, torch.Tensor]]:
        """
        Rows idx (B, T), targets (B, T) the tokens after them, -1 = not counted: for pairs those of y are counted, for text all,
        or all up to an end. No logits (codes come before tokens: see read, code_logits, write), but the losses by name: `total`
        (to minimise), `reconstruction` (nats per token given the codes; in training as the warm-up feeds it), `code` (nats per
        code), what the bottleneck adds (`commitment` or `usage`, unweighted), and `token`, the bound, nats per token. Raises
        ValueError without targets, and for rows that do not fit.
        """
        (_, T), N, most = idx.shape, self.config.target_size, self.config.block_size
        require(targets is not None, "a latent transformer has no logits before it has codes: give targets, or use read and write")
        require(most >= T, f"{T} tokens do not fit into the context of block_size={most}")
        require(self.config.task == "pairs" or T % N == 0, f"{T} tokens are no whole number of targets of target_size={N}")
        sums, losses, _ = self.sums(idx, targets)
        nats = sums["code_nats"].sum()
        losses["reconstruction"] = sums["token_nats"] / sums["tokens"]
        losses["code"] = nats / sums["codes"].clamp(min=1)
        losses["token"] = (nats + sums["token_nats"]) / sums["tokens"]
        # codes that come from no data are not worth predicting
        losses["total"] = losses["reconstruction"] + losses["code"] * self.bottleneck.ready
        if self.training and self.frozen:  # of all parameters a gradient is awaited where there are several processes
            losses["total"] = losses["total"] + 0.0 * sum(p.sum() for _, p in self.named_backbone_parameters())
        for name, weight in self.bottleneck.loss_weights.items():
            losses["total"] = losses["total"] + weight * losses[name]
        return None, losses

    # ------------------------------------------------------------------------------------------------------------------
    # sampling

    def make_cache(self, capacity: int | None = None, static: bool = False) -> Cache:
        """An empty cache for read(): by default for the longest prefix and the codes of one target."""
        assert not static, "codes and tokens alternate, so shapes change"
        return super().make_cache(capacity or self.config.prefix_size + self.config.latents * self.config.codebook_levels)

    def write(self, codes: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """
        Codes (B, m, D) of the first m latents of a target, -1 after its end, and the states h (B, P, C) of all text before it ->
        logits (B, m S, V) of its tokens.
        """
        starts = torch.tensor([h.size(1)], device=h.device)
        z = self.bottleneck.decode(codes).to(h.dtype)
        x = self.ad(z[:, None], (codes[..., 0] >= 0)[:, None], h, None, starts)
        return head_logits(x[:, 0], self.wte.weight)

    # ------------------------------------------------------------------------------------------------------------------
    # hooks of training: see checkpoint.py

    def check(self, data, max_iters: int) -> None:
        """Raise ValueError for a data set that cannot work. Warn of a training that ends too early: it may be a trial."""
        config, kind = self.config, data.meta.get("kind", "text")
        require(
            kind == config.task,
            f"task={config.task}, but {data.folder} is a set of {kind}; set --task={kind}, or train on another set",
        )
        if kind == "pairs":
            for side, longest, size in (("x", data.longest_x, config.prefix_size), ("y", data.longest_y, config.target_size)):
                require(
                    longest <= size,
                    f"{data.folder} has an {side} of {longest} tokens, its end included, but there is room for {size} "
                    f"(block_size={config.block_size}, target_size={config.target_size}): raise them, or leave long pairs out",
                )
        require(
            max_iters == 0 or config.freeze_codes_after == 0 or config.dropout == 0.0,
            f"freeze_codes_after={config.freeze_codes_after} is to keep the codes of a text as they are, but with "
            f"dropout={config.dropout} they would differ from step to step; set one of the two to 0",
        )
        warn_too_late(config, "startup_steps", max_iters, "never decodes from latents alone")
        warn_too_late(config, "freeze_codes_after", max_iters, "never freezes its codes")
        if not self.bottleneck.ready:
            warn_too_late(config, "quantize_after", max_iters, "never trains on codes")

    @property
    def frozen(self) -> bool:
        """
        Whether the codes of a text will never change again. To ask the device would cut a compiled step in two, so compiled code
        takes what was found last outside: by `after_step`, or before each step for `backbone_rate`.
        """
        if not torch.compiler.is_compiling():
            self.was_frozen = bool(0 < self.config.freeze_codes_after <= self.steps and self.bottleneck.ready)
        return self.was_frozen

    def train(self, mode: bool = True) -> "LatentTransformer":
        """As of any module; but the bottleneck of frozen codes has nothing to collect, and its vectors are those of the codes."""
        super().train(mode)
        self.bottleneck.train(mode and not self.frozen)
        return self

    def named_backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What gets a learning rate of its own: all that makes the codes, if they are to be frozen after some steps; else nothing."""
        makers = ("wte.", "convolutions.", "encoder.", "down.", "to_latent.", "bottleneck.")
        if self.config.freeze_codes_after > 0:
            yield from ((name, p) for name, p in self.named_parameters() if name.startswith(makers))

    def backbone_rate(self, step: int) -> float:
        """The factor of that rate: 0 once codes are frozen. If they moved, however little, the prior would have to learn them again."""
        return 0.0 if self.frozen else 1.0

    def after_step(self) -> None:
        """Once after each optimizer step, in every process."""
        if not self.frozen:  # its passes have collected
            self.bottleneck.after_step(bool(self.steps + 1 >= self.config.quantize_after))
        self.steps += 1
        self.train(self.training)  # the bottleneck's mode, if codes are frozen from here on

    @torch.no_grad()
    def measure(self, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """What summarize() needs of a batch, in evaluation mode: float64 sums on the CPU, to be added up."""
        assert not self.training, "measured with dropout, noise and true tokens"
        sums, _, codes = self.sums(idx, targets)
        sums["usage"] = code_counts(codes, self.config.codebook_size)
        return {name: value.cpu().double() for name, value in sums.items()}

    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float | list[float]]:
        """Entries of summary.json: bits of codes (and end) and of tokens given the codes add up to the bound."""
        report, bits = code_usage(sums["usage"], warn=bool(self.bottleneck.ready)), math.log(2) * sums["tokens"]
        return {
            "codes_of_data": bool(self.bottleneck.ready),
            "code_bits_per_token": (sums["code_nats"].sum() / bits).item(),
            "end_bits_per_token": (sums["end_nats"] / bits).item(),  # part of the codes'
            "token_bits_per_token": (sums["token_nats"] / bits).item(),
            # nats a code, per level; of pairs, the first with those of ends
            "code_loss": (sums["code_nats"] / (sums["codes"] / self.config.codebook_levels)).tolist(),
            "code_usage": report["usage"],
            "code_perplexity": report["perplexity"],
            "code_restarts": self.bottleneck.restarts,
        }

    def flops_per_token(self) -> int:
        """
        As CausalModel counts, for a token of a full row: what runs once for several tokens counts for each of them in part, and
        attention with the keys that are multiplied, masked ones included.
        """
        config = self.config
        C, S, N, P, T = config.n_embd, config.latent_factor, config.target_size, config.prefix_size, config.block_size
        J = 1 if config.task == "pairs" else T // N
        y, codes = J * N / T, J * (config.latents * config.codebook_levels - 1)  # target tokens for each token of a row; codes of a row
        shares = [(self.blocks, (P + codes) / T)]  # module, how often it runs for a token
        shares += [(part, y) for part in (self.convolutions, self.encoder, self.decoder, self.wte)]
        shares += [(layer, y / 2 ** (i + 1)) for i, layer in enumerate(self.down.layers)]
        shares += [(part, y / S) for part in (self.to_latent, self.bottleneck, self.heads, self.from_latent)]
        ups = [y / S * 2**i for i in range(len(self.up_layers))]
        for up, parts in zip(ups, zip(self.up_convolutions, self.up_attention, self.up_layers)):
            shares += [(part, up) for part in parts] + [(parts[1].c_kv, P / T - up)]  # keys and values: of the prefix, once
        shares += [(layer.cross_attn.c_kv, P / T - y) for layer in self.decoder]
        products = 6 * sum(share * p.numel() for module, share in shares for p in module.parameters())
        keys = config.n_layer * (P + codes) ** 2 / T + y * (N + config.n_decoder_layer * (J * N + P)) + sum(ups) * P
        quantizers = [quantizer.config for quantizer in getattr(self.bottleneck, "quantizers", ())]  # codes are looked up forward only
        lookups = y / S * sum(2 * q.codebook_levels * q.codebook_size * q.latent_dim for q in quantizers)
        return round(products + 12 * C * keys + lookups)
