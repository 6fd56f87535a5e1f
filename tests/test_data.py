"""Preparation of data: every format gives the same documents, the split never shares one, nothing half-finished is left."""

import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import tokenizer as tokenizers
from data import corpus, sources
from data.distill import prepare as distill
from data.fineweb import prepare as fineweb
from data.pairs import prepare as pairs
from data.shakespeare_char import prepare as shakespeare
from data.stdlib import prepare as stdlib
from data.text import prepare as text_set
from data.wikipedia import prepare as wikipedia
from dataloader import TokenData
from validation import bytes_per_target

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [f"Title {i}\n\nnaïve café 日本語 🙂 number {i * i}\n" + "line\n" * (i % 7) + "the end" for i in range(60)]
BYTE = tokenizers.get("byte")


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": d}, ensure_ascii=i % 2 == 0) + "\n" for i, d in enumerate(documents)).encode()


def two_frames(data: bytes) -> bytes:
    """zstd as parallel writers leave it, in several frames."""
    zstandard = pytest.importorskip("zstandard")
    packer, half = zstandard.ZstdCompressor(), len(data) // 2
    return packer.compress(data[:half]) + packer.compress(data[half:])


PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": two_frames}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_formats_agree(tmp_path, kind, packer):
    """Guards against a format that loses, joins or alters documents."""
    data = jsonl(DOCUMENTS) if kind == ".jsonl" else "\n\n\n".join(DOCUMENTS).encode()
    path = tmp_path / f"some.name{kind}{packer}"
    path.write_bytes(PACKERS[packer](data))
    assert list(sources.read_documents(path)) == DOCUMENTS


@pytest.mark.parametrize("name", ["A.TXT", "a.Txt.GZ", "A.JSONL", "a.JSONL.XZ"])
def test_suffixes_in_capitals(tmp_path, name):
    """Guards against a packed file or rows of JSON that are read as plain text because of how their name is written."""
    data = jsonl(DOCUMENTS) if "JSONL" in name else "\n\n\n".join(DOCUMENTS).encode()
    (tmp_path / name).write_bytes(PACKERS[Path(name.lower()).suffix.replace(".txt", "").replace(".jsonl", "")](data))
    assert list(sources.read_documents(tmp_path / name)) == DOCUMENTS


def test_zstd_with_a_long_window(tmp_path):
    """Guards against refusing what `zstd --long=28` packs, whose window is beyond the default limit of readers."""
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=12, chain_log=12, strategy=zstandard.STRATEGY_FAST)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # as a stream: its size is not in the header
    data = packer.compress("\n\n\n".join(DOCUMENTS).encode()) + packer.flush()
    assert zstandard.get_frame_parameters(data).window_size == 1 << 28
    (tmp_path / "a.txt.zst").write_bytes(data)
    assert list(sources.read_documents(tmp_path / "a.txt.zst")) == DOCUMENTS


def test_jsonl_with_a_byte_order_mark(tmp_path):
    """Guards against "not JSON" for the files of some Windows programs."""
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(DOCUMENTS))
    assert list(sources.read_documents(tmp_path / "a.jsonl")) == DOCUMENTS


def test_parquet_agrees(tmp_path):
    """Guards against the same in Parquet (several row groups), and against a column that is silently another one."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"title": [f"T{i}" for i in range(60)], "body": DOCUMENTS, "n": range(60)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert list(sources.read_documents(tmp_path / "a.parquet", text_key="body")) == DOCUMENTS
    both = [f"T{i}\n\n{document}" for i, document in enumerate(DOCUMENTS)]
    assert list(sources.read_documents(tmp_path / "a.parquet", text_key="title,body")) == both
    for key in ("text", "title,text"):  # all columns are listed, whichever of them were asked for
        with pytest.raises(ValueError, match=f"a.parquet: no text under '{key}', there is title, body, n; set --text_key"):
            list(sources.read_documents(tmp_path / "a.parquet", text_key=key))
    with pytest.raises(ValueError, match="a.parquet, row 1: the value under 'n' is int, not text; .*set --text_key"):
        list(sources.read_documents(tmp_path / "a.parquet", text_key="n"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    with pytest.raises(ValueError, match="b.parquet is damaged"):
        list(sources.read_documents(tmp_path / "b.parquet"))


def test_parquet_rows_without_text(tmp_path):
    """Guards against "no text under 'text', there is text" for a null, and against a decoding error that names no file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets = pa.array([0, 4, 7], pa.int32()).buffers()[1]
    latin = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"fineb\xe4d")])
    columns = {
        "a.parquet, row 302: the value under 'text' is null": pa.array(["fine"] * 301 + [None]),
        "a.parquet, row 1: the value under 'text' is bytes, not text": pa.array([b"binary"]),
        "a.parquet, row 2: not UTF-8": latin,
        "a.parquet, row 1 holds a zero byte": pa.array(["a\0b"]),
    }
    for message, column in columns.items():
        pq.write_table(pa.table({"id": pa.array(range(len(column))), "text": column}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=message):
            list(sources.read_documents(tmp_path / "a.parquet"))


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tar.gz", gzip.compress(tar_file())),
        ("windows.txt", "text of two bytes a character".encode("utf-16-le")),
        ("train.bin", np.frombuffer(b"tokens of a byte tokenizer", dtype=np.uint8).astype("<u2").tobytes()),
        ("late.txt", b"text\n" * 300_000 + b"\0"),
        ("rows.jsonl", b'{"text": "fine"}\n{"text": "a\\u0000b"}\n'),
    ],
    ids=["archive", "utf-16", "tokens", "late", "jsonl"],
)
def test_zero_byte_is_refused(tmp_path, name, data):
    """Guards against archives and token files taken for text: a zero byte ends a document for the byte tokenizer."""
    (tmp_path / name).write_bytes(data)
    place = f"{name}, line 2" if name == "rows.jsonl" else name
    with pytest.raises(ValueError, match=f"{place} holds a zero byte: not"):
        list(sources.read_documents(tmp_path / name))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_empty_archive_is_an_error(tmp_path, suffix):
    """Guards against a download that never began being taken for an empty text."""
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    (tmp_path / f"a.txt{suffix}").touch()
    with pytest.raises(ValueError, match=f"a.txt{suffix} is damaged or not a {suffix} file"):
        list(sources.read_documents(tmp_path / f"a.txt{suffix}"))
    (tmp_path / "a.txt").touch()
    assert list(sources.read_documents(tmp_path / "a.txt")) == []


def test_folder_in_order_of_paths(tmp_path):
    """Guards against an order that depends on the file system, reading hidden files, and texts behind a link that nobody misses."""
    files = {"b.txt": "two", "a/z.txt": "one", "c/d.jsonl": '{"text": "three"}', ".git/x": "no", "c/.y": "no"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(sources.read_documents(tmp_path)) == ["one", "two", "three"]
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        list(sources.read_documents(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="without files"):
        list(sources.read_documents(tmp_path / "empty"))
    (tmp_path / "a" / "link.txt").symlink_to(tmp_path / "b.txt")  # of a file: that is read
    assert list(sources.read_documents(tmp_path / "a")) == ["two", "one"]
    for target, message in (("c", "is a link to a folder, which is not followed"), ("gone", "is a link to nothing")):
        (tmp_path / "a" / "more").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=message):
            list(sources.read_documents(tmp_path / "a"))
        (tmp_path / "a" / "more").unlink()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_documents_do_not_depend_on_the_size_of_reads(tmp_path, monkeypatch, size):
    """Guards against a separator, a line end or a character that is lost where two reads meet."""
    text = "é\n\n\nzwei\r\n\r\n\r\ndrei \ufeff🙂\n\n\n\n\nvier\n\n\n\n\n\n\nfünf\n\n6"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark, and mixed line ends
    expected = [d.strip("\n") for d in re.split("\n\n\n", text.replace("\r\n", "\n")) if d.strip("\n")]
    monkeypatch.setattr(sources, "READ_BYTES", size)
    assert list(sources.read_documents(tmp_path / "a.txt")) == expected == ["é", "zwei", "drei \ufeff🙂", "vier", "fünf\n\n6"]
    (tmp_path / "b.txt").write_text("one<|end|>two<|end|><|end|>three", encoding="utf-8")
    assert list(sources.read_documents(tmp_path / "b.txt", separator="<|end|>")) == ["one", "two", "three"]


@pytest.mark.parametrize("longest", [1 << 22, 100_000])
def test_text_without_separator_is_cut_at_line_ends(tmp_path, monkeypatch, longest):
    """Guards against a document as large as the file, text lost or lines broken at a cut, and cuts in what a separator marks."""
    monkeypatch.setattr(sources, "LONGEST_CHARS", longest)
    text = "".join(f"{i} is a line\n" for i in range(30_000)) + "the last one has no end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(sources.read_documents(tmp_path / "a.txt"))
    assert "".join(pieces) == text
    assert len(pieces) == len(text) // 65_536 + 1 and all(piece.endswith("\n") for piece in pieces[:-1])
    assert all(65_536 <= len(piece) < 65_600 for piece in pieces[:-1])
    long = text[:90_000].strip()
    assert list(sources.split_documents(["short\n\n\n", long])) == ["short", long]
    assert list(sources.cut_lines("ab\ncd\n\nef", 3)) == ["ab\n", "cd\n", "\nef"]


def test_one_endless_line_is_cut_as_well(tmp_path, monkeypatch):
    """Guards against unbounded memory for a file without any line end."""
    monkeypatch.setattr(sources, "LONGEST_CHARS", 100_000)
    monkeypatch.setattr(sources, "READ_BYTES", 1000)
    (tmp_path / "a.txt").write_text("x" * 1_000_001, encoding="utf-8")
    pieces = list(sources.read_documents(tmp_path / "a.txt"))
    assert "".join(pieces) == "x" * 1_000_001
    assert max(map(len, pieces)) <= 101_000


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize(("data", "at"), [(b"good \xff bad", 5), ("äöü".encode() + b"\xc3(", 6), (b"cut off \xe6\x97", 8)])
def test_undecodable_byte_is_located(tmp_path, monkeypatch, size, data, at):
    """Guards against a decoding error that names a position in some buffer instead of file and byte."""
    monkeypatch.setattr(sources, "READ_BYTES", size)
    (tmp_path / "latin.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"latin.txt is not UTF-8 at byte {at} "):
        list(sources.read_documents(tmp_path / "latin.txt"))


@pytest.mark.parametrize("packer", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_truncated_archive_is_an_error(tmp_path, kind, packer):
    """Guards against half a download taken for the whole text (which zstandard's own readers do)."""
    rng = random.Random(0)
    data = PACKERS[packer](jsonl([str(rng.random()) for _ in range(2000)]))
    for cut in (1, 50, len(data) // 4):
        path = tmp_path / f"a{kind}{packer}"
        path.write_bytes(data[:-cut])
        with pytest.raises(ValueError, match=f"{path.name} is damaged or not a {packer} file"):
            list(sources.read_documents(path))
    path.write_bytes(b"this is not packed at all")
    with pytest.raises(ValueError, match=f"{path.name} is damaged or not a {packer} file"):
        list(sources.read_documents(path))


def test_names_that_begin_with_a_tilde():
    """Guards `--input *` where an office program keeps ~$notes.docx: nobody's home is asked for; one's own is found."""
    assert corpus.given_path("~$notes.docx") == Path("~$notes.docx")
    assert corpus.given_path("~/notes") == Path.home() / "notes"


def test_bad_rows_are_located(tmp_path):
    """Guards against a KeyError from deep inside, and against rows that are dropped silently."""
    path = tmp_path / "a.jsonl"
    for row, message in {
        '{"text": "half': "not JSON",
        '{"content": "x", "id": 1}': "no text under 'text', there is content, id; set --text_key",
        '{"text": 5}': "the value under 'text' is int, not text",
        '{"text": null}': "the value under 'text' is null",
        "[" * 100_000: "not JSON",
        '["text"]': "a JSON list, but an object is needed",
        '{}': "no text under 'text', there is nothing",
    }.items():
        path.write_text('{"text": "fine"}\n\n' + row + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"a.jsonl, line 3: {message}"):
            list(sources.read_documents(path))
    path.write_text('{"text": "half \\ud83d a character"}\n{"text": ""}\n', encoding="utf-8")
    assert list(sources.read_documents(path)) == ["half ? a character"]


def test_take_bytes_ends_between_documents():
    """Guards against a limit counted in characters, and against a document cut in the middle."""
    documents = ["äää", "bbb", "c", "ddd"]  # 6, 3, 1, 3 bytes
    for limit, expected in {None: 4, 13: 4, 12: 3, 10: 3, 9: 2, 8: 1, 1: 1}.items():
        assert list(sources.take_bytes(documents, limit)) == documents[:expected]


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def tokens_of(folder: Path, split: str) -> list[int]:
    dtype = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["dtype"]
    return np.fromfile(folder / f"{split}.bin", dtype=dtype).tolist()


def documents_of(folder: Path, split: str) -> list[str]:
    """Decode a split again and cut it at the ends of documents."""
    tokenizer = tokenizers.load(folder)
    documents, ids = [], []
    for token in tokens_of(folder, split):
        if token == tokenizer.eos:
            documents.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert not ids, "the last document has no end"
    return documents


def write(folder: Path, documents=DOCUMENTS, tokenizer=BYTE, val_fraction=0.3, **options) -> dict:
    return corpus.write_dataset(documents, tokenizer, folder, val_fraction, "a test", **options)


def wide_tokenizer():
    """A tiktoken encoding whose end-of-text id does not fit into 16 bits."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"li": 256}
    encoding = tiktoken.Encoding("wide", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000})
    return tokenizers.TiktokenTokenizer("wide", encoding)


@pytest.mark.parametrize("name", ["byte", "char", "wide"])
def test_bytes_of_a_part_are_counted(tmp_path, name):
    """Guards bits per byte over the first tokens of a file, whose tokens may be longer or shorter than those of all of it."""
    tokenizer = wide_tokenizer() if name == "wide" else tokenizers.get(name, chars="".join(DOCUMENTS))
    meta = write(tmp_path / "set", tokenizer=tokenizer)
    data, ids = TokenData(tmp_path / "set", 16), tokens_of(tmp_path / "set", "val")
    for count in (1, 15, 16, 17, 100, len(ids) - 2):
        targets = ids[1 : count + 1]
        written = tokenizer.decode_bytes([i for i in targets if i != tokenizer.eos])
        expected = (len(written) + targets.count(tokenizer.eos)) / len(targets)
        assert bytes_per_target(data, count) == pytest.approx(expected, rel=1e-12)
    ends = [len(tokenizer.decode_bytes([i])) if i != tokenizer.eos else 1 for i in (ids[0], ids[-1])]
    assert bytes_per_target(data, len(ids) - 2) * (len(ids) - 2) == pytest.approx(meta["val"]["bytes"] - sum(ends), rel=1e-12)
    for everything in (None, len(ids) - 1, len(ids) + 5):  # the same number, or compare.py would take them for different tokenizers
        assert bytes_per_target(data, everything) == meta["bytes_per_token"]


@pytest.mark.parametrize("tokenizer", [BYTE, "wide"])
def test_what_is_written_is_what_was_read(tmp_path, monkeypatch, tokenizer):
    """Guards against lost, reordered or joined documents, wrong counts in meta.json, and ids that overflow 16 bits."""
    tokenizer = wide_tokenizer() if tokenizer == "wide" else tokenizer
    monkeypatch.setattr(corpus, "BATCH_CHARS", 200)  # many batches in flight
    meta = write(tmp_path / "set", tokenizer=tokenizer, threads=3)
    assert meta == json.loads((tmp_path / "set" / "meta.json").read_text(encoding="utf-8"))
    val = [d for d in DOCUMENTS if corpus.is_validation(d, 0.3)]
    expected = {"train": [d for d in DOCUMENTS if d not in val], "val": val}
    for split in ("train", "val"):
        data = (tmp_path / "set" / f"{split}.bin").read_bytes()
        assert documents_of(tmp_path / "set", split) == expected[split]
        assert meta[split] == {
            "tokens": len(tokens_of(tmp_path / "set", split)),
            "bytes": sum(len(d.encode()) + 1 for d in expected[split]),
            "documents": len(expected[split]),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert meta["dtype"] == ("uint16" if tokenizer is BYTE else "uint32")
    assert meta["bytes_per_token"] == meta["val"]["bytes"] / meta["val"]["tokens"]
    data = TokenData(tmp_path / "set", 16)
    assert data.vocab_size == tokenizer.vocab_size and data.bytes_per_token == meta["bytes_per_token"]


def test_no_document_on_both_sides(tmp_path):
    """Guards against validation on training text: copies of a document stay together, wherever they stand in the input."""
    documents = DOCUMENTS * 3
    random.Random(0).shuffle(documents)
    write(tmp_path / "a", documents)
    write(tmp_path / "b", documents[::-1])
    sides = {folder: [set(documents_of(tmp_path / folder, split)) for split in ("train", "val")] for folder in "ab"}
    assert not sides["a"][0] & sides["a"][1]
    assert sides["a"] == sides["b"]  # the order of the input decides nothing
    assert len(documents_of(tmp_path / "a", "train")) + len(documents_of(tmp_path / "a", "val")) == 180


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_val_fraction(fraction):
    """Guards against a fraction that is of something else (or its complement), and sides other than those of older sets."""
    share = np.mean([corpus.is_validation(f"document {i}", fraction) for i in range(4000)])
    assert abs(share - fraction) < 0.03  # 3.8 standard deviations at 0.5
    for document in DOCUMENTS:
        number = int(hashlib.blake2b(document.encode(), digest_size=8).hexdigest(), 16)
        assert corpus.is_validation(document, fraction) == (number / 2**64 < fraction)


def test_threads_do_not_change_the_result(tmp_path, monkeypatch):
    """Guards against an order of batches that depends on which thread is faster."""
    monkeypatch.setattr(corpus, "BATCH_CHARS", 100)
    one, many = write(tmp_path / "one", threads=1), write(tmp_path / "many", threads=8)
    assert {**one, "dataset": ""} == {**many, "dataset": ""}


def test_line_ends_around_a_document_do_not_matter(tmp_path):
    """Guards against equal texts on both sides because one was cut out by a separator and the other is a file of its own."""
    documents = [f"document {i}\nof two lines" for i in range(200)]
    for i, document in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(document + "\n" * (i % 3), encoding="utf-8")
    (tmp_path / "all.txt").write_text("\n\n\n".join(documents), encoding="utf-8")
    assert sorted(sources.read_documents(tmp_path)) == sorted(documents * 2)
    write(tmp_path / "set", sources.read_documents(tmp_path))
    sides = [documents_of(tmp_path / "set", split) for split in ("train", "val")]
    assert not set(sides[0]) & set(sides[1]) and sorted(sides[0] + sides[1]) == sorted(documents * 2)


def test_small_files_of_a_char_tokenizer_do_not_touch(tmp_path):
    """Guards against the last line of a file and the first of the next without the empty line that separates documents."""
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i}\n", encoding="utf-8")
    read = list(sources.read_documents(tmp_path))
    write(tmp_path / "set", read, corpus.make_tokenizer("char", lambda: read))
    tokenizer = tokenizers.load(tmp_path / "set")
    texts = [tokenizer.decode(tokens_of(tmp_path / "set", split)) for split in ("train", "val")]
    assert sorted("".join(texts).split("\n\n")) == sorted([f"file {i}" for i in range(30)] + [""])


PREPARE_AND_HANG = """
import sys, time
from data import corpus, sources
import tokenizer
def documents():
    yield from ("a document", "another one")
    print("writing", flush=True)
    time.sleep(600)
corpus.write_dataset(documents(), tokenizer.get("byte"), sys.argv[1], 0.5, "a test")
"""


@pytest.mark.skipif(os.name != "posix", reason="asks for a process as POSIX does")
def test_leftovers_of_a_killed_preparation_are_removed(tmp_path):
    """Guards against gigabytes that nobody sees after kill -9, and against removing what another process still writes."""
    command = [sys.executable, "-c", PREPARE_AND_HANG, str(tmp_path)]
    first, second = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2))
    try:
        assert first.stdout.readline() == second.stdout.readline() == "writing\n"
        assert len(list(tmp_path.glob(".preparing-*"))) == 2
        first.kill()
        first.wait()
        write(tmp_path)
        (left,) = tmp_path.glob(".preparing-*")
        assert f"-{second.pid}-" in left.name and (left / "train.bin").exists()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


def test_interrupted_preparation_changes_nothing(tmp_path):
    """Guards against a folder that holds half a data set, or a new train.bin beside an old meta.json."""
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]

    def broken():
        yield from DOCUMENTS[::-1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, broken())
    with pytest.raises(ValueError, match="not in the vocabulary"):
        write(tmp_path, tokenizer=tokenizers.get("char", chars="abc"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("failing", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_meta_is_written_last(tmp_path, monkeypatch, failing):
    """Guards against a mixture of old and new files that passes for a data set, when the very last moment fails."""
    write(tmp_path)
    replace = os.replace

    def disk_full(source, target):
        if Path(target).name == failing:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path)
    assert not (tmp_path / "meta.json").exists()


def test_single_document_is_cut(tmp_path):
    """Guards against an empty side for the most common own data set: one small text file."""
    text = "".join(f"line {i} of the only document\n" for i in range(500))
    write(tmp_path, [text], val_fraction=0.2)
    pieces = documents_of(tmp_path, "train") + documents_of(tmp_path, "val")
    assert sorted("".join(pieces).splitlines()) == sorted(text.splitlines())
    assert all(piece.endswith("\n") for piece in pieces) and 40 <= len(pieces) <= 60


def test_empty_side_and_bad_values(tmp_path):
    """Guards against a data set without validation, found out only when the first evaluation divides by zero."""
    for documents, fraction in ((["a"] * 5, 0.01), (["a"] * 5, 0.99)):
        with pytest.raises(ValueError, match=r"no document fell on the (train|val) side, of \d in all; .*--val_fraction"):
            write(tmp_path / "set", documents, val_fraction=fraction)
    for documents in ([], ["", ""]):
        with pytest.raises(ValueError, match="there is no text to prepare"):
            write(tmp_path / "set", documents, val_fraction=0.5)
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            write(tmp_path / "set", val_fraction=fraction)
    with pytest.raises(ValueError, match="max_bytes=0"):
        write(tmp_path / "set", max_bytes=0)
    assert not (tmp_path / "set" / "meta.json").exists()


def test_documents_of_a_char_tokenizer_do_not_touch(tmp_path):
    """Guards against "...the end" + "Title..." becoming one word where no token can mark the end of a document."""
    write(tmp_path, tokenizer=corpus.make_tokenizer("char", lambda: DOCUMENTS))
    val = [d for d in DOCUMENTS if corpus.is_validation(d, 0.3)]
    assert tokenizers.load(tmp_path).decode(tokens_of(tmp_path, "val")) == "".join(d + "\n\n" for d in val)


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Guards against reading ahead without limit: 20 MB of text must pass through a few hundred KB."""
    monkeypatch.setattr(corpus, "BATCH_CHARS", 1 << 14)
    documents = (f"{i} " + "x" * 20_000 for i in range(1000))
    tracemalloc.start()
    write(tmp_path, documents, threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "train.bin").stat().st_size + (tmp_path / "val.bin").stat().st_size > 40_000_000
    assert peak < 2_000_000


# ----------------------------------------------------------------------------------------------------------------------
# The scripts


@pytest.mark.parametrize("script", [stdlib, wikipedia, fineweb, shakespeare, text_set, pairs, distill])
def test_help(script, capsys):
    """
    Guards against a "%" in a help text, which argparse reports only when help is asked for, and a help that explains little; and
    against other defaults than those of the sets that losses were reported on.
    """
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--out_dir" in text and script.__doc__.strip() in text
    assert "default: None" not in text and "default: False" not in text
    of = {stdlib: ("byte", 0.05), wikipedia: ("gpt2", 0.1), fineweb: ("gpt2", 0.01), text_set: ("byte", 0.1), pairs: ("byte", 0.02)}
    of[distill] = ("best",)  # the weights
    assert all(f"default: {value}" in text for value in of.get(script, ()))


@pytest.mark.parametrize("script", [stdlib, wikipedia, fineweb, shakespeare, text_set, pairs])
def test_numbers_out_of_range(tmp_path, script):
    """Guards against a script that names a wrong number in its own way, or only after reading (or downloading) all text."""
    words = ["--out_dir", str(tmp_path / "set")] + (
        ["--input", str(tmp_path / "none.txt")] if script in (text_set, pairs) else []
    )
    for fraction in ("0", "1", "-0.5", "nan"):
        with pytest.raises(ValueError, match=f"val_fraction={float(fraction)}: give a number between 0 and 1"):
            script.main([*words, "--val_fraction", fraction])
    if script in (wikipedia, fineweb, text_set):
        with pytest.raises(ValueError, match="max_bytes=0: give a positive number"):
            script.main([*words, "--max_bytes", "0", "--tokenizer", "char"])
    assert not (tmp_path / "set").exists()


def test_stdlib(tmp_path):
    """Guards against a default data set that differs from one preparation to the next, or holds tests or foreign packages."""
    one, other = stdlib.main(["--out_dir", str(tmp_path / "1")]), stdlib.main(["--out_dir", str(tmp_path / "2")])
    assert one == other and one["dataset"] == "stdlib"
    library = Path(os.__file__).parent
    tokens = np.concatenate([np.fromfile(tmp_path / "1" / f"{split}.bin", dtype=np.uint16) for split in ("train", "val")])
    documents = set(tokens.astype(np.uint8).tobytes().decode().split("\0"))
    assert (library / "json" / "__init__.py").read_text(encoding="utf-8") in documents
    for left_out in ("unittest/test", "test", "site-packages"):
        for path in sorted((library / left_out).glob("*.py"))[:20]:
            assert path.stat().st_size < 100 or path.read_text(encoding="utf-8", errors="replace") not in documents
    assert f"CPython {sys.version.split()[0]}" in one["source"]


def test_stdlib_in_order_of_paths(tmp_path):
    """Guards against an order that depends on the file system, files made for one machine, and one that is not UTF-8."""
    names = ["b.py", "a/z.py", "a/y/b.py", "test/x.py", "a/idle_test/x.py", "a/site-packages/x.py", "_sysconfigdata_linux.py"]
    for name in [*names, "config-3.11/x.py", "a/x.txt", "latin.py", "empty.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes({"latin.py": b"caf\xe9", "empty.py": b""}.get(name, name.encode()))
    assert list(stdlib.documents(tmp_path)) == ["a/y/b.py", "a/z.py", "b.py"]


@pytest.fixture
def parquet_files(tmp_path):
    """Two files in the layout of wikimedia/wikipedia."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = []
    for n, part in enumerate((DOCUMENTS[:40], DOCUMENTS[40:])):
        titles = [f"T{n}-{i}" for i in range(len(part))]
        table = pa.table({"id": [str(i) for i in range(len(part))], "url": titles, "title": titles, "text": part})
        pq.write_table(table, tmp_path / f"train-{n}.parquet", row_group_size=9)
        files.append(str(tmp_path / f"train-{n}.parquet"))
    return files


def test_streaming_through_datasets(tmp_path, parquet_files, monkeypatch):
    """Guards against an interface of `datasets` that has moved on; the same files read directly must give the same data set."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    options = {"name": None, "revision": None, "data_files": parquet_files}
    articles, pages = wikipedia.articles, fineweb.pages
    monkeypatch.setattr(wikipedia, "articles", lambda: articles("parquet", **options))
    monkeypatch.setattr(fineweb, "pages", lambda: pages("parquet", **options))
    common = ["--tokenizer", "byte", "--val_fraction", "0.3"]
    streamed = wikipedia.main([*common, "--out_dir", str(tmp_path / "streamed")])
    local = ["--input", *parquet_files, "--text_key", "title,text"]
    read = wikipedia.main([*common, "--out_dir", str(tmp_path / "read"), *local])
    assert streamed["train"] == read["train"] and streamed["val"] == read["val"]
    assert streamed["train"]["documents"] + streamed["val"]["documents"] == 60
    assert wikipedia.REVISION in streamed["source"] and read["source"] == "train-0.parquet, train-1.parquet"
    meta = fineweb.main([*common, "--out_dir", str(tmp_path / "pages")])
    assert {k: meta[k] for k in ("train", "val")} == {k: write(tmp_path / "direct")[k] for k in ("train", "val")}
    limited = wikipedia.main([*common, "--out_dir", str(tmp_path / "limited"), "--max_bytes", "1500"])
    assert 1300 < limited["train"]["bytes"] + limited["val"]["bytes"] <= 1530
    monkeypatch.setattr(wikipedia, "PUBLISHED_BYTES", 1500)  # of the stream; local text is read to its end
    assert wikipedia.main([*common, "--out_dir", str(tmp_path / "default")])["train"] == limited["train"]
    assert wikipedia.main([*common, "--out_dir", str(tmp_path / "whole"), *local])["train"] == read["train"]
    # which writes a warning for each of its retries, eleven lines before ours
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("script", ["wikipedia", "fineweb"])
def test_unreachable_hub_is_one_line(tmp_path, script):
    """Guards against the page-long traceback of a machine without network."""
    pytest.importorskip("datasets")
    path = ROOT / "data" / script / "prepare.py"
    command = [sys.executable, str(path), "--tokenizer", "byte", "--out_dir", str(tmp_path / "set")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.fullmatch(r"error: could not read \S+ from the Hugging Face Hub .*give local text with --input\n", run.stderr)
    assert not (tmp_path / "set").exists()


def test_shakespeare_is_split_by_position(tmp_path):
    """Guards against another split than nanoGPT's, whose losses would then not be comparable."""
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefghij klmnop\n", k=shakespeare.CHARACTERS))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    meta = shakespeare.main(["--input", str(tmp_path / "input.txt"), "--out_dir", str(tmp_path / "set")])
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (1_003_854, 111_540)
    tokenizer = tokenizers.load(tmp_path / "set")
    assert tokenizer.decode(tokens_of(tmp_path / "set", "train") + tokens_of(tmp_path / "set", "val")) == text
    assert shakespeare.download((tmp_path / "input.txt").as_uri()) == text


def test_shakespeare_from_a_bad_file(tmp_path):
    """Guards against a side that holds nothing but an end of document, and a decoding error that names no file."""
    path, words = tmp_path / "input.txt", ["--out_dir", str(tmp_path / "set"), "--tokenizer", "byte"]
    for data, fraction, message in (
        (b"a few words", "1e-20", "no document fell on the val side, of 1 in all"),
        (b"a few words", "0.99", "no document fell on the train side, of 1 in all"),
        (b"", "0.1", "there is no text to prepare"),
        (b"caf\xe9", "0.1", "input.txt is not UTF-8 at byte 3"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            shakespeare.main(["--input", str(path), *words, "--val_fraction", fraction])
    assert not (tmp_path / "set" / "meta.json").exists()


def test_shakespeare_download_errors(tmp_path):
    """Guards against a traceback without network, and against a changed file under the same address."""
    with pytest.raises(FileNotFoundError, match="could not reach http://127.0.0.1:9/x .*--input"):
        shakespeare.download("http://127.0.0.1:9/x")
    (tmp_path / "other.txt").write_text("404: Not Found", encoding="utf-8")
    with pytest.raises(ValueError, match="has 14 characters instead of 1,115,394"):
        shakespeare.download((tmp_path / "other.txt").as_uri())


def test_own_text(tmp_path, monkeypatch):
    """Guards against an own data set that lands in, or overwrites, one of the project's; separators are typed as in a shell."""
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "prepare.py").touch()
    (tmp_path / "a.txt").write_text("\n--\n".join(DOCUMENTS[:30]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(jsonl(DOCUMENTS[30:]))
    inputs = ["--input", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--separator", r"\n--\n", "--val_fraction", "0.3"]
    meta = text_set.main([*inputs, "--name", "mine"])
    assert meta["dataset"] == "mine" and meta["source"] == "a.txt, b.jsonl"
    assert sorted(documents_of(tmp_path / "mine", "train") + documents_of(tmp_path / "mine", "val")) == sorted(DOCUMENTS)
    meta = text_set.main([*inputs, "--tokenizer", "char", "--out_dir", str(tmp_path / "chars")])
    assert meta["dataset"] == "chars" and meta["vocab_size"] == len(set("".join(DOCUMENTS)))
    for name in ("numbers", "stdlib", "../up", "..", ""):
        with pytest.raises(ValueError, match="give a plain name"):
            text_set.main([*inputs, "--name", name])
    with pytest.raises(ValueError, match="--name NAME"):
        text_set.main(inputs)
    with pytest.raises(ValueError, match="separator is empty"):
        text_set.main([*inputs, "--name", "x", "--separator", ""])
    (tmp_path / "a.txt").write_text("\t\n".join(DOCUMENTS), encoding="utf-8")
    inputs = ["--input", str(tmp_path / "a.txt"), "--separator", r"\t\n", "--val_fraction", "0.3"]
    meta = text_set.main([*inputs, "--out_dir", str(tmp_path / "tabs")])
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(DOCUMENTS)


def test_what_would_silently_be_another_text(tmp_path):
    """Guards a separator with a typo, which would be trained on, and .json, whose brackets would; a part of the files may lack one."""
    for name, text in (("a", "one<|end|>two"), ("b", "three\n"), ("c", "four\n")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    words = ["--val_fraction", "0.5", "--out_dir", str(tmp_path / "set"), "--input"]
    with pytest.raises(ValueError, match=r"the separator '<\|END\|>' stands nowhere in the text; give another, or leave"):
        text_set.main([*words, *(str(tmp_path / f"{name}.txt") for name in "abc"), "--separator", "<|END|>"])
    assert not (tmp_path / "set").exists()
    text_set.main([*words, *(str(tmp_path / f"{name}.txt") for name in "abc"), "--separator", "<|end|>"])
    shutil.rmtree(tmp_path / "set")
    text_set.main([*words, str(tmp_path), "--separator", "<|end|>"])
    assert sorted(documents_of(tmp_path / "set", "train") + documents_of(tmp_path / "set", "val")) == ["four", "one", "three", "two"]
    (tmp_path / "d.json.gz").touch()
    with pytest.raises(ValueError, match=r"d.json.gz: .json is not read; write a .jsonl"):
        text_set.main([*words, str(tmp_path / "d.json.gz")])


@pytest.mark.parametrize("script", [text_set, fineweb, wikipedia])
def test_limit_of_bytes(tmp_path, script):
    """Guards against a limit that is ignored, and against a vocabulary with characters from behind it."""
    (tmp_path / "a.txt").write_text("\n\n\n".join([*DOCUMENTS, "ß"]), encoding="utf-8")
    taken = list(sources.take_bytes(DOCUMENTS, 2000))
    words = ["--input", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "set"), "--tokenizer", "char"]
    meta = script.main([*words, "--val_fraction", "0.3", "--max_bytes", "2000"])
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(taken) < len(DOCUMENTS)
    assert meta["vocab_size"] == len(set("".join(taken)))


def test_a_text_of_any_size_has_two_sides(tmp_path):
    """Guards a text of 70 KB without empty lines, which was cut into two documents, so that mostly nothing could validate."""
    text = "".join(f"line {i}, of which every one is different\n" for i in range(1800))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(sources.read_documents(tmp_path / "a.txt", alone=True))
    assert 45 <= len(pieces) <= 50 and "".join(pieces) == text.strip("\n")
    assert len(list(sources.read_documents(tmp_path / "a.txt"))) == 2, "beside other files it stays as whole as it may be"
    assert text_set.main(["--input", str(tmp_path / "a.txt"), "--out_dir", str(tmp_path / "set")])["val"]["documents"] > 0


def test_what_a_folder_held_is_not_lost(tmp_path):
    """Guards the tokenizer of a run from a data set that is written into its folder, and a data set from another one."""
    (tmp_path / "a.txt").write_text("\n\n\n".join(DOCUMENTS))
    words = ["--input", str(tmp_path / "a.txt"), "--val_fraction", "0.3", "--out_dir", str(tmp_path / "set")]
    first = text_set.main(words)
    (tmp_path / "set" / "train.bin").write_bytes(b"damaged")
    assert text_set.main(words) == first and TokenData(tmp_path / "set", 8).meta == first, "the same again mends it"
    shutil.copy(tmp_path / "a.txt", tmp_path / "moved.txt")
    moved = text_set.main(["--input", str(tmp_path / "moved.txt"), *words[2:]])
    assert moved == first | {"source": "moved.txt"}, "the same text from another place is the same data set"
    assert text_set.main(words) == first
    with pytest.raises(FileExistsError, match="holds another data set.*give another --out_dir .or --name"):
        text_set.main([*words, "--val_fraction", "0.5"])
    assert TokenData(tmp_path / "set", 8).meta == first and len(list((tmp_path / "set").iterdir())) == 4
    (tmp_path / "set" / "train.bin").unlink()  # then it is none any more
    assert text_set.main([*words, "--val_fraction", "0.5"]) != first
    (tmp_path / "set" / "meta.json").unlink()  # nanoGPT's data sets have none
    held = (tmp_path / "set" / "train.bin").read_bytes()
    with pytest.raises(FileExistsError, match="set has train.bin, val.bin, tokenizer.json but no meta.json.*give another --out_dir"):
        text_set.main(words)
    assert (tmp_path / "set" / "train.bin").read_bytes() == held
    (tmp_path / "set" / "config.json").touch()
    with pytest.raises(ValueError, match="is a run directory"):
        text_set.main(words)


def test_script_errors_are_one_line(tmp_path):
    """Guards against tracebacks from the command line: a missing file exits with 1, a bad value with 2."""
    script, one = str(ROOT / "data" / "text" / "prepare.py"), tmp_path / "one.txt"
    one.write_text("a line without an end " * 9)
    for arguments, code, message in (
        (["--input", str(tmp_path / "no.txt")], 1, "no.txt does not exist"),
        (["--input", script, "--val_fraction", "2"], 2, "val_fraction=2.0"),
        (["--input", str(one)], 2, "only one line of text"),
    ):
        command = [sys.executable, script, "--out_dir", str(tmp_path / "set"), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == code
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and message in run.stderr
        assert not (tmp_path / "set").exists()
    for empty in (["--input", ""], ["--input", script, "--out_dir", ""]):
        run = subprocess.run([sys.executable, script, *empty], capture_output=True, text=True, check=False)
        assert run.returncode == 2 and "nothing was given: a file or folder is needed" in run.stderr, "the current folder"
