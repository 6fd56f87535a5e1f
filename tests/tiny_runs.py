"""Runs of train.py with tiny models on real text, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import train
from conftest import ROOT
from errors import exit_on_user_error
from trainer import Trainer

REFERENCE = ("--dropout=0.1", "--embedding_loss=mse", "--pos_sub=plain", "--gradient_accumulation_steps=2", "--grad_clip=1.0")
TINY = {
    "encoder_decoder": "--n_encoder_layer=1 --n_decoder_layer=1 --n_head=2 --n_cross_head=2 --n_embd=16 --block_size=32",
    "decoder_only": "--model=decoder_only --n_layer=2 --n_head=2 --n_embd=16 --block_size=32",
}
SHORT = "--max_iters=6 --warmup_iters=2 --eval_interval=3 --eval_iters=2 --log_interval=1 --batch_size=4 --device=cpu --dtype=float32"


def arguments(data: Path, out: Path, *more: str, model: str = "encoder_decoder") -> list[str]:
    return [f"--dataset={data}", f"--out_dir={out}", *TINY[model].split(), *SHORT.split(), *more]


def run(data: Path, out: Path, *more: str, model: str = "encoder_decoder") -> dict:
    return train.main(arguments(data, out, *more, model=model))


def command(
    data: Path, out: Path, *more: str, model: str = "encoder_decoder", launcher: tuple[str, ...] = ()
) -> subprocess.Popen:
    start = launcher or (sys.executable,)
    words = [*start, str(ROOT / "train.py"), *arguments(data, out, *more, model=model)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def records(out: Path, kind: str) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(out: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / which / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def complaint(script, argv: list[str], capsys) -> tuple[int, str]:
    """Exit status and what stands on stderr, as a user of the script sees it."""
    with pytest.raises(SystemExit) as exit_info, exit_on_user_error():
        script.main(argv)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return exit_info.value.code, [line for line in error.splitlines() if line.startswith("error: ")][-1]


def call_at(monkeypatch, step: int, what) -> None:
    """Have what() called behind the update that finishes `step`."""
    update = Trainer.update

    def with_call(trainer):
        sums = update(trainer)
        if trainer.step == step:
            what()
        return sums

    monkeypatch.setattr(Trainer, "update", with_call)


def crash() -> None:
    raise RuntimeError("the machine is gone")
