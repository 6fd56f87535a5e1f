"""
Discretization bottlenecks behind one interface: latents become codes, and the vectors that the codes stand for.

    bottleneck(z, mask, step) -> z_q, codes, losses;   bottleneck.decode(codes) == z_q in evaluation, bit for bit

1. vq, rq, dvq are ResidualQuantizer of quantize.py: one level; D levels, each of what is left over; or the latent cut into D
   slices, each with a codebook of its own (decomposed vector quantization, arXiv:1803.03382, section 3.3).
2. gumbel (arXiv:1611.01144): w = softmax((log_softmax(W z) + noise * g) / temperature), z_q = w E. The temperature falls and the
   noise rises linearly with the step; `hard` feeds the one-hot argmax of w and sends the gradient of w through it.
3. semhash, improved semantic hashing (arXiv:1801.09797): log2(K) bits by noise and a saturating sigmoid,
       y = clamp(1.2 sigmoid(W z + n) - 0.1, 0, 1);   d = 1[y > 0.5] + y - sg(y);   z_q = (2 d - 1) E
   where in training half of the latents pass y itself.
Outside training there is no noise, and every z_q is what the codes say. In training the codes have none either, whatever z_q
has: it is these that the prior has to predict.

Shapes: Z latent width, K codes of a level, D levels, b = log2(K) bits, leading dimensions (...) of any number.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from latent.quantize import QuantizerConfig, ResidualQuantizer
from model import require

NOISE_OF_HASHING = 0.5  # standard deviation of n, as in tensor2tensor


class Bottled(NamedTuple):
    z_q: torch.Tensor  # (..., Z), zero where masked
    codes: torch.Tensor  # (..., D) int64, -1 where masked
    losses: dict[str, torch.Tensor]  # scalars, unweighted


def check(config) -> None:
    """Raise ValueError for settings of a bottleneck that cannot work."""
    kind, K, D = config.bottleneck, config.codebook_size, config.codebook_levels
    require(
        kind in ("rq", "dvq") or D == 1,
        f"codebook_levels={D}, but bottleneck={kind} has one level; use rq or dvq for more, or codebook_levels=1",
    )
    require(
        kind != "dvq" or config.latent_dim % D == 0,
        f"latent_dim={config.latent_dim} cannot be cut into codebook_levels={D} slices; choose a multiple",
    )
    require(
        kind != "semhash" or (K >= 2 and K & (K - 1) == 0),
        f"codebook_size={K}: bottleneck=semhash has a code for all values of some bits; choose a power of two",
    )
    require(
        config.gumbel_temperature > 0.0, f"gumbel_temperature={config.gumbel_temperature}: a positive temperature is needed"
    )
    for key in ("gumbel_noise", "usage_weight"):
        require(getattr(config, key) >= 0.0, f"{key}={getattr(config, key)} must not be negative")
    require(config.anneal_steps >= 1, f"anneal_steps={config.anneal_steps}: at least 1 is needed")
    quantizer_config(config)  # raises as well


def slices(config) -> int:
    """Parts of a latent that are quantized by themselves."""
    return config.codebook_levels if config.bottleneck == "dvq" else 1


def quantizer_config(config) -> QuantizerConfig:
    """Settings of each quantizer of a vq, rq or dvq bottleneck."""
    return QuantizerConfig(
        latent_dim=config.latent_dim // slices(config),
        codebook_size=config.codebook_size,
        codebook_levels=config.codebook_levels // slices(config),
        commitment_weight=config.commitment_weight,
        codebook_decay=config.codebook_decay,
    )


def make(config) -> "VectorBottleneck | GumbelBottleneck | HashBottleneck":
    """The bottleneck that config.bottleneck names."""
    return {"gumbel": GumbelBottleneck, "semhash": HashBottleneck}.get(config.bottleneck, VectorBottleneck)(config)


def masked(z_q: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """z_q (..., Z) and codes (..., D) with 0 and -1 where mask (...) is False."""
    if mask is None:
        return z_q, codes
    return torch.where(mask[..., None], z_q, 0.0), torch.where(mask[..., None], codes, -1)


class VectorBottleneck(nn.Module):
    """vq, rq, dvq. Until k-means has made codebooks of data, training passes z itself (see quantize.py, point 5)."""

    def __init__(self, config):
        super().__init__()
        self.loss_weights = {"commitment": config.commitment_weight}
        self.quantizers = nn.ModuleList(ResidualQuantizer(quantizer_config(config)) for _ in range(slices(config)))

    @property
    def ready(self) -> torch.Tensor:
        """Whether the codes mean anything yet."""
        return torch.stack([quantizer.codebook.initialized for quantizer in self.quantizers]).all()

    @property
    def restarts(self) -> int:
        """Codes replaced so far."""
        return sum(sum(quantizer.restarts) for quantizer in self.quantizers)

    def forward(self, z: torch.Tensor, mask: torch.Tensor | None = None, step: torch.Tensor | None = None) -> Bottled:
        """z (..., Z), mask (...) True = real -> see Bottled. The step has no say here."""
        parts = [quantizer(part, mask) for quantizer, part in zip(self.quantizers, z.chunk(len(self.quantizers), dim=-1))]
        z_q, codes = (torch.cat([getattr(part, name) for part in parts], dim=-1) for name in ("z_q", "codes"))
        commitment = torch.stack([part.losses["commitment"] for part in parts]).mean()
        if self.training:
            z_q = torch.where(self.ready, z_q, masked(z, codes, mask)[0])
            commitment = torch.where(self.ready, commitment, 0.0)
        return Bottled(z_q, codes, {"commitment": commitment})

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (..., D) -> z_q (..., Z)."""
        parts = codes.chunk(len(self.quantizers), dim=-1)
        return torch.cat([quantizer.decode(part) for quantizer, part in zip(self.quantizers, parts)], dim=-1)

    def after_step(self, initialize: bool) -> None:
        """Move the codebooks: once after each optimizer step. initialize=False: k-means waits."""
        for quantizer in self.quantizers:
            quantizer.step(initialize)


def gumbel_softmax(logits: torch.Tensor, temperature: torch.Tensor | float, noise: torch.Tensor | float) -> torch.Tensor:
    """
    w (..., K) of the top of this file. With noise 1 its argmax is a draw from softmax(logits) at every temperature; u is kept off
    0 and 1, where g is infinite.
    """
    u = torch.rand_like(logits).clamp(1e-5, 0.99998)
    return ((logits.log_softmax(-1) - noise * (-u.log()).log()) / temperature).softmax(-1)


class GumbelBottleneck(nn.Module):
    """See point 2 above. `usage` is log K less the entropy of the mean softmax: 0 if all codes are used alike."""

    ready, restarts = True, 0

    def __init__(self, config):
        super().__init__()
        self.config, self.loss_weights = config, {"usage": config.usage_weight}
        self.directions = nn.Parameter(torch.randn(config.codebook_size, config.latent_dim) / math.sqrt(config.latent_dim))  # W
        self.codes = nn.Parameter(torch.randn(config.codebook_size, config.latent_dim))  # E, as long as the normed latents

    def schedule(self, step: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Temperature and noise in step 0, 1, ...: from 1.2 and 0 to what the config says, in anneal_steps."""
        done = (torch.as_tensor(step) / self.config.anneal_steps).clamp(max=1.0)
        return 1.2 + (self.config.gumbel_temperature - 1.2) * done, self.config.gumbel_noise * done

    def forward(self, z: torch.Tensor, mask: torch.Tensor | None = None, step: torch.Tensor | int = 0) -> Bottled:
        """z (..., Z), mask (...) True = real, step: number of finished optimizer steps -> see Bottled."""
        logits = F.linear(z, self.directions)  # (..., K)
        codes = logits.argmax(-1, keepdim=True)
        weight = torch.ones_like(logits[..., :1]) if mask is None else mask[..., None].to(logits.dtype)
        mean = (logits.softmax(-1) * weight).flatten(0, -2).sum(0) / weight.sum().clamp(min=1)  # (K,)
        losses = {"usage": torch.special.xlogy(mean, mean * len(mean)).sum()}
        if self.training:
            w = gumbel_softmax(logits, *self.schedule(step))
            if self.config.gumbel_hard:
                w = F.one_hot(w.argmax(-1), w.size(-1)).to(w.dtype) + (w - w.detach())
            z_q = w @ self.codes
        else:
            z_q = F.embedding(codes[..., 0], self.codes)
        return Bottled(*masked(z_q, codes, mask), losses)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (..., 1) -> z_q (..., Z)."""
        return masked(F.embedding(codes[..., 0].clamp(min=0), self.codes), codes, codes[..., 0] >= 0)[0]

    def after_step(self, initialize: bool) -> None:
        """The optimizer has moved everything."""


class HashBottleneck(nn.Module):
    """See point 3 above: bit i of a code is 1 where (W z)_i is positive."""

    ready, restarts = True, 0

    def __init__(self, config):
        super().__init__()
        bits, self.loss_weights = config.codebook_size.bit_length() - 1, {}
        self.directions = nn.Parameter(torch.randn(bits, config.latent_dim) / math.sqrt(config.latent_dim))  # W
        self.codes = nn.Parameter(torch.randn(bits, config.latent_dim) / math.sqrt(bits))  # E
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    def forward(self, z: torch.Tensor, mask: torch.Tensor | None = None, step: torch.Tensor | int = 0) -> Bottled:
        """z (..., Z), mask (...) True = real -> see Bottled. The step has no say here."""
        logits = F.linear(z, self.directions)  # (..., b)
        codes = ((logits > 0) * self.powers).sum(-1, keepdim=True)
        if not self.training:
            return Bottled(*masked(self.decode(codes), codes, mask), {})
        y = (1.2 * (logits + NOISE_OF_HASHING * torch.randn_like(logits)).sigmoid() - 0.1).clamp(0.0, 1.0)
        hard = (y > 0.5).to(y.dtype) + (y - y.detach())
        bits = torch.where(torch.rand_like(y[..., :1]) < 0.5, hard, y)
        return Bottled(*masked((2 * bits - 1) @ self.codes, codes, mask), {})

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (..., 1) -> z_q (..., Z)."""
        bits = (codes.clamp(min=0) & self.powers != 0).to(self.codes.dtype)
        return masked((2 * bits - 1) @ self.codes, codes, codes[..., 0] >= 0)[0]

    def after_step(self, initialize: bool) -> None:
        """The optimizer has moved everything."""
