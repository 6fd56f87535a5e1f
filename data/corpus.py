"""
Text -> a data set, for all prepare scripts: read documents, decide their side, tokenize on all cores, write.

Everything is a stream: memory holds a few megabytes of text whatever the size of the input. What is written is a function of
the documents alone (no dates, no order of threads), so the same input gives the same sha256 on every machine.
"""

import argparse
import codecs
import contextlib
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import platform
import shutil
import sys
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

import tokenizer as tokenizers
from tokenizer import Tokenizer, to_utf8

DATA = Path(__file__).resolve().parent
PACKED = (".gz", ".xz", ".zst")
SEPARATOR = "\n\n\n"  # two empty lines
CUT_CHARS = 1 << 16  # where a file names no document ends, one is set at the first line end after this many characters
LONGEST_CHARS = 1 << 22  # a stretch without separator that is longer than this is cut in the same way, to bound memory
READ_BYTES = 1 << 20  # per read of a plain or compressed file
BATCH_CHARS = 1 << 19  # text handed to a tokenizer thread at once
WORK = f".preparing-{platform.node()}-"  # what a folder of unfinished work is called, with the process id behind it
FEW_PIECES = 50  # a corpus of a single document is cut into about this many


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_documents(path: str | Path, separator: str = SEPARATOR, text_key: str = "text", alone: bool = False) -> Iterator[str]:
    """Documents of a file, or of all files of a folder (recursively, sorted by path, hidden ones left out).

    By name: .jsonl and .parquet have a document a row, in column `text_key` ("title,text": both, an empty line between);
    everything else is UTF-8 text with `separator` between documents. Text and .jsonl may be packed as .gz, .xz or .zst.
    A text file that is `alone` the whole corpus is cut into FEW_PIECES at least where it has no separators.
    Raises FileNotFoundError for a missing path, ValueError (file and place) for what cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted((p.relative_to(path) for p in path.rglob("*") if p.is_file()), key=lambda p: p.as_posix())
        files = [path / p for p in inside if not any(part.startswith(".") for part in p.parts)]
        if not files:
            raise FileNotFoundError(f"{path} is a folder without files; give a text file or a folder with some")
        for file in files:
            yield from read_documents(file, separator, text_key)
        return
    if not path.is_file():
        why = "is neither a file nor a folder; write what it gives to a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {why}; give a text file or a folder with some")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        yield from _read_parquet(path, text_key)
    elif kind == ".jsonl":
        yield from _read_jsonl(path, text_key)
    else:
        yield from split_documents(read_text(path), separator, FEW_PIECES if alone else 1)


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            return io.BufferedReader(_ZstdFile(path), READ_BYTES)
        case _:
            return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst file of any number of frames. The readers that zstandard offers take a truncated file for a complete one."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ModuleNotFoundError:
            raise ValueError(f"{path} needs zstandard: pip install zstandard, or unpack it") from None
        self.error = zstandard.ZstdError
        # `zstd --long` uses windows beyond the default limit
        self.frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self.file, self.frame, self.packed, self.unpacked = io.FileIO(path), None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unpacked:
            self.packed = self.packed or self.file.read(1 << 16)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self.frame = self.frame or self.frames.decompressobj()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except self.error as error:
                raise EOFError(str(error)) from error
            self.packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.unpacked))
        buffer[:n], self.unpacked = self.unpacked[:n], self.unpacked[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def _unpacked(path: Path, read: Callable[[BinaryIO], bytes]) -> Iterator[bytes]:
    """Call `read` until the file ends, turning what the decompressors raise into one kind of error."""
    with _open(path) as file:
        while True:
            try:
                data = read(file)
                if not data and path.suffix.lower() in PACKED and path.stat().st_size == 0:
                    raise EOFError("it is empty")  # which two of the three take for an empty text
            except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{path} is damaged or not a {path.suffix} file ({error}); fetch it again") from error
            if not data:
                return
            yield data


def read_text(path: Path) -> Iterator[str]:
    """Pieces of a text file, packed or not, with line ends made "\\n" as Python's text files do. Raises ValueError for other files."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done, at_start = 0, True  # bytes given to the decoder, and whether they were a character yet
    for data in chain(_unpacked(path, lambda file: file.read(READ_BYTES)), [b""]):
        if b"\0" in data:  # the end of a document to the byte tokenizer
            raise ValueError(f"{path} holds a zero byte: not a text file; leave it out or unpack it")
        pending = len(decoder.getstate()[0])  # the first bytes of a character that the last read cut in two
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = f"byte {done - pending + error.start:,}"
            raise ValueError(f"{path} is not UTF-8 at {place} ({error.reason}); convert it to UTF-8 or leave it out") from error
        done += len(data)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False  # the byte order mark of some Windows editors
        yield newlines.decode(text, final=not data)


def split_documents(pieces: Iterable[str], separator: str = SEPARATOR, least: int = 1) -> Iterator[str]:
    """
    Documents of a text that arrives in pieces; where there is no separator, documents of about 64 K characters, and of fewer where
    these would not be `least` ones.
    """
    if not separator:
        raise ValueError("the separator is empty; give the text that stands between two documents")
    rest, separated = "", False
    for piece in pieces:
        *documents, rest = (rest + piece).split(separator)
        for document in documents:
            separated = True
            yield from _not_empty(document)
        if len(rest) > LONGEST_CHARS:
            *cut, rest = cut_lines(rest)
            yield from cut
            least = 1
    # line ends around a document are not part of it, with a separator or without: equal texts belong to one side
    rest = rest.strip("\n")
    yield from _not_empty(rest) if separated else cut_lines(rest, min(CUT_CHARS, max(1, len(rest) // least)))


def _not_empty(document: str) -> Iterator[str]:
    document = document.strip("\n")
    if document:
        yield document


def cut_lines(text: str, chars: int = CUT_CHARS) -> Iterator[str]:
    """Cut after the first line end that follows `chars` characters, again and again. The pieces add up to the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + chars - 1) + 1
        if end == 0:
            # no line end: rather a cut in the middle than a document without bound
            end = min(start + LONGEST_CHARS, len(text)) if len(text) - start > LONGEST_CHARS else len(text)
        yield text[start:end]
        start = end


def _read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(_unpacked(path, lambda file: file.readline()), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from error
        text = _text_of(row if isinstance(row, dict) else {}, text_key, f"{path}, line {number}")
        yield from [to_utf8(text).decode()] if text else []  # JSON can hold half a character, a data set must not


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        # a buffer size makes pyarrow read a column in pieces instead of a whole row group
        with pq.ParquetFile(path, buffer_size=READ_BYTES) as file:
            columns, number = file.schema_arrow.names, 0
            keys = _keys_in(columns, text_key, str(path))
            for batch in file.iter_batches(batch_size=256, columns=keys):
                for values in zip(*(batch.column(key) for key in keys)):
                    number += 1
                    try:
                        row = {key: value.as_py() for key, value in zip(keys, values)}
                    except UnicodeDecodeError as error:
                        raise ValueError(f"{path}, row {number}: not UTF-8 ({error.reason}); leave the row out") from error
                    yield from filter(None, [_text_of(row, text_key, f"{path}, row {number}")])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file ({error}); fetch it again") from error


def _text_of(row: dict, text_key: str, place: str) -> str:
    parts = []
    for key in _keys_in(row, text_key, place):
        if not isinstance(row[key], str):
            what = "null" if row[key] is None else f"{type(row[key]).__name__}, not text"
            raise ValueError(f"{place}: the value under {key!r} is {what}; leave the row out, or set --text_key")
        parts.append(row[key])
    text = "\n\n".join(parts)
    if "\0" in text:
        raise ValueError(f"{place} holds a zero byte: not text; leave the row out")
    return text


def _keys_in(columns: Iterable[str], text_key: str, place: str) -> list[str]:
    """The parts of `text_key`. Raises ValueError unless there is a column of each name."""
    keys, columns = text_key.split(","), list(columns)
    if not set(keys) <= set(columns):
        present = ", ".join(columns) or "nothing"
        raise ValueError(f"{place}: no text under {text_key!r}, there is {present}; set --text_key")
    return keys


def stream_rows(path: str, **options) -> Iterator[dict]:
    """Rows of datasets.load_dataset(path, **options), read over the network while they are used.

    Raises FileNotFoundError in one line when the rows cannot be had.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ValueError("streaming needs datasets: pip install datasets, or give local text with --input") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not a warning for each of its retries
    try:
        yield from load_dataset(path, split="train", streaming=True, **options)
    except Exception as error:  # three libraries raise theirs here: datasets, huggingface_hub and its HTTP client
        reason = next(iter(str(error).splitlines()), "")
        raise FileNotFoundError(
            f"could not read {path} from the Hugging Face Hub ({type(error).__name__}: {reason}); "
            "check the network, or give local text with --input"
        ) from error


def take_bytes(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Whole documents until the next one would exceed max_bytes of UTF-8 (the first one always); None: all."""
    taken = 0
    for document in documents:
        size = len(to_utf8(document))
        if max_bytes is not None and taken > 0 and taken + size > max_bytes:
            return
        taken += size
        yield document


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


def check_numbers(val_fraction: float, max_bytes: int | None = None) -> None:
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
    The same for (is it validation?, document) pairs whose side is known. A document may come in parts, (val, part, part, ...),
    which are tokenized apart. `complete` is given the meta of all documents, to add to it before it is written. `total_bytes` is
    only for the progress bar.
    """
    out_dir = Path(out_dir)
    if (out_dir / "config.json").exists():  # its tokenizer.json would be replaced
        raise ValueError(f"{out_dir} is a run directory, and no place for a data set; give another --out_dir")
    _remove_leftovers(out_dir)
    threads = threads or os.cpu_count() or 1
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    bar = _progress_bar(total_bytes)
    # In a folder of its own until complete: an interrupted run leaves what was there before, and two runs do not mix.
    with _naming(out_dir), _made(out_dir), tempfile.TemporaryDirectory(prefix=f"{WORK}{os.getpid()}-", dir=out_dir) as work:
        work = Path(work)
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
                advice = "give more of them, or a --val_fraction nearer to 0.5" if count > 1 else "give more text"
                raise ValueError(f"no document fell on the {name} side, of {count} in all; {advice}")
        meta = {
            "dataset": dataset or out_dir.resolve().name,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "dtype": {2: "uint16", 4: "uint32"}[dtype.itemsize],
            **{name: side.numbers() for name, side in sides.items()},
            "bytes_per_token": sides["val"].bytes / sides["val"].tokens,
            "source": source,
        }
        complete(meta)
        tokenizers.save(tokenizer, work)
        (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        replaced = _held(out_dir) not in (None, meta)
        (out_dir / "meta.json").unlink(missing_ok=True)  # without it the folder does not count as a data set
        for name in ("train.bin", "val.bin", tokenizers.FILE_NAME, "meta.json"):
            os.replace(work / name, out_dir / name)
    for name in ("train", "val"):
        print(f"{name:5s} {meta[name]['tokens']:>14,} tokens  {meta[name]['documents']:>9,} documents")
    print(f"{meta['bytes_per_token']:.4f} bytes per token (val); written to {out_dir}")
    if replaced:
        print(f"note: that replaced another data set in {out_dir}; runs on it cannot be resumed", file=sys.stderr)
    return meta


def _held(folder: Path) -> dict | None:
    """The meta.json of the data set that a folder holds, None without one."""
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Inside, a full disk is reported with the name of the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from None


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
    return Path(word).expanduser()


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
    separator = args.separator.replace(r"\n", "\n").replace(r"\t", "\t")
    alone = len(args.input) == 1
    return chain.from_iterable(read_documents(path, separator, args.text_key, alone) for path in args.input)


def make_tokenizer(name: str, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """tokenizer.get, with the characters collected in a pass of its own over `documents()` where the name is char."""
    if name != "char":
        return tokenizers.get(name)
    chars = {"\n"}  # stands between documents
    for document in documents():
        chars.update(document)
    return tokenizers.get(name, chars="".join(chars))
