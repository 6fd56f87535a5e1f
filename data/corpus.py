"""
Documents -> a data set, for all prepare scripts: decide their side, tokenize on all cores, write. sources.py reads them.

What is written is a function of the documents alone (no dates, no order of threads), so the same input gives the same sha256 on
every machine.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

import tokenizer as tokenizers
from data.sources import FEW_PIECES, SEPARATOR, cut_lines, read_documents, take_bytes
from errors import naming
from tokenizer import Tokenizer, to_utf8

DATA = Path(__file__).resolve().parent
FILES = ("train.bin", "val.bin", tokenizers.FILE_NAME, "meta.json")  # in the order in which they are put into place
BATCH_CHARS = 1 << 19  # text handed to a tokenizer thread at once
WORK = f".preparing-{platform.node()}-"  # what a folder of unfinished work is called, with the process id behind it


# ----------------------------------------------------------------------------------------------------------------------
# Writing


class _Side:
    """One split while it is being written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.tokens = self.bytes = self.documents = 0

    def add(self, tokens: np.ndarray, n_bytes: int, n_documents: int) -> None:
        self.file.write(tokens)
        self.digest.update(tokens)
        self.tokens += tokens.size
        self.bytes += n_bytes
        self.documents += n_documents

    def numbers(self) -> dict:
        counts = {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents}
        return {**counts, "sha256": self.digest.hexdigest()}


def is_validation(document: str, val_fraction: float) -> bool:
    """Side of a document, decided by a hash of its text: copies of a document are never on both sides, in whatever order."""
    digest = hashlib.blake2b(to_utf8(document), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def check_numbers(val_fraction: float, max_bytes: int | None) -> None:
    """Raise ValueError for what is not a share of the text, or not an amount of it."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: give a number between 0 and 1, e.g. 0.1")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: give a positive number of bytes")


def write_dataset(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    val_fraction: float,
    source: str,
    dataset: str | None = None,
    max_bytes: int | None = None,
    threads: int | None = None,
) -> dict:
    """Tokenize documents into out_dir/{train.bin, val.bin, tokenizer.json, meta.json}; returns meta.

    A single document is cut at line ends first, so that it can have two sides. Raises ValueError when a side ends empty.
    """
    check_numbers(val_fraction, max_bytes)
    documents = iter(documents)
    first = list(islice(documents, 2))
    if len(first) == 1:
        first = list(cut_lines(first[0], chars=max(1, len(first[0]) // FEW_PIECES)))
        if len(first) == 1:
            raise ValueError("there is only one line of text, which cannot be cut, so nothing can validate; give more text")
    documents = take_bytes(chain(first, documents), max_bytes)
    sided = ((is_validation(document, val_fraction), document) for document in documents)
    if tokenizer.eos is None:  # nothing marks the end of a document: let it be an empty line
        sided = ((val, text if text.endswith("\n") else text + "\n\n") for val, text in sided)
    return write_sides(sided, tokenizer, out_dir, source, dataset, max_bytes, threads)


def write_sides(
    sided: Iterable[tuple],
    tokenizer: Tokenizer,
    out_dir: str | Path,
    source: str,
    dataset: str | None = None,
    total_bytes: int | None = None,
    threads: int | None = None,
    complete: Callable[[dict], None] = lambda meta: None,
) -> dict:
    """
    write_dataset for documents whose side is known: pairs (is it validation?, document). A document may come in parts,
    (val, part, part, ...), which are tokenized apart. `complete` is given the meta of all documents, to add to it before it is
    written. `total_bytes` is only for the progress bar. Raises FileExistsError where out_dir holds another data set, or what may
    be one, ValueError where it is a run directory or one of the two sides would be empty.
    """
    out_dir = Path(out_dir)
    if (out_dir / "config.json").exists():  # its tokenizer.json would be replaced
        raise ValueError(f"{out_dir} is a run directory, and no place for a data set; give another --out_dir")
    found = [name for name in FILES if (out_dir / name).exists()]
    if found and "meta.json" not in found and out_dir.resolve().parent != DATA:  # nanoGPT's, or a model's folder
        raise FileExistsError(
            f"{out_dir} has {', '.join(found)} but no meta.json, so it may be no data set of this project: give another --out_dir, or "
            "remove them"
        )
    _remove_leftovers(out_dir)
    threads = threads or os.cpu_count() or 1
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    # In a folder of its own until complete: an interrupted run leaves what was there before, and two runs do not mix.
    with naming(out_dir), _made(out_dir), tempfile.TemporaryDirectory(prefix=f"{WORK}{os.getpid()}-", dir=out_dir) as work:
        work = Path(work)
        sides = _encode(sided, tokenizer, dtype, work, threads, total_bytes)
        meta = {
            "dataset": dataset or out_dir.resolve().name,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            **{name: side.numbers() for name, side in sides.items()},
            "bytes_per_token": sides["val"].bytes / sides["val"].tokens,
            "source": source,
        }
        complete(meta)
        tokenizers.save(tokenizer, work)
        (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        held = _held(out_dir)
        if held is not None and held | {"source": source} != meta:  # which may have moved
            raise FileExistsError(
                f"{out_dir} holds another data set, and runs on that could not be resumed: give another --out_dir (or "
                "--name, where there is one), or remove it"
            )
        (out_dir / "meta.json").unlink(missing_ok=True)  # without it the folder does not count as a data set
        for name in FILES:
            os.replace(work / name, out_dir / name)
    for name in ("train", "val"):
        print(f"{name:5s} {meta[name]['tokens']:>14,} tokens  {meta[name]['documents']:>9,} documents")
    print(f"{meta['bytes_per_token']:.4f} bytes per token (val); written to {out_dir}")
    return meta


def _encode(
    sided: Iterable[tuple], tokenizer: Tokenizer, dtype: np.dtype, work: Path, threads: int, total_bytes: int | None
) -> dict[str, _Side]:
    """Write train.bin and val.bin into the folder `work`. Raises ValueError when one ends empty."""
    bar = _progress_bar(total_bytes)
    with open(work / "train.bin", "wb") as train, open(work / "val.bin", "wb") as val, ThreadPoolExecutor(threads) as pool:
        sides = {"train": _Side(train), "val": _Side(val)}
        pending = deque()  # oldest first; its length bounds the memory

        def finish_oldest():
            encoded = pending.popleft().result()
            for side, numbers in zip(sides.values(), encoded, strict=True):
                side.add(*numbers)
            if bar is not None:
                bar.update(sum(n_bytes for _, n_bytes, _ in encoded))

        for batch in _batches(sided):
            # Threads, not processes: tiktoken and numpy work outside the interpreter lock, and nothing is copied.
            pending.append(pool.submit(_encode_batch, batch, tokenizer, dtype))
            if len(pending) > 2 * threads:
                finish_oldest()
        while pending:
            finish_oldest()
    if bar is not None:
        bar.close()
    count = sum(side.documents for side in sides.values())
    if count == 0:
        raise ValueError("there is no text to prepare: what was given is empty")
    for name, side in sides.items():
        if side.documents == 0:
            advice = "give other ones, or a --val_fraction nearer to 0.5" if count > 1 else "give more text, or a larger --max_bytes"
            raise ValueError(f"no document fell on the {name} side, of {count} in all; {advice}")
    return sides


def _held(folder: Path) -> dict | None:
    """The meta.json of the data set that a folder holds, None without one or where its tokens are missing."""
    if not all((folder / name).exists() for name in ("train.bin", "val.bin")):
        return None
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Inside, the folder is there; afterwards, too, unless it is new and nothing was put into it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _remove_leftovers(out_dir: Path) -> None:
    """Remove the folders of preparations on this machine that were killed."""
    for folder in out_dir.glob(f"{WORK}*-*"):
        pid = folder.name.removeprefix(WORK).split("-")[0]
        if os.name == "posix" and pid.isdigit():
            try:
                os.kill(int(pid), 0)  # this signal only asks whether the process is there
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except PermissionError:  # it is, and another user's
                pass


def _batches(sided: Iterable[tuple]) -> Iterator[list[tuple[bool, list[str]]]]:
    """The documents with any text, about BATCH_CHARS characters at a time."""
    batch, chars = [], 0
    for val, *parts in sided:
        if not any(parts):
            continue
        batch.append((val, parts))
        chars += sum(map(len, parts))
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode_batch(
    batch: list[tuple[bool, list[str]]], tokenizer: Tokenizer, dtype: np.dtype
) -> list[tuple[np.ndarray, int, int]]:
    """(token ids, bytes, documents) of train and val. Bytes are those of the text, and one for each end of document."""
    end = np.array([] if tokenizer.eos is None else [tokenizer.eos], dtype=dtype)
    result = []
    for side in (False, True):
        documents = [parts for val, parts in batch if val == side]
        arrays = [np.empty(0, dtype=dtype)]
        for parts in documents:
            arrays += [*(tokenizer.encode_array(part).astype(dtype) for part in parts), end]
        n_bytes = sum(len(to_utf8(part)) for parts in documents for part in parts) + end.size * len(documents)
        result.append((np.concatenate(arrays), n_bytes, len(documents)))
    return result


def _progress_bar(total_bytes: int | None):
    """tqdm on a terminal, when it is installed (the embedded data set must not need it)."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing")


# ----------------------------------------------------------------------------------------------------------------------
# What the scripts share


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def given_path(word: str) -> Path:
    """The value of an option; Path("") would be the current folder."""
    if not word:
        raise argparse.ArgumentTypeError("nothing was given: a file or folder is needed")
    return Path(os.path.expanduser(word))  # leaves a name like ~$notes.docx as it is


def bare_arguments(description: str, out_dir: Path | None) -> argparse.ArgumentParser:
    """Parser with the option that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    parser.add_argument("--out_dir", type=given_path, default=out_dir, help="folder to write to")
    return parser


def arguments(description: str, out_dir: Path | None, tokenizer: str, val_fraction: float) -> argparse.ArgumentParser:
    """Parser with the options of every script that reads text."""
    parser = bare_arguments(description, out_dir)
    parser.add_argument("--tokenizer", default=tokenizer, help="byte, char, gpt2 or another encoding of tiktoken")
    parser.add_argument("--val_fraction", type=float, default=val_fraction, help="share of the text that validates")
    return parser


def input_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Options of the scripts that can read local text."""
    kinds = "text, .jsonl or .parquet; .gz, .xz, .zst"
    parser.add_argument("--input", nargs="+", type=given_path, required=required, help=f"local files or folders ({kinds})")
    parser.add_argument("--separator", default=r"\n\n\n", help=r"between two documents of a text file; \n is a line end")
    parser.add_argument("--text_key", default="text", help="column of .jsonl and .parquet; several: title,text")
    parser.add_argument("--max_bytes", type=int, help="stop before the document that exceeds so many bytes of text")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The values of a parser that `arguments` made. Raises ValueError for numbers out of range."""
    args = parser.parse_args(argv)
    check_numbers(args.val_fraction, getattr(args, "max_bytes", None))
    return args


def folder_for(name: str | None, out_dir: Path | None) -> Path:
    """Where a data set of this name goes. Raises ValueError for a name that is none, or that of a set with a script of its own."""
    if out_dir is not None:
        return out_dir
    if name is None:
        raise ValueError("the data set has no name; give --name NAME (written to data/NAME) or --out_dir FOLDER")
    taken = name == "numbers" or (DATA / name / "prepare.py").exists()  # the former is made by pairs/prepare.py
    if not name or Path(name).name != name or name == ".." or taken:
        raise ValueError(f"--name {name}: give a plain name that no data set of this project has, or an --out_dir")
    return DATA / name


def read_inputs(args: argparse.Namespace) -> Iterator[str]:
    """The documents of all inputs. Raises ValueError, at their end, if a separator of the user's stands nowhere."""
    separator, alone, separated = tokenizers.unescaped(args.separator), len(args.input) == 1, False
    for path in args.input:
        separated |= yield from read_documents(path, separator, args.text_key, alone)
    if not separated and separator != SEPARATOR:
        raise ValueError(f"the separator {args.separator!r} stands nowhere in the text; give another, or leave --separator out")


def make_tokenizer(name: str, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """tokenizer.get, with the characters collected in a pass of its own over `documents()` where the name is char."""
    if name != "char":
        return tokenizers.get(name)
    chars = {"\n"}  # stands between documents
    for document in documents():
        chars.update(document)
    return tokenizers.get(name, chars="".join(chars))
