"""
How fast it is: variants of one job side by side in one run, in turns (A B C, C B A, ...), and the median of each.

    python bench.py sample                          # the two published sizes, 15.8 M and 16.0 M, random weights
    python bench.py sample --run=out/quickstart     # a trained model: only there does tokens/step mean anything
    python bench.py sample --quick                  # less of everything, under a minute
    python bench.py latent --run=out/latent/rq_transformer_stdlib --baseline=out/stdlib/baseline
                                                    # blocks of tokens from codes, and single tokens from a plain model

Prints a table, then one line of JSON.
"""

import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import checkpoint
import configurator
import generate
import lookahead
import runtime
import stepper


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


def in_turns(variants: list[Variant], tokens: int, repeats: int, texts: dict[str, int]) -> list[Row]:
    """Time all variants `repeats` times, every other time in reverse, after a short warm-up."""
    timed = {variant.name: [] for variant in variants}
    for variant in variants:
        variant.work(4)
    for repeat in range(repeats):
        for variant in variants[:: 1 if repeat % 2 == 0 else -1]:
            began = time.perf_counter()
            made, steps = variant.work(tokens)
            seconds = time.perf_counter() - began
            size = sum(p.numel() * p.element_size() for p in variant.model.parameters())
            timed[variant.name].append(
                (made / seconds, made / steps / texts.get(variant.name, 1), steps * size / seconds / 1e9)
            )
    return [Row(name, *(statistics.median(column) for column in zip(*runs))) for name, runs in timed.items()]


# ----------------------------------------------------------------------------------------------------------------------
# sample

PUBLISHED = {  # config/wikipedia/encdec_plain.py and baseline.py
    "encoder_decoder": dict(n_encoder_layer=13, n_decoder_layer=13, n_head=5, n_cross_head=10, n_embd=150),
    "decoder_only": dict(n_layer=26, n_head=10, n_embd=160),
}


@dataclass(frozen=True)
class SampleBench:
    run: str | None = None  # run directory of a trained model; none: both models of the published sizes, random weights
    prompt: str = "def "  # text to continue, where there is a run
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
        for key in ("tokens", "batch", "repeats") + (("threads",) if self.threads is not None else ()):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: at least 1 is needed")


def plainly(
    model: torch.nn.Module, prompt: list[int], sampling: generate.Sampling, texts: int = 1, **how
) -> Callable[[int], tuple[int, int]]:
    """The work of a Variant: so many texts, sampled together."""

    def work(tokens: int) -> tuple[int, int]:
        samples = [generate.Continuation(prompt, tokens) for _ in range(texts)]
        steps = sum(1 for _ in generate.sample_together(model, samples, sampling, **how))
        return texts * tokens, steps

    return work


def sample_variants(model: torch.nn.Module, prompt: list[int], config: SampleBench) -> list[Variant]:
    """All the ways of sampling from the model, and Hugging Face's where it has the same shape."""
    sampling = generate.Sampling(config.temperature, seed=config.seed)

    def plain(texts: int = 1, **how) -> Callable:
        return plainly(model, prompt, sampling, texts, **how)

    def ahead(setting: lookahead.Setting) -> Callable:
        def work(tokens: int) -> tuple[int, int]:
            run = lookahead.Lookahead(model, generate.Continuation(prompt, tokens), sampling, setting)
            while not run.sample.finished:
                run.step()
            return tokens, run.steps

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
        variants.append(hugging_face(model, prompt, config))
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
        models, prompt = {}, list(range(10))
        for name, shape in PUBLISHED.items():
            torch.manual_seed(config.seed)
            models[name] = checkpoint.build(name, checkpoint.CONFIGS[name](vocab_size=50257, block_size=200, **shape))
    else:
        model, text, _ = checkpoint.load_run(config.run, "best", machine.device)
        models = {Path(config.run).name: model}
        prompt = text.encode(config.prompt)
    tokens, repeats = (min(config.tokens, 24), 1) if config.quick else (config.tokens, config.repeats)
    rows = []
    for name, model in models.items():
        model.to(machine.device, machine.weight_dtype).eval()
        generate.lay_out_for_decoding(model)
        variants = sample_variants(model, prompt, config)
        with machine.autocast():
            found = in_turns(variants, tokens, repeats, {f"plain cached, batch {config.batch}": config.batch})
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
    prompt: str = "def "  # text to continue, where there is a run
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
        SampleBench.__post_init__(self)


def latent_models(config: LatentBench) -> list[tuple[str, torch.nn.Module, list[int]]]:
    """Name, model and prompt of the baseline, first, and of the models over codes. Raises ValueError for runs of another kind."""
    found, prompt = [], list(range(8))
    torch.manual_seed(config.seed)
    for run, is_baseline in ((config.baseline, True), (config.run, False)):
        if run is not None:
            model, text, _ = checkpoint.load_run(run, "best")
            if (getattr(model, "autoencoder", None) is None) != is_baseline:
                kinds = "baseline=... takes a plain model, run=... one over codes"
                raise ValueError(f"{'baseline' if is_baseline else 'run'}={run}: the wrong kind of model; {kinds}")
            found.append((run, model, text.encode(config.prompt)))
        elif is_baseline:
            shape = checkpoint.CONFIGS["decoder_only"](**STDLIB_BASELINE)
            found.append(("baseline", checkpoint.build("decoder_only", shape), prompt))
        else:
            for S in (4, 8):
                autoencoder = checkpoint.build("autoencoder", checkpoint.CONFIGS["autoencoder"](latent_factor=S))
                shape = checkpoint.CONFIGS["rq_transformer"]().fitted_to(autoencoder)
                found.append((f"RQ-transformer, S={S}", checkpoint.build("rq_transformer", shape), prompt))
                found[-1][1].attach(autoencoder)
    return found


def bench_latent(config: LatentBench) -> list[dict]:
    machine = runtime.start(config.device, config.dtype, "off")
    sampling = generate.Sampling(config.temperature, seed=config.seed)
    tokens, repeats = (min(config.tokens, 24), 1) if config.quick else (config.tokens, config.repeats)
    variants, texts, batches = [], {}, sorted({1, config.batch})
    for name, model, prompt in latent_models(config):
        model.to(machine.device, machine.weight_dtype).eval()
        generate.lay_out_for_decoding(model)
        print(f"{name}: {model.get_num_params():,} parameters")
        for batch in batches:
            variants.append(Variant(f"{name}, batch {batch}", plainly(model, prompt, sampling, batch), model))
            texts[variants[-1].name] = batch
    with machine.autocast():
        found = in_turns(variants, tokens, repeats, texts)
    plain = {texts[row.variant]: row.tokens_per_second for row in found[: len(batches)]}
    print(f"{tokens} tokens a text, temperature {config.temperature:g}; {machine.reasons}")
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

COMMANDS = {  # word -> its keys, and what takes them and returns rows
    "sample": (SampleBench, bench_sample),
    "latent": (LatentBench, bench_latent),
}


def main(argv: list[str] | None = None) -> list[dict]:
    """Run one benchmark; returns its rows."""
    argv = sys.argv[1:] if argv is None else argv
    word = next((word for word in argv if not word.startswith("-")), None)
    sections = [COMMANDS[word][0]] if word in COMMANDS else [section for section, _ in COMMANDS.values()]
    settings = configurator.configure(argv, sections, description=__doc__, positional="|".join(COMMANDS))
    if word not in COMMANDS:
        raise ValueError(f"unknown benchmark {word!r}: {configurator.choice_text(word, COMMANDS)} was expected")
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
