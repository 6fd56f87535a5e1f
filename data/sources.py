"""
Documents out of files: text, .jsonl and .parquet, packed or not, and rows that are streamed over the network. Everything is a
stream: memory holds a few megabytes of text whatever the size of the input.
"""

import codecs
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tokenizer import to_utf8

PACKED = (".gz", ".xz", ".zst")
SEPARATOR = "\n\n\n"  # two empty lines
CUT_CHARS = 1 << 16  # where a file names no document ends, one is set at the first line end after this many characters
LONGEST_CHARS = 1 << 22  # a stretch without separator that is longer than this is cut in the same way, to bound memory
READ_BYTES = 1 << 20  # per read of a plain or compressed file
FEW_PIECES = 50  # a corpus of a single document is cut into about this many


def read_documents(
    path: str | Path, separator: str = SEPARATOR, text_key: str = "text", alone: bool = False
) -> Generator[str, None, bool]:
    """Documents of a file, or of all files of a folder (recursively, sorted by path, hidden ones left out).

    By name: .jsonl and .parquet have a document a row, in column `text_key` ("title,text": both, an empty line between);
    everything else is UTF-8 text with `separator` between documents. Text and .jsonl may be packed as .gz, .xz or .zst.
    A text file that is `alone` the whole corpus is cut into FEW_PIECES at least where it has no separators. Returns, when all are
    read, whether anything named its documents: a separator, or rows.
    Raises FileNotFoundError for a missing path, ValueError (file and place) for what cannot be read, links to folders among it.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted((p.relative_to(path) for p in path.rglob("*")), key=lambda p: p.as_posix())
        inside = [path / p for p in inside if not any(part.startswith(".") for part in p.parts)]
        files = [p for p in inside if p.is_file()]
        for link in (p for p in inside if p.is_symlink() and not p.is_file()):
            what = "a folder, which is not followed; give that as another --input" if link.exists() else "nothing; remove it, or mend it"
            raise ValueError(f"{link} is a link to {what}")
        if not files:
            raise FileNotFoundError(f"{path} is a folder without files; give a text file or a folder with some")
        separated = False
        for file in files:
            separated |= yield from read_documents(file, separator, text_key)
        return separated
    if not path.is_file():
        why = "is neither a file nor a folder; write what it gives to a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {why}; give a text file or a folder with some")
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        yield from _read_parquet(path, text_key)
    elif kind == ".jsonl":
        yield from _read_jsonl(path, text_key)
    elif kind == ".json":
        raise ValueError(f"{path}: .json is not read; write a .jsonl, a document a row, or call it .txt if it is to be read as text")
    else:
        return (yield from split_documents(read_text(path), separator, FEW_PIECES if alone else 1))
    return True


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


def split_documents(pieces: Iterable[str], separator: str = SEPARATOR, least: int = 1) -> Generator[str, None, bool]:
    """
    Documents of a text that arrives in pieces; where there is no separator, documents of about 64 K characters, and of fewer where
    these would not be `least` ones. Returns whether there was one.
    """
    if not separator:
        raise ValueError("the separator is empty; give the text that stands between two documents")
    rest, separated = "", False
    for piece in pieces:
        *documents, rest = (rest + piece).split(separator)
        separated = separated or bool(documents)
        yield from filter(None, (document.strip("\n") for document in documents))
        if len(rest) > LONGEST_CHARS:
            *cut, rest = cut_lines(rest)
            yield from cut
            least = 1
    # line ends around a document are not part of it, with a separator or without: equal texts belong to one side
    rest = rest.strip("\n")
    if not separated:
        yield from cut_lines(rest, min(CUT_CHARS, max(1, len(rest) // least)))
    elif rest:
        yield rest
    return separated


def cut_lines(text: str, chars: int = CUT_CHARS) -> Iterator[str]:
    """Cut after the first line end that follows `chars` characters, again and again. The pieces add up to the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + chars - 1) + 1
        if end == 0:
            # no line end: rather a cut in the middle than a document without bound
            end = min(start + LONGEST_CHARS, len(text))
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
        if not isinstance(row, dict):
            what = f"a JSON {type(row).__name__}, but an object is needed"
            raise ValueError(f'{path}, line {number}: {what}, such as {{"{text_key}": "..."}}')
        if text := _text_of(row, text_key, f"{path}, line {number}"):
            yield to_utf8(text).decode()  # JSON can hold half a character, a data set must not


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
                    if text := _text_of(row, text_key, f"{path}, row {number}"):
                        yield text
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
