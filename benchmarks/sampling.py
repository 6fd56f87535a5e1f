"""
`bench.py sample`: tokens/s of all the ways of sampling from one model, with what a forward pass yields and reads.

Without a run it times both models of the published sizes; random weights say nothing about the tokens/step of lookahead.
"""

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import checkpoint
import configurator
import dataloader
import generate
import lookahead
import runtime
import stepper
from baseline_transformer.model import DecoderOnly
from benchmarks.shapes import PUBLISHED
from benchmarks.timing import in_turns
from runs import markdown_table


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
        configurator.at_least_one(self, "tokens", "batch", "repeats", "threads")
        if self.val_prompts and (self.val_prompts < 0 or self.run is None):
            raise ValueError(f"val_prompts={self.val_prompts}: give a positive number, and run=... with validation data")


class Variant(NamedTuple):
    name: str
    work: Callable[[int], tuple[int, int]]  # asked for so many tokens a text, returns tokens made and forward passes
    texts: int = 1  # sampled together


class Row(NamedTuple):
    """Medians over the repeats."""

    variant: str
    tokens_per_second: float
    tokens_per_step: float  # of one text


def sampled(variants: list[Variant], tokens: int, repeats: int) -> list[Row]:
    """Rows of all variants, timed in turns."""
    timed = in_turns({variant.name: variant.work for variant in variants}, tokens, repeats, warm_up=4)
    rows = []
    for name, _, texts in variants:
        columns = [(made / t, made / steps / texts) for t, (made, steps) in timed[name]]
        rows.append(Row(name, *map(statistics.median, zip(*columns))))
    return rows


def plainly(
    model: torch.nn.Module, prompts: list[list[int]], sampling: generate.Sampling, texts: int, **how
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
    folder = dataloader.prepare_if_missing(checkpoint.read_config(Path(run))[0]["dataset"])
    val, length = dataloader.open_data(folder, block_size, "val").val, block_size // 2
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

    # with codes there is neither lookahead nor a static cache
    codes = getattr(model.config, "latent_factor", 0) > 0
    variants = [
        Variant("plain cached", plain()),
        Variant("plain uncached", plain(use_cache=False)),
        Variant(f"plain cached, batch {config.batch}", plain(config.batch), config.batch),
        *(Variant(f"lookahead {setting}", ahead(setting)) for setting in (lookahead.AUTO if not codes else ())),
    ]
    if stepper.can_step(model) and not codes:
        variants.append(Variant("plain cached, int8", plain(int8=True)))
    if next(model.parameters()).is_cuda and not codes:
        variants.append(Variant("plain cached, compiled", plain(compile="inductor")))
    gpt2 = isinstance(model, DecoderOnly) and model.config.position == "learned" and model.config.pos_sub == "none"
    if gpt2 and model.config.window == 0 and importlib.util.find_spec("transformers"):
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

    return Variant(f"Hugging Face {transformers.__version__}", work)


def bench_sample(config: SampleBench) -> list[dict]:
    machine = runtime.start(config.device, config.dtype, "off")
    if config.run is None:
        models, prompts = {}, [list(range(10))]
        for name, shape in PUBLISHED.items():
            runtime.seed_everything(config.seed)
            models[name] = checkpoint.build(name, checkpoint.CONFIGS[name](vocab_size=50257, block_size=200, **shape))
    else:
        model, text, _ = checkpoint.load_run(config.run, "best", machine.device)
        if model.reconstructs:
            raise ValueError(f"run={config.run} is an autoencoder, which continues no text; give the run of a language model")
        if checkpoint.separator(config.run) is not None:
            raise ValueError(f"run={config.run} answers questions; python bench.py latent --run=... --prompt=QUESTION measures that")
        models = {Path(config.run).name: model}
        if config.val_prompts:
            prompts = validation_prompts(config.run, config.val_prompts, model.config.block_size)
        else:
            prompts = [text.encode(config.prompt)]
    rows = []
    for name, model in models.items():
        model.to(machine.device, machine.weight_dtype).eval()
        generate.prepare_for_decoding(model)
        variants = sample_variants(model, prompts, config)
        with machine.autocast():
            found = sampled(variants, config.tokens, config.repeats)
        print(
            f"\n{name}, {model.get_num_params():,} parameters, {config.tokens} tokens, temperature {config.temperature:g}; "
            f"{machine.reasons}"
        )
        lines = []
        for row in found:
            speed, ratio = row.tokens_per_second, row.tokens_per_second / found[0].tokens_per_second
            lines.append([row.variant, f"{speed:.1f}", f"{ratio:.2f}", f"{row.tokens_per_step:.2f}"])
            rows.append({"model": name, "new_tokens": config.tokens} | row._asdict() | {"ratio": ratio})
        print("\n" + markdown_table(["variant", "tokens/s", "x plain cached", "tokens/step"], lines))
    return rows
