"""
How fast it is: variants of one job side by side in one run, in turns (A B C, C B A, ...), and the median of each.

    python bench.py sample                          # the two published sizes, 15.8 M and 16.0 M, random weights
    python bench.py sample --run=out/quickstart     # a trained model: only there does tokens/step mean anything
    python bench.py sample --run=out/quickstart --val_prompts=64 --temperature=0.8      # of many prompts
    python bench.py sample --quick                  # less of everything, under a minute
    python bench.py latent --run=out/latent/rq_transformer_stdlib --baseline=out/stdlib/baseline
                                                    # blocks of tokens from codes, and single tokens from a plain model
    python bench.py latent --run=out/latent/numbers_8 --baseline=out/latent/numbers_baseline --prompt=382751 --temperature=0
    python bench.py train --size=stdlib             # optimizer steps of our models
    python bench.py train --compare_with=../nanoGPT/model.py --memory       # beside those of a nanoGPT
    python bench.py data --input=wikipedia.txt.xz   # text to tokens, and tokens to batches
    python bench.py compare before.txt after.txt    # two saved outputs, row by row

Prints a table, then one line of JSON.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

import checkpoint
import configurator
import dataloader
import generate
import lookahead
import runtime
import stepper
import tokenizer
from data import corpus

T = TypeVar("T")


def in_turns(works: dict[str, Callable[[int], T]], amount: int, repeats: int, warm_up: int) -> dict[str, list[tuple[float, T]]]:
    """(seconds, result) of each work(amount), `repeats` times, every other time in reverse, after a work(warm_up) of each."""
    timed = {name: [] for name in works}
    for work in works.values():
        work(warm_up)
    for repeat in range(repeats):
        for name in list(works)[:: 1 if repeat % 2 == 0 else -1]:
            began = time.perf_counter()
            result = works[name](amount)
            timed[name].append((time.perf_counter() - began, result))
    return timed


def rate(runs: list[tuple[float, T]]) -> float:
    """Median of the results per second."""
    return statistics.median(amount / seconds for seconds, amount in runs)


def at_least_one(config, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) is not None and getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)}: at least 1 is needed")


# ----------------------------------------------------------------------------------------------------------------------
# sample


class Variant(NamedTuple):
    name: str
    work: Callable[[int], tuple[int, int]]  # asked for so many tokens a text, returns tokens made and forward passes
    model: torch.nn.Module


class Row(NamedTuple):
    """Medians over the repeats."""

    variant: str
    tokens_per_second: float
    tokens_per_step: float  # of one text
    gigabytes_per_second: float  # weights read: all of them in each forward pass


def sampled(variants: list[Variant], tokens: int, repeats: int, texts: dict[str, int]) -> list[Row]:
    """Rows of all variants, timed in turns; `texts` says how many a variant samples together, if not one."""
    timed = in_turns({variant.name: variant.work for variant in variants}, tokens, repeats, warm_up=4)
    rows = []
    for name, _, model in variants:
        size, together = sum(p.numel() * p.element_size() for p in model.parameters()), texts.get(name, 1)
        columns = [(made / t, made / steps / together, steps * size / t / 1e9) for t, (made, steps) in timed[name]]
        rows.append(Row(name, *map(statistics.median, zip(*columns))))
    return rows


PUBLISHED = {  # config/wikipedia/encdec_plain.py and baseline.py
    "encoder_decoder": dict(n_encoder_layer=13, n_decoder_layer=13, n_head=5, n_cross_head=10, n_embd=150),
    "decoder_only": dict(n_layer=26, n_head=10, n_embd=160),
}


@dataclass(frozen=True)
class SampleBench:
    run: str | None = None  # run directory of a trained model; none: both models of the published sizes, random weights
    prompt: str = "def "  # text to continue, where there is a run
    val_prompts: int = 0  # continue so many pieces of the run's validation data instead, half a context each, evenly spaced
    tokens: int = 190  # new tokens of a text
    temperature: float = 0.0  # 0 is greedy
    batch: int = 8  # texts of the batched variant
    repeats: int = 3  # of each variant
    quick: bool = False  # 24 tokens, 1 repeat
    threads: int | None = None  # of the CPU; none: as many as torch takes
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of matrix products
    seed: int = 1337  # of random weights and of the noise

    def __post_init__(self):
        at_least_one(self, "tokens", "batch", "repeats", "threads")
        if self.val_prompts and (self.val_prompts < 0 or self.run is None):
            raise ValueError(f"val_prompts={self.val_prompts}: give a positive number, and run=... with validation data")


def plainly(
    model: torch.nn.Module, prompts: list[list[int]], sampling: generate.Sampling, texts: int = 1, **how
) -> Callable[[int], tuple[int, int]]:
    """The work of a Variant: so many texts of each prompt, sampled together."""

    def work(tokens: int) -> tuple[int, int]:
        steps = 0
        for prompt in prompts:
            samples = [generate.Continuation(prompt, tokens) for _ in range(texts)]
            steps += sum(1 for _ in generate.sample_together(model, samples, sampling, **how))
        return len(prompts) * texts * tokens, steps

    return work


def validation_prompts(run: str, count: int, block_size: int) -> list[list[int]]:
    """So many pieces of half a context, evenly spaced over the validation data of a run."""
    folder = dataloader.resolve(checkpoint.read_json(Path(run) / "config.json")["train"]["dataset"])
    val, length = dataloader.open_data(folder, block_size).val, block_size // 2
    starts = [i * (len(val) - length) // count for i in range(count)]
    return [val[start : start + length].tolist() for start in starts]


def sample_variants(model: torch.nn.Module, prompts: list[list[int]], config: SampleBench) -> list[Variant]:
    """All the ways of sampling from the model, and Hugging Face's where it has the same shape."""
    sampling = generate.Sampling(config.temperature, seed=config.seed)

    def plain(texts: int = 1, **how) -> Callable:
        return plainly(model, prompts, sampling, texts, **how)

    def ahead(setting: lookahead.Setting) -> Callable:
        def work(tokens: int) -> tuple[int, int]:
            steps = 0
            for prompt in prompts:
                run = lookahead.Lookahead(model, generate.Continuation(prompt, tokens), sampling, setting)
                while not run.sample.finished:
                    run.step()
                steps += run.steps
            return len(prompts) * tokens, steps

        return work

    head = getattr(model.config, "latent_factor", 0) > 0  # a compression head allows neither lookahead nor a static cache
    variants = [
        Variant("plain cached", plain(), model),
        Variant("plain uncached", plain(use_cache=False), model),
        Variant(f"plain cached, batch {config.batch}", plain(config.batch), model),
        *(Variant(f"lookahead {setting}", ahead(setting), model) for setting in (lookahead.AUTO if not head else ())),
    ]
    if stepper.can_step(model):
        variants.append(Variant("plain cached, int8", plain(int8=True), model))
    if next(model.parameters()).is_cuda and not head:
        variants.append(Variant("plain cached, compiled", plain(compile="inductor"), model))
    if hasattr(model.config, "n_layer") and importlib.util.find_spec("transformers"):
        variants.append(hugging_face(model, prompts[0], config))
    return variants


def hugging_face(model: torch.nn.Module, prompt: list[int], config: SampleBench) -> Variant:
    """`generate` of transformers, with its cache, from a GPT-2 of the shape of our decoder-only model, random weights."""
    import transformers

    shape = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer,
            n_head=shape.n_head, bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    weight = next(model.parameters())
    theirs.to(weight.device, weight.dtype)
    how = dict(do_sample=True, temperature=config.temperature, top_k=0) if config.temperature > 0 else dict(do_sample=False)
    idx = torch.tensor([prompt], device=weight.device)

    def work(tokens: int) -> tuple[int, int]:
        tokens = min(tokens, shape.block_size - len(prompt))  # it cannot go beyond its context
        with torch.inference_mode():
            out = theirs.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **how
            )
        return out.size(1) - len(prompt), tokens

    return Variant(f"Hugging Face {transformers.__version__}", work, theirs)


def bench_sample(config: SampleBench) -> list[dict]:
    machine = runtime.start(config.device, config.dtype, "off")
    if config.run is None:
        models, prompts = {}, [list(range(10))]
        for name, shape in PUBLISHED.items():
            torch.manual_seed(config.seed)
            models[name] = checkpoint.build(name, checkpoint.CONFIGS[name](vocab_size=50257, block_size=200, **shape))
    else:
        model, text, _ = checkpoint.load_run(config.run, "best", machine.device)
        models = {Path(config.run).name: model}
        prompts = [text.encode(config.prompt)]
        if config.val_prompts:
            prompts = validation_prompts(config.run, config.val_prompts, model.config.block_size)
    tokens, repeats = (min(config.tokens, 24), 1) if config.quick else (config.tokens, config.repeats)
    rows = []
    for name, model in models.items():
        model.to(machine.device, machine.weight_dtype).eval()
        generate.lay_out_for_decoding(model)
        variants = sample_variants(model, prompts, config)
        with machine.autocast():
            found = sampled(variants, tokens, repeats, {f"plain cached, batch {config.batch}": config.batch})
        print(
            f"\n{name}, {model.get_num_params():,} parameters, {tokens} tokens, temperature {config.temperature:g}; {machine.reasons}"
        )
        print(f"\n{'| variant':32} | tokens/s | x plain cached | tokens/step | GB/s of weights |")
        print(f"| {'-' * 30} | -------: | -------------: | ----------: | --------------: |")
        for row in found:
            ratio = row.tokens_per_second / found[0].tokens_per_second
            print(
                f"| {row.variant:30} | {row.tokens_per_second:8.1f} | {ratio:14.2f} | {row.tokens_per_step:11.2f} "
                f"| {row.gigabytes_per_second:15.2f} |"
            )
            rows.append({"model": name, "new_tokens": tokens} | row._asdict() | {"ratio": ratio})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# latent

STDLIB_BASELINE = dict(n_layer=4, n_head=4, n_embd=148)  # config/stdlib/baseline.py


@dataclass(frozen=True)
class LatentBench:
    run: str | None = None  # run directory of a model over codes; none: the default sizes for S = 4 and 8, random weights
    baseline: str | None = None  # run directory of the plain model beside it; none: config/stdlib/baseline.py, random weights
    prompt: str = "def "  # text to continue, where there is a run; a question, where it is one on pairs
    tokens: int = 192  # new tokens of a text
    temperature: float = 0.8  # of codes and of the baseline's tokens; 0 is greedy
    batch: int = 32  # texts of the batched variants
    repeats: int = 3  # of each variant
    quick: bool = False  # 24 tokens, 1 repeat
    threads: int | None = None  # of the CPU; none: as many as torch takes
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of matrix products
    seed: int = 1337  # of random weights and of the noise

    def __post_init__(self):
        at_least_one(self, "tokens", "batch", "repeats", "threads")


def latent_models(config: LatentBench) -> list[tuple[str, torch.nn.Module, list[int], int | None]]:
    """
    Name, model, prompt and, of runs on pairs, the end of an answer: first the baseline's, then those of the models over codes.
    Raises ValueError for runs of another kind.
    """
    found, prompt = [], list(range(8))
    torch.manual_seed(config.seed)
    for run, is_baseline in ((config.baseline, True), (config.run, False)):
        if run is not None:
            model, text, _ = checkpoint.load_run(run, "best")
            if generate.writes_blocks(model) == is_baseline or getattr(model, "predicts", "next") == "itself":
                kinds = "baseline=... takes a plain model, run=... one over codes"
                raise ValueError(f"{'baseline' if is_baseline else 'run'}={run}: the wrong kind of model; {kinds}")
            separator = checkpoint.read_json(Path(run) / "config.json").get("separator")
            end = None if separator is None else text.eos
            found.append((run, model, text.encode(config.prompt) + ([] if end is None else [separator]), end))
        elif is_baseline:
            shape = checkpoint.CONFIGS["decoder_only"](**STDLIB_BASELINE)
            found.append(("baseline", checkpoint.build("decoder_only", shape), prompt, None))
        else:
            for S in (4, 8):
                autoencoder = checkpoint.build("autoencoder", checkpoint.CONFIGS["autoencoder"](latent_factor=S))
                shape = checkpoint.CONFIGS["rq_transformer"]().fitted_to(autoencoder)
                found.append((f"RQ-transformer, S={S}", checkpoint.build("rq_transformer", shape), prompt, None))
                found[-1][1].attach(autoencoder)
    if len({end for *_, end in found}) > 1:
        raise ValueError(f"run={config.run}, baseline={config.baseline}: only one is on pairs; give two runs on the same data")
    return found


def answering(
    model: torch.nn.Module, question: list[int], end: int, sampling: generate.Sampling, texts: int
) -> Callable[[int], tuple[int, int]]:
    """The work of a Variant: the whole answer, however long, so many times together."""

    def work(tokens: int) -> tuple[int, int]:
        samples = [generate.Continuation(question, model.config.block_size, eos=end) for _ in range(texts)]
        steps = sum(1 for _ in generate.sample_together(model, samples, sampling))
        return sum(len(sample.output) + (sample.reason == "eos") for sample in samples), steps

    return work


def bench_latent(config: LatentBench) -> list[dict]:
    machine = runtime.start(config.device, config.dtype, "off")
    sampling = generate.Sampling(config.temperature, seed=config.seed)
    tokens, repeats = (min(config.tokens, 24), 1) if config.quick else (config.tokens, config.repeats)
    variants, texts, batches = [], {}, sorted({1, config.batch})
    for name, model, prompt, end in latent_models(config):
        model.to(machine.device, machine.weight_dtype).eval()
        generate.lay_out_for_decoding(model)
        print(f"{name}: {model.get_num_params():,} parameters")
        for batch in batches:
            work = plainly(model, [prompt], sampling, batch) if end is None else answering(model, prompt, end, sampling, batch)
            variants.append(Variant(f"{name}, batch {batch}", work, model))
            texts[variants[-1].name] = batch
    with machine.autocast():
        found = sampled(variants, tokens, repeats, texts)
    plain = {texts[row.variant]: row.tokens_per_second for row in found[: len(batches)]}
    length = f"{tokens} tokens a text" if end is None else "whole answers"
    print(f"{length}, temperature {config.temperature:g}; {machine.reasons}")
    print(f"\n{'| variant':42} | tokens/s | x plain cached | tokens/step |")
    print(f"| {'-' * 40} | -------: | -------------: | ----------: |")
    rows = []
    for row in found:
        values = {"variant": row.variant, "batch": texts[row.variant], "tokens_per_second": row.tokens_per_second,
                  "tokens_per_step": row.tokens_per_step, "ratio": row.tokens_per_second / plain[texts[row.variant]]}  # fmt: skip
        print(f"| {row.variant:40} | {row.tokens_per_second:8.1f} | {values['ratio']:14.2f} | {row.tokens_per_step:11.2f} |")
        rows.append(values | {"new_tokens": tokens})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# train

SIZES = {  # vocabulary, tokens of a sequence, sequences of a step, shapes of the models
    "published": (50257, 200, 8, PUBLISHED),
    "stdlib": (256, 256, 16, {  # config/stdlib/encdec_plain.py and baseline.py
        "encoder_decoder": dict(n_encoder_layer=2, n_decoder_layer=2, n_head=4, n_cross_head=8, n_embd=136),
        "decoder_only": STDLIB_BASELINE,
    }),
}  # fmt: skip
THEIRS = "nanogpt"  # name in `models` of what compare_with brings


@dataclass(frozen=True)
class TrainBench:
    size: Literal["published", "stdlib"] = "published"  # 16 M parameters, vocabulary 50,257, 8 x 200; or 1 M, 256, 16 x 256
    batch: int | None = None  # sequences of a step, if others than that
    models: tuple[str, ...] = (THEIRS, "encoder_decoder", "decoder_only")  # in this order; nanogpt only with compare_with
    compare_with: str | None = None  # path to a nanoGPT's model.py, whose GPT gets the shape of our decoder_only
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of matrix products
    compile: tuple[str, ...] = ("off", "on")  # torch.compile
    steps: int = 2  # in a repeat
    repeats: int = 5  # of each variant
    memory: bool = False  # also the peak memory of each variant, alone in another process
    quick: bool = False  # 1 step, 1 repeat, the first of dtypes, not compiled
    threads: int | None = None  # of the CPU; none: as many as torch takes
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    seed: int = 1337  # of weights and tokens

    def __post_init__(self):
        at_least_one(self, "batch", "steps", "repeats", "threads")
        for key, known in (("models", (THEIRS, *PUBLISHED)), ("dtypes", ("float32", "bfloat16")), ("compile", ("off", "on"))):
            for word in getattr(self, key):
                if word not in known:
                    raise ValueError(f"{key}={word}: {configurator.choice_text(word, known)} was expected")
        if not (self.measured and self.dtypes and self.compile):
            raise ValueError("nothing to measure: models, dtypes and compile need a word each, and models=nanogpt compare_with")

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


def training(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, machine: runtime.Runtime
) -> Callable[[int], int]:
    """Work for in_turns: so many optimizer steps on tokens (B, T + 1), and how many tokens they learn from."""
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def work(steps: int) -> int:
        for _ in range(steps):
            with machine.autocast():
                loss = model(x, y)[1]
            (loss["total"] if isinstance(loss, dict) else loss).backward()  # theirs comes without a name
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
    base = runtime.start(config.device, "float32", "off")
    vocab_size, block_size, batch, shapes = SIZES[config.size]
    steps, repeats, dtypes, compiles = config.steps, config.repeats, config.dtypes, config.compile
    if config.quick:
        steps, repeats, dtypes, compiles = 1, 1, dtypes[:1], ("off",)
    torch.manual_seed(config.seed)
    tokens = torch.randint(vocab_size, (config.batch or batch, block_size + 1), device=base.device)
    machines = {dtype: dataclasses.replace(base, dtype=runtime.DTYPES[dtype]) for dtype in dtypes}
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
        for dtype, compile in itertools.product(dtypes, compiles):
            called = torch.compile(model, dynamic=False) if compile == "on" else model
            variant = f"{name} {dtype}{' compiled' if compile == 'on' else ''}"
            works[variant] = training(called, optimizer, tokens, machines[dtype])
            chosen[variant] = name, dtype, compile, flops
    timed = in_turns(works, steps, repeats, warm_up=2)
    alone = base.peak_memory_bytes() if len(works) == 1 else None  # before matrix_peak adds to it
    peaks = {dtype: matrix_peak(machine, 2048 if base.device.type == "cpu" else 8192) for dtype, machine in machines.items()}

    print(f"{config.size} size, {len(tokens)} x {block_size} tokens a step; {base.reasons.split(';')[0]}; matrix peak", end=" ")
    print(", ".join(f"{dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in peaks.items()))
    print(f"\n{'| variant':44} | tokens/s | x first | TFLOP/s | of peak | peak memory, MiB |")
    print(f"| {'-' * 42} | -------: | ------: | ------: | ------: | ---------------: |")
    rows = []
    for variant, (name, dtype, compile, flops) in chosen.items():
        speed = rate(timed[variant])
        memory = memory_alone(config, name, dtype, compile) if config.memory else alone
        rows.append(
            {"variant": variant, "tokens_per_second": speed, "ratio": speed / rate(next(iter(timed.values()))),
             "flops_per_second": speed * flops, "share_of_peak": speed * flops / peaks[dtype], "peak_memory_bytes": memory}
        )  # fmt: skip
        row, shown = rows[-1], "" if memory is None else f"{memory / 2**20:,.0f}"
        print(
            f"| {variant:42} | {speed:8,.0f} | {row['ratio']:7.2f} | {row['flops_per_second'] / 1e12:7.3g} "
            f"| {row['share_of_peak']:7.1%} | {shown:>16} |"
        )
    return rows


def memory_alone(config: TrainBench, name: str, dtype: str, compile: str) -> int:
    """Peak memory, bytes, of one variant: of a process that does nothing else, as a process only knows the highest it ever had."""
    only = dataclasses.replace(
        config, models=(name,), dtypes=(dtype,), compile=(compile,), steps=1, repeats=1, memory=False, quick=False
    )
    flags = [f"--{key}={configurator.as_text(value)}" for key, value in configurator.to_dict(only).items()]
    done = subprocess.run([sys.executable, __file__, "train", *flags], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} {dtype} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])["rows"][0]["peak_memory_bytes"]


# ----------------------------------------------------------------------------------------------------------------------
# data


@dataclass(frozen=True)
class DataBench:
    input: str | None = None  # a text file or folder, as data/text/prepare.py takes it; none: the sources of Python's library
    megabytes: int = 32  # of text, at most
    tokenizer: str = "gpt2"  # byte, gpt2 or another encoding of tiktoken
    batch: int = 50  # sequences of a batch
    block_size: int = 200  # tokens of a sequence
    batches: int = 200  # in a repeat
    repeats: int = 3  # of each variant
    quick: bool = False  # 2 megabytes, 1 repeat
    threads: int | None = None  # of the tokenizers; none: one a core

    def __post_init__(self):
        at_least_one(self, "megabytes", "batch", "block_size", "batches", "repeats", "threads")


def library_sources() -> Iterator[str]:
    """The source files of Python's standard library, again and again: text that every machine has."""
    for path in itertools.cycle(sorted(Path(os.__file__).parent.glob("*.py"))):
        yield path.read_text(encoding="utf-8")


def bench_data(config: DataBench) -> list[dict]:
    encoder, threads = tokenizer.get(config.tokenizer), config.threads or os.cpu_count() or 1
    megabytes, repeats = (min(config.megabytes, 2), 1) if config.quick else (config.megabytes, config.repeats)
    source = corpus.read_documents(config.input) if config.input else library_sources()
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder, "text.txt"), Path(folder, "set")
        text.write_bytes(tokenizer.to_utf8(corpus.SEPARATOR.join(corpus.take_bytes(source, megabytes * 10**6))))
        documents = list(corpus.read_documents(text))
        size = sum(len(tokenizer.to_utf8(document)) for document in documents)

        def ours(times: int) -> int:
            with contextlib.redirect_stdout(None):  # it says what it has written
                for _ in range(times):
                    corpus.write_dataset(corpus.read_documents(text), encoder, made, 0.1, "bench.py", threads=threads)
            return times * size

        def theirs(times: int) -> int:
            for _ in range(times):
                encoder.encoding.encode_ordinary_batch(documents, num_threads=threads)
            return times * size

        works = {"tiktoken, encode_ordinary_batch": theirs} if hasattr(encoder, "encoding") else {}
        works["data/corpus.py, file to data set"] = ours
        timed = in_turns(works, 1, repeats, warm_up=1)
        data = dataloader.TokenData(made, config.block_size)

        def load(batches: int) -> int:
            for step in range(batches):
                data.gather("train", data.batch_starts(0, step, config.batch))
            return batches

        loading = f"dataloader.py, {config.batch} x {config.block_size}"
        loaded = rate(in_turns({loading: load}, config.batches, repeats, warm_up=1)[loading])

    print(f"{size / 1e6:,.1f} MB of text, {len(documents):,} documents, tokenizer {config.tokenizer}, {threads} threads")
    print(f"\n{'| variant':37} | MB/s | x first | batches/s |")
    print(f"| {'-' * 35} | ---: | ------: | --------: |")
    rows = []
    for name, runs in timed.items():
        row = {"variant": name, "bytes_per_second": rate(runs), "ratio": rate(runs) / rate(next(iter(timed.values())))}
        print(f"| {name:35} | {row['bytes_per_second'] / 1e6:4.1f} | {row['ratio']:7.2f} | {'':9} |")
        rows.append(row)
    print(f"| {loading:35} | {'':4} | {'':7} | {loaded:9,.0f} |")
    return [*rows, {"variant": loading, "batches_per_second": loaded}]


# ----------------------------------------------------------------------------------------------------------------------
# compare


def read_report(path: Path) -> dict:
    """The last line of JSON that a benchmark printed into a file. Raises FileNotFoundError, or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; save what a benchmark prints: python bench.py train > {path}")
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        with contextlib.suppress(ValueError):
            if line.startswith("{") and "rows" in (report := json.loads(line)):
                return report
    raise ValueError(f"{path} holds no line of JSON from bench.py; save all that it prints")


def compare(one: Path, two: Path) -> list[dict]:
    """Print and return the ratio of every speed and memory in two saved outputs, row by row."""
    a, b = read_report(one), read_report(two)
    if a["bench"] != b["bench"]:
        raise ValueError(f"{one} is of bench.py {a['bench']}, {two} of bench.py {b['bench']}; only equals can be compared")
    other = [f"{key} {a.get(key)} -> {b.get(key)}" for key in {**a, **b} if key != "rows" and a.get(key) != b.get(key)]
    print(f"A {one}, B {two}; {'; '.join(other) or 'same settings'}")

    def named(report: dict) -> dict[str, dict]:
        return {" ".join(str(row[key]) for key in ("model", "variant") if key in row): row for row in report["rows"]}

    before, after = named(a), named(b)
    print(f"\n{'| variant':52} | {'quantity':24} | {'A':>12} | {'B':>12} | B / A |")
    print(f"| {'-' * 50} | {'-' * 24} | -----------: | -----------: | ----: |")
    rows = []
    for name in (name for name in before if name in after):
        for key, x in before[name].items():
            y = after[name].get(key)
            if (key.endswith("_per_second") or key == "peak_memory_bytes") and x and y:
                rows.append({"variant": name, "quantity": key, "a": x, "b": y, "ratio": y / x})
                print(f"| {name:50} | {key:24} | {x:12,.4g} | {y:12,.4g} | {y / x:5.2f} |")
    for path, missing in ((one, after.keys() - before.keys()), (two, before.keys() - after.keys())):
        for name in sorted(missing):
            print(f"not in {path}: {name}")
    return rows


# ----------------------------------------------------------------------------------------------------------------------

COMMANDS = {  # word -> its keys, and what takes them and returns rows
    "sample": (SampleBench, bench_sample),
    "latent": (LatentBench, bench_latent),
    "train": (TrainBench, bench_train),
    "data": (DataBench, bench_data),
}
POSITIONAL = f"{'|'.join(COMMANDS)}|compare FILE_A FILE_B ..."


def main(argv: list[str] | None = None) -> list[dict]:
    """Run one benchmark; returns its rows."""
    argv = ["compare" if word == "--compare" else word for word in (sys.argv[1:] if argv is None else argv)]
    word = next((word for word in argv if not word.startswith("-")), None)
    sections = [COMMANDS[word][0]] if word in COMMANDS else [section for section, _ in COMMANDS.values()]
    settings = configurator.configure(argv, sections, description=__doc__, positional=POSITIONAL)
    if word == "compare":
        if len(settings.words) != 3:
            raise ValueError("compare takes two files: python bench.py compare FILE_A FILE_B")
        rows = compare(*map(Path, settings.words[1:]))
        print("\n" + json.dumps({"bench": word, "files": settings.words[1:], "rows": rows}))
        return rows
    if word not in COMMANDS:
        known = [*COMMANDS, "compare"]
        raise ValueError(f"unknown benchmark {word!r}: {configurator.choice_text(word, known)} was expected")
    if len(settings.words) > 1:
        raise ValueError(f"unexpected word {settings.words[1]!r}: values are written --key=value")
    config = settings.sections[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(config.threads or threads)
        rows = COMMANDS[word][1](config)
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "platform": platform.platform()}
    finally:
        torch.set_num_threads(threads)
    print()
    print(json.dumps({"bench": word} | configurator.to_dict(config) | machine | {"rows": rows}))
    return rows


if __name__ == "__main__":
    with configurator.exit_on_user_error():
        main()
