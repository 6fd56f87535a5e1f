"""Token batches: order as a pure function, the whole split exactly once, and every damaged file named."""

import hashlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dataloader
from dataloader import TokenData

ROOT = Path(__file__).resolve().parents[1]


def make_set(folder: Path, train: np.ndarray, val: np.ndarray, vocab_size: int, dtype: str = "uint32") -> Path:
    """A data set as the prepare scripts write it."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"dataset": folder.name, "tokenizer": "byte", "vocab_size": vocab_size, "dtype": dtype}
    for split, tokens in (("train", train), ("val", val)):
        data = tokens.astype(dtype).tobytes()
        (folder / f"{split}.bin").write_bytes(data)
        meta[split] = {"tokens": tokens.size, "bytes": 3 * tokens.size, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"name": "byte"}', encoding="utf-8")
    return folder


def counting_set(folder: Path, train: int = 1000, val: int = 100, **options) -> Path:
    """Token i of each split is i, so that a batch tells where it comes from."""
    return make_set(folder, np.arange(train), np.arange(val), max(train, val), **options)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_gather_agrees_with_slices(tmp_path, dtype):
    """Guards against targets that are not shifted by one, or by two, counted wrongly, and against windows cut off at either end."""
    data = TokenData(counting_set(tmp_path / "set", dtype=dtype), block_size=16)
    starts = np.array([0, 983, 5, 5])
    x, y = data.gather("train", starts)
    tokens = list(range(1000))
    assert x.dtype == y.dtype == torch.int64
    assert x.tolist() == [tokens[s : s + 16] for s in starts]
    assert y.tolist() == [tokens[s + 1 : s + 17] for s in starts]
    assert data.target_counts(starts).tolist() == (y >= 0).sum(1).tolist()


def test_every_start_can_be_drawn(tmp_path):
    """Guards against an off-by-one that never trains on the last token, or reads beyond the file."""
    data = TokenData(counting_set(tmp_path / "set", train=20, val=21), block_size=16)
    assert set(data.batch_starts(0, 0, 500)) == {0, 1, 2, 3}
    assert set(data.eval_starts("val", 500)) == {0, 1, 2, 3, 4}
    _, y = data.gather("train", np.array([3]))
    assert y[0, -1] == 19


def test_order_is_a_function_of_seed_and_step(tmp_path):
    """Guards against a hidden generator state: a resumed run, or one that evaluates more often, must see the same data."""
    folder = counting_set(tmp_path / "set")
    data, resumed = TokenData(folder, 8), TokenData(folder, 8)
    steps = [data.batch_starts(7, step, 12) for step in range(5)]
    resumed.eval_starts("train", 3)
    next(resumed.full_windows("val", 2))
    assert resumed.batch_starts(7, 4, 12).tolist() == steps[4].tolist()
    assert steps[4].dtype == np.int64
    everything = {tuple(data.batch_starts(seed, step, 12)) for seed in range(4) for step in range(50)}
    assert len(everything) == 200  # no two steps or seeds share their windows


def test_evaluation_windows_are_those_of_every_run(tmp_path):
    """Guards against evaluation windows that depend on the run, and against evaluating on the windows of a training step."""
    folder = counting_set(tmp_path / "set", val=1000)
    one, other = TokenData(folder, 8), TokenData(folder, 8)
    one.batch_starts(3, 9, 5)
    for split in ("train", "val"):
        assert one.eval_starts(split, 20).tolist() == other.eval_starts(split, 20).tolist()
        for seed in range(3):
            for step in range(3):
                assert one.eval_starts(split, 20).tolist() != one.batch_starts(seed, step, 20).tolist()
    assert one.eval_starts("train", 20).tolist() != one.eval_starts("val", 20).tolist()


@pytest.mark.parametrize("tokens", [9, 10, 16, 17, 18, 100, 129])
@pytest.mark.parametrize(("rows", "world"), [(1, 1), (3, 1), (16, 1), (2, 3), (1, 4)])
def test_full_windows_cover_every_target_once(tmp_path, tokens, rows, world):
    """Guards against a validation loss that skips the last window, counts one twice, or depends on batches or processes."""
    data = TokenData(counting_set(tmp_path / "set", val=tokens), block_size=8)
    seen, batches = [], []
    for rank in range(world):
        mine = list(data.full_windows("val", rows, rank, world))
        batches.append(len(mine))
        for x, y in mine:
            assert x.shape == y.shape == (rows, 8)
            counted = y >= 0
            assert torch.equal(y[counted], x[counted] + 1)  # token i is i
            assert (x[~counted] == 0).all() and (y[~counted] == -1).all()
            seen += y[counted].tolist()
    assert sorted(seen) == list(range(1, tokens))
    assert max(batches) - min(batches) <= 1  # no process waits long for the others
    if world == 1:
        assert seen == sorted(seen)  # in the order of the file


def damage(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")


def test_damaged_files_are_named(tmp_path):
    """Guards against np.memmap's "not a multiple of the data-type size", or worse, training on what is left of a file."""
    folder = counting_set(tmp_path / "set")
    whole = (folder / "train.bin").read_bytes()
    for cut in (1, 4, 400):
        (folder / "train.bin").write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"train.bin has [\d,]+ bytes, but meta.json says 1,000 tokens.*truncated"):
            TokenData(folder, 8)
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        TokenData(folder, 8)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4000\n"
    (folder / "train.bin").write_text(pointer, encoding="utf-8")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        TokenData(folder, 8)
    (folder / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match="train.bin does not exist; run again: python data/text/prepare.py.* --tokenizer "):
        TokenData(folder, 8)
    damage(folder, dataset="wikipedia")  # prepared elsewhere with --out_dir
    with pytest.raises(FileNotFoundError, match=f"python data/wikipedia/prepare.py --out_dir {folder}$"):
        TokenData(folder, 8)


@pytest.mark.parametrize("split", ["train", "val"])
def test_exchanged_file(tmp_path, split):
    """Guards against a loss reported for, or a run trained on, a file that is not the one whose hash stands in the results."""
    folder = counting_set(tmp_path / "set")
    tokens = np.fromfile(folder / f"{split}.bin", dtype=np.uint32)
    tokens[::-1].tofile(folder / f"{split}.bin")
    with pytest.raises(ValueError, match=f"{split}.bin is not the file that meta.json describes"):
        TokenData(folder, 8)


def test_damaged_meta(tmp_path):
    """Guards against a KeyError from an incomplete meta.json."""
    folder = counting_set(tmp_path / "set")
    damage(folder, dtype="int8")
    with pytest.raises(ValueError, match="dtype 'int8' is not one of uint16, uint32"):
        TokenData(folder, 8)
    damage(folder, dtype=["uint16"])
    with pytest.raises(ValueError, match=r"meta.json: dtype \['uint16'\] is not one of uint16, uint32"):
        dataloader.open_data(folder, 8)
    for changes in ({"vocab_size": "3"}, {"train": {"tokens": "200", "bytes": 1, "sha256": ""}}):
        damage(folder, dtype="uint32", **changes)
        with pytest.raises(ValueError, match="meta.json is damaged .TypeError: '(3|200)' is no integer"):
            dataloader.open_data(folder, 8)
    damage(folder, vocab_size=3, train={"tokens": 200, "bytes": 200, "sha256": None})
    with pytest.raises(ValueError, match="meta.json is damaged .TypeError: None is no text"):
        dataloader.open_data(folder, 8)
    for text in (b"{", b"{}", b"[]", b'"caf\xe9"', b'{"vocab_size": 3, "dtype": "uint16", "train": {"tokens": 1}}'):
        (folder / "meta.json").write_bytes(text)
        with pytest.raises(ValueError, match="meta.json is damaged .*; run again: "):
            dataloader.open_data(folder, 8)
    (folder / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="meta.json does not exist"):
        TokenData(folder, 8)


def test_split_shorter_than_a_window(tmp_path):
    """Guards against an endless loop or an index error for a tiny split; block_size + 1 tokens are just enough."""
    folder = counting_set(tmp_path / "set", val=33)
    assert TokenData(folder, 32).eval_starts("val", 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="val.bin has 33 tokens, too few for block_size=33, which needs 34; set --block_size to 32"):
        TokenData(folder, 33)
    with pytest.raises(ValueError, match="block_size=0: at least 1"):
        TokenData(folder, 0)
    with pytest.raises(ValueError, match="val.bin has 1 tokens, of which none can be predicted; prepare more text$"):
        TokenData(counting_set(tmp_path / "one", val=1), 8)


@pytest.mark.parametrize("position", [0, 57, 999])
@pytest.mark.parametrize("split", ["train", "val"])
def test_token_outside_the_vocabulary(tmp_path, monkeypatch, split, position):
    """Guards against a device-side assertion in the embedding, hours later; the check reads in chunks and must see all."""
    monkeypatch.setattr(dataloader, "SCAN_TOKENS", 64)
    tokens = {"train": np.arange(1000) % 50, "val": np.arange(1000) % 50}
    tokens[split][position] = 50
    with pytest.raises(ValueError, match=f"{split}.bin holds token id 50, but the vocabulary ends at 49"):
        TokenData(make_set(tmp_path / "bad", tokens["train"], tokens["val"], 50, "uint16"), 8)
    assert TokenData(make_set(tmp_path / "good", tokens["train"], tokens["val"], 51, "uint16"), 8).vocab_size == 51


def test_attributes(tmp_path):
    """Guards against bits per byte computed from the wrong split, and against a data hash that ignores the training split."""
    folder = counting_set(tmp_path / "a")
    damage(folder, train=json.loads((folder / "meta.json").read_text(encoding="utf-8"))["train"] | {"bytes": 1})
    data = TokenData(folder, 8)
    other = TokenData(counting_set(tmp_path / "b", train=1001), 8)
    assert data.bytes_per_token == 3.0
    assert data.val_hash == hashlib.sha256((tmp_path / "a" / "val.bin").read_bytes()).hexdigest()
    assert data.val_hash == other.val_hash and data.both_hash != other.both_hash
    assert (len(data.train), len(data.val), data.vocab_size) == (1000, 100, 1000)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory from /proc")
def test_resident_memory_stays_flat(tmp_path):
    """Guards against a job that the system kills because every page of the map it ever touched counts as its memory."""

    def resident() -> float:  # MB of mapped files
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("RssFile:")[1].split()[0]) / 1000

    folder = counting_set(tmp_path / "set", dtype="uint16")
    tokens = 150_000_000  # 300 MB, sparse: all zeros
    with open(folder / "train.bin", "wb") as file:
        file.truncate(2 * tokens)
    with open(folder / "train.bin", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    damage(folder, train={"tokens": tokens, "bytes": tokens, "sha256": digest})

    data = TokenData(folder, 8)
    starts = np.concatenate([data.batch_starts(0, step, 128) for step in range(80)])  # 10,240 windows
    before = resident()
    x, _ = data.gather("train", starts)
    assert resident() - before < 20
    assert np.array_equal(data.train[starts], x[:, 0])
    assert resident() - before > 200  # what the map costs for one token of each window: the measurement can see it


def test_unknown_set_lists_the_known_ones():
    """Guards against a bare file-not-found for a typing mistake."""
    message = "no data set 'wikipedai'; known sets: fineweb, numbers, .*stdlib, wikipedia; or give a folder"
    with pytest.raises(FileNotFoundError, match=message):
        dataloader.resolve("wikipedai")
    with pytest.raises(FileNotFoundError, match="no data set 'text'"):  # a script for the user's own sets, not a set
        dataloader.resolve("text")


def test_folder_is_resolved(tmp_path, monkeypatch):
    """Guards against a path that is taken for a name: absolute, relative, and a prepared set of the user's in data/."""
    folder = counting_set(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert dataloader.resolve(str(folder)) == folder
    assert dataloader.resolve("mine") == Path("mine")
    assert dataloader.prepare_if_missing(folder) == folder
    monkeypatch.setattr(dataloader, "DATA", tmp_path)
    assert dataloader.resolve("mine") == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not prepared yet \(no tokenizer.json\); run: python data/text/prepare.py"):
        dataloader.prepare_if_missing("mine")
    other = counting_set(tmp_path / "other" / "stdlib")  # is not the project's stdlib, which could be made here and now
    (other / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"not prepared yet \(no val.bin\); run: python data/.* --out_dir .*other/stdlib$"):
        dataloader.prepare_if_missing(other)


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ({}, "python data/text/prepare.py --input YOUR_TEXT --out_dir {}"),
        ({"dataset": "numbers"}, "python data/text/prepare.py --input YOUR_TEXT --out_dir {}"),
        ({"dataset": "stdlib"}, "python data/stdlib/prepare.py --out_dir {}"),
        ({"kind": "pairs"}, "python data/pairs/prepare.py --input YOUR_PAIRS --out_dir {}"),
        ({"kind": "pairs", "dataset": "wikipedia"}, "python data/pairs/prepare.py --input YOUR_PAIRS --out_dir {}"),
        ({"kind": "pairs", "dataset": "numbers"}, "python data/pairs/prepare.py --numbers --out_dir {}"),
        ({"kind": "pairs", "teacher": {"run": "out/a"}}, "python data/distill/prepare.py --run out/a --out_dir {}"),
        ({"teacher": {"run": "out/a"}, "dataset": "stdlib"}, "python data/distill/prepare.py --run out/a --out_dir {}"),
        (None, "the script that made it, which may be data/text/prepare.py, data/pairs"),
    ],
    ids=lambda value: "",
)
def test_advice_fits_the_kind_of_set(tmp_path, facts, command):
    """Guards against a command that overwrites pairs, or what a run wrote, with a set of text."""
    folder = counting_set(tmp_path / "my set")
    if facts is None:
        (folder / "meta.json").write_text("{", encoding="utf-8")
    else:
        damage(folder, **facts)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"; run: {command.format(shlex.quote(str(folder)))}"):
        dataloader.prepare_if_missing(folder)


@pytest.fixture
def fresh_checkout(tmp_path, monkeypatch) -> Path:
    """The scripts that prepare sets, without any set."""
    for path in [ROOT / "tokenizer.py", ROOT / "errors.py", *ROOT.glob("data/*.py"), *ROOT.glob("data/*/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(dataloader, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["numbers", "data/numbers"])
def test_numbers_are_prepared(fresh_checkout, name):
    """Guards against a first run that stops at a set of pairs which needs no network, given by name or by its folder."""
    folder = dataloader.prepare_if_missing(name)
    assert folder.resolve() == fresh_checkout / "data" / "numbers"
    data = dataloader.open_data(dataloader.resolve(name), 96)
    assert isinstance(data, dataloader.PairData) and data.meta["dataset"] == "numbers"
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="run again: python data/pairs/prepare.py --numbers$"):
        dataloader.open_data(folder, 96)


def test_failing_preparation_is_reported(fresh_checkout, capfd):
    """Guards against going on without data where the script of the default set fails, or hiding what it said."""
    script = "raise SystemExit('error: no standard library here')"
    (fresh_checkout / "data" / "stdlib" / "prepare.py").write_text(script, encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="data set 'stdlib' could not be prepared, see the message above"):
        dataloader.prepare_if_missing("stdlib")
    assert "error: no standard library here" in capfd.readouterr().err


def test_missing_sets(fresh_checkout):
    """Guards against a download nobody asked for, and against a first run that fails: stdlib is prepared, wikipedia named."""
    for name in ("wikipedia", "data/wikipedia", "data/wikipedia/", fresh_checkout / "data" / "wikipedia"):
        with pytest.raises(FileNotFoundError, match="not prepared yet .*; run: python data/wikipedia/prepare.py$"):
            dataloader.prepare_if_missing(name)
    with pytest.raises(FileNotFoundError, match="no data set 'data/wikipedai'; known sets"):
        dataloader.prepare_if_missing("data/wikipedai")
    folder = dataloader.prepare_if_missing("stdlib")
    assert folder == fresh_checkout / "data" / "stdlib"
    data = TokenData(folder, 256)
    assert len(data.train) > 5_000_000 and len(data.val) > 100_000
    written = (folder / "meta.json").stat().st_mtime_ns
    dataloader.prepare_if_missing("stdlib")
    assert (folder / "meta.json").stat().st_mtime_ns == written  # not prepared twice
