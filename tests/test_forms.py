"""Forms of the codes of a block: each says what the bytes say, and reading them shows nothing of what is to be written."""

import functools
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from test_rq_transformer import disturb, run

import checkpoint
import train
from dev import forms
from latent.rq_transformer import RQTransformer, RQTransformerConfig

SIZES = {"autoencoder": None, "n_spatial_layer": 1, "n_depth_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}


@pytest.fixture(scope="module")
def autoencoder_run(tiny_data, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("runs") / "autoencoder"
    run("autoencoder", tiny_data, out, "--encoder_context=block")
    return str(out)


def build(read: str, write: str) -> forms.FormTransformer:
    torch.manual_seed(0)
    model = forms.FormTransformer(forms.FormConfig(**SIZES, read=read, write=write))
    disturb(model)
    return model.eval()


@pytest.mark.parametrize("name", forms.FORMS)
def test_a_form_can_be_inverted(name):
    """Guards nats of codes that say less than the bytes: two blocks never have the same codes, and codes are bytes."""
    torch.manual_seed(0)
    near = torch.tensor(list(itertools.product((0, 1, 2, 127, 128, 255), repeat=4)))
    blocks = torch.cat((near, torch.randint(256, (50_000, 4)))).unique(dim=0)
    codes = forms.Form(name, 4)(blocks)[:, 0]
    assert codes.min() >= 0 and codes.max() <= 255
    assert len(codes.unique(dim=0)) == len(blocks)
    assert torch.equal(codes, blocks) == (name == "bytes")


def test_bytes_are_the_model_without_an_autoencoder():
    """Guards the control: reading and writing bytes is the model of config/latent/rq_transformer_bytes.py, bit for bit."""
    model = build("bytes", "bytes")
    plain = RQTransformer(RQTransformerConfig(**SIZES)).eval()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(1))
    targets = idx.clone()
    targets[1, 20:] = -1
    assert model(idx, targets)[1]["token"].item() == plain(idx, targets)[1]["token"].item()


@pytest.mark.parametrize(("read", "write"), [("mix", "mix"), ("bytes", "pairs"), ("pairs", "chain"), ("run", "bytes"), ("bytes", "run")])
def test_what_is_read_is_the_past(read, write, autoencoder_run):
    """Guards a leak: a byte changes logits of its own block only behind the first code that it changes, and of later blocks all."""
    model = build(*(autoencoder_run if name == "run" else name for name in (read, write)))
    idx = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(1))
    other = idx.clone()
    other[0, 13] += 1  # of block 3
    codes, others = (model.encode(x, None)[0] for x in (idx, other))
    assert torch.equal(codes[:, :3], others[:, :3]) and torch.equal(codes[:, 4:], others[:, 4:])
    assert model.read.name == model.write.name or not torch.equal(codes, model.seen)
    a, b = (model(x)[0] for x in (idx, other))  # (1, M, D, K)
    first = int((codes[0, 3] != others[0, 3]).int().argmax()) if not torch.equal(codes, others) else codes.size(-1)
    assert torch.equal(a[:, :3], b[:, :3]) and torch.equal(a[:, 3, : first + 1], b[:, 3, : first + 1])
    if read != "run":  # whose codes may be the same
        assert (a[:, 4:] != b[:, 4:]).any(-1).all()


@pytest.mark.parametrize("name", ["bytes", "mix"])
def test_a_table_of_last_codes(name, tiny_data):
    """Guards the count of what follows three codes: all blocks of the training text, wherever they begin, and no other."""
    train, val = ([int(x) for x in np.fromfile(tiny_data / f"{split}.bin", dtype=np.uint16)] for split in ("train", "val"))
    form, counts = forms.Form(name, 4), defaultdict(Counter)
    code = lambda block: tuple(form(torch.tensor([block]))[0, 0].tolist())  # noqa: E731
    of = functools.cache(lambda *block: code(block))
    for i in range(len(train) - 3):
        *before, last = of(*train[i : i + 4])
        counts[tuple(before)][last] += 1
    nats = []
    for i in range(0, len(val) - 3, 4):
        *before, last = of(*val[i : i + 4])
        stood = counts[tuple(before)]
        nats.append(-math.log((stood[last] + 0.1 / 256) / (stood.total() + 0.1)))
    assert forms.count_last(name, str(tiny_data)) == pytest.approx(sum(nats) / len(nats), rel=1e-9)


def test_a_run_goes_on_in_its_forms(tiny_data, tmp_path, monkeypatch):
    """Guards numbers of a wrong form: a run says which it has, keeps them when resumed, and no other command takes codes for bytes."""
    monkeypatch.setattr(checkpoint, "MODELS", dict(checkpoint.MODELS))
    monkeypatch.setattr(checkpoint, "CONFIGS", dict(checkpoint.CONFIGS))
    forms.register()
    out = f"--out_dir={tmp_path / 'mix'}"
    sizes = ["--n_spatial_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=2"]
    steps = ["--max_iters=2", "--eval_interval=2", "--eval_iters=1", "--final_eval_tokens=64", "--device=cpu"]
    first = train.main([f"--dataset={tiny_data}", out, "--model=forms", "--read=bytes", "--write=mix", *sizes, *steps])
    assert train.main([out, "--resume"])["val_loss"] == first["val_loss"]
    with pytest.raises(ValueError, match="write='chain' .was 'mix'."):
        train.main([out, "--resume", "--write=chain"])
    with pytest.raises(ValueError, match="judge --final_eval_tokens=N, a multiple of 4"):
        train.main([out, "--resume", "--final_eval_tokens=66"])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown model 'forms'"):
        checkpoint.load_run(tmp_path / "mix")


def test_codes_that_know_other_blocks_are_refused(tiny_data, tmp_path):
    """Guards nats of a byte given codes that have seen it: only an autoencoder that sees its block alone is a form."""
    run("autoencoder", tiny_data, tmp_path / "prefix", "--encoder_context=prefix")
    with pytest.raises(ValueError, match="needs encoder_context=block and latent_factor=4"):
        forms.Form(str(tmp_path / "prefix"), 4)
