"""Shared by all tests: tiny models that are far from their initialisation, and a tiny data set of real text."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_SILENT", "true")
torch.set_num_threads(1)  # tiny tensors, and pytest -n runs one process a core: more threads would only wait for each other

import tokenizer  # noqa: E402
from baseline_transformer.model import DecoderOnly, DecoderOnlyConfig  # noqa: E402
from model import EncoderDecoder, EncoderDecoderConfig  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The one test that takes minutes comes first: begun last, it would keep one process busy and the others waiting."""
    items.sort(key=lambda item: item.name != "test_readme_commands")


HOW_TO_INSTALL = 'transformers is not installed: pip install -e ".[hf]"'

TINY_ENCODER_DECODER = dict(
    vocab_size=31, block_size=12, n_encoder_layer=2, n_decoder_layer=2, n_head=2, n_cross_head=3, n_embd=12
)
TINY_BASELINE = dict(vocab_size=31, block_size=12, n_layer=3, n_head=2, n_embd=12)

# every value of every option stands in at least one of these, which tests/test_model.py holds
ENCODER_DECODER_OPTIONS = [
    {},
    {"bias": True, "pos_sub": "plain", "embedding_loss": "mse"},
    {"position": "rope", "n_cross_head": 4},  # head widths 6 and 3: one of them odd
    {"position": "rope", "pos_sub": "ln", "bias": True},
    {"pos_sub": "ln", "decoder_order": "cross_first", "embedding_loss": "cosine", "embedding_loss_ln": "average"},
    {"decoder_pos_emb": True, "bridge_ln": True, "bridge_init": "identity", "embedding_loss": "log_cosine",
     "embedding_loss_ln": "none"},
    {"n_encoder_layer": 1, "n_decoder_layer": 3, "embedding_loss": "mse", "embedding_loss_detach": "embedding"},
    {"n_encoder_layer": 3, "n_decoder_layer": 1, "embedding_loss": "mse", "embedding_loss_detach": "none",
     "embedding_loss_ln_affine": False, "embedding_loss_weight": 8.0},
    {"window": 4, "position": "rope", "n_cross_head": 2},  # with a compression head: test_compression.py
]  # fmt: skip
BASELINE_OPTIONS = [
    {},
    {"bias": True, "pos_sub": "plain"},
    {"position": "rope"},
    {"position": "rope", "pos_sub": "plain"},
    {"pos_sub": "ln"},
    {"window": 5},
]
ALL_MODELS = [("encoder_decoder", o) for o in ENCODER_DECODER_OPTIONS] + [("decoder_only", o) for o in BASELINE_OPTIONS]
ALL_MODELS_IDS = [f"{name}-{'-'.join(map(str, o.values())) or 'default'}" for name, o in ALL_MODELS]


def make_model(name: str, options: dict, seed: int = 0, dtype: torch.dtype = torch.float64, **more) -> torch.nn.Module:
    """A tiny model with weights of order one: at initialisation attention is almost uniform and would hide a wrong mask."""
    torch.manual_seed(seed)
    if name == "encoder_decoder":
        model = EncoderDecoder(EncoderDecoderConfig(**(TINY_ENCODER_DECODER | options | more)))
    else:
        model = DecoderOnly(DecoderOnlyConfig(**(TINY_BASELINE | options | more)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


def write_tokens(folder: Path, train: np.ndarray, val: np.ndarray, vocab_size: int = 256) -> Path:
    """A data set folder in the format of data/*/prepare.py, from token ids; one byte per token."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"dataset": folder.name, "tokenizer": "byte", "vocab_size": vocab_size, "dtype": "uint16", "source": "a test"}
    for name, tokens in (("train", train), ("val", val)):
        data = np.asarray(tokens, dtype=np.uint16).tobytes()
        (folder / f"{name}.bin").write_bytes(data)
        meta[name] = {"tokens": len(tokens), "bytes": len(tokens), "documents": 1, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    tokenizer.save(tokenizer.ByteTokenizer(), folder)
    return folder


@pytest.fixture(scope="session")
def wide_data(tiny_data, tmp_path_factory) -> Path:
    """The same tokens, said to stand for two bytes each in validation: bits per byte are half of bits per token."""
    folder = shutil.copytree(tiny_data, tmp_path_factory.mktemp("data") / "wide")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta["val"]["bytes"] *= 2
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The source of argparse as bytes: 80,000 for training, the next 3,001 for validation."""
    text = np.frombuffer(Path(argparse.__file__).read_bytes(), dtype=np.uint8)
    return write_tokens(tmp_path_factory.mktemp("data") / "tiny", text[:80_000], text[80_000:83_001])


@pytest.fixture(scope="session")
def reference(tiny_data, tmp_path_factory) -> Path:
    """Six uninterrupted steps with dropout, the embedding loss, accumulation: everything that could break a resumed run."""
    from tiny_runs import REFERENCE, run

    out = tmp_path_factory.mktemp("runs") / "reference"
    run(tiny_data, out, *REFERENCE)
    return out


def crash_behind_meta(monkeypatch) -> None:
    """Have a preparation end right after it has put meta.json into place."""
    replace = os.replace

    def crash_after(source, target):
        replace(source, target)
        if Path(target).name == "meta.json":
            raise OSError("the machine went down")

    monkeypatch.setattr(os, "replace", crash_after)
