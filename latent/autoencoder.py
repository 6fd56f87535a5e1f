"""
A text autoencoder with discrete codes in the middle (an RQ-VAE: arXiv:1711.00937, arXiv:2203.01941; no KL term, so "VAE" in
name only). S tokens become one latent vector, that one stack of D codes out of K, and the codes the tokens again, all at once:

    tokens -> causal trunk -> down -> Linear to Z -> refine -> norm -> D codes -> refine -> Linear to C -> up -> trunk -> logits

1. Encoding is causal and aligned to blocks of S tokens: the codes of a prefix are those of the whole text on complete blocks,
   otherwise no model of codes could continue a prompt. With encoder_context=block a latent sees the tokens of its own block
   only, so that the same S tokens have the same codes wherever they stand; with prefix all tokens so far.
2. Decoding is causal by blocks: position t of block j sees all positions of the blocks up to j (in a trunk of Hugging Face, those
   up to t), so text can be written as its codes arrive. Nothing else needs a mask there: what stands after the end of a text is
   in later blocks.
3. It predicts tokens that it has seen: `token` is the cross-entropy of a reconstruction, never a language model's loss.

Shapes: B batch, T tokens, C width, S tokens per latent, M = ceil(T / S) latents, Z latent width, K codes of a level, D levels,
V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from kernels import Dropout, head_logits, head_loss, uncompiled
from latent.huggingface import PretrainedCache, PretrainedTrunk
from latent.quantize import QuantizerConfig, ResidualQuantizer, code_counts, code_usage, full_float32, warn_too_late
from latent.resample import CausalDownsample, Upsample, doublings
from model import Block, Cache, CausalModel, check_fields, require, warn_ignored


@dataclass(frozen=True)
class AutoencoderConfig:
    vocab_size: int = 256  # number of token ids; train.py takes it from the data set unless given
    block_size: int = 256  # longest text, tokens; a multiple of latent_factor
    latent_factor: int = 4  # tokens S that become one latent, a power of two
    n_encoder_layer: int = 1  # blocks in front of the codes
    n_decoder_layer: int = 3  # blocks after them
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width C
    bias: bool = False  # biases in linear layers, convolutions and LayerNorms
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, in training only
    position: Literal["learned", "rope"] = "rope"  # a table added to the input, or rotary keys and queries
    encoder_context: Literal["prefix", "block"] = "prefix"  # what a latent may know: all tokens so far, or those of its block
    # codes: latent/quantize.py explains them
    latent_dim: int = 64  # width Z of a latent
    codebook_size: int = 512  # codes K of a level
    codebook_levels: int = 4  # levels D; a token costs D log2(K) / S bits
    codebook_kind: Literal["ema", "simvq"] = "ema"  # how codebooks learn: moving averages, or gradients of a linear map
    shared_codebook: bool = False  # one codebook for all levels
    commitment_weight: float = 0.25  # of the commitment loss in the total
    quantizer_gradient: Literal["straight_through", "rotation"] = "straight_through"  # how gradients pass the codes
    quantize_dropout: float = 0.0  # probability that a training step uses only the first 1..D-1 levels
    codebook_decay: float = 0.99  # ema: weight of the past in the moving averages, per step
    quantize_after: int = 300  # ema: steps of training without codes before k-means makes the codebooks
    freeze_codes: bool = False  # train only what stands behind the codes, which stay those of init_from; embeddings stay, too
    # initial weights from elsewhere
    backbone: str | None = None  # run directory of an encoder_decoder; or hf:NAME_OR_PATH: latent/huggingface.py
    backbone_config: str | None = None  # of hf:NAME_OR_PATH, what it is, as JSON; train.py takes it from there
    freeze_backbone_iters: int = 0  # steps in which they stay as they are; gradients flow through them
    backbone_lr_scale: float = 0.1  # learning rate of the backbone after that, relative to the others'

    def __post_init__(self):
        heads = ("n_head",) if self.pretrained is None else ()
        check_fields(self, "vocab_size", "block_size", "n_encoder_layer", "n_decoder_layer", "n_embd", *heads)
        for key in ("quantize_after", "freeze_backbone_iters", "backbone_lr_scale"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative")
        require(
            self.backbone is not None or self.freeze_backbone_iters == 0,
            f"freeze_backbone_iters={self.freeze_backbone_iters} freezes what a backbone brings, but there is none; set backbone",
        )
        require(
            not self.freeze_codes or self.dropout == self.quantize_dropout == 0.0,
            f"freeze_codes=true: dropout={self.dropout} and quantize_dropout={self.quantize_dropout} would change codes; set both to 0",
        )
        require(self.latent_dim >= 2, f"latent_dim={self.latent_dim}: at least 2, as LayerNorm leaves nothing of one channel")
        require(
            self.pretrained is None or self.position == "rope",
            f"position={self.position}: backbone={self.backbone} has positions of its own; leave position out",
        )
        require(
            self.pretrained is not None or self.backbone_config is None,
            "backbone_config belongs to backbone=hf:...; leave it out",
        )
        doublings(self.latent_factor)
        require(
            self.block_size % self.latent_factor == 0,
            f"block_size={self.block_size} is not a multiple of latent_factor={self.latent_factor}, but a text is cut into "
            "blocks of that many tokens; choose another block_size",
        )
        self.quantizer_config()
        if self.codebook_kind == "simvq":
            warn_ignored(self, ("codebook_decay", "quantize_after"), "codebook_kind=simvq has no moving averages")

    @property
    def pretrained(self) -> str | None:
        """Name or path of the Hugging Face model that both trunks are, if they are."""
        return self.backbone.removeprefix("hf:") if (self.backbone or "").startswith("hf:") else None

    def quantizer_config(self) -> QuantizerConfig:
        """Settings of the quantizer. Raises ValueError where they cannot work."""
        return QuantizerConfig(
            latent_dim=self.latent_dim,
            codebook_size=self.codebook_size,
            codebook_levels=self.codebook_levels,
            kind=self.codebook_kind,
            shared_codebook=self.shared_codebook,
            commitment_weight=self.commitment_weight,
            gradient=self.quantizer_gradient,
            quantize_dropout=self.quantize_dropout,
            codebook_decay=self.codebook_decay,
        )


class SwiGLU(nn.Module):
    """x + W_o (silu(W_g n) * W_u n) with n = LayerNorm(x), for each latent by itself (arXiv:2002.05202)."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=bias)
        self.c_fc = nn.Linear(width, 8 * width, bias=bias)  # gate, value
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.c_fc(self.norm(x)).chunk(2, dim=-1)
        return x + self.c_proj(F.silu(gate) * value)


class Autoencoder(CausalModel):
    """See the top of this file. Parameter names are part of the checkpoint format; those of the trunk are EncoderDecoder's."""

    reconstructs, side_by_side = True, False

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        C, Z, S, learned = config.n_embd, config.latent_dim, config.latent_factor, config.position == "learned"
        self.n_layer_cache = config.n_encoder_layer + config.n_decoder_layer
        block, own_blocks = (C, config.n_head, config.bias, config.dropout), config.pretrained is None
        self.head_widths = {C // config.n_head} if own_blocks else set()
        self.trunk = None if own_blocks else PretrainedTrunk(config.backbone_config, config.dropout)  # for all blocks
        self.wte = nn.Embedding(config.vocab_size, C) if own_blocks else self.trunk.take_embeddings()  # also the output layer
        self.wpe = nn.Embedding(config.block_size, C) if learned else None
        self.dropout = Dropout(config.dropout)
        self.encoder = nn.ModuleList(Block(*block) for _ in range(own_blocks * config.n_encoder_layer))
        kernel = 2 if config.encoder_context == "block" else 3
        self.down = CausalDownsample(C, S, kernel, keep_partial=True, bias=config.bias)
        self.to_latent = nn.Linear(C, Z, bias=config.bias)
        self.refine_encoder = SwiGLU(Z, config.bias)
        self.ln_latent = nn.LayerNorm(Z, elementwise_affine=False)  # no gain: it would shrink to please the commitment loss
        self.quantizer = ResidualQuantizer(config.quantizer_config())
        self.refine_decoder = SwiGLU(Z, config.bias)
        self.from_latent = nn.Linear(Z, C, bias=config.bias)
        self.up = Upsample(C, S, bias=config.bias)
        self.wpe_decoder = nn.Embedding(config.block_size, C) if learned else None
        self.decoder = nn.ModuleList(Block(*block) for _ in range(own_blocks * config.n_decoder_layer))
        self.ln_f = nn.LayerNorm(C, bias=config.bias) if own_blocks else nn.Identity()  # a pretrained trunk ends with its own
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # optimizer steps so far
        self.initialize([self.encoder, self.decoder])
        if config.freeze_codes:  # all that compress() runs; wte among it, although it is the output layer as well
            encoding = (self.wte, self.wpe, self.trunk, self.encoder, self.down, self.to_latent, self.refine_encoder, self.quantizer)
            for module in filter(None, encoding):
                module.requires_grad_(False)

    def flops_per_token(self) -> int:
        """As for the other models, but what runs once for several tokens counts for each of them in part; and the codes' lookup.
        What is frozen counts as if it were trained.
        """
        config, S = self.config, self.config.latent_factor
        latent = (self.to_latent, self.refine_encoder, self.refine_decoder, self.from_latent)
        shares = [(module, 1 / S) for module in latent]  # module, how often it runs for a token
        shares += [(layer, 1 / 2 ** (i + 1)) for i, layer in enumerate(self.down.layers)]
        shares += [(layer, 2**i / S) for i, layer in enumerate(self.up.layers)]
        idle = sum((1 - share) * p.numel() for module, share in shares for p in module.parameters())
        again = 0 if self.trunk is None else self.trunk.flops_again(config.block_size)
        lookup = 2 * config.codebook_levels * config.codebook_size * config.latent_dim / S
        unseen = (config.block_size - S) * config.n_encoder_layer if config.encoder_context == "block" else 0  # keys
        return round(super().flops_per_token() - 6 * idle - 12 * config.n_embd * unseen + again + lookup)

    def compress(self, idx: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens idx (B, T), mask (B, T) True = real, all of them in front -> latents (B, M, Z) and which are real (B, M)."""
        (B, T), S = idx.shape, self.config.latent_factor
        if self.config.encoder_context == "block":  # every block is a text of its own: (B, T) -> (B M, S)
            mask = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask
            idx, mask = (F.pad(given, (0, -T % S)).reshape(-1, S) for given in (idx, mask))
        positions, context = self.place(idx)
        x = self.wte(idx)
        if self.trunk is not None:
            x = self.trunk(x)
        else:
            x = self.dropout(x if self.wpe is None else x + self.wpe(positions))
            for block in self.encoder:
                x = block(x, context)
        x, mask = self.down(x, mask)
        z = self.ln_latent(self.refine_encoder(self.to_latent(x)))
        return z.reshape(B, -1, z.size(-1)), None if mask is None else mask.reshape(B, -1)  # from (B M, 1, Z), if by block

    def expand(self, z: torch.Tensor, cache: Cache | PretrainedCache | None = None) -> torch.Tensor:
        """Quantized latents z (B, M, Z), of the blocks after those in the cache -> states (B, M S, C) for the output layer."""
        x = self.up(self.from_latent(self.refine_decoder(z)))
        S, start = self.config.latent_factor, cache.length if cache is not None else 0
        block = torch.arange(start + x.size(1), device=x.device) // S
        positions, context = self.place(x, cache, mask=block <= block[start:, None])
        if self.trunk is not None:
            return self.trunk(x, cache)
        x = self.dropout(x if self.wpe_decoder is None else x + self.wpe_decoder(positions))
        for i, layer in enumerate(self.decoder):
            x = layer(x, context, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.length += x.size(1)
        return self.ln_f(x)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        idx (B, T) token ids -> logits (B, T, V) of the same tokens and no losses. With targets (B, T), which only say which
        tokens are real (>= 0, all of them in front), no logits but the losses by name: `total` (to minimise), `token` (nats
        per token, of the reconstruction) and, in training, unless codes are frozen, `commitment` and, with simvq, `codebook`
        (unweighted).
        """
        mask = None if targets is None else targets >= 0
        if self.config.freeze_codes or not self.training:
            z, losses = self.quantizer.decode(self.encode(idx, mask)), {}
        else:
            latent, real = self.compress(idx, mask)
            z, _, losses, _ = self.quantizer(latent, real)
            of_data = self.quantizer.codebook.initialized  # other codes would pull the latents together before they have spread
            z = torch.where(of_data, z, latent)
            losses = {name: torch.where(of_data, loss, 0.0) for name, loss in losses.items()}
        x = self.expand(z)[:, : idx.size(1)]
        if targets is None:
            return head_logits(x, self.wte.weight), {}
        weights = self.quantizer.config.loss_weights
        of_codes = sum(weights[name] * loss for name, loss in losses.items())
        losses["token"] = head_loss(x, self.wte.weight, torch.where(mask, idx, -1))
        losses["total"] = losses["token"] + of_codes
        return None, losses

    # ------------------------------------------------------------------------------------------------------------------
    # text to codes, codes to text

    @uncompiled
    def encode(self, idx: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Tokens (B, T), mask (B, T) True = real, all of them in front -> codes (B, M, D), -1 for a block without real tokens: the
        same ones in whatever precision the rest is computed.
        """
        with torch.no_grad(), full_float32(idx.device):
            return self.quantizer.encode(*self.compress(idx, mask))

    def decode(self, codes: torch.Tensor, cache: Cache | PretrainedCache | None = None) -> torch.Tensor:
        """
        Codes (B, M, d) of the first d <= D levels -> logits (B, M S, V). With a cache they are those of the blocks after
        the ones already in it, and are appended to it. Raises ValueError beyond block_size, or for too many levels.
        """
        return head_logits(self.expand(self.quantizer.decode(codes), cache), self.wte.weight)

    def make_decoder_cache(self) -> Cache | PretrainedCache:
        """An empty cache for decode(); its length is in tokens."""
        return Cache(self.config.n_decoder_layer, self.config.block_size) if self.trunk is None else self.trunk.make_cache()

    def codebook_hash(self) -> str:
        return self.quantizer.codebook_hash()

    # ------------------------------------------------------------------------------------------------------------------
    # a backbone

    def load_backbone(self, weights: dict[str, torch.Tensor]) -> None:
        """Take embeddings and encoder from the weights of an EncoderDecoder of this width, vocabulary and number of blocks."""
        with torch.no_grad():
            for name, parameter in self.named_backbone_parameters():
                parameter.copy_(weights[name][: len(parameter)])  # it may have more positions

    def named_backbone_parameters(self) -> list[tuple[str, nn.Parameter]]:
        if self.config.backbone is None:
            return []
        return [(name, p) for name, p in self.named_parameters() if name.startswith(("wte.", "wpe.", "encoder.", "trunk."))]

    def backbone_rate(self, step: int) -> float:
        """
        Factor of the backbone's learning rate in step 0, 1, ... While frozen it has a rate of 0 instead of requires_grad=False, so
        that it is in the optimizer from the start, with moments up to date when it thaws.
        """
        return 0.0 if step < self.config.freeze_backbone_iters else self.config.backbone_lr_scale

    # ------------------------------------------------------------------------------------------------------------------
    # hooks of training: see checkpoint.py

    def check(self, data, max_iters: int) -> None:
        """Warn of a training that ends before there are codes: it may be a trial."""
        if self.config.codebook_kind == "ema" and not self.quantizer.initialized:
            warn_too_late(self.config, "quantize_after", max_iters, "never trains on codes")

    def after_step(self) -> None:
        """Once after each optimizer step, in every process."""
        self.steps += 1
        if not self.config.freeze_codes:
            self.quantizer.step(initialize=bool(self.steps >= self.config.quantize_after))

    @torch.no_grad()
    def measure(self, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What summarize() needs of a batch, in evaluation mode: float64 sums on the CPU, to be added over batches and
        processes. Arguments as in forward().
        """
        assert not self.training, "measured with dropout, and it would collect statistics"
        S, T, mask = self.config.latent_factor, idx.size(1), targets >= 0
        with full_float32(idx.device):  # the codes of encode(), which are what a model of codes gets
            latent, real = self.compress(idx, mask)
            quantized = self.quantizer(latent, real)
        right_by_depth = []
        for depth in range(1, self.config.codebook_levels + 1):
            states = self.expand(self.quantizer.decode(quantized.codes[..., :depth]))[:, :T]
            nats, right = self.judge(states, idx)
            right_by_depth.append((right & mask).sum())
        wrong = F.pad(mask & ~right, (0, -T % S)).unflatten(1, (-1, S)).any(-1)  # (B, T) -> (B, M S) -> (B, M, S) -> (B, M)
        sums = {
            "nats": by_position(torch.where(mask, nats, 0.0), S),
            "tokens": by_position(mask, S),
            "right_by_depth": torch.stack(right_by_depth),
            "latents": real.sum(),
            "exact_blocks": (real & ~wrong).sum(),
            "rows": real.any(-1).sum(),
            "exact_rows": (real.any(-1) & ~wrong.any(-1)).sum(),
            "codes": code_counts(quantized.codes, self.config.codebook_size),
            "squared_residual": quantized.distortion * real.sum(),
        }
        return {name: value.cpu().double() for name, value in sums.items()}

    def judge(self, x: torch.Tensor, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States x (B, T, C) and the tokens idx (B, T) they stand for -> nats and whether the most likely token is right (B, T)."""
        nats, right = [], []
        for states, tokens in zip(x, idx):  # a row at a time: the logits of a whole batch may not fit into memory
            logits = head_logits(states, self.wte.weight)
            nats.append(F.cross_entropy(logits, tokens, reduction="none"))
            right.append(logits.argmax(-1) == tokens)
        return torch.stack(nats), torch.stack(right)

    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float | int | list[float]]:
        """Entries of summary.json from the sums of measure(). Warns of levels that say next to nothing."""
        config, tokens = self.config, sums["tokens"].sum()
        report = code_usage(sums["codes"], warn=self.quantizer.initialized)
        accuracy = (sums["right_by_depth"] / tokens).tolist()
        return {
            "codes_of_data": self.quantizer.initialized,  # if not, codebooks are random: nothing here means anything
            "token_accuracy": accuracy[-1],
            "exact_blocks": (sums["exact_blocks"] / sums["latents"]).item(),  # all S tokens right
            "exact_sequences": (sums["exact_rows"] / sums["rows"]).item(),  # all tokens of a window, block_size of them
            "accuracy_by_depth": accuracy,  # decoded from the first 1..D levels
            "loss_by_position": (sums["nats"] / sums["tokens"].clamp(min=1)).tolist(),  # in its block, nats per token
            "residual_by_depth": (sums["squared_residual"] / sums["squared_residual"][0]).sqrt().tolist(),  # |r_d| / |z|
            "code_usage": report["usage"],  # per level: the fraction of codes that occur
            "code_perplexity": report["perplexity"],
            "code_bits_per_token": config.codebook_levels * math.log2(config.codebook_size) / config.latent_factor,
            "code_entropy_per_token": report["bits"] / config.latent_factor,  # bits, levels and latents each by themselves
            "code_restarts": sum(self.quantizer.restarts),
        }


def by_position(values: torch.Tensor, S: int) -> torch.Tensor:
    """Sums (S,) of values (B, T) over all that stand at the same place in their block of S."""
    return F.pad(values, (0, -values.size(1) % S)).unflatten(1, (-1, S)).sum((0, 1))  # (B, M S) -> (B, M, S) -> (S,)
