"""
Numerical building blocks: LayerNorm, rotary positions, attention for short texts on a CPU, the output layer's loss. What is
written for speed states the plain computation it equals; tests hold it to that.

Shapes: B batch, T tokens of this call, S keys, C width, H heads, D head width, V vocabulary.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Losses and statistics are computed in float32 under bfloat16 autocast, and in float64 in float64 tests."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.Module):
    """LayerNorm whose bias, or whole affine part, can be absent."""

    def __init__(self, width: int, bias: bool, affine: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and bias else None
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, 1e-5)


def rotary_angles(positions: torch.Tensor, head_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (T, D // 2) of the rotary embedding, base 10000, for absolute positions (T,). arXiv:2104.09864, eq. 34."""
    half = head_width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / max(half, 1))
    angle = positions[:, None].float() * frequency  # (T, D // 2), radians
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate channel pairs (i, i + D // 2) of x (B, H, T, D). An odd head width leaves its last channel as it is."""
    cos, sin = rotary
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).type_as(x)


def attend_in_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, dropout: float
) -> torch.Tensor:
    """The same as two plain products: for short texts in bfloat16 on a CPU a third faster than torch's kernel (dev/LOG.md)."""
    bias = torch.zeros(q.size(2), k.size(2), dtype=q.dtype)  # (T, S), -inf where a key is hidden
    if causal:
        bias = bias.fill_(-math.inf).triu_(1)
    elif mask is not None:
        bias = bias.masked_fill_(~mask, -math.inf)
    scores = torch.baddbmm(bias, q.flatten(0, 1) / math.sqrt(q.size(3)), k.flatten(0, 1).mT)  # (B H, T, S)
    weights = F.dropout(scores.softmax(-1), dropout).type_as(v)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, q.shape[:2])  # (B H, T, D) -> (B, H, T, D)


def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, nats per token, of targets (B, T) under softmax(x weight^T), x (B, T, C); targets of -1 do not count."""
    logits = F.linear(x, weight)
    return F.cross_entropy(at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=-1)
