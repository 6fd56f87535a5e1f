"""
Sample text from a run directory; nothing else is needed, neither its data set nor a network.

    python sample.py out/run --prompt="def " --max_new_tokens=200 --temperature=0.8 --top_k=50 --top_p=0.95 --num_samples=3
    python sample.py out/run --prompt=FILE:prompt.txt --stream      # the prompt from a file
    echo "import os" | python sample.py out/run --prompt=-          # or from standard input
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import configurator
import generate
import runtime


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = "\n"  # text to continue; FILE:path reads a file, - reads standard input
    max_new_tokens: int = 200  # length of the continuation, tokens; it may go beyond the context, see generate.py
    num_samples: int = 1  # continuations, sampled together; number i is the same text whatever their number
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = None  # only the k most likely tokens; none: all
    top_p: float = 1.0  # then only the most likely ones that together have this probability
    seed: int = 1337  # of the noise
    stop: str | None = None  # end where this text appears (it is not printed)
    eos: bool = True  # end at the end-of-document token, where the tokenizer has one
    stream: bool = False  # print tokens as they come; needs num_samples=1
    cache: bool = True  # false: compute the whole context again for every token
    checkpoint: Literal["best", "last"] = "best"  # lowest validation loss, or latest
    json: bool = False  # print one line of JSON at the end
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of matrix products; auto on a CPU: float32

    def __post_init__(self):
        for key, least in (("max_new_tokens", 1), ("num_samples", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}: at least {least} is needed")
        if self.stream and self.num_samples > 1:
            raise ValueError("stream=true prints one text as it grows; use num_samples=1")
        if self.stop == "":
            raise ValueError("stop='' would end every text at once; use none to have no stop string")
        self.sampling()

    def sampling(self) -> generate.Sampling:
        return generate.Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def read_prompt(word: str) -> str:
    if word == "-":
        return sys.stdin.read()
    if word.startswith("FILE:"):
        path = Path(word.removeprefix("FILE:"))
        if not path.is_file():
            raise FileNotFoundError(f"prompt file {path} does not exist")
        return path.read_text(encoding="utf-8")
    return word


def main(argv: list[str] | None = None) -> list[str]:
    """Print the continuations; returns their texts."""
    settings = configurator.configure(argv, [SampleConfig], description=__doc__, positional="RUN")
    (config,), (run,) = settings.sections, settings.words
    machine = runtime.start(config.device, config.dtype, "off")
    if config.dtype == "auto" and machine.device.type == "cpu":  # one token at a time is bound by memory, not arithmetic
        machine = dataclasses.replace(machine, dtype=torch.float32)
    model, text, trainer = checkpoint.load_run(run, config.checkpoint, machine.device)
    model.to(machine.weight_dtype)

    written = read_prompt(config.prompt)
    prompt = text.encode(written)
    if not prompt:
        if text.eos is None:
            raise ValueError(
                "the prompt is empty, and this tokenizer has no end-of-document token to begin with; give a prompt"
            )
        prompt = [text.eos]
    write = (lambda piece: print(piece, end="", flush=True)) if config.stream else None
    samples = [
        generate.Continuation(
            prompt, config.max_new_tokens, text, text.eos if config.eos else None, (config.stop,) if config.stop else (), write
        )
        for _ in range(config.num_samples)
    ]
    if config.stream:
        print(written, end="", flush=True)
    began = time.perf_counter()
    with machine.autocast():
        for _ in generate.sample_together(model, samples, config.sampling(), config.cache):
            pass
    seconds = time.perf_counter() - began
    if config.stream:
        print()
    else:
        for number, sample in enumerate(samples):
            if config.num_samples > 1:
                print(f"----- sample {number}")
            print(written + sample.text)
    tokens = sum(len(sample.output) for sample in samples)
    report = {
        "run": str(run), "step": trainer["step"], "samples": len(samples), "prompt_tokens": len(prompt), "tokens": tokens,
        "seconds": seconds, "tokens_per_second": tokens / seconds, "ended": [sample.reason for sample in samples],
        "device": str(machine.device), "dtype": str(machine.dtype).removeprefix("torch."),
    }  # fmt: skip
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    if config.json:
        print(json.dumps(report))
    return [sample.text for sample in samples]


if __name__ == "__main__":
    with configurator.exit_on_user_error():
        main()
