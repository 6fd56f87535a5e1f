"""The store of codes: what it holds equals encoding on the fly, and it never hands out codes of anything else."""

import json

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


def test_order_is_a_pure_function(data, tmp_path):
    """Guards resuming: the windows of a step depend on seed and step alone, and all windows occur."""
    store = CodeData(tmp_path / "codes", data, autoencoder())
    a, b, c = (store.batch_starts(seed, step, 8) for seed, step in ((1, 5), (1, 5), (1, 6)))
    assert (a == b).all() and (a != c).any()
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
    elsewhere = dataloader.TokenData(write_tokens(tmp_path / "other", text, text), 24)
    assert "data_hash" in store(autoencoder(seed=1), elsewhere)[1]
    (folder / "codes.bin").write_bytes((folder / "codes.bin").read_bytes()[:-2])
    assert "codes.bin is damaged" in store(autoencoder(seed=1), elsewhere)[1]
    (folder / "meta.json").write_text("{")
    store(autoencoder(seed=1), elsewhere)
    store(autoencoder(seed=1), elsewhere)
    assert extractions == [True, False, True, True, True, True, True, False]
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
    assert not (folder / "meta.json").exists() and max(calls) <= latent.codes.TOKENS // 24
    monkeypatch.undo()
    assert CodeData(folder, data, other).gather("train", np.arange(3))[0].shape == (3, 6, 3)


def test_codes_that_do_not_fit_16_bits_are_refused(data, tmp_path):
    model = autoencoder()
    object.__setattr__(model.config, "codebook_size", 65537)
    with pytest.raises(ValueError, match="65536 is the limit"):
        CodeData(tmp_path / "codes", data, model)
