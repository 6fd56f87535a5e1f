"""
What makes the codes of a block hard to predict: reading them, or writing them? Trains an RQ-transformer whose spatial transformer reads
the blocks so far in one form, and whose depth transformer predicts the next block in another (or the same) form.

    python -m dev.forms READ WRITE config/latent/rq_transformer_bytes.py --seed=1 --out_dir=out/forms/mix ...

Every form is a function of the bytes b_1 .. b_S of a block alone, so h_m always knows the same text, and each but the last can be
inverted: what WRITE costs are the nats of the bytes themselves.

    bytes        b_1 .. b_S; READ = WRITE = bytes is config/latent/rq_transformer_bytes.py
    backwards    b_S .. b_1
    chain        b_1, b_1 + b_2, b_2 + b_3, ...                modulo 256
    mix          A b, for one random matrix A                  modulo 256, det A odd: each code depends on all bytes
    pairs        a random permutation of all 65,536 pairs of bytes, for (b_1, b_2), (b_3, b_4), ...
    RUN          the codes of the autoencoder of a run directory, which must see its block only; its tokens' nats come on top

Two forms have two tables of embeddings; codes of a run have a learned table, too, not the codebook's vectors.

    python -m dev.forms count WRITE ...

says what the last code of a block costs a table that knows only the codes before it: how often each code stood behind them, over all
blocks of 4 bytes of the standard library's training text, wherever they begin. Where that is little, it is no matter of what is known.
"""

import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import checkpoint
import dataloader
from errors import exit_on_user_error
from latent.rq_transformer import RQTransformer

SEED = 0  # of the random matrix and permutation
SMOOTH = 0.1  # times that all codes together are taken to have been seen behind anything
FORMS = ("bytes", "backwards", "chain", "mix", "pairs")


class Form:
    """One form of the codes of a block of S bytes."""

    def __init__(self, name: str, S: int):
        self.name, self.K, self.D = name, 256, S
        random = torch.Generator().manual_seed(SEED)
        if name == "mix":
            while True:
                self.matrix = torch.randint(256, (S, S), generator=random)
                if round(torch.linalg.det((self.matrix % 2).double()).item()) % 2:
                    break
        if name == "pairs":
            self.permutation = torch.randperm(256 * 256, generator=random)
        if name not in FORMS:
            self.autoencoder = checkpoint.load_autoencoder(Path(name))
            config = self.autoencoder.config
            if config.encoder_context != "block" or config.latent_factor != S:
                raise ValueError(f"{name} needs encoder_context=block and latent_factor={S}")
            self.K, self.D = config.codebook_size, config.codebook_levels

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        """Bytes (B, M S) -> codes (B, M, D)."""
        if self.name not in FORMS:
            return self.autoencoder.encode(idx)
        blocks = idx.unflatten(1, (-1, self.D))  # (B, M S) -> (B, M, S)
        match self.name:
            case "backwards":
                return blocks.flip(-1)
            case "chain":
                return (blocks + F.pad(blocks[..., :-1], (1, 0))) % 256
            case "mix":
                return blocks @ self.matrix.T % 256
            case "pairs":
                word = self.permutation[blocks[..., ::2] * 256 + blocks[..., 1::2]]  # (B, M, S / 2)
                return torch.stack((word // 256, word % 256), -1).flatten(-2)  # (B, M, S / 2, 2) -> (B, M, S)
        return blocks


class FormTransformer(RQTransformer):
    """An RQ-transformer without an autoencoder that reads and writes the forms `names`."""

    names: tuple[str, str]  # READ, WRITE

    def __init__(self, config):
        read, write = (Form(name, config.latent_factor) for name in self.names)
        config = copy.copy(config)  # without an autoencoder its K and D are those of bytes, whatever was given
        object.__setattr__(config, "codebook_size", write.K)
        object.__setattr__(config, "codebook_levels", write.D)
        super().__init__(config)
        self.read, self.write = read, write
        self.read_table = nn.Parameter(torch.empty(read.D, read.K, config.n_embd).normal_(std=0.02)) if read.name != write.name else None
        self.seen: torch.Tensor  # what is read of the text that `encode` saw last, (B, M, D)

    def encode(self, idx, mask):
        if mask is not None:
            blocks = mask.unflatten(1, (-1, self.config.latent_factor))
            assert (blocks.all(-1) == blocks.any(-1)).all(), "a block is partly text"
        codes, self.seen = self.write(idx), self.read(idx)
        return codes if mask is None else torch.where(blocks.all(-1, keepdim=True), codes, -1), None

    def logits(self, codes):
        table = self.table()
        h = self.states(self.seen[:, :-1], table if self.read_table is None else self.read_table)
        return self.code_logits(h.flatten(0, 1), codes.flatten(0, 1)[:, :-1], table).unflatten(0, codes.shape[:2])


def count_last(name: str, dataset: str = "stdlib", S: int = 4) -> float:
    """Nats of the last code of a block of the validation text, of the table described at the top."""
    form = Form(name, S)
    data = dataloader.open_data(dataloader.prepare_if_missing(dataset), 256, "val")
    train = np.fromfile(data.folder / "train.bin", dtype=np.uint16)
    blocks, times = np.unique(np.lib.stride_tricks.sliding_window_view(train, S), axis=0, return_counts=True)
    blocks = np.concatenate((blocks, data.val[: len(data.val) // S * S].reshape(-1, S))).astype(np.int64)
    padded = F.pad(torch.from_numpy(blocks).flatten(), (0, -blocks.size % 256))  # an autoencoder takes windows of 256 bytes
    codes = torch.cat([form(rows) for rows in padded.view(-1, 256).split(64)]).flatten(0, 1)[: len(blocks)].numpy()  # (N, D)
    _, before = np.unique(codes[:, :-1], axis=0, return_inverse=True)  # what stood before, numbered
    _, all_of = np.unique(codes, axis=0, return_inverse=True)
    n = len(times)  # the others are those of the validation text
    stood, followed = (np.bincount(of[:n], times, of.max() + 1)[of[n:]] for of in (before, all_of))
    return float(-np.log((followed + SMOOTH / form.K) / (stood + SMOOTH)).mean())


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv[:2]:
        print(__doc__)
        return
    if argv[0] == "count":
        for name in argv[1:]:
            print(f"{name}: {count_last(name):.3f} nats for the last code of a block")
        return
    if len(argv) < 3:
        raise ValueError("usage: python -m dev.forms READ WRITE CONFIG [--key=value ...], as the top of dev/forms.py says")
    FormTransformer.names = (argv[0], argv[1])
    config, _ = checkpoint.MODELS["rq_transformer"]
    checkpoint.MODELS["rq_transformer"] = (config, FormTransformer)
    sys.argv = ["train.py", *argv[2:]]
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "train.py"), run_name="__main__")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
