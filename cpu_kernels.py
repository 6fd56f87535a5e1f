"""
What kernels.py computes on a CPU in C++, where torch's own kernel takes several times as long (dev/LOG.md): causal attention.
cpu_kernels.cpp is the algorithm; here it is compiled, for each head width and type of number when first used, and called.

Shapes: B texts, H heads, T tokens, D head width.
"""

import atexit
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_suffix(".cpp")
OPTIONS = ["-std=c++17", "-O3", "-shared", "-fPIC"]
TUNED = [["-march=native"], ["-mcpu=native"], []]  # the first that the compiler knows
# where torch's threads are OpenMP's; a second library of OpenMP beside torch's would end the process on macOS
THREADED = [["-fopenmp"], []] if sys.platform == "linux" else [[]]
BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # private in torch, so it may go away
# what it has been measured for, where it is faster than torch's kernel, from D = 8 to 128 and T = 8 to 4,096, in both types
WIDEST, SHORTEST = 128, 8  # D, T; in shorter texts the call takes longer than the work


# ----------------------------------------------------------------------------------------------------------------------
# compilation


class CannotCompile(Exception):
    """Why there is no kernel, in words for the user."""


libraries: dict[tuple[int, bool], ctypes.CDLL | None] = {}  # of a head width, in bfloat16 or not; None: cannot be compiled
lock = threading.Lock()  # lanes ask for the same library at once


def available(width: int, bfloat16: bool) -> bool:
    """Whether there is a kernel. Compiles it if need be, in a second or two; says once why there is none."""
    with lock:
        if (width, bfloat16) not in libraries:
            try:
                libraries[width, bfloat16] = compiled(width, bfloat16)
            except (CannotCompile, OSError) as why:
                if None not in libraries.values():
                    print(f"Attention on the CPU is computed by torch, which takes longer: {why}", file=sys.stderr, flush=True)
                libraries[width, bfloat16] = None
        return libraries[width, bfloat16] is not None


# as torch.compiler.assume_constant_result does it, which would import the compiler: 1.4 s of every command
available._dynamo_marked_constant = True


def compiled(width: int, bfloat16: bool) -> ctypes.CDLL:
    """cpu_kernels.cpp for this head width and type of number. Several processes may compile the same file at once."""
    command = [*compiler(), *OPTIONS, f"-DHEAD_WIDTH={width}", f"-DBF16={int(bfloat16)}"]
    version = subprocess.run([*command, "--version"], capture_output=True).stdout
    described = b"\0".join([SOURCE.read_bytes(), repr((command, TUNED, THREADED)).encode(), version, cpu().encode()])
    path = cached(f"attention_{width}_{'bfloat16' if bfloat16 else 'float32'}_{hashlib.sha256(described).hexdigest()[:16]}.so")
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # what a full disk has left of it: once more
            pass
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder, path.name)
        for tuned, threaded in itertools.product(TUNED, THREADED):
            # in a session of its own: Ctrl-C, which a training run survives, would end the compiler and look like a bad option
            words = [*command, *tuned, *threaded, str(SOURCE), "-o", str(new)]
            done = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
            try:
                library = ctypes.CDLL(str(new))
                os.replace(new, path)  # at once: nobody sees half a file
                return library
            except OSError as error:  # none was made, or it misses a library, such as OpenMP's
                why = done.stderr or str(error)
    raise CannotCompile(f"{shlex.join(command)} failed: {why.strip()[:300]}")


def compiler() -> list[str]:
    """The command that starts a C++ compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    for name in names:
        try:
            command = shlex.split(name)
        except ValueError as error:  # an open quotation
            raise CannotCompile(f"CXX={name}: {error}") from None
        if shutil.which(command[0]):
            return command
    raise CannotCompile(f"there is no C++ compiler ({', '.join(names)}); install one or name it in CXX")


@functools.cache
def cpu() -> str:
    """What this CPU is: a home directory, and with it what is kept there, may be shared by machines that differ."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in first if line.startswith(("model", "flags", "CPU", "Features")))
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"


def cached(name: str) -> Path:
    """Where a compiled file of this name is kept; where nothing can be written, a place for this process alone."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "encdec")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder / name
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return scratch() / name


@functools.cache
def scratch() -> Path:
    """A folder that goes with this process."""
    folder = tempfile.mkdtemp(prefix="encdec")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# ----------------------------------------------------------------------------------------------------------------------
# attention


def suits(q: torch.Tensor) -> bool:
    """Whether `attend` takes queries (B, H, T, D) like these, and is the fastest way."""
    bfloat16, D = q.dtype == torch.bfloat16, q.size(3)
    known = BFLOAT16 if bfloat16 else q.dtype == torch.float32
    return q.device.type == "cpu" and known and D <= WIDEST and q.size(2) >= SHORTEST and available(D, bfloat16)


def in_65536(p: float) -> int:
    """A probability as 16 random bits decide it: in so many of 2^16 cases, but never in all."""
    return min(round(p * 2**16), 2**16 - 1)


Rotary = tuple[torch.Tensor, torch.Tensor] | None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0, rotary: Rotary = None) -> torch.Tensor:
    """
    Causal softmax(q k^T / sqrt(D)) v of q, k, v (B, H, T, D), any strides, its weights dropped with probability `dropout`, which is
    rounded as in `kernels.dropout_factors`. With `rotary`, cos and sin (T, D // 2), q and k are rotated first, as `kernels.rotate`
    does it. The result lies as (B, T, H, D) in memory. Not differentiable twice.
    """
    if torch.compiler.is_compiling():
        assert dropout == 0.0 and rotary is None, "torch.compile makes both one piece with the rest"
        return attend_op(q, k, v)[0].transpose(1, 2)
    return Attention.apply(q, k, v, dropout, rotary)


class Attention(torch.autograd.Function):
    """`attend` where nothing is compiled: the operation for the compiler takes 0.05 ms longer, forward and backward each."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, rotary: Rotary) -> torch.Tensor:
        seed = int(torch.empty((), dtype=torch.int64).random_()) if dropout > 0.0 else 0
        ctx.options = seed, in_65536(dropout), rotary
        y, lse = forward(q, k, v, *ctx.options)
        ctx.save_for_backward(q, k, v, y, lse)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *backward(grad_y, *ctx.saved_tensors, *ctx.options).transpose(2, 3), None, None


def forward(q, k, v, seed: int = 0, dropped: int = 0, rotary: Rotary = None) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, T, H, D) and the log-sum-exp (B, H, T) of the scores, to base 2. Of 2^16 weights `dropped` are dropped."""
    y, lse = empty_output(q, k, v)
    call("forward", (q, k, v), (y.transpose(1, 2),), lse, seed, dropped, rotary)
    return y, lse


def backward(grad_y, q, k, v, y, lse, seed: int = 0, dropped: int = 0, rotary: Rotary = None) -> torch.Tensor:
    """Gradients of q, k and v: (3, B, T, H, D)."""
    grads = empty_gradients(grad_y, q, k, v, y, lse)
    call("backward", (q, k, v, y.transpose(1, 2), grad_y), grads.transpose(2, 3).unbind(), lse, seed, dropped, rotary)
    return grads


def call(name: str, inputs: tuple, outputs: tuple, lse: torch.Tensor, seed: int, dropped: int, rotary: Rotary) -> None:
    """A function of cpu_kernels.cpp, of tensors (B, H, T, D). Other threads of Python run meanwhile."""
    B, H, T, D = shape = inputs[0].shape
    dtype = inputs[0].dtype
    assert all(x.shape == shape and x.dtype == dtype for x in inputs), "what differs from the queries would be read beyond its end"
    tensors = [x if x.stride(3) == 1 else x.contiguous() for x in inputs] + [*outputs]
    tables = [0, 0] if rotary is None else [x.data_ptr() for x in rotary]
    angles = (T, D // 2), True, torch.float32
    assert all((x.shape, x.is_contiguous(), x.dtype) == angles for x in rotary or ()), "they are read as such"
    sizes = B, H, T, seed, dropped, min(torch.get_num_threads(), B * H), *tables
    places = [number for x in tensors for number in (x.data_ptr(), H, *x.stride()[:3])]
    of_int64 = [(ctypes.c_int64 * len(numbers))(*numbers) for numbers in (sizes, places)]
    getattr(libraries[D, dtype == torch.bfloat16], name)(*of_int64, ctypes.c_void_p(lse.data_ptr()))


@torch.library.custom_op("encdec::cpu_attend", mutates_args=())
def attend_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` without dropout as one operation for torch.compile."""
    return forward(q, k, v)


@torch.library.custom_op("encdec::cpu_attend_backward", mutates_args=())
def attend_gradients(
    grad_y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, lse: torch.Tensor
) -> torch.Tensor:
    return backward(grad_y, q, k, v, y, lse)


@attend_op.register_fake
def empty_output(q, k, v):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@attend_gradients.register_fake
def empty_gradients(grad_y, q, k, v, y, lse):
    B, H, T, D = q.shape
    return q.new_empty(3, B, T, H, D)


attend_op.register_autograd(
    lambda ctx, grad_y, _: tuple(attend_gradients(grad_y.transpose(1, 2), *ctx.saved_tensors).transpose(2, 3)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)
