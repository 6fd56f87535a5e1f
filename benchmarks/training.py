"""
`bench.py train`: tokens/s of whole optimizer steps of our models and of a nanoGPT's, their share of what the machine's matrix
products reach, and peak memory.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import configurator
import runtime
from benchmarks.shapes import PUBLISHED, STDLIB
from benchmarks.timing import in_turns, rate
from runs import markdown_table
from trainer import compiled, lanes_that_pay, own_gradients

SIZES = {  # vocabulary, tokens of a sequence, sequences of a step, shapes of the models
    "published": (50257, 200, 8, PUBLISHED),
    "stdlib": (256, 256, 16, STDLIB),
}
THEIRS = "nanogpt"  # name in `models` of what compare_with brings


@dataclass(frozen=True)
class TrainBench:
    size: Literal["published", "stdlib"] = "published"  # 16 M parameters, vocabulary 50,257, 8 x 200; or 1 M, 256, 16 x 256
    batch: int | None = None  # sequences of a step, if others than that
    models: tuple[str, ...] = (THEIRS, "encoder_decoder", "decoder_only")  # in this order; nanogpt only with compare_with
    micro_batch: int | None = None  # sequences of a step at a time; none: all of them
    their_micro_batch: int | None = None  # the same of nanogpt; none: as micro_batch
    compare_with: str | None = None  # path to a nanoGPT's model.py, whose GPT gets the shape of our decoder_only
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of matrix products
    compile: tuple[str, ...] = ("off", "on")  # torch.compile
    lanes: tuple[int, ...] = ()  # parts of a batch at once on a CPU, of our models not compiled; left out: as many as train.py takes
    steps: int = 2  # in a repeat
    repeats: int = 5  # of each variant
    memory: bool = False  # also the peak memory of each variant, alone in another process
    quick: bool = False  # 1 step, 1 repeat, the first of dtypes, not compiled
    threads: int | None = None  # of the CPU; none: as many as torch takes
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    seed: int = 1337  # of weights and tokens

    def __post_init__(self):
        configurator.at_least_one(self, "batch", "micro_batch", "their_micro_batch", "steps", "repeats", "threads")
        if any(count < 1 for count in self.lanes):
            raise ValueError(f"lanes={','.join(map(str, self.lanes))}: at least 1 is needed")
        together = min(self.micro_batch or self.sequences, self.sequences)
        if any(count > together for count in self.lanes):
            raise ValueError(f"lanes={','.join(map(str, self.lanes))}: a lane needs one of the {together} sequences at a time, at least")
        for key, known in (("models", (THEIRS, *PUBLISHED)), ("dtypes", ("float32", "bfloat16")), ("compile", ("off", "on", "graphs"))):
            for word in getattr(self, key):
                if word not in known:
                    raise ValueError(f"{key}={word}: {configurator.choice_text(word, known)} was expected")
        if not (self.measured and self.dtypes and self.compile):
            raise ValueError("nothing to measure: models, dtypes and compile need a word each, and models=nanogpt compare_with")

    @property
    def sequences(self) -> int:
        return self.batch or SIZES[self.size][2]

    @property
    def measured(self) -> list[str]:
        return [name for name in self.models if name != THEIRS or self.compare_with]


def their_model(path: Path, **shape) -> torch.nn.Module:
    """GPT of a nanoGPT's model.py. Raises FileNotFoundError, or ValueError where the file has no such class."""
    if not path.is_file():
        raise FileNotFoundError(f"compare_with={path}: there is no such file; give the path of a nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location(THEIRS, path)
    module = sys.modules[THEIRS] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise ValueError(f"compare_with={path} has no classes GPT and GPTConfig; give the path of a nanoGPT's model.py")
    with contextlib.redirect_stdout(sys.stderr):  # it says how many parameters it has
        return module.GPT(module.GPTConfig(dropout=0.0, bias=False, **shape))


def optimizer_steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, machine: runtime.Runtime, size: int, lanes: int
) -> Callable[[int], int]:
    """Work for in_turns: so many optimizer steps on tokens (B, T + 1), `size` sequences at a time; how many tokens they learn from."""
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    parameters, side_by_side = list(model.parameters()), runtime.Lanes(lanes)

    def losses(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        with machine.autocast():
            loss = model(x, y)[1]
        return loss if isinstance(loss, dict) else {"total": loss}  # theirs comes without a name

    def work(steps: int) -> int:
        with side_by_side.shared_threads():
            own_gradients(parameters if machine.graphs else ())
            for _ in range(steps):
                for some_x, some_y in zip(x.split(size), y.split(size)):
                    if lanes == 1:
                        (losses(some_x, some_y)["total"] * (len(some_x) / len(x))).backward()
                    else:
                        parts = list(zip(some_x.tensor_split(lanes), some_y.tensor_split(lanes)))
                        side_by_side.backward(losses, parts, [len(part) / len(x) for part, _ in parts], parameters)
                optimizer.step()
                optimizer.zero_grad(set_to_none=not machine.graphs)
            machine.wait()
        return steps * x.numel()

    return work


def matrix_peak(machine: runtime.Runtime, n: int) -> float:
    """Floating-point operations per second of a product of two n x n matrices, the best of five."""
    a = torch.randn(n, n, device=machine.device).to(machine.dtype)

    def work(times: int) -> None:
        for _ in range(times):
            a @ a
        machine.wait()

    return 2 * n**3 / min(seconds for seconds, _ in in_turns({"": work}, 1, 5, warm_up=1)[""])


def bench_train(config: TrainBench) -> list[dict]:
    base = runtime.start(config.device, "float32", "graphs" if "graphs" in config.compile else "off")
    torch._dynamo.config.recompile_limit = 64  # of all variants together, as their code is the same
    vocab_size, block_size, _, shapes = SIZES[config.size]
    runtime.seed_everything(config.seed)
    tokens = torch.randint(vocab_size, (config.sequences, block_size + 1), device=base.device)
    machines = {dtype: dataclasses.replace(base, dtype=runtime.DTYPES[dtype]) for dtype in config.dtypes}
    works, chosen = {}, {}
    for name in config.measured:
        kind = "decoder_only" if name == THEIRS else name
        shape = dict(vocab_size=vocab_size, block_size=block_size, **shapes[kind])
        model = checkpoint.build(kind, checkpoint.CONFIGS[kind](**shape))
        flops = model.flops_per_token()  # theirs is of the same shape
        if name == THEIRS:
            model = their_model(Path(config.compare_with), **shape)
        model.to(base.device).train()
        # one model for all its variants: how fast it trains does not depend on what it has learned
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=base.device.type in ("cuda", "cpu"))
        size = (config.their_micro_batch if name == THEIRS else None) or config.micro_batch or len(tokens)
        several = (1,) if name == THEIRS or base.device.type != "cpu" else config.lanes or (lanes_that_pay(model, size),)
        for dtype, compile in itertools.product(config.dtypes, config.compile):
            for lanes in several if compile == "off" else (1,):
                machine = dataclasses.replace(machines[dtype], compile=compile != "off", graphs=compile == "graphs")
                called = compiled(model, machine) if machine.compile else model
                how = {"off": "", "on": " compiled", "graphs": " graphs"}[compile] + (f", {lanes} lanes" if lanes > 1 else "")
                variant = f"{name} {dtype}{how}{f', {size} at a time' if size < len(tokens) else ''}"
                works[variant] = optimizer_steps(called, optimizer, tokens, machine, size, lanes)
                chosen[variant] = dict(models=(name,), dtypes=(dtype,), compile=(compile,), lanes=(lanes,)), flops
    timed = in_turns(works, config.steps, config.repeats, warm_up=2)
    alone = base.peak_memory_bytes() if len(works) == 1 else None  # before matrix_peak adds to it
    peaks = {dtype: matrix_peak(machine, 2048 if base.device.type == "cpu" else 8192) for dtype, machine in machines.items()}

    print(f"{config.size} size, {len(tokens)} x {block_size} tokens a step; {base.reasons.split(';')[0]}; matrix peak", end=" ")
    print(", ".join(f"{dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in peaks.items()))
    rows, lines = [], []
    for variant, (only, flops) in chosen.items():
        speed, peak = rate(timed[variant]), peaks[only["dtypes"][0]]
        memory = memory_alone(config, **only) if config.memory else alone
        rows.append(
            {"variant": variant, "tokens_per_second": speed, "ratio": speed / rate(next(iter(timed.values()))),
             "flops_per_second": speed * flops, "share_of_peak": speed * flops / peak, "peak_memory_bytes": memory}
        )  # fmt: skip
        row, shown = rows[-1], "" if memory is None else f"{memory / 2**20:,.0f}"
        lines.append([variant, f"{speed:,.0f}", f"{row['ratio']:.2f}", f"{row['flops_per_second'] / 1e12:.3g}",
                      f"{row['share_of_peak']:.1%}", shown])  # fmt: skip
    print("\n" + markdown_table(["variant", "tokens/s", "x first", "TFLOP/s", "of peak", "peak memory, MiB"], lines))
    return rows


def memory_alone(config: TrainBench, **only: tuple) -> int:
    """Peak memory, bytes, of one variant: of a process that does nothing else, as a process only knows the highest it ever had."""
    alone = dataclasses.replace(config, **only, steps=1, repeats=1, memory=False)
    flags = [f"--{key}={configurator.as_text(value)}" for key, value in configurator.to_dict(alone).items()]
    script = Path(__file__).parents[1] / "bench.py"
    done = subprocess.run([sys.executable, script, "train", *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {only} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])["rows"][0]["peak_memory_bytes"]
