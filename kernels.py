"""
Numerical building blocks: rotary positions, LayerNorm, dropout, attention, the output layer and its loss. What is written for
speed states the plain computation it equals; tests hold it to that. What runs on a GPU in Triton is in gpu_kernels.py, and what runs
on a CPU in C++ in cpu_kernels.py.

Shapes: B batch, T tokens of this call, S keys, C width, H heads, D head width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch.nn import functional as F

import cpu_kernels

try:
    import gpu_kernels
except ImportError:  # no Triton
    gpu_kernels = None


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Losses and statistics are computed in float32 under bfloat16 autocast, and in float64 in float64 tests."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def uncompiled(method: Callable) -> Callable:
    """torch.compiler.disable for a method, which imports the compiler, a second of time, only where something is compiled."""
    # private in torch, so it may go away: this imports it when first called, torch.compiler.disable at once
    disabled = getattr(torch, "_disable_dynamo", torch.compiler.disable)(method)

    @functools.wraps(method)
    def call(*given, **named):
        return (disabled if torch.compiler.is_compiling() else method)(*given, **named)

    return call


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """x.cumsum(1) of x (B, T, C)."""
    return cumsum_op(x) if torch.compiler.is_compiling() and x.device.type == "cuda" else x.cumsum(1)


@torch.library.custom_op("encdec::cumsum", mutates_args=())
def cumsum_op(x: torch.Tensor) -> torch.Tensor:
    """An operation that torch.compile leaves as it is: torch 2.11 fails to make code of its own for a small B (dev/LOG.md)."""
    return x.contiguous().cumsum(1)


@cumsum_op.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


cumsum_op.register_autograd(lambda ctx, grad: cumsum_op(grad.flip(1)).flip(1))


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


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over C channels, of x (..., C), or of x with zeros behind them, which stay zeros: see padding.py."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (C,), width = self.normalized_shape, x.size(-1)
        if width == C:
            return super().forward(x)
        x = at_least_float32(x)
        mean = x.sum(-1, keepdim=True) / C
        x = torch.where(torch.arange(width, device=x.device) < C, x - mean, 0.0)
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) / C + self.eps)
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias


class Dropout(nn.Dropout):
    """nn.Dropout, with the masks of `drop`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return drop(x, self.p) if self.training else x


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout, on a CPU in a third of its time (dev/LOG.md), unless it is compiled, where torch's is in one piece with the rest."""
    if p == 0.0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return x * dropout_factors(x.shape, p, x.dtype)


def dropout_factors(shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """
    0 with probability p, else 1 / (1 - p), drawn for each element on the CPU. torch draws a number for each element; here 64 random
    bits serve four of them, so p is rounded to a multiple of 2^-16, and the factor is that of the rounded p.
    """
    n, dropped = math.prod(shape), cpu_kernels.in_65536(p)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n]
    return (bits >= dropped - 2**15).view(shape).to(dtype).mul_(2**16 / (2**16 - dropped))


def attend_in_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """
    `attention` as two plain products: for short texts on a CPU a third faster than torch's kernel in bfloat16, and as much in
    float32 where weights are dropped (dev/LOG.md).
    """
    bias = torch.zeros(q.size(2), k.size(2), dtype=q.dtype)  # (T, S), -inf where a key is hidden
    if mask is not None:
        bias = bias.masked_fill_(~mask, -math.inf)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=1 / math.sqrt(q.size(3)))  # (B H, T, S)
    weights = drop(scores.softmax(-1), dropout).type_as(v)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, q.shape[:2])  # (B H, T, D) -> (B, H, T, D)


def triton_runs(x: torch.Tensor) -> bool:
    """Whether gpu_kernels.py computes with x: in what torch.compile, which needs Triton as well, makes for a GPU."""
    return gpu_kernels is not None and torch.compiler.is_compiling() and x.device.type == "cuda" and x.dtype == torch.bfloat16


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, dropout: float,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """
    softmax(q k^T / sqrt(D)) v of q (B, H, T, D), k and v (B, H, S, D), its weights dropped with probability `dropout`. What a
    query sees is True in mask, (T, S) or (B, 1, T, S); without one all, or, if `causal`, the keys up to its own position (T = S).
    With `rotary`, angles (T, D // 2), q and k are rotated first.
    """
    compiled = torch.compiler.is_compiling()  # then dropout and rotation are torch's, in one piece with the rest
    in_cpp = causal and not (compiled and dropout > 0.0) and cpu_kernels.suits(q)
    if in_cpp and not compiled:
        return cpu_kernels.attend(q, k, v, dropout, rotary)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    if in_cpp:
        return cpu_kernels.attend(q, k, v)
    if causal and dropout == 0.0 and triton_runs(q) and gpu_kernels.suits(q):
        return gpu_kernels.attend(q, k, v)[0].transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
    products_pay = q.dtype == torch.bfloat16 if dropout == 0.0 else not compiled
    if products_pay and q.device.type == "cpu" and k.size(2) <= 512 and (mask is None or mask.dim() == 2):
        seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril() if causal else mask
        return attend_in_products(q, k, v, seen, dropout)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)


# ----------------------------------------------------------------------------------------------------------------------
# the output layer and its loss

# logits held at a time: on a CPU 28 MiB in float32, a block that `runtime.keep_freed_memory` keeps, on a GPU 1 GiB in bfloat16
CHUNK = {"cpu": 7 * 2**20, "cuda": 2**29}
FEW = 2**26  # logits up to which Triton's chunks are not worth it: a guess


def head_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    Logits (..., V) of states x (..., C), from which something is chosen: x weight^T + bias in float32 at least, autocast or not.
    In bfloat16 the two largest are often equal, and rounding, which depends on the batch and the cache, would choose.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def head_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy, nats per token, of targets (B, T) under softmax(x weight^T), x (B, T, C), weight (V, C); targets of -1 do
    not count. Where B T V logits are too many to hold, a chunk of tokens at a time gives its losses and, when they will be
    needed, its gradients, and the logits are forgotten: memory O(V C) instead of O(B T V). Softmax in float32 at least.
    Not differentiable twice.
    """
    x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N,)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    most = CHUNK.get(x.device.type, 2**26)
    if len(x) <= max(1, (FEW if triton_runs(x) else most) // weight.size(0)):
        return F.cross_entropy(at_least_float32(F.linear(x, weight)), targets, ignore_index=-1)
    if not torch.is_grad_enabled():  # else it would compute the gradients of a parameter that nobody asks for
        x, weight = x.detach(), weight.detach()
    rows = max(1, most // weight.size(0))
    # A chunk's part of the weight's gradient is a sum over its tokens, in float16 infinite above 65,504: with 2**14 of them only
    # where a channel of the states is nearly 4 on average.
    if x.dtype == torch.float16:
        rows = min(rows, 2**14)
    return ChunkedHeadLoss.apply(x, weight, targets, rows) / (targets >= 0).sum()


class ChunkedHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of targets (N,) under x (N, C) and weight (V, C), `rows` tokens at a time."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total, *grads = (chunks_in_triton if triton_runs(x) else chunks)(x, weight, targets, rows, needed)
        if needed:
            ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        # that of the weight is rounded only now: the sum over tokens, not yet divided by their number, can exceed float16
        return grad_x * grad_total.to(grad_x.dtype), (grad_weight * grad_total).to(grad_x.dtype), None, None


def chunks(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, needed: bool, by_triton: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The sum of ChunkedHeadLoss and its gradients with respect to x and weight, the latter in float32 at least; empty unless needed.
    """
    V, C = weight.shape
    dtype, grads = torch.promote_types(x.dtype, torch.float32), []
    total = x.new_zeros((), dtype=dtype)
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needed else weight.new_empty(0)
    widened = by_triton and (V % 64 > 0 or C % 8 > 0)  # 50,257 x 150 took three times as long as multiples of 8 (dev/LOG.md)
    if widened:
        x, weight = F.pad(x, (0, -C % 8)), F.pad(weight, (0, -C % 8, 0, -V % 64))
    with torch.autocast(x.device.type, enabled=False):
        for part, target in zip(x.split(rows), targets.split(rows)):
            valid, column = (target >= 0)[:, None], target.clamp(min=0)[:, None]
            logits = part @ weight.T  # (rows, V)
            if by_triton:
                losses, grad = gpu_kernels.losses_and_gradients(logits, column, V, needed)
            else:
                losses, grad = losses_and_gradients(logits, column, needed)  # (rows, 1), (rows, V)
            total = total + torch.where(valid, losses, 0.0).sum()
            if needed:
                grads.append(torch.where(valid, grad @ weight, 0.0)[:, :C])
                part = torch.where(valid, part, 0.0)
                if grad.dtype == dtype and not widened:
                    grad_weight.addmm_(grad.T, part)
                else:
                    grad_weight += (grad.T @ part)[:V, :C]
    return total, torch.cat(grads) if needed else x.new_empty(0), grad_weight


def losses_and_gradients(logits: torch.Tensor, column: torch.Tensor, needed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Cross-entropies (R, 1) of the columns (R, 1) under logits (R, V) and, if needed, the gradients of their sum with respect to the
    logits: softmax - one-hot.
    """
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    of_target = log_p.gather(1, column)
    if not needed:
        return -of_target, None
    return -of_target, log_p.exp_().scatter_add_(1, column, torch.full_like(of_target, -1.0)).to(logits.dtype)


@torch.library.custom_op("encdec::chunks", mutates_args=())
def chunks_in_triton(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, needed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`chunks` as one operation for torch.compile: it would put half of the products into the backward pass and keep the logits there."""
    return chunks(x, weight, targets, rows, needed, by_triton=True)


@chunks_in_triton.register_fake
def _(x, weight, targets, rows, needed):
    dtype = torch.promote_types(x.dtype, torch.float32)
    total, like_x = x.new_empty((), dtype=dtype), torch.empty_like(x, memory_format=torch.contiguous_format)
    return (total, like_x, torch.empty_like(weight, dtype=dtype)) if needed else (total, x.new_empty(0), weight.new_empty(0))
