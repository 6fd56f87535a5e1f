"""
What kernels.py computes on an NVIDIA GPU in Triton, where torch's own kernels take 1.3 to 3 times as long (dev/LOG.md): causal
attention of short texts with narrow heads, of which those work on tiles that are mostly masked or empty, and the gradient of a
softmax over a large vocabulary, in place. tests/test_cuda.py holds both to the plain computation.

Shapes: B texts, H heads, T tokens, D head width; R rows, V vocabulary; M queries or keys of a block, N keys of a tile.
"""

import math

import torch
import triton
import triton.language as tl

LONGEST = 256  # T of `attend`, whose backward pass unrolls a head
# the fastest of those in results/gpu/attention.txt, measured on an H200
TILES = {16: (64, 3), 32: (32, 2)}  # D -> keys of a tile and stages of the pipeline, of the forward pass
M = 64  # queries of a block, and in the backward pass keys


# ----------------------------------------------------------------------------------------------------------------------
# attention


@triton.jit
def load(base, rows, stride, T, D: tl.constexpr):
    """Rows (R,) of a (T, D) matrix as (R, D); zeros behind its end."""
    return tl.load(base + rows[:, None] * stride + tl.arange(0, D)[None, :], mask=rows[:, None] < T, other=0.0)


@triton.jit
def store(base, rows, stride, x, T, D: tl.constexpr):
    tl.store(base + rows[:, None] * stride + tl.arange(0, D)[None, :], x.to(base.dtype.element_ty), mask=rows[:, None] < T)


@triton.jit
def attend_forward(
    q, k, v, o, lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, c,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """o (M, D) of a block of M queries and lse (M,), the log-sum-exp of their scores, to base 2; c = log2(e) / sqrt(D)."""
    blocks = tl.cdiv(T, M)  # of one head, next to each other
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    first = (tl.program_id(0) % blocks) * M
    rows = first + tl.arange(0, M)
    a, k, v = load(q + b * q_b + h * q_h, rows, q_t, T, D), k + b * k_b + h * k_h, v + b * v_b + h * v_h
    acc = tl.zeros((M, D), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)  # largest score so far, times c
    full = first // N * N  # the keys before it are seen by all of these queries
    for diagonal in tl.static_range(2):
        for start in range(full if diagonal else 0, tl.minimum(first + M, T) if diagonal else full, N):
            columns = start + tl.arange(0, N)
            s = tl.dot(a, tl.trans(load(k, columns, k_t, T, D)), input_precision="ieee")  # (M, N)
            if diagonal:  # hides keys behind T as well, from all rows that are stored
                s = tl.where(rows[:, None] >= columns[None, :], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1) * c)  # finite: every query sees the first key, or that of its first tile
            p = tl.exp2(s * c - new[:, None])
            shrink = tl.exp2(top - new)
            total = total * shrink + tl.sum(p, 1)
            y = load(v, columns, v_t, T, D)
            acc = tl.dot(p.to(y.dtype), y, acc * shrink[:, None], input_precision="ieee")
            top = new
    store(o + b * T * H * D + h * D, rows, H * D, acc / total[:, None], T, D)
    tl.store(lse + bh * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def attend_backward(
    q, k, v, o, do, lse, dq, dk, dv, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, H, T, scale, c,
    D: tl.constexpr, M: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A whole head, its blocks unrolled: each score is computed once, and dq stays in registers until its last key has been seen."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v, lse = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h, lse + bh * T
    at, o_t = b * T * H * D + h * D, H * D  # of o, do, dq, dk, dv
    queries, open_dq = (), ()  # of each block of queries; dq of those that have keys to come
    for i in tl.static_range(BLOCKS):
        rows = i * M + tl.arange(0, M)
        g = load(do + at, rows, o_t, T, D)
        delta = tl.sum(g.to(tl.float32) * load(o + at, rows, o_t, T, D).to(tl.float32), 1)  # (M,) what the softmax takes off
        queries = queries + ((load(q, rows, q_t, T, D), g, tl.load(lse + rows, mask=rows < T, other=0.0), delta),)
        open_dq = open_dq + (tl.zeros((M, D), tl.float32),)
    for j in tl.static_range(BLOCKS):
        columns = j * M + tl.arange(0, M)
        x, y = load(k, columns, k_t, T, D), load(v, columns, v_t, T, D)
        gk, gv = tl.zeros((M, D), tl.float32), tl.zeros((M, D), tl.float32)
        rest = ()
        for i in tl.static_range(j, BLOCKS):
            a, g, z, delta = queries[i]
            rows = i * M + tl.arange(0, M)
            s = tl.dot(x, tl.trans(a), input_precision="ieee") * c - z[None, :]  # (M keys, M queries)
            if i == j:
                s = tl.where(rows[None, :] >= columns[:, None], s, float("-inf"))
            p = tl.exp2(s)
            ds = (p * (tl.dot(y, tl.trans(g), input_precision="ieee") - delta[None, :])).to(x.dtype)
            gv = tl.dot(p.to(x.dtype), g, gv, input_precision="ieee")
            gk = tl.dot(ds, a, gk, input_precision="ieee")
            gq = tl.dot(tl.trans(ds), x, open_dq[i - j], input_precision="ieee")
            if i == j:  # the last keys that these queries see
                store(dq + at, rows, o_t, gq * scale, T, D)
            else:
                rest = rest + (gq,)
        open_dq = rest
        store(dk + at, columns, o_t, gk * scale, T, D)
        store(dv + at, columns, o_t, gv, T, D)


def suits(q: torch.Tensor) -> bool:
    """Whether `attend` takes queries (B, H, T, D) of this shape."""
    return q.size(3) in TILES and q.size(2) <= LONGEST


def sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[tuple, dict]:
    """What both kernels are told of the shapes: strides of b, h, t, then H and T; and the constants."""
    strides = (x.stride(i) for x in (q, k, v) for i in range(3))
    return (*strides, *q.shape[1:3]), dict(D=q.size(3), M=M, num_warps=4)


@torch.library.custom_op("encdec::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Causal softmax(q k^T / sqrt(D)) v of q, k, v (B, H, T, D), D = 16 or 32, T <= 256, any strides with the last one 1. Returns it as
    (B, T, H, D), and what the backward pass needs. Not differentiable twice.
    """
    assert q.shape == k.shape == v.shape, f"{q.shape} {k.shape} {v.shape}: a kernel would read what lies behind the shorter ones"
    o, lse = empty_output(q, k, v)
    numbers, constants = sizes(q, k, v)
    N, stages = TILES[q.size(3)]
    grid = (q.size(0) * q.size(1) * triton.cdiv(q.size(2), M),)
    attend_forward[grid](q, k, v, o, lse, *numbers, math.log2(math.e) / math.sqrt(q.size(3)), N=N, num_stages=stages, **constants)
    return o, lse


@torch.library.custom_op("encdec::attend_backward", mutates_args=())
def attend_gradients(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, each (B, H, T, D), (B, T, H, D) in memory."""
    grads = empty_gradients(do, q, k, v, o, lse)
    numbers, constants = sizes(q, k, v)
    scale, blocks = 1 / math.sqrt(q.size(3)), triton.cdiv(q.size(2), M)
    attend_backward[(q.size(0) * q.size(1),)](
        q, k, v, o, do.contiguous(), lse, *grads, *numbers, scale, math.log2(math.e) * scale, BLOCKS=blocks, num_stages=1, **constants
    )
    return grads


@attend.register_fake
def empty_output(q, k, v):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@attend_gradients.register_fake
def empty_gradients(do, q, k, v, o, lse):
    B, H, T, D = q.shape
    return tuple(q.new_empty(B, T, H, D).transpose(1, 2) for _ in range(3))


attend.register_autograd(
    lambda ctx, do, _: attend_gradients(do, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


# ----------------------------------------------------------------------------------------------------------------------
# softmax over the vocabulary


@triton.jit
def scaled(logits, at, V, width):
    """Logits at these columns times log2(e), -inf from V on. `width` is a multiple of 16, so 16 bytes are loaded at a time."""
    x = tl.load(logits + at, mask=at < width, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where(at < V, x, float("-inf"))


@triton.jit
def softmax_gradient(logits, columns, losses, stride, V, width, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """One row: its loss and, in place of its logits, softmax - one-hot with zeros behind V."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        x = scaled(logits, start + tl.arange(0, BLOCK), V, width)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(x - new), 0)
        top = new
    log_z = top + tl.log2(total)
    column = tl.load(columns + row).to(tl.int32)
    tl.store(losses + row, log_z * 0.6931471805599453 - tl.load(logits + column).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the logit above has been read before it is overwritten
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            p = tl.exp2(scaled(logits, at, V, width) - log_z)
            tl.store(logits + at, tl.where(at == column, p - 1.0, p).to(logits.dtype.element_ty), mask=at < width)


def losses_and_gradients(logits: torch.Tensor, column: torch.Tensor, V: int, needed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross-entropies (R, 1), float32, of the columns (R, 1) under the first V columns of logits (R, >= V), contiguous, and the logits,
    which are overwritten with the gradients of their sum if those are needed.
    """
    losses = logits.new_empty(len(logits), 1, dtype=torch.float32)
    softmax_gradient[(len(logits),)](
        logits, column, losses, logits.stride(0), V, logits.size(1), BLOCK=4096, GRADIENT=needed, num_warps=8
    )
    return losses, logits
