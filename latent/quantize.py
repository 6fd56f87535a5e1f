"""
Residual vector quantization: a latent vector becomes D codes out of K, level by level (arXiv:2107.03312, arXiv:2203.01941).

    r_0 = z;   k_d = argmin_k |r_{d-1} - e_{d,k}|^2;   r_d = r_{d-1} - e_{d,k_d};   zhat_d = e_{1,k_1} + ... + e_{d,k_d}

1. The output z_q has exactly the value zhat_D, and `decode(codes)` returns the same bits. Its gradient goes straight through to
   z, ONCE on the sum: straight through every level would multiply the encoder's gradient by D. (`gradient="rotation"` turns and
   scales it as z had to be turned and scaled to become zhat_D: arXiv:2410.06424.)
2. Commitment is mean_d mean |z - sg(zhat_d)|^2, over levels, latents and channels alike, so its weight depends on none of them.
3. `ema` codebooks are buffers, moving averages of what is assigned to them. forward() never changes what it looks up: it only
   collects statistics, in training; `step()` applies them, called once after each optimizer step. An update before the lookup
   of the same batch would leak later tokens into the codes of earlier ones, and forward() runs more than once a step under
   gradient accumulation or activation checkpointing. To freeze the codebooks, do not call step().
4. `simvq` (arXiv:2411.02038) has no statistics: codes are a frozen random table times one learned matrix a level. Every code
   moves with every gradient, so none can die, and nothing needs to be kept equal between processes beyond what DDP does. It was
   taken rather than FSQ because it keeps K codes on D levels of any width: the same codes, stack, prior and metrics.
5. Until k-means has seen enough vectors, an `ema` codebook is random, of the length that serves a Gaussian latent best: one
   code path from the first step on, in which codes are codes and evaluation is honest (passing z through unquantized would
   report the loss of another model). Wait for `initialized` before codes are stored. A model may train on z itself until then
   (latent/autoencoder.py does: random codes would pull its latents together before they have spread), but evaluates on codes.

DistributedDataParallel must not broadcast buffers, or rank 0's statistics replace those of the others; step() sums them.
Float32 outside autocast (float64 in a float64 model). Shapes: N latents (of any leading dimensions), Z width, K codes, D levels,
and a number of codebooks that is D, or 1 if they are shared.
"""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def warn_too_late(config, key: str, max_iters: int, what: str) -> None:
    """Warn of a step config.key that a run of max_iters steps ends before, or with: it `what`. Not where nothing is trained."""
    if max_iters > 0 and getattr(config, key) >= max_iters:
        warnings.warn(f"{key}={getattr(config, key)} is not below max_iters={max_iters}: this run {what}", stacklevel=1)


@dataclass(frozen=True)
class QuantizerConfig:
    latent_dim: int = 256  # width Z of a latent
    codebook_size: int = 512  # codes K of a level
    codebook_levels: int = 4  # levels D; a latent costs D log2(K) bits
    kind: Literal["ema", "simvq"] = "ema"  # how codebooks learn: moving averages, or gradients of a linear map
    shared_codebook: bool = False  # one codebook for all levels, updated once after all of them
    commitment_weight: float = 0.25  # of the commitment loss in the total
    gradient: Literal["straight_through", "rotation"] = "straight_through"  # how the decoder's gradient reaches z
    quantize_dropout: float = 0.0  # probability that a training forward sums only the first 1..D-1 levels
    codebook_decay: float = 0.99  # ema: weight of the past in the moving averages, per step()
    eps: float = 1e-5  # ema: Laplace smoothing of the counts; large values shrink rare codes towards 0
    kmeans_iterations: int = 10  # ema: Lloyd iterations of the initialization; 0 = random vectors
    vectors_per_code: int = 50  # ema: K times as many recent latents are kept (and stored in checkpoints) for it and restarts
    dead_threshold: float = 0.05  # ema: a code is dead below this fraction of the mean hits of a code; 0 = no restarts
    restart_interval: int | None = None  # ema: steps between searches for dead codes; none: the averages' memory, 100 at least

    def __post_init__(self):
        for key in ("latent_dim", "codebook_levels", "vectors_per_code", "restart_interval"):
            require(getattr(self, key) is None or getattr(self, key) >= 1, f"{key}={getattr(self, key)}: at least 1 is needed")
        require(self.codebook_size >= 2, f"codebook_size={self.codebook_size}: at least 2 codes are needed to say anything")
        require(self.commitment_weight >= 0.0, f"commitment_weight={self.commitment_weight} must not be negative")
        require(0.0 <= self.quantize_dropout <= 1.0, f"quantize_dropout={self.quantize_dropout}: a probability is needed")
        require(
            self.quantize_dropout == 0.0 or self.codebook_levels > 1,
            f"quantize_dropout={self.quantize_dropout} drops levels, but codebook_levels=1 leaves none to drop; set it to 0",
        )
        require(0.0 <= self.codebook_decay < 1.0, f"codebook_decay={self.codebook_decay}: a number in [0, 1) is needed")

    @property
    def restart_steps(self) -> int:
        if self.restart_interval is not None:
            return self.restart_interval
        return max(100, math.ceil(1 / (1 - self.codebook_decay)))

    @property
    def loss_weights(self) -> dict[str, float]:
        """Factors of the named losses of a forward pass in the total."""
        codebook = {"codebook": 1.0} if self.kind == "simvq" else {}
        return {"commitment": self.commitment_weight} | codebook


class Quantized(NamedTuple):
    z_q: torch.Tensor  # (..., Z) float32, with the gradient of z; zero where masked
    codes: torch.Tensor  # (..., D) int64, -1 where masked and at levels that quantize-dropout left out
    losses: dict[str, torch.Tensor]  # scalars, unweighted; QuantizerConfig.loss_weights has their factors
    distortion: torch.Tensor  # (D + 1,) mean |r_d|^2 / Z for d = 0..D over valid latents, to be logged


# ----------------------------------------------------------------------------------------------------------------------
# nearest vectors


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """
    Inside, neither autocast nor TF32, whose 10 bits of mantissa would make codes depend on the machine: products and convolutions in
    float32 are what they say. Not for what torch.compile sees, see kernels.uncompiled.
    """
    of_products, of_convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(of_products)
        torch.backends.cudnn.allow_tf32 = of_convolutions


def nearest_code(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """
    Index (N,) of the row of codebook (K, Z) nearest to each row of x (N, Z); of equal ones the first.

    argmin |e|^2 / 2 - x.e, in chunks of at most 2^24 distances. torch.cdist expands the square as well, and keeps |x|^2 in it,
    which only adds rounding.
    """
    if torch.compiler.is_compiling():
        return nearest_code_op(x, codebook)
    with full_float32(x.device):
        half_square = codebook.pow(2).sum(-1) / 2
        chunks = x.split(max(1, 2**24 // codebook.size(0)))
        return torch.cat([torch.addmm(half_square, chunk, codebook.T, alpha=-1).argmin(-1) for chunk in chunks])


@torch.library.custom_op("encdec::nearest_code", mutates_args=())
def nearest_code_op(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """
    `nearest_code` as one operation for torch.compile: no unrolled chunks, and precision is set where it computes. Only for that: the
    first call of such an operation imports the compiler, which takes a second.
    """
    return nearest_code(x, codebook)


@nearest_code_op.register_fake
def _(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.size(0), dtype=torch.int64)


def kmeans(x: torch.Tensor, size: int, iterations: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`size` centres (K, Z) of the rows of x (N, Z), N >= K, by Lloyd's algorithm, and the rows (K,) each of them got."""
    assert len(x) >= size, f"{len(x)} vectors cannot fill {size} codes"
    centres = x[torch.randperm(len(x), generator=generator)[:size].to(x.device)]
    for _ in range(iterations):
        code = nearest_code(x, centres)
        count = torch.bincount(code, minlength=size)
        mean = torch.zeros_like(centres).index_add_(0, code, x) / count.clamp(min=1)[:, None]
        elsewhere = x[torch.randint(len(x), (size,), generator=generator).to(x.device)]  # for centres that got no row
        centres = torch.where((count == 0)[:, None], elsewhere, mean)
    return centres, torch.bincount(nearest_code(x, centres), minlength=size)


def random_codes(config: QuantizerConfig, books: int) -> torch.Tensor:
    """
    Gaussian codes (books, K, Z) for a latent of unit variance per channel, of about the length that shortens the residual most.

    The best of K random directions has a cosine of about c = sqrt(2 ln K / Z) with a residual, where Z is large beside ln K;
    subtracting that part leaves sqrt(1 - c^2) of it. Codes of unit variance would lengthen it instead.
    """
    cosine = min(math.sqrt(2 * math.log(config.codebook_size) / config.latent_dim), 0.9)
    lengths = cosine * torch.sqrt(torch.tensor(1 - cosine**2)) ** torch.arange(books)
    return torch.randn(books, config.codebook_size, config.latent_dim) * lengths[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# codebooks: vectors() to look up, collect() in training forwards, step() after an optimizer step


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    """This tensor of every process, whose shapes are equal."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


class EMACodebook(nn.Module):
    """Codebooks as moving averages of the residuals assigned to them (arXiv:1711.00937, appendix A)."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        books = 1 if config.shared_codebook else config.codebook_levels
        K, Z = config.codebook_size, config.latent_dim
        codes = random_codes(config, books)
        self.register_buffer("codes", codes)  # (books, K, Z) e
        self.register_buffer("ema_count", torch.ones(books, K))  # hits a step, N_k
        self.register_buffer("ema_sum", codes.clone())  # sum of the residuals of a step, m_k
        # recent latents, of a pass the first that fit, one row after the other in a ring; the row behind its end takes the others
        self.register_buffer("recent", torch.zeros(config.vectors_per_code * K + 1, Z))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # latents ever written there
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # updates since then
        self.register_buffer("restarts", torch.zeros(books, dtype=torch.int64))  # codes ever replaced
        # what forward() collects until step(); zero whenever a checkpoint is written
        self.register_buffer("pending_count", torch.zeros(books, K), persistent=False)
        self.register_buffer("pending_sum", torch.zeros(books, K, Z), persistent=False)
        self.register_buffer("pending_latents", torch.zeros((), dtype=torch.int64), persistent=False)  # written to `recent`
        self.register_buffer("pending_calls", torch.zeros((), dtype=torch.int64), persistent=False)  # how often collect() was called
        self.register_buffer("call", torch.zeros(len(self.recent), dtype=torch.int64), persistent=False)  # of them, the writer of a row

    def vectors(self) -> torch.Tensor:
        return self.codes

    def state(self) -> list[torch.Tensor]:
        """What decides the codes, for the hash."""
        return [self.codes]

    @torch.no_grad()
    def collect(self, residuals: list[torch.Tensor], codes: list[torch.Tensor], valid: torch.Tensor) -> None:
        """Add residuals (N, Z) and codes (N,) of every level where valid (N,). Shapes depend on no data: it must compile."""
        # what overflowed in float16 would stay in the averages, although the optimizer skips such a step
        valid = valid & residuals[0].isfinite().all(-1)
        weight = valid.to(self.pending_count.dtype)
        for level, (residual, code) in enumerate(zip(residuals, codes)):
            book = 0 if self.config.shared_codebook else level
            self.pending_count[book].index_add_(0, code, weight)
            self.pending_sum[book].index_add_(0, code, torch.where(valid[:, None], residual, 0.0))
        capacity = len(self.recent) - 1
        order = valid.cumsum(0) - 1  # of a valid latent among the valid ones
        keep = valid & (order < capacity)
        row = torch.where(keep, (self.seen + order) % capacity, capacity)
        self.recent.index_copy_(0, row, torch.where(keep[:, None], residuals[0], 0.0))
        self.call.index_copy_(0, row, self.pending_calls.expand_as(row))
        self.seen.add_(keep.sum())
        self.pending_latents.add_(keep.sum())
        self.pending_calls.add_(1)

    @torch.no_grad()
    def step(self, initialize: bool) -> None:
        """One update from all that was collected since the last one, in all processes."""
        if distributed():
            dist.all_reduce(self.pending_count)
            dist.all_reduce(self.pending_sum)
            self.share_recent()
        if not self.initialized:
            if initialize and self.seen >= len(self.recent) - 1:
                self.initialize()
        elif self.pending_count.sum() > 0:  # else nothing was collected, and the averages must not fade
            self.update()
            if self.config.dead_threshold > 0 and self.steps % self.config.restart_steps == 0:
                self.restart_dead_codes()
        for pending in (self.pending_count, self.pending_sum, self.pending_latents, self.pending_calls):
            pending.zero_()

    def share_recent(self) -> None:
        """
        Write the latents that each process has collected since the last step into the ring of all, in the order in which a single
        process would have met them: pass by pass (all make equally many), in each process by process. (Where one process fills the
        whole ring in a step, the order is another one.)
        """
        capacity, before = len(self.recent) - 1, self.seen - self.pending_latents
        mine = self.pending_latents.clamp(max=capacity)
        counts = gathered(mine)
        # slots of this process's own; where others have more, what lies behind them
        slots = (self.seen - mine + torch.arange(int(max(counts)), device=mine.device)) % capacity
        real = torch.cat([torch.arange(len(slots), device=mine.device) < count for count in counts])
        order = torch.cat(gathered(self.call[slots]))[real].argsort(stable=True)
        rows = torch.cat(gathered(self.recent[slots]))[real][order]
        self.seen.copy_(before + len(rows))
        self.recent[(before + torch.arange(len(rows), device=mine.device))[-capacity:] % capacity] = rows[-capacity:]

    def update(self) -> None:
        """One step of the moving averages, and the codes they give."""
        decay, eps, K = self.config.codebook_decay, self.config.eps, self.config.codebook_size
        self.ema_count.lerp_(self.pending_count, 1 - decay)
        self.ema_sum.lerp_(self.pending_sum, 1 - decay)
        total = self.ema_count.sum(-1, keepdim=True)
        smoothed = total * (self.ema_count + eps) / (total + K * eps)  # Laplace: no division by 0
        self.codes.copy_(self.ema_sum / smoothed[..., None])
        self.steps += 1

    def from_rank_0(self, *tensors: torch.Tensor) -> None:
        """Give every process the values of rank 0, in place: rounding must not let codebooks drift apart."""
        if distributed():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def generator(self) -> torch.Generator:
        """Random choices of step(): a function of its number, so that a resumed run makes the same ones."""
        return torch.Generator().manual_seed(int(self.steps))

    def initialize(self) -> None:
        """k-means of each level on its own residual, on the latents that were kept."""
        config, generator = self.config, self.generator()
        if not distributed() or dist.get_rank() == 0:
            residual, residuals = self.recent[:-1], []
            for level in range(config.codebook_levels):
                centres, count = kmeans(residual, config.codebook_size, config.kmeans_iterations, generator)
                if not config.shared_codebook:
                    self.set_codes(level, centres, count)
                residuals.append(residual)
                residual = residual - centres[nearest_code(residual, centres)]
            if config.shared_codebook:  # one codebook for what all levels will see
                self.set_codes(0, *kmeans(torch.cat(residuals), config.codebook_size, config.kmeans_iterations, generator))
        self.initialized.fill_(True)
        self.from_rank_0(self.codes, self.ema_count, self.ema_sum)

    def set_codes(self, book: int, codes: torch.Tensor, count: torch.Tensor) -> None:
        """A whole codebook (K, Z), with averages as if its counts (K,) were the usual share of a step of this size."""
        share = count.clamp(min=1).to(codes.dtype)  # a code without a vector would be drawn to zero by its first update
        self.codes[book] = codes
        self.ema_count[book] = share / share.sum() * self.pending_count[book].sum().clamp(min=1)
        self.ema_sum[book] = self.ema_count[book][:, None] * codes

    def restart_dead_codes(self) -> None:
        """Replace the dead codes of each level by recent residuals of this level."""
        if not distributed() or dist.get_rank() == 0:
            generator, residual, residuals = self.generator(), self.recent[:-1], []
            for level in range(self.config.codebook_levels):
                book = 0 if self.config.shared_codebook else level
                if not self.config.shared_codebook:
                    self.restart_dead_codes_of(book, residual, generator)
                residuals.append(residual)
                residual = residual - self.codes[book][nearest_code(residual, self.codes[book])]
            if self.config.shared_codebook:
                self.restart_dead_codes_of(0, torch.cat(residuals), generator)
        self.from_rank_0(self.codes, self.ema_count, self.ema_sum, self.restarts)

    def restart_dead_codes_of(self, book: int, residual: torch.Tensor, generator: torch.Generator) -> None:
        """restart_dead_codes of one codebook, given the residuals (N, Z) that it quantizes."""
        codes, count, total = self.codes[book], self.ema_count[book], self.ema_sum[book]
        mean_hits = count.mean()  # of a code and step; "fewer than 2 hits" would kill all of them in a small batch
        dead = count < self.config.dead_threshold * mean_hits
        choice = torch.randperm(len(residual), generator=generator)[: len(codes)].to(codes.device)
        codes.copy_(torch.where(dead[:, None], residual[choice], codes))
        # The averages restart as well, at the mean: the old ones would undo the restart at the next update, and a count below
        # the threshold would have it repeated at the next search.
        count.copy_(torch.where(dead, mean_hits, count))
        total.copy_(torch.where(dead[:, None], mean_hits * codes, total))
        self.restarts[book] += dead.sum()


class SimVQCodebook(nn.Module):
    """Codebooks as a frozen random table times a learned matrix (arXiv:2411.02038)."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        books = 1 if config.shared_codebook else config.codebook_levels
        codes = random_codes(config, books)
        scale = codes.std(dim=(1, 2), keepdim=True)
        self.register_buffer("table", codes / scale)  # (books, K, Z), unit variance
        self.map = nn.Parameter(scale * torch.eye(config.latent_dim))  # (books, Z, Z)
        self.register_buffer("initialized", torch.ones((), dtype=torch.bool))
        self.register_buffer("restarts", torch.zeros(books, dtype=torch.int64), persistent=False)

    def vectors(self) -> torch.Tensor:
        with torch.autocast(self.table.device.type, enabled=False):
            return self.table @ self.map

    def state(self) -> list[torch.Tensor]:
        """What decides the codes, for the hash: not the product, whose rounding differs between machines."""
        return [self.table, self.map]

    def collect(self, residuals: list[torch.Tensor], codes: list[torch.Tensor], valid: torch.Tensor) -> None:
        pass

    def step(self, initialize: bool) -> None:
        pass


# ----------------------------------------------------------------------------------------------------------------------
# the stack


class ResidualQuantizer(nn.Module):
    """
    D levels of vector quantization, each of what the ones before it left over; see the top of this file. Another quantizer can take
    its place that has config, codebook.initialized, forward, encode, decode, vectors (tables whose entries add up to a latent), step,
    codebook_hash and the two properties.
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.codebook = {"ema": EMACodebook, "simvq": SimVQCodebook}[config.kind](config)

    @property
    def initialized(self) -> bool:
        """Whether the codebooks come from data. Codes made before that are worth nothing later."""
        return bool(self.codebook.initialized)

    @property
    def restarts(self) -> list[int]:
        """Codes replaced so far, per codebook. On data that do not change it must stop growing."""
        return self.codebook.restarts.tolist()

    def step(self, initialize: bool = True) -> None:
        """
        Update the codebooks: once after each optimizer step, by every process. forward() never does. initialize=False: k-means
        waits, although there may be latents enough.
        """
        self.codebook.step(initialize)

    def vectors(self) -> list[torch.Tensor]:
        """The codebook (K, Z) of each level."""
        books = self.codebook.vectors().unbind(0)
        return list(books) * self.config.codebook_levels if self.config.shared_codebook else list(books)

    def lookup(self, residual: torch.Tensor, vectors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Codes k_1..k_D, each (N,), and residuals r_0..r_D, each (N, Z), of r_0 = residual (N, Z). No gradients."""
        codes, residuals = [], [residual]
        for book in vectors:
            codes.append(nearest_code(residuals[-1], book.detach()))
            residuals.append(residuals[-1] - book.detach()[codes[-1]])
        return codes, residuals

    def flatten(self, z: torch.Tensor, mask: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N, Z) in the precision of `like`, zero where masked, and which of them (N,) are real."""
        assert z.size(-1) == self.config.latent_dim, f"latents of width {z.size(-1)}, codes of {self.config.latent_dim}"
        valid = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask
        return torch.where(valid[..., None], z.to(like.dtype), 0.0).flatten(0, -2), valid.flatten()

    def random_depth(self, device: torch.device) -> torch.Tensor | None:
        """Levels (a scalar on the device, so that nothing waits for it) to sum in this forward; None = all."""
        config = self.config
        if not self.training or config.quantize_dropout == 0.0:
            return None
        drop = torch.rand((), device=device) < config.quantize_dropout
        return torch.where(drop, torch.randint(1, config.codebook_levels, (), device=device), config.codebook_levels)

    def forward(self, z: torch.Tensor, mask: torch.Tensor | None = None) -> Quantized:
        """
        z (..., Z), mask (...) True = real -> see Quantized. In training statistics are collected for step(), from valid
        latents only; in evaluation nothing changes.
        """
        leading, config = z.shape[:-1], self.config
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.vectors()
            z, valid = self.flatten(z, mask, vectors[0])
            codes, residuals = self.lookup(z.detach(), vectors)
            if self.training:  # at all levels: residuals do not depend on the depth that quantize-dropout draws
                self.codebook.collect(residuals[:-1], codes, valid)

            depth = self.random_depth(z.device)
            weight = valid.to(z.dtype) / valid.sum().clamp(min=1)  # turns a sum over latents into the mean of the valid ones
            zhat = output = torch.zeros_like(z)
            commitment, codebook = [], []
            for level, book in enumerate(vectors):
                vector = book[codes[level]]
                zhat = zhat + vector.detach()
                commitment.append(((z - zhat).pow(2).mean(-1) * weight).sum())
                if config.kind == "simvq":  # does what the averages do for ema: moves codes to the residuals they got
                    codebook.append(((residuals[level] - vector).pow(2).mean(-1) * weight).sum())
                summed = valid if depth is None else valid & (level < depth)
                output = torch.where(summed[:, None], zhat, output)
                codes[level] = torch.where(summed, codes[level], -1)
            losses = {"commitment": torch.stack(commitment).mean()}
            if codebook:
                losses["codebook"] = torch.stack(codebook).mean()

            through = rotate_to(output, z) if config.gradient == "rotation" else z
            z_q = output + (through - through.detach())  # adds exactly 0, and the gradient
            before = (z.detach().pow(2).mean(-1) * weight).sum()
            distortion = torch.stack([before, *(level.detach() for level in commitment)])
        return Quantized(z_q.unflatten(0, leading), torch.stack(codes, -1).unflatten(0, leading), losses, distortion)

    @torch.no_grad()
    def encode(self, z: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """z (..., Z) -> codes (..., D), -1 where mask (...) is False. The codes of forward(), and nothing else happens."""
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.vectors()
            rows, valid = self.flatten(z, mask, vectors[0])
            codes = torch.stack(self.lookup(rows, vectors)[0], -1)
        return torch.where(valid[:, None], codes, -1).unflatten(0, z.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """
        Codes (..., d) of the first d <= D levels -> the latents (..., Z) they stand for; -1 adds nothing.
        Raises ValueError for more levels than there are.
        """
        if codes.size(-1) > self.config.codebook_levels:
            raise ValueError(
                f"codes of {codes.size(-1)} levels for a quantizer with codebook_levels={self.config.codebook_levels}"
            )
        vectors = self.vectors()
        zhat = vectors[0].new_zeros(*codes.shape[:-1], self.config.latent_dim)
        for code, book in zip(codes.unbind(-1), vectors):  # in forward()'s order, so that the bits are the same
            zhat = torch.where(code[..., None] >= 0, zhat + book[code.clamp(min=0)], zhat)
        return zhat

    def codebook_hash(self) -> str:
        """sha256 of the codebooks as float32 bytes: a prior trained on codes is worth nothing with other codebooks."""
        digest = hashlib.sha256()
        for tensor in self.codebook.state():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def rotate_to(target: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """
    z (N, Z) turned onto target (N, Z) in the plane of the two and stretched to its length, by a map that counts as constant:
    R = I - 2 w w^T + 2 b a^T with a = z / |z|, b = target / |target|, w = (a + b) / |a + b| (arXiv:2410.06424, section 4.2).
    """
    a, b = F.normalize(z.detach(), dim=-1), F.normalize(target, dim=-1)
    w = F.normalize(a + b, dim=-1)
    turned = z - 2 * (z * w).sum(-1, keepdim=True) * w + 2 * (z * a).sum(-1, keepdim=True) * b
    return turned * (target.norm(dim=-1, keepdim=True) / z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12))


# ----------------------------------------------------------------------------------------------------------------------
# how much of the codebooks is used


def code_counts(codes: torch.Tensor, size: int) -> torch.Tensor:
    """How often each code of each level occurs (D, K) in codes (..., D) of K = size; -1 is not counted."""
    return torch.stack([torch.bincount(code[code >= 0], minlength=size) for code in codes.flatten(0, -2).unbind(-1)])


def code_usage(counts: torch.Tensor, warn: bool) -> dict[str, int | float | list[float]]:
    """
    Of counts (D, K) on the CPU, those of a whole evaluation pass, as usage and perplexity of a batch are capped by its size:
    `latents`, how many had a code; per level `usage`, the fraction of codes that occurred, and `perplexity`,
    exp(-sum p ln p), the number of equally frequent codes that would say as much; `bits`, the sum of its log2: what a
    latent costs at most, when nothing is known about its neighbours or its other levels. `warn`: of levels that say next to nothing.
    """
    p = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    nats = -torch.special.xlogy(p, p).sum(-1)
    latents, usage, perplexities = int(counts[0].sum()), (counts > 0).double().mean(-1).tolist(), nats.exp().tolist()
    possible = min(counts.size(1), latents)
    for level, (perplexity, used) in enumerate(zip(perplexities, usage), start=1):
        if warn and possible > 1 and perplexity < 1 + 0.05 * (possible - 1):
            warnings.warn(
                f"codebook level {level} has collapsed: perplexity {perplexity:.1f} of {possible}, {used:.1%} of its codes used "
                "(a smaller learning rate or fewer levels may help)",
                stacklevel=2,
            )
    return {"latents": latents, "usage": usage, "perplexity": perplexities, "bits": nats.sum().item() / math.log(2)}
