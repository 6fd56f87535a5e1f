"""
Where and how to compute: device, precision, compilation, seeds and processes, decided once for every script.

The order matters: the device is chosen first, then the precision it supports, then whether to compile for it. Several
processes are started by torchrun, which sets RANK, LOCAL_RANK and WORLD_SIZE; without them there is one process.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

PROGRESS_SECONDS = 30.0  # between two lines of with_progress
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """What `start` decided. `reasons` is the line that tells the user what was chosen and why."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are float32 (float64 for float64)
    compile: bool
    reasons: str
    rank: int = 0
    world_size: int = 1
    graphs: bool = False  # compile to CUDA graphs

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, in the main process."""
        if self.is_main:
            print(text, flush=True)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision where the dtype is a half one; nothing otherwise."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, dtype=self.dtype)
        return contextlib.nullcontext()

    def sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all processes, on the CPU (float64 survives gloo and NCCL)."""
        if self.world_size > 1:
            value = value.to(self.device, copy=True)  # NCCL wants it on the GPU
            dist.all_reduce(value)
        return value.cpu()

    def in_any_process(self, flag: bool) -> bool:
        """Whether the flag is set in one process at least. All have to ask together."""
        return self.sum_over_processes(torch.tensor(float(flag))).item() > 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def wait(self) -> None:
        """Return when the device has done all that it was given to do."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def peak_memory_bytes(self) -> int | None:
        """Peak memory of this process: allocated on the GPU, or resident on the CPU. None where nobody counts it: Windows."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(FileNotFoundError, StopIteration):  # Linux; there getrusage counts what the parent held, too
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def start(device: str = "auto", dtype: str = "auto", compile: str = "auto", several: bool = False) -> Runtime:
    """
    Decide device, dtype and compilation ("auto" or the user's word) and, if there may be `several`, join the other processes that
    torchrun started. Raises ValueError for a device or dtype that this machine does not have, or processes that must not be.
    """
    rank, local_rank, world_size = (
        int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    if world_size > 1 and not several:  # the others may not even be there: a cluster's job has the variable set as well
        raise ValueError(f"WORLD_SIZE={world_size}: only train.py runs in several processes; start this without torchrun, or unset it")
    chosen, why_device = choose_device(device, local_rank, world_size)
    chosen_dtype, why_dtype = choose_dtype(dtype, chosen)
    graphs = compile == "graphs"
    if graphs and (chosen.type != "cuda" or world_size > 1):
        raise ValueError(f"compile=graphs: CUDA graphs need one process and a CUDA GPU, not {world_size} and {chosen}; use auto")
    chosen_compile, why_compile = choose_compile("on" if graphs else compile, chosen, chosen_dtype)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in float32; generate.prepare_for_decoding takes it back
    elif chosen.type == "cpu":
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        on_gpu = chosen.type == "cuda"
        # hours, because process 0 alone prepares data, writes codes and answers questions, for which the others wait
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=6), device_id=chosen if on_gpu else None)
    processes = f", {world_size} processes" if world_size > 1 else ""
    reasons = (
        f"device {chosen} ({why_device}){processes}; precision {str(chosen_dtype).removeprefix('torch.')} ({why_dtype}); "
        f"compile {'graphs' if graphs else 'on' if chosen_compile else 'off'} ({why_compile})"
    )
    return Runtime(chosen, chosen_dtype, chosen_compile, reasons, rank, world_size, graphs)


def keep_freed_memory() -> None:
    """
    Ask glibc to keep freed blocks of up to 32 MiB, the most it can, for the next tensor. By default it gives them back to the kernel,
    which has to map and clear their pages again: a tenth of the time of a training step (dev/LOG.md). Elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library has no mallopt, Windows no CDLL(None)
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: larger blocks are mapped on their own, and unmapped when freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the end of the heap above which it shrinks


def stop(failed: bool = False) -> None:
    """
    Leave the group of processes. With NCCL not if this process has failed: leaving would wait for the others, and they wait in a
    collective for this one, so it would never come to say why.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def end_process() -> None:
    """
    End this process, whose work is done, if it is one of several. DistributedDataParallel keeps the threads of the group alive beyond
    stop(), and one that lets go of a tensor while the interpreter shuts down aborts the process (dev/LOG.md).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(0)


def choose_device(word: str, local_rank: int = 0, world_size: int = 1) -> tuple[torch.device, str]:
    why = "as asked"
    if word == "auto":
        apple = torch.backends.mps.is_available() and world_size == 1
        word = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
        why = "a GPU found" if word == "cuda" else "Apple GPU" if word == "mps" else "no GPU found"
    try:
        device = torch.device(word)
    except RuntimeError:
        raise ValueError(f"device={word}: not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={word}: this machine or this build of torch has no CUDA GPU; use device=cpu or auto")
        if device.index is not None and world_size > 1:
            raise ValueError(f"device={word}: each of {world_size} processes needs a GPU of its own; use device=cuda")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device={device}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: no Apple GPU here; use device=cpu or auto")
    elif device.type == "mps" and world_size > 1:
        raise ValueError("device=mps: several processes cannot exchange what is on an Apple GPU; use device=cpu, or no torchrun")
    elif device.type not in ("cpu", "mps") or device.index not in (None, 0):
        raise ValueError(f"device={word}: not supported; use auto, cpu, cuda, cuda:N or mps")
    return device, f"{torch.get_num_threads()} threads, {why}" if device.type == "cpu" else why


def choose_dtype(word: str, device: torch.device) -> tuple[torch.dtype, str]:
    if word != "auto":
        if word == "float64" and device.type == "mps":
            raise ValueError("dtype=float64: Apple GPUs have none; use float32 or device=cpu")
        return DTYPES[word], "as asked" if word != "float16" else "as asked; float16 can overflow, bfloat16 cannot"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] >= 8:
            return torch.bfloat16, "the GPU computes in it"
        return torch.float32, "the GPU has no bfloat16; float16 is faster but can overflow, so it has to be asked for"
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16, "the CPU has instructions for it"
    return torch.float32, f"no fast bfloat16 on this {device.type}"


def cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this CPU: AVX-512 BF16 or AMX."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch, so they may go away
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def choose_compile(word: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[bool, str]:
    missing = missing_compiler(device)
    old = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8
    if word == "on" and old:
        raise ValueError("torch.compile has no bfloat16 for this GPU; use dtype=float32 or float16, or compile=off")
    if word == "on" and missing:
        raise ValueError(f"torch.compile needs {missing}, which is not there; install it, or do without compilation")
    if word != "auto":
        return word == "on", "as asked"
    if device.type != "cuda":
        return False, "on a CPU it takes long to start and hardly pays; compile=on asks for it"
    if not sys.platform.startswith("linux"):
        return False, "torch.compile for GPUs needs Linux"
    if missing:
        return False, f"torch.compile needs {missing}, which is not there"
    if torch.cuda.get_device_capability(device)[0] < 7:
        return False, "triton, which compiles for it, needs a GPU of compute capability 7 at least"
    if old:
        return False, "it has no bfloat16 for this GPU"
    return True, "a CUDA GPU under Linux"


def missing_compiler(device: torch.device) -> str | None:
    """
    What torch.compile would miss: the C++ compiler that it starts on a CPU, the C compilers of which triton needs one, or the header
    of Python that their code includes.
    """
    if sys.platform == "win32":
        return None
    if device.type == "cpu":
        names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    else:
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return " or ".join(names)
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"{header} (Debian: python3-dev)"


def seed_everything(*parts: int) -> None:
    """Seed torch's generators with a hash of the parts, e.g. (seed, step, micro-batch): dropout is then a function of them."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


T = TypeVar("T")


def with_progress(items: Iterable[T], total: float, what: str, size: Callable[[T], float] = lambda item: 1) -> Iterator[T]:
    """Yields the items, whose sizes add up to `total`; says every half minute how much is done, and how long the rest will take."""
    began = said = time.perf_counter()
    done = 0.0
    for item in items:
        if (now := time.perf_counter()) - said >= PROGRESS_SECONDS and done:
            said = now
            print(f"{what}: {done / total:.0%}, {duration((now - began) / done * (total - done))} to go", flush=True)
        yield item
        done += size(item)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Lanes:
    """
    Parts of a batch computed side by side on a CPU, each by a thread that has its share of torch's threads. If all of torch's threads
    worked on one part, they would wait for the slowest of them after every operation: a tenth of the time where nothing else runs,
    nearly all of it beside other work (dev/LOG.md). Every lane holds gradients of its own until they are added up.
    """

    def __init__(self, count: int):
        self.count, self.pool = count, ThreadPoolExecutor(count)

    @contextlib.contextmanager
    def shared_threads(self):
        """Inside, every lane has its share of torch's threads, and so has this thread between two calls of backward()."""
        threads = torch.get_num_threads()
        if self.count > 1:
            torch.set_num_threads(max(1, threads // self.count))
        try:
            yield
        finally:
            if self.count > 1:
                torch.set_num_threads(threads)

    def backward(
        self, losses_of: Callable[..., dict[str, torch.Tensor]], parts: list[tuple[torch.Tensor, ...]], shares: list[float],
        parameters: list[torch.nn.Parameter],
    ) -> list[dict[str, torch.Tensor]]:  # fmt: skip
        """
        losses_of(*part) for each part; adds the gradients of the sum of share * `total` to those of the parameters, as backward() in
        each lane would do, but always in the same order.
        """
        threads = torch.get_num_threads()

        def one(part: tuple[torch.Tensor, ...], share: float):
            torch.set_num_threads(threads)  # a new thread would take what was set when it was first used
            losses = losses_of(*part)
            return losses, torch.autograd.grad(share * losses["total"], parameters, allow_unused=True)

        lanes = [self.pool.submit(one, part, share) for part, share in zip(parts, shares)]
        wait(lanes)  # for all of them, whatever went wrong in one
        done = [lane.result() for lane in lanes]
        for parameter, *grads in zip(parameters, *(grads for _, grads in done)):
            for grad in grads:
                if grad is not None:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)  # not `grad`, whose strides are its own
                    parameter.grad.add_(grad)
        return [losses for losses, _ in done]


def checkpoint_activations(model: torch.nn.Module, kinds: tuple[type, ...]) -> None:
    """
    Make the modules of these kinds forget in training what they computed between input and output, and compute it again, with
    the same dropout, when gradients are due (arXiv:1604.06174). For modules that keep nothing of a forward pass: a quantizer, which
    collects statistics, would count twice.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = functools.partial(recomputed, module, module.forward)


def recomputed(module: torch.nn.Module, forward, *args, **kwargs):
    if not (module.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
