"""`bench.py data`: MB/s from a text file to a data set, beside tiktoken's own batch call, and batches/s of the data set."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
import dataloader
import tokenizer
from benchmarks.timing import in_turns, rate
from data import corpus, sources
from runs import markdown_table


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
    threads: int | None = None  # of the tokenizers; none: as many as torch takes

    def __post_init__(self):
        configurator.at_least_one(self, "megabytes", "batch", "block_size", "batches", "repeats", "threads")


def library_sources() -> Iterator[str]:
    """The source files of Python's standard library, again and again: text that every machine has."""
    for path in itertools.cycle(sorted(Path(os.__file__).parent.glob("*.py"))):
        yield path.read_text(encoding="utf-8")


def bench_data(config: DataBench) -> list[dict]:
    encoder, threads = tokenizer.get(config.tokenizer), config.threads or torch.get_num_threads()
    source = sources.read_documents(config.input) if config.input else library_sources()
    with tempfile.TemporaryDirectory() as folder:
        text, made = Path(folder, "text.txt"), Path(folder, "set")
        text.write_bytes(tokenizer.to_utf8(sources.SEPARATOR.join(sources.take_bytes(source, config.megabytes * 10**6))))
        documents = list(sources.read_documents(text))
        size = sum(len(tokenizer.to_utf8(document)) for document in documents)

        def ours(times: int) -> int:
            with contextlib.redirect_stdout(None):  # it says what it has written
                for _ in range(times):
                    corpus.write_dataset(sources.read_documents(text), encoder, made, 0.1, "bench.py", threads=threads)
            return times * size

        def theirs(times: int) -> int:
            for _ in range(times):
                encoder.encoding.encode_ordinary_batch(documents, num_threads=threads)
            return times * size

        works = {"tiktoken, encode_ordinary_batch": theirs} if hasattr(encoder, "encoding") else {}
        works["data/corpus.py, file to data set"] = ours
        timed = in_turns(works, 1, config.repeats, warm_up=1)
        data = dataloader.TokenData(made, config.block_size)

        def load(batches: int) -> int:
            for step in range(batches):
                data.gather("train", data.batch_starts(0, step, config.batch))
            return batches

        loading = f"dataloader.py, {config.batch} x {config.block_size}"
        loaded = rate(in_turns({loading: load}, config.batches, config.repeats, warm_up=1)[loading])

    print(f"{size / 1e6:,.1f} MB of text, {len(documents):,} documents, tokenizer {config.tokenizer}, {threads} threads")
    first = rate(next(iter(timed.values())))
    rows = [{"variant": name, "bytes_per_second": rate(runs), "ratio": rate(runs) / first} for name, runs in timed.items()]
    lines = [[row["variant"], f"{row['bytes_per_second'] / 1e6:.1f}", f"{row['ratio']:.2f}", ""] for row in rows]
    lines.append([loading, "", "", f"{loaded:,.0f}"])
    print("\n" + markdown_table(["variant", "MB/s", "x first", "batches/s"], lines))
    return [*rows, {"variant": loading, "batches_per_second": loaded}]
