"""`bench.py latent`: tokens/s of models that write blocks of tokens from codes, beside a plain model that writes single ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

import checkpoint
import configurator
import generate
import runtime
from benchmarks.sampling import Variant, plainly, sampled
from benchmarks.shapes import STDLIB
from runs import markdown_table


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
        configurator.at_least_one(self, "tokens", "batch", "repeats", "threads")


def latent_models(config: LatentBench) -> list[tuple[str, torch.nn.Module, list[int], int | None]]:
    """
    Name, model, prompt and, of runs on pairs, the end of an answer: first the baseline's, then those of the models over codes.
    Raises ValueError for runs of another kind.
    """
    found, prompt = [], list(range(8))
    runtime.seed_everything(config.seed)
    for run, is_baseline in ((config.baseline, True), (config.run, False)):
        if run is not None:
            model, text, _ = checkpoint.load_run(run, "best")
            if model.writes_blocks == is_baseline or model.reconstructs:
                kinds = "baseline=... takes a plain model, run=... one over codes"
                raise ValueError(f"{'baseline' if is_baseline else 'run'}={run}: the wrong kind of model; {kinds}")
            separator = checkpoint.separator(run)
            end = None if separator is None else text.eos
            found.append((run, model, text.encode(config.prompt) + ([] if end is None else [separator]), end))
        elif is_baseline:
            shape = checkpoint.CONFIGS["decoder_only"](**STDLIB["decoder_only"])
            found.append(("baseline", checkpoint.build("decoder_only", shape), prompt, None))
        else:
            for S in (4, 8):
                autoencoder = checkpoint.build("autoencoder", checkpoint.CONFIGS["autoencoder"](latent_factor=S))
                shape = checkpoint.CONFIGS["rq_transformer"]
                model = checkpoint.build("rq_transformer", shape().fitted_to(autoencoder))
                model.attach(autoencoder)
                found.append((f"RQ-transformer, S={S}", model, prompt, None))
                model = checkpoint.build("rq_transformer", shape(autoencoder=None, latent_factor=S))
                found.append((f"the same, codes are the tokens, S={S}", model, prompt, None))
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
    variants, batches = [], sorted({1, config.batch})
    for name, model, prompt, end in latent_models(config):
        model.to(machine.device, machine.weight_dtype).eval()
        generate.prepare_for_decoding(model)
        print(f"{name}: {model.get_num_params():,} parameters")
        for batch in batches:
            work = plainly(model, [prompt], sampling, batch) if end is None else answering(model, prompt, end, sampling, batch)
            variants.append(Variant(f"{name}, batch {batch}", work, batch))
    with machine.autocast():
        found = sampled(variants, config.tokens, config.repeats)
    plain = dict(zip(batches, (row.tokens_per_second for row in found)))  # the baseline's come first
    length = f"{config.tokens} tokens a text" if end is None else "whole answers"
    print(f"{length}, temperature {config.temperature:g}; {machine.reasons}")
    rows, lines = [], []
    for row, (*_, batch) in zip(found, variants):
        values = {"variant": row.variant, "batch": batch, "tokens_per_second": row.tokens_per_second,
                  "tokens_per_step": row.tokens_per_step, "ratio": row.tokens_per_second / plain[batch]}  # fmt: skip
        rows.append(values | {"new_tokens": config.tokens})
        lines.append([row.variant, f"{row.tokens_per_second:.1f}", f"{values['ratio']:.2f}", f"{row.tokens_per_step:.2f}"])
    print("\n" + markdown_table(["variant", "tokens/s", "x plain cached", "tokens/step"], lines))
    return rows
