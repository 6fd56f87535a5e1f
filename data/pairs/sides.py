"""
A set of pairs (x, y) on disk: documents x SEPARATOR y with an end after each, so that meta.json also says which token stands between
and which after, and how much of the validation side is y, the part that is predicted.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizer as tokenizers
from data import corpus

SEPARATOR = "\t"


def write_pairs(
    sided: Iterable[tuple[bool, str, str]],
    tokenizer: tokenizers.Tokenizer,
    out_dir: Path,
    source: str,
    name: str | None,
    complete: Callable[[dict], None] = lambda meta: None,
) -> dict:
    """(is it validation?, x, y) of every pair -> a data set in out_dir; returns its meta, to which `complete` may add."""
    target_bytes = target_tokens = 0

    def documents() -> Iterator[tuple[bool, str, str, str]]:
        nonlocal target_bytes, target_tokens
        for val, x, y in sided:
            if val:
                target_bytes += len(tokenizers.to_utf8(y)) + 1
                target_tokens += len(tokenizer.encode(y)) + 1
            yield val, x, SEPARATOR, y  # apart: a byte-pair encoding may merge a tab with the word after it

    def add_to(meta: dict) -> None:
        meta |= {"kind": "pairs", "separator": tokenizer.encode(SEPARATOR)[0], "end": tokenizer.eos}
        meta["val"] |= {"target_bytes": target_bytes, "target_tokens": target_tokens}
        complete(meta)

    return corpus.write_sides(documents(), tokenizer, out_dir, source, name, complete=add_to)
