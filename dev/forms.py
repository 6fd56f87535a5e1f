"""
What makes the codes of a block hard to predict: reading them, or writing them? Trains an RQ-transformer whose spatial transformer reads
the blocks so far in one form, and whose depth transformer predicts the next block in another (or the same) form.

    python -m dev.forms config/latent/rq_transformer_bytes.py --read=bytes --write=mix --seed=1 --out_dir=out/forms/mix ...
    python -m dev.forms --resume --out_dir=out/forms/mix

It is train.py with one more model, which no other command knows. Every form is a function of the bytes b_1 .. b_S of a block alone,
so h_m always knows the same text, and each but the last can be inverted: what `write` costs are the nats of the bytes themselves.

    bytes        b_1 .. b_S; read and written it is config/latent/rq_transformer_bytes.py
    backwards    b_S .. b_1
    chain        b_1, b_1 + b_2, b_2 + b_3, ...                modulo 256
    mix          A b, for one random matrix A                  modulo 256, det A odd: each code depends on all bytes
    pairs        a random permutation of all 65,536 pairs of bytes, for (b_1, b_2), (b_3, b_4), ...
    RUN          the codes of the autoencoder of a run directory, which must see its block only; its tokens' nats come on top

Two forms have two tables of embeddings; codes of a run have a learned table, too, not the codebook's vectors.

    python -m dev.forms count FORM ...

says what the last code of a block costs a table that knows only the codes before it: how often each code stood behind them, over all
blocks of 4 bytes of the standard library's training text, wherever they begin. Where that is little, it is no matter of what is known.
"""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import checkpoint
import dataloader
from errors import exit_on_user_error
from latent.rq_transformer import RQTransformer, RQTransformerConfig
from model import require

SEED = 0  # of the random matrix and permutation
SMOOTH = 0.1  # times that all codes together are taken to have been seen behind anything
FORMS = ("bytes", "backwards", "chain", "mix", "pairs")


class Form:
    """One form of the codes of a block of S bytes."""

    def __init__(self, name: str, S: int):
        require(name in FORMS or Path(name).is_dir(), f"{name}: neither a form nor a run directory; forms are {', '.join(FORMS)}")
        require(name != "pairs" or S % 2 == 0, f"latent_factor={S}: pairs needs an even one")
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
            fits = config.encoder_context == "block" and config.latent_factor == S
            require(fits, f"{name} needs encoder_context=block and latent_factor={S}")
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


@dataclass(frozen=True)
class FormConfig(RQTransformerConfig):
    autoencoder: str | None = None  # none, as codes are made of bytes
    read: str = "bytes"  # form in which the spatial transformer reads blocks: a name, or the run of an autoencoder
    write: str = "bytes"  # form in which the depth transformer predicts them

    def __post_init__(self):
        require(self.autoencoder is None, f"autoencoder={self.autoencoder}: a form takes its place, --read=RUN or --write=RUN")
        super().__post_init__()
        write = Form(self.write, self.latent_factor)
        object.__setattr__(self, "codebook_size", write.K)  # where those of bytes are now
        object.__setattr__(self, "codebook_levels", write.D)


class FormTransformer(RQTransformer):
    """An RQ-transformer without an autoencoder that reads one form of the bytes and writes another."""

    def __init__(self, config: FormConfig):
        super().__init__(config)
        read, write = (Form(name, config.latent_factor) for name in (config.read, config.write))
        self.read, self.write = read, write
        self.read_table = nn.Parameter(torch.empty(read.D, read.K, config.n_embd).normal_(std=0.02)) if read.name != write.name else None
        self.seen: torch.Tensor  # what is read of the text that `encode` saw last, (B, M, D)

    def encode(self, idx, mask):
        if mask is not None:
            blocks = mask.unflatten(1, (-1, self.config.latent_factor))
            whole, S = (blocks.all(-1) == blocks.any(-1)).all(), self.config.latent_factor
            require(whole, f"the text to judge ends inside a block of {S} bytes; judge --final_eval_tokens=N, a multiple of {S}")
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


def register() -> None:
    """Make it a model that train.py can build."""
    checkpoint.MODELS["forms"] = (FormConfig, FormTransformer)
    checkpoint.CONFIGS["forms"] = FormConfig


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv[:2]:
        print(__doc__)
        return
    if argv[0] == "count":
        require(len(argv) > 1, f"count needs forms: {', '.join(FORMS)}, or runs of autoencoders")
        for name in argv[1:]:
            print(f"{name}: {count_last(name):.3f} nats for the last code of a block")
        return
    register()
    sys.argv = ["train.py", *argv, "--model=forms"]
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "train.py"), run_name="__main__")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
