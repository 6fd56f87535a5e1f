"""The store of codes: what it holds equals encoding on the fly, and it never hands out codes of anything else."""

import contextlib
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_rq_transformer import make_autoencoder

import dataloader
import latent.codes
from conftest import write_tokens
from latent.codes import CodeData


@pytest.fixture
def data(tiny_data, tmp_path) -> dataloader.TokenData:
    text = np.fromfile(tiny_data / "train.bin", dtype=np.uint16)
    return dataloader.TokenData(write_tokens(tmp_path / "data", text[:20_000], text[:100]), 24)


def autoencoder(seed: int = 0, **options):
    return make_autoencoder(seed, vocab_size=256, **options).float()


@pytest.mark.parametrize("offsets", [1, 3])
def test_stored_codes_equal_codes_made_on_the_fly(data, tmp_path, offsets):
    """Guards the store: each window's codes are those of its text, in evaluation mode, whatever else was encoded with it."""
    model = autoencoder().eval()
    store = CodeData(tmp_path / "codes", data, model, offsets)
    begins = [i * (24 // offsets) + i for i in range(offsets)]
    starts = [start for begin in begins for start in range(begin, 20_000 - 24, 24)]
    assert store.windows == len(starts) and len({begin % 4 for begin in begins}) == offsets
    chosen = np.array([0, 1, 777, 832, store.windows - 1, 5])
    codes, same = store.gather("train", chosen)
    assert codes is same and codes.dtype == torch.int64 and codes.shape == (6, 6, 3)
    for code, number in zip(codes, chosen):
        text = torch.from_numpy(data.train[starts[number] : starts[number] + 24].astype(np.int64))
        assert torch.equal(code, model.encode(text[None])[0])
    assert len(codes.unique()) > 3
    with pytest.raises(AssertionError, match="only the training text"):
        store.gather("val", chosen)


def test_how_codes_are_extracted_does_not_matter(data, tmp_path, monkeypatch):
    """Guards chunks and precision: one window at a time, because it is longer than a chunk, or under autocast: the same codes."""
    text, model = np.array(data.train[:1500]), autoencoder()
    few = dataloader.TokenData(write_tokens(tmp_path / "few", text, text), 24)

    def codes(name: str) -> torch.Tensor:
        return CodeData(tmp_path / name, few, model).gather("train", np.arange(62))[0]

    whole, used = codes("whole"), []
    seen = lambda *_: used.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))  # noqa: E731
    hook = model.down.register_forward_pre_hook(seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codes("autocast"), whole)
    hook.remove()
    assert set(used) == {("highest", False)}, "on a GPU products and convolutions would be TF32"
    monkeypatch.setattr(latent.codes, "TOKENS", 23)
    assert torch.equal(codes("single"), whole)


def test_all_16_bits_are_codes(data, tmp_path):
    """Guards the format: of 65536 codes, as many as are allowed, those of the upper half do not come back negative."""
    text, model = np.array(data.train[:1000]), autoencoder(codebook_size=2**16, codebook_levels=1)
    few = dataloader.TokenData(write_tokens(tmp_path / "few", text, text), 24)
    codes = CodeData(tmp_path / "codes", few, model).gather("train", np.arange(40))[0]
    assert torch.equal(codes, model.encode(torch.from_numpy(text[: 40 * 24].astype(np.int64)).view(40, 24)))
    assert codes.max() >= 2**15


def store_of_rank(rank: int, folder: Path, data: dataloader.TokenData, model) -> None:
    """One of two processes: what it said and what it read, in files of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    with open(folder / f"said{rank}", "w") as said, contextlib.redirect_stdout(said):
        torch.save(CodeData(folder / "codes", data, model).gather("train", np.arange(50))[0], folder / f"read{rank}")
    os._exit(0)  # all is saved; see runtime.end_process


def test_one_process_extracts_and_the_other_waits(data, tmp_path):
    """Guards DDP: two processes that write one file, or one that reads it before it is written."""
    model, context = autoencoder(), multiprocessing.get_context("fork")
    processes = [context.Process(target=store_of_rank, args=(rank, tmp_path, data, model)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert "encoding the training text" in (tmp_path / "said0").read_text() and not (tmp_path / "said1").read_text()
    expected = CodeData(tmp_path / "alone", data, model).gather("train", np.arange(50))[0]
    assert all(torch.equal(torch.load(tmp_path / f"read{rank}"), expected) for rank in range(2))


def test_two_runs_extract_at_the_same_time(data, tmp_path, monkeypatch):
    """Guards priors started together on one autoencoder: one that writes into the other's unfinished file, or takes it away."""
    folder, model, context = tmp_path / "codes", autoencoder(), multiprocessing.get_context("fork")
    calls, encode = [], model.encode

    def meet(text):
        calls.append(len(text))
        if len(calls) == 2:  # another run comes and is done while this one is in the middle
            other = context.Process(target=CodeData, args=(folder, data, autoencoder()))
            other.start()
            other.join(60)
            assert other.exitcode == 0
        return encode(text)

    monkeypatch.setattr(model, "encode", meet)
    found = CodeData(folder, data, model).gather("train", np.arange(800))[0]
    assert len(calls) > 2 and torch.equal(found, CodeData(tmp_path / "alone", data, autoencoder()).gather("train", np.arange(800))[0])
    assert sorted(path.name for path in folder.iterdir()) == ["codes.bin", "meta.json"]


def test_copies_are_cut_into_other_blocks():
    """Guards code_offsets: copies whose windows begin at the same place of a block hold the same codes once more."""
    for T in (16, 32, 96, 256):
        for S in (2, 4, 8, 16):
            for copies in range(1, S + 1):
                begins = latent.codes.begins_of_copies(T, S, copies)
                assert begins[0] == 0 and max(begins) < T and len({begin % S for begin in begins}) == copies


def test_order_is_a_pure_function(data, tmp_path):
    """Guards resuming: the windows of a step depend on seed and step alone, and all windows occur."""
    store = CodeData(tmp_path / "codes", data, autoencoder())
    a, b, c, d = (store.batch_starts(seed, step, 8) for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5)))
    assert (a == b).all() and (a != c).any() and (a != d).any()
    many = store.batch_starts(0, 0, 100_000)
    assert many.min() == 0 and many.max() == store.windows - 1


def test_store_is_reused_or_made_again(data, tmp_path, capsys):
    """Guards against stale codes: the same autoencoder and text reuse the store; another codebook, text or damage remakes it."""
    folder, extractions = tmp_path / "codes", []

    def store(model, data=data, **options) -> CodeData:
        capsys.readouterr()
        made = CodeData(folder, data, model, **options)
        said = capsys.readouterr().out
        extractions.append("encoding the training text" in said)
        return made, said

    first = store(autoencoder())[0].gather("train", np.arange(50))[0]
    assert torch.equal(store(autoencoder())[0].gather("train", np.arange(50))[0], first)
    other, said = store(autoencoder(seed=1))
    assert "note: " in said and "codebook_hash" in said and not torch.equal(other.gather("train", np.arange(50))[0], first)
    assert "offsets, windows" in store(autoencoder(seed=1), offsets=2)[1]
    text = np.array(data.train[:9000])
    elsewhere = dataloader.TokenData(write_tokens(tmp_path / "other", text, np.array(data.val)), 24)  # validation is the same
    assert "data_hash" in store(autoencoder(seed=1), elsewhere)[1]
    whole = (folder / "codes.bin").read_bytes()
    for content in (whole[:-2], b"\xff\xff" + whole[2:]):
        (folder / "codes.bin").write_bytes(content)
        assert "codes.bin is damaged" in store(autoencoder(seed=1), elsewhere)[1]
        assert (folder / "codes.bin").read_bytes() == whole
    for damaged in ("{", "[1]"):
        (folder / "meta.json").write_text(damaged)
        store(autoencoder(seed=1), elsewhere)
    store(autoencoder(seed=1), elsewhere)
    assert extractions == [True, False, True, True, True, True, True, True, True, False]
    assert json.loads((folder / "meta.json").read_text())["windows"] == 374


def test_a_crash_leaves_no_store(data, tmp_path, monkeypatch):
    """Guards the order of writing: an interrupted extraction, even over an older store, is not taken for a whole one."""
    folder, model = tmp_path / "codes", autoencoder()
    CodeData(folder, data, model)
    other = autoencoder(seed=1)
    calls, encode = [], other.encode

    def crash(text):
        calls.append(len(text))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(text)

    monkeypatch.setattr(other, "encode", crash)
    with pytest.raises(KeyboardInterrupt):
        CodeData(folder, data, other)
    assert [path.name for path in folder.iterdir()] == ["codes.bin"] and max(calls) <= latent.codes.TOKENS // 24
    monkeypatch.undo()
    assert CodeData(folder, data, other).gather("train", np.arange(3))[0].shape == (3, 6, 3)


def test_a_store_that_shrinks_during_a_run_is_noticed(data, tmp_path):
    """Guards against memory that was never written: windows behind the new end are no codes, those before it still are."""
    folder = tmp_path / "codes"
    store = CodeData(folder, data, autoencoder())
    last = store.gather("train", np.array([store.windows - 2]))[0]
    (folder / "codes.bin").write_bytes((folder / "codes.bin").read_bytes()[:-2])
    assert torch.equal(store.gather("train", np.array([store.windows - 2]))[0], last)
    with pytest.raises(AssertionError, match="codes.bin ends within window"):
        store.gather("train", np.array([store.windows - 1]))


def test_codes_that_do_not_fit_16_bits_are_refused(data, tmp_path):
    model = autoencoder()
    object.__setattr__(model.config, "codebook_size", 65537)
    with pytest.raises(ValueError, match="65536 is the limit"):
        CodeData(tmp_path / "codes", data, model)
