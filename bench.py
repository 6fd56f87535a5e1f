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
    python bench.py compare before.txt after.txt    # two saved outputs, row by row; --compare as well

Prints a table, then one line of JSON.
"""

import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch

import configurator
from benchmarks.data import DataBench, bench_data
from benchmarks.latent import LatentBench, bench_latent
from benchmarks.report import compare
from benchmarks.sampling import SampleBench, bench_sample
from benchmarks.training import TrainBench, bench_train
from errors import exit_on_user_error

COMMANDS = {  # word -> its keys, and what takes them and returns rows
    "sample": (SampleBench, bench_sample),
    "latent": (LatentBench, bench_latent),
    "train": (TrainBench, bench_train),
    "data": (DataBench, bench_data),
}
AT_MOST = {"tokens": 24, "megabytes": 2, "steps": 1, "repeats": 1}  # with --quick
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
    if config.quick:
        less = {key: min(most, getattr(config, key)) for key, most in AT_MOST.items() if hasattr(config, key)}
        less |= {"dtypes": config.dtypes[:1], "compile": ("off",)} if word == "train" else {}
        config = dataclasses.replace(config, **less)
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
    with exit_on_user_error():
        main()
