"""
Sample text from a run directory; nothing else is needed, neither its data set nor a network.

    python sample.py out/run --prompt="def " --max_new_tokens=200 --temperature=0.8 --top_k=50 --top_p=0.95 --num_samples=3
    python sample.py out/run --prompt=FILE:prompt.txt --stream      # the prompt from a file
    echo "import os" | python sample.py out/run --prompt=-          # or from standard input
    python sample.py out/run --lookahead=0,8,1,3 --check            # several tokens a step, and the same text: lookahead.py
    python sample.py out/latent/numbers_8 --prompt=4711             # a model of pairs answers it
    python sample.py out/latent/rq_transformer_stdlib --temperature=0.9,0.8,0.8,0.7   # a model over codes: one value, or one a level
"""

import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import configurator
import generate
import lookahead
import runtime
import stepper
import tokenizer
from errors import exit_on_user_error
from lookahead import Setting
from model import warn_ignored


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = "\n"  # text to continue; FILE:path reads a file, - reads standard input
    max_new_tokens: int = 200  # length of the continuation, tokens; it may go beyond the context, see generate.py
    num_samples: int = 1  # continuations, sampled together; number i is the same text whatever their number
    temperature: float | tuple[float, ...] = 0.8  # 0 is greedy; for a model over codes also one value a level: 0.9,0.7,0.7,0.7
    top_k: int | tuple[int, ...] | None = None  # only the k most likely tokens or codes, likewise; none: all
    top_p: float | tuple[float, ...] = 1.0  # then only the most likely ones that together have this probability, likewise
    token_temperature: float = 0.0  # of the tokens that the codes of a block become, where the model writes blocks
    seed: int = 1337  # of the noise
    stop: str | None = None  # end where this text appears (it is not printed); \n is a line end, \t a tab
    eos: bool = True  # end at the end-of-document token, where the tokenizer has one
    stream: bool = False  # print tokens as they come; needs num_samples=1
    cache: bool = True  # false: compute the whole context again for every token
    lookahead: str | None = None  # several tokens a step, the same text: W,N,G[,M] such as 4,3,4, see lookahead.py; auto tries some
    prompt_lookup: bool = True  # lookahead also guesses the n-grams of prompt and output; false: only those of its window
    check: bool = False  # sample again, plainly with the cache (without it, if the first run was that); exit status 1 if texts differ
    compile: bool = False  # torch.compile for the steps of one token; takes a minute to start
    int8: bool = False  # weights in 8 bits: faster for one text on a CPU, and not quite the same model
    checkpoint: Literal["best", "last"] = "best"  # lowest validation loss, or latest
    json: bool = False  # print one line of JSON at the end
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of matrix products; auto on a CPU: float32

    def __post_init__(self):
        configurator.at_least_one(self, "max_new_tokens", "num_samples")
        if self.stream and self.num_samples > 1:
            raise ValueError("stream=true prints one text as it grows; use num_samples=1")
        if self.stop == "":
            raise ValueError("stop='' would end every text at once; use none to have no stop string")
        check_utf8("prompt", self.prompt)
        check_utf8("stop", self.stop or "")
        configurator.check_given(self, "temperature", "top_k", "top_p")
        if self.lookahead is not None:
            if self.num_samples > 1:
                raise ValueError(
                    f"lookahead continues one text at a time, because each accepts another number of tokens in a step; "
                    f"num_samples={self.num_samples} needs lookahead=none"
                )
            if self.compile or not self.cache:
                raise ValueError("lookahead needs cache=true and compile=false")
            self.setting()
        if self.lookahead in (None, "auto"):
            warn_ignored(self, ["prompt_lookup"], f"lookahead={self.lookahead or 'none'}")
        if self.compile and not self.cache:
            raise ValueError("compile=true compiles the step behind a cache; use cache=true")
        if self.int8 and (self.num_samples > 1 or self.lookahead is not None or self.compile or not self.cache):
            raise ValueError(
                "int8=true is for one text with a cache: use num_samples=1, lookahead=none, compile=false, cache=true"
            )
        if self.int8 and self.check:
            raise ValueError("check=true compares paths of one model, but int8=true makes another of it; use one of the two")
        if all(how.temperature == 0 for how in self.samplings()):
            warn_ignored(self, ("top_k", "top_p"), "at temperature 0 the most likely token is taken")
        try:
            generate.Sampling(self.token_temperature)
        except ValueError as error:
            raise ValueError(f"token_{error}") from None

    def setting(self) -> Setting | None:
        """None: plain decoding, or what lookahead=auto begins with."""
        if self.lookahead in (None, "auto"):
            return None
        return dataclasses.replace(lookahead.parse(self.lookahead), from_text=self.prompt_lookup)

    def samplings(self) -> tuple[generate.Sampling, ...]:
        """One for each level of codes, or one for all."""
        given = {key: getattr(self, key) for key in ("temperature", "top_k", "top_p")}
        count = max((len(value) for value in given.values() if isinstance(value, tuple)), default=1)
        columns = [value if isinstance(value, tuple) else (value,) * count for value in given.values()]
        if any(len(column) != count for column in columns):
            lengths = ", ".join(f"{key} has {len(value)}" for key, value in given.items() if isinstance(value, tuple))
            raise ValueError(f"values for the levels of codes: {lengths}; give as many of each, or one for all levels")
        return tuple(generate.Sampling(*values, self.seed) for values in zip(*columns))

    def how(self, model: torch.nn.Module) -> generate.Sampling | generate.BlockSampling | None:
        """How this model chooses, if it does. Raises ValueError for settings that are of another kind of model."""
        if model.reconstructs:
            keys = vars(self).keys() - {"prompt", "checkpoint", "device", "dtype"}
            if given := sorted(key for key in keys if getattr(self, key) != getattr(SampleConfig, key)):
                raise ValueError(f"{', '.join(given)}: an autoencoder gives its prompt back and nothing else; leave them out")
            return None
        levels = self.samplings()
        if model.writes_blocks:
            if self.lookahead is not None:
                raise ValueError("lookahead drafts single tokens, but this model writes blocks of them; use lookahead=none")
            if self.token_temperature > 0 and getattr(model, "autoencoder", model) is None:
                raise ValueError("token_temperature is of tokens behind codes, but here the codes are the tokens; use temperature")
            return generate.BlockSampling(levels, generate.Sampling(self.token_temperature, seed=self.seed))
        if len(levels) > 1 or self.token_temperature > 0:
            raise ValueError(
                "several values of temperature, top_k or top_p, and token_temperature, are for models over codes; this model "
                "chooses its tokens directly: give one value, and no token_temperature"
            )
        return levels[0]


def check_utf8(key: str, text: str) -> None:
    """Raise ValueError for a text with bytes in it that are no UTF-8, which Python hands on as surrogates."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{key}={text!r} is not UTF-8; convert it")


def read_prompt(word: str) -> str:
    try:
        if word == "-":
            if sys.stdin is None:
                raise ValueError("prompt=-: there is no standard input; give the prompt itself, or FILE:path")
            if hasattr(sys.stdin, "reconfigure"):  # whatever the locale says: Windows would read UTF-8 in its own code page
                sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
            text = sys.stdin.read()
            check_utf8("prompt", text)
            return text
        if word.startswith("FILE:"):
            path = Path(word.removeprefix("FILE:"))
            if not path.is_file():
                raise FileNotFoundError(f"prompt={word}: there is no such file")
            return path.read_text(encoding="utf-8-sig")  # without the byte order mark of some Windows editors
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt={word}: not {error.encoding} at byte {error.start}; convert it to UTF-8") from None
    return word.replace("\r\n", "\n").replace("\r", "\n")  # as of files, and of all texts that are trained on


def encode_prompt(written: str, text: tokenizer.Tokenizer, separator: int | None) -> tuple[str, list[int]]:
    """The prompt as it is printed and its tokens; `separator` ends the question of a model of pairs. Raises ValueError without any."""
    if separator is not None:
        prompt = tokenizer.encode_question(text, written, separator)
        return text.decode(prompt), prompt
    prompt = text.encode(written)
    if prompt or text.eos is not None:
        return written, prompt or [text.eos]
    raise ValueError("the prompt is empty, and this tokenizer has no end-of-document token to begin with; give a prompt")


def look_ahead(run: lookahead.Lookahead, auto: bool) -> Iterator[None]:
    """Continue the text of `run`, with the setting that it has or, if `auto`, with the fastest."""
    chosen = ""
    for said in lookahead.tune(run) if auto else ():
        chosen = said
        yield
    while not run.sample.finished:
        run.step()
        yield
    if chosen:  # said only now: the text may be streamed
        print(chosen, file=sys.stderr)


def first_difference(samples: list[generate.Continuation], others: list[generate.Continuation]) -> tuple[int, int] | None:
    """Number of the first sample that is another text, and of the first of its tokens that is, both from 0; None if all are the same."""
    for number, (one, other) in enumerate(zip(samples, others, strict=True)):
        if (one.output, one.reason) != (other.output, other.reason):
            pairs = itertools.zip_longest(one.output, other.output)
            return number, next((place for place, (a, b) in enumerate(pairs) if a != b), len(one.output))
    return None


@torch.no_grad()
def reconstruct(model: torch.nn.Module, text: tokenizer.Tokenizer, prompt: list[int], machine: runtime.Runtime) -> str:
    """Print the prompt as an autoencoder gives it back, which is all that it can do, and how much of that is right."""
    given, output = torch.tensor(prompt, device=machine.device), []
    with machine.autocast():
        for window in given.split(model.config.block_size):
            output.append(model(window[None])[0][0].argmax(-1))
    written = text.decode(torch.cat(output).tolist())
    print(written)
    right = (torch.cat(output) == given).sum().item()
    print(f"an autoencoder continues no text; it gave back {right} of {len(prompt)} tokens of the prompt", file=sys.stderr)
    return written


def main(argv: list[str] | None = None) -> list[str]:
    """Print the continuations; returns their texts. With check=true, SystemExit(1) if the plain path gives another text."""
    settings = configurator.configure(argv, [SampleConfig], description=__doc__, positional="RUN")
    (config,), (run,) = settings.sections, settings.words
    machine = runtime.start(config.device, config.dtype, "on" if config.compile else "off")
    if config.dtype == "auto" and machine.device.type == "cpu":  # one token at a time is bound by memory, not arithmetic
        machine = dataclasses.replace(machine, dtype=torch.float32)
    model, text, trainer = checkpoint.load_run(run, config.checkpoint, machine.device)
    model.to(machine.weight_dtype)
    generate.prepare_for_decoding(model)
    how = config.how(model)
    if config.int8 and (isinstance(how, generate.BlockSampling) or not stepper.can_step(model)):
        raise ValueError("int8=true is for encoder-decoders and decoder-only models, without window and latents, on a CPU")

    separator = checkpoint.separator(run)
    written, prompt = encode_prompt(read_prompt(config.prompt), text, separator)
    if separator is not None and hasattr(model, "bottleneck") and separator in prompt[:-1]:
        raise ValueError("the prompt goes on behind the end of its question, but a latent transformer answers whole questions only")
    if model.reconstructs:
        return [reconstruct(model, text, prompt, machine)]

    def start(write=None) -> list[generate.Continuation]:
        eos, stop = text.eos if config.eos else None, (tokenizer.unescaped(config.stop),) if config.stop else ()
        return [generate.Continuation(prompt, config.max_new_tokens, text, eos, stop, write) for _ in range(config.num_samples)]

    def timed(steps: Iterator[None]) -> float:
        gc.freeze()  # a collection that goes through all that is loaded takes 75 ms, the time of a hundred tokens
        began = time.perf_counter()
        try:
            with machine.autocast():
                for _ in steps:
                    pass
        finally:
            gc.unfreeze()
        return time.perf_counter() - began

    samples = start((lambda piece: print(piece, end="", flush=True)) if config.stream else None)
    generate.check_prompts(model, [prompt])  # before anything is printed
    ahead = None if config.lookahead is None else lookahead.Lookahead(model, samples[0], how, config.setting())
    if config.stream:
        print(written, end="", flush=True)
    if ahead is not None:
        seconds = timed(look_ahead(ahead, config.lookahead == "auto"))
    else:
        backend = "inductor" if config.compile else None
        seconds = timed(generate.sample_together(model, samples, how, config.cache, compile=backend, int8=config.int8))
    if config.stream:
        print()
    else:
        for number, sample in enumerate(samples):
            if config.num_samples > 1:
                print(f"----- sample {number}")
            print(written + sample.text)
    tokens = sum(len(sample.output) for sample in samples)
    report = {
        "run": run, "step": trainer["step"], "samples": len(samples), "prompt_tokens": len(prompt), "tokens": tokens,
        "seconds": seconds, "tokens_per_second": tokens / seconds, "ended": [sample.reason for sample in samples],
        "texts": [sample.text for sample in samples],
        "device": str(machine.device), "dtype": str(machine.dtype).removeprefix("torch."),
    }  # fmt: skip
    line = f"{run}, step {trainer['step']}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"
    if ahead is not None:
        report |= {
            "lookahead": str(ahead.setting or "plain"), "steps": ahead.steps, "drafted": ahead.drafted, "accepted": ahead.accepted,
            "tokens_per_step": tokens / ahead.steps, "accepted_share": ahead.accepted / max(ahead.drafted, 1),
        }  # fmt: skip
        trials = ", trials included" if config.lookahead == "auto" else ""
        line += f"; lookahead {ahead.setting or 'plain'}{trials}: {report['tokens_per_step']:.2f} tokens/step, "
        line += f"{report['accepted_share']:.0%} of {ahead.drafted} drafted tokens accepted"
    print(line, file=sys.stderr)
    if config.check:
        others = start()
        # the plain path or, where that is what has run, the one without a cache
        plain_has_cache = not config.cache or config.lookahead is not None or config.compile
        seconds = timed(generate.sample_together(model, others, how, plain_has_cache))
        differs = first_difference(samples, others)
        speed = sum(len(other.output) for other in others) / seconds
        report |= {"same": differs is None, "plain_tokens_per_second": speed}
        found = "the same text" if differs is None else "ANOTHER text, sample {} from its token {} on".format(*differs)
        if differs and machine.dtype in (torch.bfloat16, torch.float16):
            found += f" ({machine.dtype} rounds by how many tokens are computed together; is it so with --dtype=float32?)"
        path = "plain cached" if plain_has_cache else "uncached"
        print(f"check: the {path} path gives {found}, at {speed:.1f} tokens/s", file=sys.stderr)
    if config.json:
        print(json.dumps(report))
    if config.check and differs:
        raise SystemExit(1)
    return [sample.text for sample in samples]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
