"""Sets of pairs: reading files, the numbers, and the windows that models are trained on."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataloader
import generate
import tokenizer as tokenizers
from conftest import crash_behind_meta
from data import corpus
from data.pairs import prepare
from validation import bytes_per_target, exact_pairs


def write(folder, name: str, text: str):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_in_words():
    """Guards the generated set: known numbers, and all words are English number words that read back to the number."""
    known = {
        0: "zero", 13: "thirteen", 20: "twenty", 99: "ninety-nine", 100: "one hundred", 101: "one hundred and one",
        999: "nine hundred and ninety-nine", 1000: "one thousand", 1005: "one thousand and five",
        1100: "one thousand one hundred", 4711: "four thousand seven hundred and eleven",
        999_999: "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
    }  # fmt: skip
    assert {n: prepare.in_words(n) for n in known} == known
    units = {word: i for i, word in enumerate(prepare.BELOW_20)} | {word: 10 * i for i, word in enumerate(prepare.TENS, 2)}

    def read(words: str) -> int:
        total = 0
        for word in re.split("[ -]", words):
            total = total * {"hundred": 100}.get(word, 1) + units.get(word, 0)
        return total

    for n in range(0, 10**6, 997):
        *thousands, rest = prepare.in_words(n).split(" thousand")
        assert sum(map(read, thousands)) * 1000 + read(rest.strip() or "zero") == n
    numbers = list(prepare.numbers())
    assert len({x for x, _ in numbers}) == len(numbers) == prepare.COUNT
    assert [x for x, _ in numbers[:3]] == ["885440", "403958", "794772"]  # always the same set, or results are not comparable


def test_windows_of_pairs(tmp_path):
    """Guards the format: a window is one pair, only its answer and end are targets, and all pairs come once, padded with nothing."""
    lines = [f"question {i}\t{'answer ' * (i % 4 + 1)}é{i}" for i in range(60)]
    source = write(tmp_path, "qa.tsv", "\n".join(lines) + "\n\n")
    where = ["--out_dir", str(tmp_path / "set"), "--name", "questions"]
    meta = prepare.main(["--input", str(source), *where, "--val_fraction", "0.3"])
    assert meta["dataset"] == "questions"
    data = dataloader.open_data(tmp_path / "set", 48)
    assert isinstance(data, dataloader.PairData) and meta["kind"] == "pairs"
    found = []
    for split in ("train", "val"):
        for x, y in data.full_windows(split, rows=7):
            assert x.shape == y.shape == (7, 48)
            for inputs, targets in zip(x.tolist(), y.tolist()):
                real = [t for t in targets if t >= 0]
                if not real:
                    continue
                first = next(i for i, t in enumerate(targets) if t >= 0)
                assert inputs[first] == 9 and real[-1] == 0 and inputs[first + 1 : first + len(real)] == real[:-1]
                found.append(bytes(inputs[: first + len(real)]).decode())
    assert sorted(found) == sorted(lines)
    x, y = data.gather("train", data.batch_starts(1, 2, 5))
    again = data.gather("train", data.batch_starts(1, 2, 5))
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert data.target_counts(data.batch_starts(1, 2, 5)).tolist() == (y >= 0).sum(1).tolist()
    assert sum(int((y >= 0).sum()) for _, y in data.full_windows("val", 4)) == meta["val"]["target_tokens"]
    assert meta["val"]["target_bytes"] == meta["val"]["target_tokens"] and data.bytes_per_token == 1.0
    ranks = [batch for rank in range(3) for batch in data.full_windows("val", 4, rank, 3)]
    assert len(ranks) == len(list(data.full_windows("val", 4)))
    some = sum(int((y >= 0).sum()) for _, y in data.full_windows("val", 4, first_targets=50))
    assert 20 < some <= 50
    counts = [int((y >= 0).sum()) for _, y in data.full_windows("val", 1)]
    for first, pairs in ((sum(counts[:3]), 3), (sum(counts[:3]) - 1, 2), (1, 1)):  # whole pairs, one at least
        assert len(list(data.full_windows("val", 1, first_targets=first))) == pairs
    assert bytes_per_target(data, 50) == 1.0
    meta["val"]["target_bytes"] *= 2
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    assert dataloader.open_data(tmp_path / "set", 48).bytes_per_token == 2.0, "of answers alone"
    questions = list(data.questions("val", 3))
    assert all(q[-1] == 9 and bytes(q + a).decode() in lines for q, a in questions) and len(questions) == 3


def test_jsonl_equals_tsv(tmp_path):
    """Guards the two formats: the same pairs give the same tokens, other keys and space around the sides included."""
    pairs = [(f"q{i}", f"a {i} ü") for i in range(40)]
    lines = [f"{x} \t {y}\r\n" for x, y in pairs]
    tsv = write(tmp_path, "a.tsv", "\ufeff" + "\r\n".join(["".join(lines[:9]), "".join(lines[9:])]))  # with an empty line
    jsonl = write(tmp_path, "b.jsonl", "\n".join(json.dumps({"from": x, "to": y, "more": 1}) for x, y in pairs))
    metas = [
        prepare.main(
            ["--input", str(path), "--keys", "from,to", "--val_fraction", "0.2", "--out_dir", str(tmp_path / path.stem)]
        )
        for path in (tsv, jsonl)
    ]
    assert metas[0]["train"]["sha256"] == metas[1]["train"]["sha256"] and metas[0]["val"] == metas[1]["val"]


def test_no_question_is_on_both_sides(tmp_path):
    """Guards the split: a question with several answers, of several files, which belongs to one side with all of them."""
    files = [
        str(write(tmp_path, f"{answer}.tsv", "".join(f"q{i}\t{answer}\n" for i in range(40)))) for answer in ("yes", "no", "maybe")
    ]
    prepare.main(["--input", *files, "--out_dir", str(tmp_path / "set"), "--val_fraction", "0.3"])
    data = dataloader.open_data(tmp_path / "set", 16)
    train, val = ([bytes(x) for x, _ in data.questions(split, None)] for split in ("train", "val"))
    assert not set(train) & set(val) and len(train) + len(val) == 120 and val.count(val[0]) == 3


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", "x\ty\nno tab\n", "a.tsv, line 2: 1 columns; a pair is x, one tab, y"),
        ("a.tsv", "x\ty\tz\n", "line 1: 3 columns"),
        ("a.tsv", "x\ty\n \ty\n", "line 2: the first side is empty"),
        ("a.tsv", "x\t \n", "line 1: the second side is empty"),
        ("a.tsv", "x\ta\0b\n", "a tab or a zero byte in the second side"),
        ("a.jsonl", '{"x": "a", "y": "b"}\n{"x": ', "line 2: not JSON"),
        ("a.jsonl", '{"x": "a"}\n', "line 1: no texts under 'x' and 'y'; set --keys"),
        ("a.jsonl", '{"x": "a", "y": 3}\n', "line 1: no texts"),
        ("a.jsonl", "[1]\n", "line 1: no texts"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("a.jsonl", '{"x": "a\\tb", "y": "c"}\n', "a tab or a zero byte in the first side"),
        ("a.txt", "x\ty\n", "pairs are read from .tsv files"),
        ("a.csv", "x\ty\n", "pairs are read from .tsv files"),
    ],
)
def test_lines_that_cannot_be_pairs(tmp_path, name, text, message):
    """Guards clear lines: each names the file and the line, and what is wrong there; nothing is written."""
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        prepare.main(["--input", str(path), "--out_dir", str(tmp_path / "set")])
    assert not (tmp_path / "set" / "train.bin").exists()


def test_arguments_that_cannot_work(tmp_path):
    """Guards clear lines for what is missing, doubled, or has no token for an end."""
    path = write(tmp_path, "a.tsv", "x\ty\n")
    for arguments, message in (
        ([], "give either --numbers or --input"),
        (["--numbers", "--input", str(path)], "give either --numbers or --input"),
        (["--input", str(path)], "the data set has no name"),
        (["--input", str(path), "--name", "../x"], "give a plain name"),
        (["--input", str(path), "--name", ".."], "give a plain name"),
        (["--input", str(path), "--name", "stdlib"], "give a plain name"),
        (["--input", str(path), "--name", "numbers"], "give a plain name"),
        (["--input", str(path), "--out_dir", str(tmp_path / "s"), "--tokenizer", "char"], "no token for the end of an answer"),
        (["--input", str(path), "--name", "x", "--keys", "a"], "--keys a: give two"),
        (["--input", str(path), "--name", "x", "--keys", "a,b,c"], "--keys a,b,c: give two"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.main(arguments)
    with pytest.raises(FileNotFoundError, match="does not exist; give a .tsv"):
        prepare.main(["--input", str(tmp_path / "none.tsv"), "--out_dir", str(tmp_path / "s")])


def small_set(folder: Path) -> dict:
    path = write(folder, "a.tsv", "".join(f"q{i}\t{'yes' * (i % 3 + 1)}\n" for i in range(60)))
    return prepare.main(["--input", str(path), "--out_dir", str(folder / "set"), "--val_fraction", "0.3"])


def test_meta_is_published_whole(tmp_path, monkeypatch):
    """Guards against a set that opens as plain text because the crash came before the second writing of its meta.json."""
    crash_behind_meta(monkeypatch)
    with pytest.raises(OSError, match="went down"):
        small_set(tmp_path)
    monkeypatch.undo()
    data = dataloader.open_data(tmp_path / "set", 16)
    assert isinstance(data, dataloader.PairData) and data.meta == small_set(tmp_path)


def test_kind_is_read_from_meta_as_json(tmp_path):
    """Guards against pairs taken for text because meta.json was written again with other white space."""
    meta = small_set(tmp_path)
    path = write(tmp_path / "set", "meta.json", json.dumps(meta, separators=(",", ":")))
    assert isinstance(dataloader.open_data(tmp_path / "set", 16), dataloader.PairData)
    for key in ("separator", "end", "target_bytes", "target_tokens"):
        less = {k: v for k, v in meta.items() if k != key} | {"val": {k: v for k, v in meta["val"].items() if k != key}}
        write(tmp_path / "set", path.name, json.dumps(less))
        with pytest.raises(ValueError, match=f"meta.json is damaged .*{key}.*python data/pairs/prepare.py --input YOUR_PAIRS"):
            dataloader.open_data(tmp_path / "set", 16)


def test_tab_that_merges_with_a_word(tmp_path):
    """Guards against pairs without a separator: encoded as one text, "4\\tfour" has a token for the tab and the f behind it."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"\tf": 256, b"4\t": 257}
    encoding = tiktoken.Encoding("tab", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})
    tokenizer = tokenizers.TiktokenTokenizer("tab", encoding)
    assert 9 not in tokenizer.encode("1\tfour") and 9 not in tokenizer.encode("4\tone")
    pairs = [(i % 3 == 0, str(i), f"f{i}") for i in range(60)]
    prepare.write_pairs(pairs, tokenizer, tmp_path / "set", "a test", "tab")
    data = dataloader.open_data(tmp_path / "set", 16)
    read = [
        (tokenizer.decode(x[:-1]), tokenizer.decode(y)) for split in ("train", "val") for x, y in data.questions(split, None)
    ]
    assert sorted(read) == sorted((x, y) for _, x, y in pairs)
    targets = sum(int((y >= 0).sum()) for _, y in data.full_windows("val", 4))
    assert data.meta["val"]["target_tokens"] == targets


def test_a_pair_that_just_fits(tmp_path):
    """Guards against an off-by-one that refuses the longest pair, or cuts its end off."""
    small_set(tmp_path)
    longest = len("q59\tyesyesyes")
    data = dataloader.open_data(tmp_path / "set", longest)
    rows = [(x, y) for split in ("train", "val") for x, y in data.full_windows(split, 1)]
    sides = [side for split in ("train", "val") for side in data.questions(split, None)]
    assert (data.longest_x, data.longest_y) == (max(len(x) for x, _ in sides), max(len(y) for _, y in sides) + 1)
    full = [(x, y) for x, y in rows if (x != 0).all()]
    assert full and all(y[0, -1] == data.meta["end"] for _, y in full)
    with pytest.raises(ValueError, match=f"a pair of {longest} tokens .* block_size={longest - 1}; raise block_size"):
        dataloader.open_data(tmp_path / "set", longest - 1)


def test_evaluation_covers_pairs_of_the_whole_split(tmp_path):
    """Guards against a loss estimate of one pair, numbers beyond the last pair or those of another run, and equal seeds or steps."""
    small_set(tmp_path)
    data, again = (dataloader.open_data(tmp_path / "set", 16) for _ in range(2))
    for split in ("train", "val"):
        numbers = data.eval_starts(split, 500)
        assert set(numbers) == set(range(len(data.bounds[split])))
        assert numbers.tolist() == again.eval_starts(split, 500).tolist()
    assert data.eval_starts("train", 20).tolist() != data.batch_starts(0, 0, 20).tolist()
    assert set(data.batch_starts(0, 0, 500)) == set(range(len(data.bounds["train"])))
    assert len({tuple(data.batch_starts(seed, step, 12)) for seed in range(4) for step in range(50)}) == 200


def test_only_whole_answers_are_exact(monkeypatch):
    """Guards the score: answers that go on or have no end are wrong, and one that fills its window has room for its end."""
    right = {(1, 9): [2, 3], (4, 9): [5], (6, 9): [7], (8, 9): [3] * 10}
    written = {(1, 9): [2, 3, 0], (4, 9): [5, 5, 0], (6, 9): [7], (8, 9): [3] * 10 + [0]}

    def sample_together(model, samples, sampling):
        for sample in samples:
            sample.accept(written[tuple(sample.tokens)])
            if not sample.finished:
                sample.end("length")
        yield

    monkeypatch.setattr(generate, "sample_together", sample_together)
    pairs = [(list(question), answer) for question, answer in right.items()]
    data = SimpleNamespace(questions=lambda split, count: pairs[:count], block_size=12, meta={"end": 0})
    assert exact_pairs(torch.nn.Identity(), data) == (0.5, 4)


def test_separators_in_the_wrong_order(tmp_path):
    """Guards against windows of mixed pairs: as many separators as ends is not enough, each pair needs its own."""
    broken = [(val, f"{x}\0{x}\t{x}\t", x) for x in "ab" for val in (False, True)]  # two pairs: x, then x SEP x SEP x
    meta = corpus.write_sides(
        broken, tokenizers.get("byte"), tmp_path / "set", "a test",
        complete=lambda meta: (meta.update(kind="pairs", separator=9, end=0), meta["val"].update(target_bytes=1, target_tokens=1)),
    )  # fmt: skip
    assert meta["kind"] == "pairs"
    with pytest.raises(ValueError, match="train.bin is no list of pairs; run again: python data/pairs/prepare.py"):
        dataloader.open_data(tmp_path / "set", 16)
