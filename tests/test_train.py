"""The training loop and what it writes, on real text with tiny models."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoint
import configurator
import dataloader
import generate
import recorder
import runtime
import sample
import tokenizer
import train
from baseline_transformer.model import DecoderOnly, DecoderOnlyConfig
from conftest import ROOT, make_model, write_tokens
from data.pairs import prepare as pairs
from model import Block, DecoderBlock
from runs import group, read_runs
from trainer import TrainConfig, Trainer, learning_rate, make_optimizer, summed_loss, whole_file

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


@pytest.fixture(scope="module")
def reference(tiny_data, tmp_path_factory) -> Path:
    """Six uninterrupted steps with dropout, the embedding loss, accumulation: everything that could break a resumed run."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    run(tiny_data, out, *REFERENCE)
    return out


REFERENCE = ("--dropout=0.1", "--embedding_loss=mse", "--pos_sub=plain", "--gradient_accumulation_steps=2", "--grad_clip=1.0")

# ----------------------------------------------------------------------------------------------------------------------
# learning


@pytest.mark.parametrize("model", ["encoder_decoder", "decoder_only"])
def test_learns_a_text_by_heart(tmp_path, model):
    """Guards the whole loop (targets, schedule, optimizer): a text with period 23 must be predicted almost perfectly."""
    text = np.resize(np.frombuffer(b"the quick brown foxes. ", dtype=np.uint8), 4000)
    data = write_tokens(tmp_path / "data", text, text[:500])
    summary = run(data, tmp_path / "run", "--max_iters=300", "--warmup_iters=30", "--eval_interval=300", "--log_interval=50",
                  "--learning_rate=1e-2", "--n_embd=32", model=model)  # fmt: skip
    assert summary["val_loss"] < 0.1
    assert abs(summary["val_bits_per_byte"] - summary["val_loss"] / math.log(2)) < 1e-9
    assert summary["best_val_loss"] < 0.1 and summary["steps"] == 300 and summary["tokens"] == 300 * 4 * 32
    first, last = records(tmp_path / "run", "train")[0], records(tmp_path / "run", "train")[-1]
    assert first["loss"] > last["loss"] and first["loss"] == first["token_loss"]
    texts = sample.main(
        [str(tmp_path / "run"), "--prompt=the quick brown ", "--temperature=0", "--max_new_tokens=14", "--device=cpu"]
    )
    assert texts == ["foxes. the qui"]


def test_accumulation_does_not_change_the_result(tiny_data, tmp_path):
    """Guards the scaling of the loss, and the tokens that are said to be read: 8 x 1, 4 x 2 and 2 x 4 sequences are the same step."""
    runs = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        out = tmp_path / f"{batch}"
        summary = run(
            tiny_data,
            out,
            f"--batch_size={batch}",
            f"--gradient_accumulation_steps={accumulation}",
            "--dtype=float64",
            "--eval_iters=1",
        )
        assert summary["tokens"] == records(out, "train")[-1]["tokens"] == 6 * 8 * 32
        runs.append([r["loss"] for r in records(out, "train")])
    assert np.ptp(runs, axis=0).max() < 1e-10


def test_schedule():
    """Guards the learning rate: linear warm-up, cosine to min_lr at lr_decay_iters, constant after; nearly constant if that is far."""
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_iters=10, max_iters=100, lr_decay_iters=60)
    assert [learning_rate(config, s) for s in (0, 4, 9)] == [1 / 11, 5 / 11, 10 / 11]
    assert learning_rate(config, 10) == 1.0 and abs(learning_rate(config, 35) - 0.6) < 1e-12
    assert abs(learning_rate(config, 60) - 0.2) < 1e-12 and learning_rate(config, 99) == 0.2
    assert TrainConfig(learning_rate=3.0).lowest_lr == 0.3
    published = TrainConfig(learning_rate=9e-4, min_lr=9e-5, warmup_iters=300, max_iters=9000, lr_decay_iters=700000)
    assert learning_rate(published, 8999) > 0.9995 * 9e-4
    constant = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100, decay_lr=False)
    assert [learning_rate(constant, s) for s in (4, 10, 99, 200)] == [5 / 11, 1.0, 1.0, 1.0]


def test_weight_decay_spares_gains_and_biases():
    model = make_model("encoder_decoder", {"bias": True, "embedding_loss": "mse"})
    decayed, spared = make_optimizer(model, TrainConfig(beta1=0.8, beta2=0.9), torch.device("cpu")).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert spared["weight_decay"] == 0.0 and all(p.dim() == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    assert decayed["betas"] == spared["betas"] == (0.8, 0.9)


# ----------------------------------------------------------------------------------------------------------------------
# resuming


def test_resume_equals_an_uninterrupted_run(tiny_data, tmp_path, reference):
    """
    Guards exact resumption: N steps = N/2 + resume + N/2, bit for bit: weights, optimizer, losses, best checkpoint; and that a run
    has to be told nothing again, not its data, model or flags.
    """
    out = tmp_path / "halves"
    run(tiny_data, out, *REFERENCE, "--max_iters=3", "--lr_decay_iters=6")
    with pytest.raises(ValueError, match="lr_decay_iters=5 .was 6"):
        run(tiny_data, out, *REFERENCE, "--lr_decay_iters=5", "--resume")
    full = tmp_path / "full"
    run(tiny_data, full, *REFERENCE, "--lr_decay_iters=6")
    train.main([f"--out_dir={out}", "--resume", "--max_iters=6"])
    for which in ("last", "best"):
        assert same(weights(out, which), weights(full, which))
    a, b = (safetensors.torch.load_file(o / "last" / "optimizer.safetensors") for o in (out, full))
    assert same(a, b)
    for kind in ("train", "eval"):
        skip = {"tokens_per_second", "seconds"}
        one, two = ([{k: v for k, v in r.items() if k not in skip} for r in records(o, kind)] for o in (out, full))
        assert one == two
    read = lambda o: json.loads((o / "summary.json").read_text())["val_loss"]  # noqa: E731
    assert read(out) == read(full)
    assert checkpoint.read_json(out / "config.json")["train"]["max_iters"] == 6, "a finished run would look unfinished"


def test_the_scale_of_the_loss_is_restored(tiny_data, tmp_path):
    """Guards float16: with the scale of a new run gradients may overflow again, and steps that an unbroken run makes are left out."""
    for out, iterations in ((tmp_path / "full", (6,)), (tmp_path / "halves", (3, 6))):
        for i in iterations:
            run(tiny_data, out, "--dtype=float16", f"--max_iters={i}", "--lr_decay_iters=6", *["--resume"] * (i != iterations[0]))
    one, two = (checkpoint.read_json(tmp_path / name / "last" / "trainer.json")["scaler"] for name in ("full", "halves"))
    assert one == two and one["_growth_tracker"] > 3, "the second half knows nothing of the first"
    assert same(weights(tmp_path / "full"), weights(tmp_path / "halves"))


def test_a_run_that_ends_where_it_was_stopped_is_evaluated_there(tiny_data, tmp_path, monkeypatch):
    """Guards best/: of a run that is stopped between evaluations, and ends there when resumed, it once held untrained weights."""
    out = tmp_path / "run"
    call_at(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_data, out, "--eval_interval=1000")
    monkeypatch.undo()
    summary = train.main([f"--out_dir={out}", "--resume", "--max_iters=4"])
    assert summary["best_step"] == 4 and same(weights(out, "best"), weights(out)), "its last evaluation is its best one"
    again = train.main([f"--out_dir={out}", "--resume"])  # nothing is left to do
    assert [record["step"] for record in records(out, "eval")] == [0, 4]
    assert all(again[key] == summary[key] for key in ("train_loss", "val_loss", "best_val_loss"))


def test_a_few_steps_of_a_long_run_can_go_on(tiny_data, tmp_path, capsys):
    """Guards a run that ended inside its warm-up, by a note and not an error: it is no error when it is resumed either."""
    words = [word for word in arguments(tiny_data, tmp_path / "run") if not word.startswith("--warmup_iters")]
    train.main(words)
    assert "ends the run inside its warm-up of 100 steps" in capsys.readouterr().out
    assert train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--max_iters=8"])["steps"] == 8


def test_a_run_keeps_its_flags_and_reads_its_config_file_again(tiny_data, tmp_path, capsys, monkeypatch):
    """
    Guards --resume CONFIG: flags of the first command hold, also those that the file says otherwise; what has changed in the file
    counts where it may change, and is refused where it may not.
    """
    monkeypatch.chdir(tmp_path)
    words = [word[2:].split("=") for word in arguments(tiny_data, tmp_path, model="decoder_only")]
    lines = [f"{key} = {value}" for key, value in words if value.isdigit()] + ["model = 'decoder_only'", "dtype = 'float32'", "seed = 1"]
    (tmp_path / "config").mkdir()
    full, halves = tmp_path / "config" / "full.py", tmp_path / "config" / "halves.py"
    for config in (full, halves):
        config.write_text("\n".join(lines))
    common = [f"--dataset={tiny_data}", "--seed=2", "--lr_decay_iters=6"]
    train.main([str(full), *common])
    train.main([str(halves), *common, "--max_iters=4"])
    halves.write_text("\n".join([*lines, "log_interval = 2"]))
    assert train.main([str(halves), "--resume"])["steps"] == 4 and train.main([str(halves), "--resume", "--max_iters=6"])["steps"] == 6
    assert same(weights(Path("out/full")), weights(Path("out/halves"))) and "log_interval=2" in capsys.readouterr().out
    full.write_text("\n".join([*lines, "max_iters = 7"]))
    assert train.main([str(full), "--resume"])["steps"] == 7
    full.write_text("\n".join([*lines, "max_iters = 7", "n_embd = 32"]))
    assert "n_embd=32 (was 16)" in complaint(train, [str(full), "--resume"], capsys)[1]
    assert "is a run of model=decoder_only, not encoder_decoder" in complaint(
        train, ["--out_dir=out/full", "--resume", "--model=encoder_decoder"], capsys
    )[1]
    settings = checkpoint.read_json(Path("out/halves/config.json"))
    assert settings.pop("flags") == ["dataset", "lr_decay_iters", "max_iters", "seed"]
    checkpoint.write_json(Path("out/halves/config.json"), settings)  # of before they were noted: then they have to be given again
    assert "seed=1 (was 2)" in complaint(train, [str(halves), "--resume"], capsys)[1]
    assert train.main([str(halves), "--resume", *common])["steps"] == 6


def test_a_run_resumed_with_another_schedule_says_so(tiny_data, tmp_path, capsys):
    """Guards --resume --max_iters=...: the cosine then ends elsewhere, so it is not the run in one piece, nor a seed of its row."""
    for seed in (1, 2):
        run(tiny_data, tmp_path / f"a_s{seed}", f"--seed={seed}")
    out = tmp_path / "a_s3"
    run(tiny_data, out, "--seed=3", "--max_iters=4")
    assert "note" not in capsys.readouterr().out
    summary = run(tiny_data, out, "--seed=3", "--resume")
    assert "decays until step 6 from now on, until here it was 4" in capsys.readouterr().out and summary["decay_ends"] == [4, 6]
    rows = group(read_runs(sorted(tmp_path.glob("a_s*"))))
    assert sorted(len(row.runs) for row in rows) == [1, 2] and any("decay_ends=[4, 6]" in row.label for row in rows)
    with pytest.raises(ValueError, match="max_iters=5, but .* has come to step 6"):
        run(tiny_data, out, "--seed=3", "--max_iters=5", "--resume")
    old, path = tmp_path / "old", tmp_path / "old" / "last" / "trainer.json"
    run(tiny_data, old, "--max_iters=4")
    state = checkpoint.read_json(path)
    del state["decay_ends"]  # as it was before it was noted
    path.write_text(json.dumps(state))
    assert run(tiny_data, old, "--max_iters=4", "--resume")["decay_ends"] == [4], "no step was made under another schedule"
    assert run(tiny_data, old, "--resume")["decay_ends"] == [4, 6]


def test_a_log_that_was_cut_off_loses_one_record(tiny_data, tmp_path):
    """Guards metrics.jsonl: the first record after a crash must not end up in the line that the crash has cut off."""
    out = tmp_path / "run"
    run(tiny_data, out, "--max_iters=3", "--lr_decay_iters=6")
    before = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(before[:-20])
    run(tiny_data, out, "--lr_decay_iters=6", "--resume")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert lines[: before.count("\n")] == [*before.splitlines()[:-1], before.splitlines()[-1][:-19]]
    assert [json.loads(line)["step"] for line in lines[before.count("\n") :]] == [4, 5, 6, 6]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_continues(tiny_data, tmp_path, how):
    """Guards crashes: SIGKILL between checkpoints falls back to the last one, Ctrl-C saves; both end like an unbroken run."""
    settings = (*REFERENCE, "--max_iters=400", "--eval_interval=50")
    out = tmp_path / "killed"
    process = command(tiny_data, out, *settings)
    while not any(r["step"] >= 60 for r in (records(out, "train") if (out / "metrics.jsonl").exists() else [])):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), complaints
    assert "Traceback" not in complaints
    stopped = checkpoint.read_json(out / "last" / "trainer.json")["step"]
    assert stopped >= 50 and (how == signal.SIGINT or stopped % 50 == 0)
    assert not (out / "summary.json").exists()
    again = command(tiny_data, out, *settings, "--resume")
    full = command(tiny_data, tmp_path / "full", *settings)
    for process in (again, full):
        assert process.wait(timeout=300) == 0, process.communicate()
    assert f"at step {stopped}" in again.stdout.read()
    assert same(weights(out), weights(tmp_path / "full"))


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


def test_a_run_that_crashed_before_its_second_evaluation_goes_on(tiny_data, tmp_path, monkeypatch, reference):
    """Guards the checkpoint of step 0, whose optimizer has no state yet."""
    call_at(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(tiny_data, tmp_path / "run", *REFERENCE)
    monkeypatch.undo()
    assert checkpoint.read_json(tmp_path / "run" / "last" / "trainer.json")["step"] == 0
    run(tiny_data, tmp_path / "run", *REFERENCE, "--resume")
    assert same(weights(tmp_path / "run"), weights(reference))


def test_terminated_run_continues(tiny_data, tmp_path, monkeypatch, reference):
    """Guards SIGTERM, between two log lines: the step is saved, with the time that its updates took."""
    rarely = ("--eval_interval=1000", "--log_interval=1000")
    call_at(monkeypatch, 4, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])  # a cluster's and torchrun's
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_data, tmp_path / "run", *REFERENCE, *rarely)
    monkeypatch.undo()
    stopped = checkpoint.read_json(tmp_path / "run" / "last" / "trainer.json")
    assert stopped["step"] == 4 and 0 < stopped["train_seconds"] < stopped["seconds"]
    assert signal.getsignal(signal.SIGTERM) == before, "the next Ctrl-C would be lost"
    longer = {key: 1000 + stopped[key] for key in ("seconds", "train_seconds")}  # as if it had been at work for a while
    checkpoint.write_json(tmp_path / "run" / "last" / "trainer.json", stopped | longer)
    run(tiny_data, tmp_path / "run", *REFERENCE, *rarely, "--resume")
    assert same(weights(tmp_path / "run"), weights(reference))
    finished = checkpoint.read_json(tmp_path / "run" / "last" / "trainer.json")
    assert all(finished[key] > longer[key] for key in longer)


def test_interrupting_a_diverged_run_keeps_the_last_good_checkpoint(tiny_data, tmp_path, monkeypatch):
    """Guards last/ against weights that are no numbers, where Ctrl-C comes before the next log line would have noticed."""
    call_at(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(FloatingPointError, match="last good checkpoint"):
        run(tiny_data, tmp_path, "--learning_rate=1e30", "--warmup_iters=0", "--eval_interval=1000", "--log_interval=1000", "--overwrite")
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


SIGNALLED = """
import os, signal, sys, time
import checkpoint, configurator, train, trainer
update, rank = trainer.Trainer.update, int(os.environ["RANK"])
def with_signal(self):
    sums = update(self)
    if self.step == (8, 6)[rank]:
        signal.raise_signal(signal.SIGTERM)
    return sums
trainer.Trainer.update = with_signal
save = checkpoint.save
def slow_save(*given):
    time.sleep(2 if given[3]["step"] > 0 else 0)
    save(*given)
checkpoint.save = slow_save
try:
    with configurator.exit_on_user_error():
        train.main(sys.argv[1:])
finally:
    print("rank", rank, "stopped", flush=True)
"""


def test_processes_stop_at_the_same_step(tiny_data, tmp_path):
    """
    Guards SIGTERM under torchrun, which reaches one process steps before the other: neither may wait for one that has left, nor be
    ended by the launcher while it writes.
    """
    (tmp_path / "signalled.py").write_text(SIGNALLED, encoding="utf-8")
    out, launcher = tmp_path / "run", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = arguments(tiny_data, out, "--gradient_accumulation_steps=2", "--max_iters=40", "--eval_interval=100", "--log_interval=5")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(tmp_path / "signalled.py"), *words], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode != 0 and "gloo" not in done.stderr.lower(), done.stderr
    assert "rank 0 stopped" in done.stdout and "rank 1 stopped" in done.stdout
    assert checkpoint.read_json(out / "last" / "trainer.json")["step"] == 10


def test_full_disk(tiny_data, tmp_path, reference):
    """Guards a checkpoint that cannot be written: one line, the one before it is still there, and nothing half written."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out)
    words = arguments(tiny_data, out, *REFERENCE, "--resume", "--max_iters=9", "--lr_decay_iters=none")
    code = (
        "import resource, runpy, sys\n"
        f"sys.argv = ['train.py', *{words!r}]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may be larger\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "could not be written" in done.stderr, done.stderr
    assert same(weights(out), weights(reference)) and not (out / "last.tmp").exists() and not (out / "best.tmp").exists()


@pytest.mark.parametrize("damage", ["trainer", "moments", "shape"])
def test_damaged_checkpoints_are_named(tiny_data, tmp_path, capsys, reference, damage):
    """Guards resuming from files that can be read but are not what was written, above all a moment of another shape."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out)
    path = out / "last" / "optimizer.safetensors"
    tensors = safetensors.torch.load_file(path)
    if damage == "trainer":
        (out / "last" / "trainer.json").write_text("{}")
    elif damage == "moments":
        del tensors["wte.weight/exp_avg_sq"]
    else:
        tensors["wte.weight/exp_avg"] = tensors["wte.weight/exp_avg"][:10].clone()
    safetensors.torch.save_file(tensors, path)
    code, line = complaint(train, arguments(tiny_data, out, *REFERENCE, "--resume", "--max_iters=8"), capsys)
    assert code == 2 and "is damaged" in line and "start the run again" in line
    assert (out / "config.json").read_bytes() == (reference / "config.json").read_bytes(), "a finished run would look unfinished"


def test_half_written_checkpoint_is_not_used(tiny_data, tmp_path, reference):
    """Guards atomicity: what a crash leaves (last.tmp, or last.old between the renames) neither breaks nor fools a resume."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out)
    shutil.copytree(out / "last", out / "last.tmp")
    (out / "last.tmp" / "model.safetensors").write_bytes(b"half")
    shutil.copytree(out / "last", out / "last.old")
    assert checkpoint.find(out, "last") == out / "last", "the older of the two"
    shutil.rmtree(out / "last.old")
    (out / "last").rename(out / "last.old")
    assert checkpoint.find(out, "last") == out / "last.old"
    model, _, trainer = checkpoint.load_run(out, "last")
    assert trainer["step"] == 6 and torch.equal(model.state_dict()["wte.weight"], weights(reference)["wte.weight"])
    x = torch.arange(32)[None]
    assert torch.equal(model(x)[0], model(x)[0]), "dropout is on"
    run(tiny_data, out, *REFERENCE, "--resume", "--max_iters=7", "--lr_decay_iters=7", "--lr_decay_iters=none")
    assert checkpoint.read_json(out / "last" / "trainer.json")["step"] == 7


def test_crash_between_the_two_renames(tmp_path, monkeypatch):
    """Guards save(): until the new folder is in place the old one must be complete under one of its names."""
    run, model = tmp_path / "run", make_model("decoder_only", {}, dtype=torch.float32)
    run.mkdir()
    (run / "config.json").write_text("{}")
    checkpoint.save(run / "last", model, None, {"step": 1})
    rename = Path.rename

    def crash(path: Path, target: Path):
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    for _ in range(2):  # the second time the old one is all there is
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(run / "last", model, None, {"step": 2})
        assert checkpoint.read_json(checkpoint.find(run, "last") / "trainer.json")["step"] == 1
    monkeypatch.undo()
    checkpoint.save(run / "last", model, None, {"step": 3})
    assert checkpoint.read_json(checkpoint.find(run, "last") / "trainer.json")["step"] == 3
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "last"]


# ----------------------------------------------------------------------------------------------------------------------
# evaluation leaves no trace, and counts everything once


def test_evaluating_more_often_changes_nothing(tiny_data, tmp_path, reference):
    """Guards A9 of the original: evaluation drew from the iterator that training draws from. Samples must not matter either."""
    out = tmp_path / "often"
    run(tiny_data, out, *REFERENCE, "--eval_interval=1", "--eval_sample_tokens=3")
    assert same(weights(out), weights(reference))
    assert [r["loss"] for r in records(out, "train")] == [r["loss"] for r in records(reference, "train")]


@pytest.mark.parametrize("name", ["decoder_only", "latent_transformer"])
def test_samples_of_pairs_are_those_of_sample_py(name, tmp_path, capsys):
    """Guards samples at evaluations: a question ends with its separator and an answer at its end; too long a one shows at once."""
    lines = [f"q{i}\t{'yes' * (i % 3 + 1)}" for i in range(60)]
    (tmp_path / "qa.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs.main(["--input", str(tmp_path / "qa.tsv"), "--out_dir", str(tmp_path / "set"), "--val_fraction", "0.3"])
    sizes = "--task=pairs --target_size=16 --latent_factor=4 --n_layer=1 --n_decoder_layer=1 --quantize_after=1 --startup_steps=0"
    words = [f"--dataset={tmp_path / 'set'}", f"--model={name}", f"--out_dir={tmp_path / 'run'}", "--block_size=32", "--n_head=2"]
    words += ["--n_embd=16", *SHORT.split(), *(sizes.split() if name == "latent_transformer" else [])]
    train.main([*words, "--eval_sample_tokens=12", "--eval_sample_prompt=q7"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample: ")]
    command = [str(tmp_path / "run"), "--prompt=q7", "--checkpoint=last", "--max_new_tokens=12", "--temperature=1", "--device=cpu"]
    assert shown[-1] == f"sample: {sample.main(command)[0]!r}" and len(shown) == 3
    if name == "latent_transformer":
        with pytest.raises(ValueError, match="the prompt has 17 tokens, but the model has room for 16"):
            train.main([*words, "--overwrite", "--eval_sample_tokens=12", f"--eval_sample_prompt={'q' * 16}"])


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_full_loss_is_exact_at_any_batch_size(tiny_data, name, monkeypatch):
    """Guards the number in every table: the same at batch sizes 1, 7, 64, equal to a loop over single windows, each token once."""
    data = dataloader.TokenData(tiny_data, 32)
    model = make_model(name, {}, vocab_size=256, block_size=32)
    machine = runtime.start("cpu", "float64", "off")
    losses = []
    for rows in (1, 7, 64):
        monkeypatch.setattr("trainer.FULL_EVAL_TOKENS", rows * 32)
        total, count = summed_loss(model, whole_file(data, machine), machine)
        losses.append((total / count).item())
        assert count == 3000
    assert np.ptp(losses) < 1e-9
    val, slow = torch.from_numpy(np.array(data.val, dtype=np.int64)), 0.0
    for first in range(0, 3000, 32):
        x, y = val[first : first + 32], val[first + 1 : first + 33]
        slow -= model(x[None, : len(y)])[0].log_softmax(-1)[0, range(len(y)), y].sum().item()
    assert abs(losses[0] - slow / 3000) < 1e-9
    # and over a part of the file: the first 100 targets, whatever the batch size
    log_p = torch.cat([model(val[None, i : i + 32])[0].log_softmax(-1)[0] for i in (0, 32, 64, 96)])
    part = -sum(log_p[i, val[i + 1]] for i in range(100))
    for rows in (1, 3):
        monkeypatch.setattr("trainer.FULL_EVAL_TOKENS", rows * 32)
        total, count = summed_loss(model, whole_file(data, machine, first_targets=100), machine)
        assert count == 100 and abs(total - part) < 1e-9


def test_summary_does_not_depend_on_batch_size(tiny_data, tmp_path):
    """Guards the same through the front door, in float32: the full evaluation has a batch of its own."""
    losses = {run(tiny_data, tmp_path / f"{b}", "--max_iters=0", f"--batch_size={b}")["val_loss"] for b in (1, 7, 64)}
    assert len(losses) == 1
    assert run(tiny_data, tmp_path / "seed", "--max_iters=0", "--seed=2")["val_loss"] not in losses, "all seeds begin alike"


def test_graphs_keep_the_sum_of_gradients(tiny_data):
    """Guards micro-batches under CUDA graphs, which write all gradients to one memory: the sum lies elsewhere, the same in every step."""
    data = dataloader.TokenData(tiny_data, 32)
    losses = []
    for graphs in (False, True):
        machine = dataclasses.replace(runtime.start("cpu", "float64", "off"), graphs=graphs)
        config = TrainConfig(batch_size=2, gradient_accumulation_steps=2, warmup_iters=1, max_iters=9)
        trainer = Trainer(config, make_model("decoder_only", {}, vocab_size=256, block_size=32), data, machine)
        sums = [parameter.grad for parameter in trainer.parameters]
        losses.append([trainer.update()["total"].item() for _ in range(3)])
        if graphs:
            assert all(parameter.grad is zeros and not zeros.any() for parameter, zeros in zip(trainer.parameters, sums))
    assert losses[0] == losses[1]
    for wrong in ("--micro_batch_size=auto", "--device=cpu"):
        with pytest.raises(ValueError, match="compile=graphs"):
            run(tiny_data, tiny_data / "never", "--compile=graphs", wrong)
    with pytest.raises(ValueError, match="compile=graphs is not possible with .* micro_batch_size=auto"):
        Trainer(dataclasses.replace(config, micro_batch_size="auto"), trainer.raw_model, data, machine)


@pytest.mark.parametrize(("micro_batch_size", "sizes"), [(None, [3, 3]), (1, [1] * 6), (2, [2] * 3), (5, [3, 3]), (100, [6])])
def test_estimates_use_the_same_windows_every_time(tiny_data, micro_batch_size, sizes):
    """Guards evaluations that forget a window, or take more at a time than a micro-batch of training, which fits into memory."""
    data = dataloader.TokenData(tiny_data, 32)
    assert np.array_equal(data.eval_starts("val", 8), dataloader.TokenData(tiny_data, 32).eval_starts("val", 8))
    config = TrainConfig(batch_size=3, eval_iters=2, micro_batch_size=micro_batch_size)
    model = make_model("decoder_only", {}, vocab_size=256, block_size=32)
    trainer = Trainer(config, model, data, runtime.start("cpu", "float64", "off"))
    x, y = data.gather("val", data.eval_starts("val", 6))
    assert [len(batch) for batch, _ in trainer.eval_batches("val")] == sizes
    assert abs(trainer.mean_loss(model, trainer.eval_batches("val"))[0] - model(x, y)[1]["token"].item()) < 1e-12


def test_what_an_evaluation_reports_takes_no_more_memory_than_a_micro_batch(tiny_data, monkeypatch):
    """Guards the report on the embedding loss, which computes gradients, against batch_size sequences that do not fit."""
    config = TrainConfig(batch_size=8, micro_batch_size=3, eval_iters=1)
    model = make_model("encoder_decoder", {"embedding_loss": "mse"}, vocab_size=256, block_size=32)
    trainer = Trainer(config, model, dataloader.TokenData(tiny_data, 32), runtime.start("cpu", "float64", "off"))
    seen = []
    monkeypatch.setattr(model, "encode", lambda x, *rest: seen.append(len(x)) or type(model).encode(model, x, *rest))
    trainer.estimates()
    assert max(seen) == 3


def test_best_is_the_lowest_validation_loss(tiny_data, tmp_path, monkeypatch):
    """Guards best/ against the weights of the last evaluation, of the highest loss, or of the lowest training loss."""
    losses = {"val": [5.0, 3.0, 4.0], "train": [3.0, 2.0, 1.0]}
    at = lambda trainer: {f"{split}_loss": values[trainer.step // 3] for split, values in losses.items()}  # noqa: E731
    monkeypatch.setattr(Trainer, "estimates", at)
    summary = run(tiny_data, tmp_path)
    assert (summary["best_val_loss"], summary["best_step"], summary["train_loss"]) == (3.0, 3, 1.0)
    assert checkpoint.read_json(tmp_path / "best" / "trainer.json")["step"] == 3
    assert not same(weights(tmp_path, "best"), weights(tmp_path, "last"))


def test_patience_ends_a_run_that_no_longer_improves(tiny_data, tmp_path, monkeypatch, capsys):
    """Guards patience: counted from the lowest loss, over a resume as well; what ended early is a finished run, and can go on."""
    losses = [5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 1.0]  # of steps 0, 3, 6, ...; equal is not lower
    at = lambda trainer: dict.fromkeys(("train_loss", "val_loss"), losses[-(-trainer.step // 3)])  # noqa: E731
    monkeypatch.setattr(Trainer, "estimates", at)
    more = ("--max_iters=18", "--patience=2")
    summary = run(tiny_data, tmp_path / "run", *more)
    assert (summary["steps"], summary["best_step"], summary["ended_early"]) == (15, 9, True)
    assert "patience=2: no val loss is lower than that of step 9" in capsys.readouterr().out
    assert read_runs([tmp_path / "run"])[0].summary["steps"] == 15
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    trainer = checkpoint.read_json(tmp_path / "resumed" / "last" / "trainer.json")
    checkpoint.write_json(tmp_path / "resumed" / "last" / "trainer.json", trainer | {"step": 17})
    with pytest.raises(ValueError, match="summary.json is of step 15 of 17"):  # resumed and stopped since then
        read_runs([tmp_path / "resumed"])
    run(tiny_data, tmp_path / "two", *more, "--max_iters=12", "--lr_decay_iters=18")
    assert run(tiny_data, tmp_path / "two", *more, "--lr_decay_iters=18", "--resume")["steps"] == 15
    summary = run(tiny_data, tmp_path / "run", *more, "--patience=3", "--resume")
    assert (summary["steps"], summary["best_step"], summary["ended_early"]) == (18, 18, False)
    losses[:] = [5.0, 4.0, 3.5, 3.0, *[6.0] * 9]  # the lowest is where a run ended, between two evaluations of the longer one
    run(tiny_data, tmp_path / "odd", "--max_iters=7", "--lr_decay_iters=30", "--patience=1")
    summary = run(tiny_data, tmp_path / "odd", "--max_iters=30", "--lr_decay_iters=30", "--patience=1", "--resume")
    assert (summary["best_step"], summary["steps"]) == (7, 12)
    assert checkpoint.read_json(tmp_path / "odd" / "last" / "trainer.json")["step"] == 12, "it ends where it was saved"


# ----------------------------------------------------------------------------------------------------------------------
# micro-batches and memory


def make_trainer(data: Path, model: torch.nn.Module, world: int = 1, rank: int = 0, **settings) -> Trainer:
    machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, 1)
    trainer = Trainer(TrainConfig(**settings), model, dataloader.TokenData(data, model.config.block_size), machine)
    trainer.machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, world)
    return trainer


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [1, 3, 4, 12, 100])
def test_micro_batches_do_not_change_the_gradient(tiny_data, size):
    """Guards the weights of micro-batches: twelve sequences, also as 5 + 5 + 2, have one gradient and one loss by name."""
    found = []
    for micro in (None, size, 5):
        model = make_model("encoder_decoder", {"embedding_loss": "mse"}, vocab_size=256)
        trainer = make_trainer(tiny_data, model, batch_size=4, gradient_accumulation_steps=3, micro_batch_size=micro)
        sums = trainer.gradients(trainer.micro_batch_size)
        found.append([*gradients(model), *(sums[name] for name in sorted(sums))])
    for other in found[1:]:
        assert len(other) == len(found[0]) and all((a - b).abs().max() < 1e-12 for a, b in zip(found[0], other))


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_of_pairs_do_not_change_the_gradient(tmp_path, world):
    """Guards sets of pairs, whose answers differ in length: a token counts the same in whatever micro-batch and process it is."""
    lines = [f"{i}\t{'long answer ' * (i % 4)}{i}" for i in range(60)]
    (tmp_path / "qa.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs.main(["--input", str(tmp_path / "qa.tsv"), "--out_dir", str(tmp_path / "set"), "--val_fraction", "0.3"])
    data, found = dataloader.open_data(tmp_path / "set", 48), []
    for size, ranks in ((8, 1), (8 // world, world), (1, world), (3, world)):
        total, losses = [], 0.0
        for rank in range(ranks):
            model = make_model("decoder_only", {}, vocab_size=256, block_size=48)
            machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, 1)
            trainer = Trainer(TrainConfig(batch_size=8, micro_batch_size=size), model, data, machine)
            trainer.machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, ranks)
            losses += trainer.gradients(size)["token"]  # each process's share of the mean
            total.append(gradients(model))
        found.append([*(sum(grads) / ranks for grads in zip(*total)), losses])  # DDP's mean
    for other in found[1:]:
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found[0], other))


def test_processes_share_the_sequences(tiny_data):
    """Guards DDP with uneven micro-batches: all sequences once, equal shares, gradients that average to those of one process."""
    settings = dict(batch_size=7, gradient_accumulation_steps=2)
    one = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), **settings)
    sums = one.gradients(7)
    averaged, shares, numbers, sequences = None, [], [], []
    for rank in (0, 1):
        trainer = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), 2, rank, micro_batch_size=3, **settings)
        mine = trainer.micro_batches(3)
        numbers += [number for number, _, _ in mine]
        sequences += [i for _, first, count in mine for i in range(first, first + count)]
        assert [count for _, _, count in mine] == [3, 3, 1]
        shares.append(trainer.gradients(3)["total"])
        half = [grad / 2 for grad in gradients(trainer.raw_model)]
        averaged = half if averaged is None else [a + b for a, b in zip(averaged, half)]
    assert sorted(sequences) == list(range(14)) and len(set(numbers)) == 6
    assert abs(sum(shares) - sums["total"]) < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(averaged, gradients(one.raw_model)))
    whole = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), 2, 1, batch_size=3, gradient_accumulation_steps=4)
    assert whole.micro_batches(3) == [(1, 3, 3), (3, 9, 3)], "without the setting: every second micro-batch, as ever"


def test_batches_are_loaded_ahead(tiny_data):
    """Guards the one-step-ahead load: what is computed is what belongs to the step, and the next one lies ready."""
    trainer = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), batch_size=3, gradient_accumulation_steps=2)
    seen = []
    trainer.raw_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(3):
        trainer.update()
    expected = [trainer.data.gather("train", trainer.data.batch_starts(1337, step, 6))[0] for step in range(4)]
    assert torch.equal(torch.cat(seen), torch.cat(expected[:3]))
    assert trainer.ahead[0] == (3, 0, 3) and torch.equal(trainer.ahead[1][0], expected[3][:3])


def test_every_micro_batch_draws_its_own_random_numbers(tiny_data):
    """Guards dropout: one mask for all micro-batches, steps or processes of a run; which it is, only seed, step and number decide."""

    def seeds(world: int, seed: int = 1) -> list[int]:
        found = []
        for rank in range(world):
            settings = dict(batch_size=2, gradient_accumulation_steps=4, seed=seed)
            trainer = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), world, rank, **settings)
            trainer.raw_model.register_forward_pre_hook(lambda *_: found.append(torch.initial_seed()))
            for trainer.step in (0, 1):
                trainer.gradients(2)
        return sorted(found)

    assert seeds(1) == seeds(2) and len(set(seeds(1) + seeds(1, seed=2))) == 16


def test_evaluations_do_not_slow_down_the_log(tiny_data, tmp_path, monkeypatch):
    """Guards tokens/s, also that by which processes settle how often they ask each other: the speed of training alone."""
    clock, update, estimates = [0.0], Trainer.update, Trainer.estimates

    def taking(seconds: float, work):
        def timed(trainer):
            clock[0] += seconds
            return work(trainer)

        return timed

    monkeypatch.setattr(Trainer, "update", taking(2.0, update))
    monkeypatch.setattr(Trainer, "estimates", taking(1000.0, estimates))
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    summary = run(tiny_data, tmp_path / "run")
    assert {record["tokens_per_second"] for record in records(tmp_path / "run", "train")} == {4 * 32 / 2.0}
    assert summary["tokens_per_second"] == 4 * 32 / 2.0 and summary["seconds"] == 6 * 2.0 + 3 * 1000.0


class Frozen(DecoderOnly):
    """Its token table has a learning rate of 0."""

    def named_backbone_parameters(self):
        return [("transformer.wte.weight", self.transformer.wte.weight)]

    def backbone_rate(self, step: int) -> float:
        return 0.0


def test_a_backbone_is_decayed_like_the_rest():
    """Guards the groups of a model with a backbone: each parameter in one of them, decayed if it would be without a backbone."""
    decay = []
    for cls in (DecoderOnly, Frozen):
        model = cls(DecoderOnlyConfig(n_layer=1, n_embd=16, block_size=12, bias=True))
        groups = make_optimizer(model, TrainConfig(), torch.device("cpu")).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        decay.append([of[id(p)] for p in model.parameters()])
    assert decay[0] == decay[1] and set(decay[0]) == {0.0, 0.1}


def test_gradients_are_clipped_at_their_own_scale(tiny_data):
    """Guards float16, whose loss is scaled up: the norm that is clipped, and logged, is that of the gradients without the scale."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        model = make_model("decoder_only", {}, dtype=torch.float32, vocab_size=256)
        trainer = make_trainer(tiny_data, model, batch_size=4, grad_clip=0.1)
        trainer.machine = runtime.Runtime(torch.device("cpu"), dtype, False, "")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
        norms.append(trainer.update()["grad_norm"].item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02) and norms[0] > 0.1


def test_clipping_looks_at_what_moves(tiny_data):
    """Guards grad_clip beside a frozen backbone, whose gradients nobody follows: they may not shorten those of the rest."""
    found = []
    for cls in (DecoderOnly, Frozen):
        torch.manual_seed(0)
        model = cls(DecoderOnlyConfig(n_layer=1, n_embd=16, block_size=12)).double()
        make_trainer(tiny_data, model, batch_size=4).gradients(4)
        norms = {name: p.grad.norm() for name, p in model.named_parameters()}
        table = norms.pop("transformer.wte.weight") if cls is Frozen else torch.tensor(0.0)
        model.zero_grad()
        sums = make_trainer(tiny_data, model, batch_size=4, grad_clip=1e-3).update()
        assert abs(sums["grad_norm"] - torch.stack(list(norms.values())).norm()) < 1e-12
        found.append(torch.hypot(sums["grad_norm"], table))
    assert table > 0 and abs(found[0] - found[1]) < 1e-12


def test_the_gradient_norm_is_logged_and_changes_nothing(tiny_data, tmp_path):
    """Guards the log of a run without clipping: the norm that a clip beyond all norms finds, and weights that do not see it."""
    run(tiny_data, tmp_path / "a", "--log_interval=4")
    run(tiny_data, tmp_path / "b", "--grad_clip=1e9")
    norms = {record["step"]: record["grad_norm"] for record in records(tmp_path / "b", "train")}
    assert {record["step"]: record["grad_norm"] for record in records(tmp_path / "a", "train")} == {4: norms[4], 6: norms[6]}
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run(tiny_data, tmp_path / "c", "--lr_decay_iters=3", "--min_lr=0")
    assert all(record["grad_norm"] > 0 for record in records(tmp_path / "c", "train")), "of steps at a rate of 0 as well"


class SmallMemory(DecoderOnly):
    """Runs out of memory beyond `limit` sequences, halfway through: it has collected something by then."""

    def __init__(self, limit: int):
        super().__init__(DecoderOnlyConfig(n_layer=1, n_embd=16, block_size=12))
        self.limit, self.calls = limit, []
        self.register_buffer("collected", torch.zeros((), dtype=torch.int64))

    def forward(self, idx, targets=None):
        self.calls.append(len(idx))
        if self.training:
            self.collected += len(idx)
        # the last call of a step fails too, when gradients of others are there
        if len(idx) > self.limit and self.calls.count(len(idx)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(idx, targets)


def test_out_of_memory_repeats_the_step(tiny_data, capsys):
    """Guards `auto`: a step that fails in its second micro-batch is repeated at half the size and leaves no other trace."""
    torch.manual_seed(0)
    small = SmallMemory(limit=5).double()
    torch.manual_seed(0)
    plain = SmallMemory(limit=99).double()
    settings = dict(batch_size=8, gradient_accumulation_steps=3)
    careful = make_trainer(tiny_data, small, micro_batch_size="auto", **settings)
    reference = make_trainer(tiny_data, plain, micro_batch_size=4, **settings)
    for step in range(3):
        assert abs(careful.update()["total"] - reference.update()["total"]) < 1e-15
        assert careful.step == step + 1 and small.collected == plain.collected == 24 * (step + 1)
    assert small.calls == [8, 8] + plain.calls and plain.calls == [4] * 18
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), plain.parameters()))
    assert capsys.readouterr().out.count("out of memory in step 0: again with micro_batch_size=4") == 1
    with pytest.raises(torch.OutOfMemoryError):  # nobody asked for another size than this
        make_trainer(tiny_data, SmallMemory(limit=5).double(), micro_batch_size=8, **settings).update()
    with pytest.raises(torch.OutOfMemoryError):  # not one sequence: there is no end to halving
        make_trainer(tiny_data, SmallMemory(limit=0).double(), micro_batch_size="auto", **settings).update()


def test_probe(tiny_data, monkeypatch):
    """
    Guards the search for a size: divisors from the whole step down, and afterwards model and gradients are as before. Of several
    processes all take what fits in the fullest.
    """
    torch.manual_seed(0)
    model = SmallMemory(limit=6).double()
    model.calls = [24, 12, 6, 3]  # so that the first call of a size fails already
    trainer = make_trainer(tiny_data, model, batch_size=8, gradient_accumulation_steps=3, micro_batch_size="auto")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.find_micro_batch_size()
    assert model.calls[4:] == [24, 12, 6] and trainer.micro_batch_size == 6
    assert same(before, model.state_dict()) and not gradients(model) and not trainer.optimizer.state
    trainer.sequences = 50
    assert [trainer.smaller(size) for size in (50, 25, 10, 5, 2)] == [25, 10, 5, 2, 1]
    for theirs, taken in ((3.0, 3), (12.0, 6)):
        both = lambda machine, mine, theirs=theirs: mine + torch.tensor([0.0, theirs])  # noqa: E731
        monkeypatch.setattr(runtime.Runtime, "sum_over_processes", both)
        shared = make_trainer(tiny_data, model, 2, 0, batch_size=8, gradient_accumulation_steps=3, micro_batch_size="auto")
        shared.find_micro_batch_size()
        assert shared.micro_batch_size == taken


def test_micro_batch_size_through_the_front_door(tiny_data, tmp_path, capsys, monkeypatch, reference):
    """Guards the setting: the default size gives the run without it bit for bit; `auto` says its size and is resumed with it."""
    run(tiny_data, tmp_path / "same", *REFERENCE, "--micro_batch_size=4")
    assert same(weights(tmp_path / "same"), weights(reference))
    out = tmp_path / "auto"
    run(tiny_data, out, *REFERENCE, "--micro_batch_size=auto", "--max_iters=3", "--lr_decay_iters=6")
    assert "micro_batch_size=auto: 4 of the 8 sequences" in capsys.readouterr().out
    state = checkpoint.read_json(out / "last" / "trainer.json")
    assert state["micro_batch_size"] == 4
    checkpoint.write_json(out / "last" / "trainer.json", state | {"micro_batch_size": 2})  # as if it had been halved
    checkpointed = []
    monkeypatch.setattr(runtime, "checkpoint_activations", lambda model, kinds: checkpointed.append(kinds))
    run(tiny_data, out, *REFERENCE, "--micro_batch_size=auto", "--lr_decay_iters=6", "--resume", "--activation_checkpointing")
    assert checkpointed == [(Block, DecoderBlock)]
    assert "micro_batch_size=auto: 2 of the 8 sequences" in capsys.readouterr().out
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        TrainConfig(micro_batch_size=0)
    machine = runtime.Runtime(torch.device("cpu"), torch.float32, False, "", rank=0, world_size=2)
    with pytest.raises(ValueError, match="the 15 sequences of a step cannot be shared by 2 processes"):
        config = TrainConfig(batch_size=5, gradient_accumulation_steps=3, micro_batch_size=1)
        Trainer(config, make_model("decoder_only", {}), None, machine)


def latent_model(name: str) -> torch.nn.Module:
    if name == "autoencoder":
        config = checkpoint.CONFIGS[name](block_size=16, n_embd=16, n_head=2, latent_dim=8, codebook_size=4, dropout=0.2)
    elif name == "latent_transformer":
        config = checkpoint.CONFIGS[name](
            block_size=16, target_size=8, n_embd=16, n_head=2, n_layer=1, n_decoder_layer=1, latent_factor=4, latent_dim=8,
            codebook_size=4, dropout=0.2,
        )  # fmt: skip
    else:
        config = checkpoint.CONFIGS[name](
            block_size=16, n_embd=16, n_head=2, n_cross_head=2, latent_factor=4, latent_dim=8, codebook_size=4, dropout=0.2,
            position="rope", window=5,
        )  # fmt: skip
    torch.manual_seed(0)
    return checkpoint.build(name, config).double().train()


@pytest.mark.parametrize("name", ["encoder_decoder", "autoencoder", "latent_transformer"])
def test_activation_checkpointing_changes_nothing(name):
    """Guards recomputation: the same gradients with dropout, and statistics of the quantizer that are collected once."""
    torch.manual_seed(1)
    idx, found, blocks = torch.randint(256, (3, 16)), [], []
    for recompute in (False, True):
        model = latent_model(name)
        if recompute:
            runtime.checkpoint_activations(model, (Block, DecoderBlock))
        calls = []
        for block in model.modules():
            if isinstance(block, (Block, DecoderBlock)):
                block.ln_1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(2)
        model(idx, idx)[1]["total"].backward()
        blocks.append(len(calls))
        found.append((gradients(model), dict(model.named_buffers())))
        model.eval()
        with torch.no_grad():
            found[-1] += (model(idx, idx)[1]["total"],)
    (grads, buffers, loss), (others, theirs, same_loss) = found
    assert blocks[1] == 2 * blocks[0] > 0, "nothing was computed again"
    assert len(grads) == len(others) and all((a - b).abs().max() < 1e-12 for a, b in zip(grads, others))
    assert same(buffers, theirs) and any(value.count_nonzero() for key, value in buffers.items() if "pending_count" in key)
    assert torch.equal(loss, same_loss)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_activation_checkpointing_compiles(name):
    """Guards torch.compile: one graph, and the eager gradients."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    idx, found = torch.randint(31, (2, 12)), []
    for compiled in (False, True):
        model = make_model(name, {}).train()
        if compiled:
            runtime.checkpoint_activations(model, (Block, DecoderBlock))
        call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
        call(idx, idx)[1]["total"].backward()
        found.append(gradients(model))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found))


# ----------------------------------------------------------------------------------------------------------------------
# processes, compilation, tying


@pytest.mark.parametrize("model", ["encoder_decoder", "decoder_only"])
def test_two_processes_equal_one(tiny_data, tmp_path, model):
    """Guards DDP: two gloo processes with the same seed give one process's losses, evaluations and summary to 1e-5."""
    more = ("--gradient_accumulation_steps=2", "--grad_clip=1.0")
    more += ("--embedding_loss=mse", "--dropout=0.1") if model == "encoder_decoder" else ()
    uneven = ("--micro_batch_size=3",) if model == "decoder_only" else ()  # 4 sequences each as 3 + 1; dropout would differ
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = command(tiny_data, tmp_path / "two", *more, *uneven, model=model, launcher=launcher)
    one = run(tiny_data, tmp_path / "one", *more, model=model)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    assert printed.count("done: validation loss") == 1, "only one process may speak"
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["world_size"] == 2 and abs(one["val_loss"] - two["val_loss"]) < 1e-5 and one["tokens"] == two["tokens"]
    for kind, keys in (("train", ("loss", "token_loss", "grad_norm", "lr")), ("eval", ("train_loss", "val_loss"))):
        a, b = records(tmp_path / "one", kind), records(tmp_path / "two", kind)
        assert len(a) == len(b)
        for key in keys:
            assert np.allclose([r[key] for r in a], [r[key] for r in b], atol=1e-5, rtol=0), key


def test_what_auto_means(monkeypatch):
    """Guards the choices of a machine that is not this one: a GPU of its own for each process, bfloat16 only where it is fast."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [runtime.choose_device(word, 2)[0].index for word in ("auto", "cuda", "cuda:0", "cuda:1")] == [2, 2, 0, 1]
    with pytest.raises(ValueError, match="device=cuda:4: this machine has 4"):
        runtime.choose_device("cuda", 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert runtime.choose_device("auto")[0].type == "mps" and runtime.choose_device("auto", 0, 2)[0].type == "cpu"
        with pytest.raises(ValueError, match="several processes"):
            runtime.choose_device("mps", 0, 2)
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert runtime.choose_dtype("auto", gpu)[0] == dtype and runtime.choose_dtype("float16", gpu)[0] == torch.float16
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(runtime, "cpu_has_bfloat16", lambda fast=fast: fast)
        assert runtime.choose_dtype("auto", cpu)[0] == dtype and runtime.choose_dtype("float32", cpu)[0] == torch.float32
    assert not runtime.choose_compile("auto", cpu)[0] and runtime.choose_compile("on", cpu)[0]
    assert runtime.choose_compile("auto", gpu)[0] == sys.platform.startswith("linux")
    assert not runtime.choose_compile("off", gpu)[0]


def test_long_work_says_how_far_it_is(tiny_data, monkeypatch, capsys):
    """Guards minutes of silence, and wrong shares: of two processes, of sizes that differ, of a part of the file."""
    monkeypatch.setattr(runtime, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("trainer.FULL_EVAL_TOKENS", 10 * 32)
    data, lines = dataloader.TokenData(tiny_data, 32), []
    for rank, world, first in ((0, 1, None), (0, 2, None), (1, 2, None), (0, 1, 640)):
        machine = runtime.Runtime(torch.device("cpu"), torch.float32, False, "", rank, world)
        seen = sum(int((y >= 0).sum()) for _, y in whole_file(data, machine, first))
        assert seen == sum(int((y >= 0).sum()) for _, y in data.full_windows("val", 10, rank, world, first))
        lines.append([line.split("%")[0] for line in capsys.readouterr().out.splitlines()])
    assert lines[0] == [f"evaluated: {round(i * 32000 / 3000)}" for i in range(1, 10)] and lines[2] == []
    assert lines[1] == [f"evaluated: {round(i * 32000 / 1500)}" for i in range(1, 5)] and lines[3] == ["evaluated: 50"]
    assert list(runtime.with_progress("abc", 6.0, "x", ord)) == ["a", "b", "c"]
    assert [runtime.duration(s) for s in (0.9, 61, 3599.5, 3660)] == ["0m00s", "1m01s", "59m59s", "1h01m"]


def test_memory_that_nobody_counts_is_unknown(monkeypatch):
    """Guards Windows, which has neither /proc nor `resource`: a script that imported the latter at its top did not start there."""
    cpu = runtime.start("cpu", "float32", "off")
    counted = cpu.peak_memory_bytes()
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError))
    assert 0.5 < cpu.peak_memory_bytes() / counted < 2, "getrusage and /proc should agree"
    monkeypatch.setitem(sys.modules, "resource", None)
    assert cpu.peak_memory_bytes() is None


def test_the_run_directory_is_named_after_the_config_file():
    """Guards runs of two config files in one folder, and of a checkout that itself lies below a folder called config."""
    names = ("config/stdlib/baseline.py", "/home/me/config/code/config/stdlib/baseline.py", "mine/baseline.py")
    assert [str(train.run_dir(TrainConfig(), Path(name))) for name in names] == ["out/stdlib/baseline"] * 2 + ["out/baseline"]
    assert str(train.run_dir(TrainConfig(model="decoder_only"), None)) == "out/decoder_only"


def test_accumulation_must_be_divisible_by_processes(tiny_data):
    machine = runtime.Runtime(torch.device("cpu"), torch.float32, False, "", rank=0, world_size=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3 cannot be shared by 2 processes"):
        Trainer(TrainConfig(gradient_accumulation_steps=3), make_model("decoder_only", {}), None, machine)


def test_weights_stay_tied_through_everything(tiny_data, tmp_path):
    """Guards tying: after init, training, saving and loading, output layer and token table are one tensor, stored once."""
    out = tmp_path / "run"
    run(tiny_data, out, model="decoder_only")
    model, _, _ = checkpoint.load_run(out, "last")
    assert model.lm_head.weight is model.transformer.wte.weight
    stored = weights(out)
    assert ("lm_head.weight" in stored) + ("transformer.wte.weight" in stored) == 1
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model(torch.tensor([[1, 2]]))[0].abs().max() == 0


def test_compiled_checkpoint_loads_without_compile(tiny_data, tmp_path):
    """Guards against `_orig_mod.` keys: a run under torch.compile is read, sampled and resumed without it."""
    out = tmp_path / "compiled"
    torch._dynamo.reset()
    short = ("--max_iters=3", "--lr_decay_iters=6", "--eval_iters=1")
    compiled = run(tiny_data, out, *short, "--compile=on", model="decoder_only")
    plain = run(tiny_data, tmp_path / "plain", *short, model="decoder_only")
    assert abs(compiled["val_loss"] - plain["val_loss"]) < 1e-4 and compiled["compiled"]
    assert weights(out).keys() == weights(tmp_path / "plain").keys()
    assert len(sample.main([str(out), "--max_new_tokens=5", "--device=cpu"])) == 1
    assert run(tiny_data, out, "--lr_decay_iters=6", "--eval_iters=1", "--resume", model="decoder_only")["steps"] == 6


def test_init_from_another_run(tiny_data, tmp_path, reference):
    """Guards warm starts: zero further steps from another run's weights give that run's loss."""
    summary = run(tiny_data, tmp_path / "next", *REFERENCE, f"--init_from={reference}", "--max_iters=0")
    best = json.loads((reference / "summary.json").read_text())
    assert best["best_step"] == 6 and abs(summary["val_loss"] - best["val_loss"]) < 1e-12
    again = run(tiny_data, tmp_path / "next", *REFERENCE, f"--init_from={reference}", "--max_iters=0", "--resume")
    train.main([f"--out_dir={tmp_path / 'next'}", "--resume"])
    kept = checkpoint.read_json(tmp_path / "next" / "config.json")["train"]["init_from"]
    assert again["val_loss"] == summary["val_loss"] and kept == str(reference), "or it would be a seed of runs from scratch"


def test_double_precision_survives_a_checkpoint(tiny_data, tmp_path):
    """Guards a float64 run against being read in float32."""
    out = tmp_path / "run"
    run(tiny_data, out, "--max_iters=2", "--dtype=float64")
    model, kept = checkpoint.load_run(out)[0], safetensors.torch.load_file(str(out / "best" / "model.safetensors"))
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items() if name in kept)


def test_init_from_a_run_with_another_tokenizer(tiny_data, tmp_path, capsys, reference):
    """Guards weights whose token ids are those of other texts."""
    other = shutil.copytree(tiny_data, tmp_path / "data")
    tokenizer.save(tokenizer.CharTokenizer("abc"), other)
    code, line = complaint(train, arguments(other, tmp_path / "run", *REFERENCE, "--vocab_size=256", f"--init_from={reference}"), capsys)
    assert code == 2 and "another tokenizer" in line and not (tmp_path / "run").exists()


def test_two_trainings_do_not_share_a_run(tiny_data, tmp_path, capsys, reference):
    """Guards one run from the checkpoints of another that runs beside it, from its own resumption and from --overwrite."""
    out = shutil.copytree(reference, tmp_path / "run")
    before = snapshot(out)
    with checkpoint.alone_in(out):
        for more in ("--resume", "--overwrite"):
            code, line = complaint(train, arguments(tiny_data, out, more), capsys)
            assert code == 1 and "another training" in line and snapshot(out) == before
    run(tiny_data, out, "--overwrite", "--max_iters=0")
    with checkpoint.alone_in(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run").is_dir()
    assert not (tmp_path / "new" / "run").exists(), "what nothing was written to is removed"


def test_a_wandb_that_will_not_start_costs_no_run(tiny_data, tmp_path, capsys, monkeypatch, reference):
    """Guards the finished run that --overwrite once deleted before it turned out that nobody was logged in."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    out = shutil.copytree(reference, tmp_path / "run")
    before = snapshot(out)
    for where in (out, tmp_path / "new"):
        code, line = complaint(train, arguments(tiny_data, where, "--overwrite", "--wandb=online"), capsys)
        assert code == 2 and "wandb=online" in line
    assert snapshot(out) == before and not (tmp_path / "new").exists()


def test_the_tokenizer_comes_back_on_resume(tiny_data, tmp_path, reference):
    """Guards against a run that trains to its end and then cannot be sampled."""
    out = shutil.copytree(reference, tmp_path / "run")
    (out / "tokenizer.json").unlink()
    run(tiny_data, out, "--resume")
    assert (out / "tokenizer.json").read_bytes() == (reference / "tokenizer.json").read_bytes()


def test_metrics_are_json(tiny_data, tmp_path, monkeypatch):
    """Guards other readers of metrics.jsonl: the norm of float16 gradients that overflow is no number, and JSON knows none."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    run(tiny_data, tmp_path / "run", "--dtype=float16", "--grad_clip=1", "--log_interval=1")

    def no_json(word: str):
        raise AssertionError(f"{word} in metrics.jsonl")

    lines = [json.loads(line, parse_constant=no_json) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert norms[0] is None and len(norms) == 6


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nobody tells what is mapped")
def test_a_resumed_optimizer_does_not_live_in_its_file(tiny_data, tmp_path, reference):
    """Guards Windows, where a file that is mapped cannot be replaced by the next checkpoint."""
    out = shutil.copytree(reference, tmp_path / "run")
    data = dataloader.open_data(tiny_data, 32)
    model = checkpoint.load_run(out, "last")[0]
    trainer = Trainer(TrainConfig(dataset=str(tiny_data)), model, data, runtime.start("cpu", "float32", "off"))
    checkpoint.load_optimizer(model, trainer.optimizer, out / "last")
    file = (out / "last" / "optimizer.safetensors").resolve()  # other tests may still hold maps of theirs
    assert trainer.optimizer.state and str(file) not in Path("/proc/self/maps").read_text()


def test_init_from_weights_that_would_mean_something_else(tiny_data, tmp_path, capsys, reference):
    """Guards warm starts from a run with other heads or another order of the same layers, which no shape gives away."""
    change = ("--n_head=4", "--decoder_order=cross_first", f"--init_from={reference}")
    code, line = complaint(train, arguments(tiny_data, tmp_path / "next", *REFERENCE, *change), capsys)
    assert code == 2 and "has n_head=2 (here 4), decoder_order=self_first (here cross_first)" in line
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("content", [b"hello", b"", None])
def test_init_from_what_is_no_checkpoint(tiny_data, tmp_path, capsys, content):
    """Guards --init_from=FILE.pt: text, nothing, and a file of torch without a model end in one line."""
    path = tmp_path / "some.pt"
    torch.save({"weights": 1}, path) if content is None else path.write_bytes(content)
    code, line = complaint(train, arguments(tiny_data, tmp_path / "run", f"--init_from={path}", model="decoder_only"), capsys)
    assert code == 2 and "is no checkpoint of nanoGPT" in line and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# what is written, and what is touched


def test_run_directory(reference, tiny_data):
    """Guards the contract of DESIGN: which files, which keys; everything loads without pickle."""
    assert {p.name for p in reference.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "summary.json",
        "last",
        "best",
    }
    assert {p.name for p in (reference / "last").iterdir()} == {"model.safetensors", "optimizer.safetensors", "trainer.json"}
    assert {p.name for p in (reference / "best").iterdir()} == {"model.safetensors", "trainer.json"}
    config = json.loads((reference / "config.json").read_text())
    assert (
        config["train"]["seed"] == 1337 and config["model"]["embedding_loss"] == "mse" and config["model"]["vocab_size"] == 256
    )
    for record in records(reference, "eval"):
        keys = {
            "train_loss",
            "val_loss",
            "embedding_loss",
            "gain_embedding",
            "gain_encoder",
            "embedding_grad_wte",
            "embedding_grad_wpe",
        }
        assert keys <= record.keys() and record["embedding_grad_wte"] > 0
    for record in records(reference, "train"):
        assert {"loss", "token_loss", "embedding_loss", "lr", "tokens_per_second", "seconds", "grad_norm"} <= record.keys()
        assert abs(record["loss"] - record["token_loss"] - record["embedding_loss"]) < 1e-6
        assert record["lr"] == learning_rate(TrainConfig(max_iters=6, warmup_iters=2), record["step"] - 1)
        assert record["tokens"] == record["step"] * 2 * 4 * 32
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["tokens"] == 6 * 2 * 4 * 32
    assert summary["data_hash"] == dataloader.TokenData(tiny_data, 32).val_hash, "that of what the loss was measured on"
    for key in ("val_loss", "val_bits_per_byte", "parameters", "flops_per_token", "tokens", "seconds", "tokens_per_second",
                "peak_memory_bytes", "seed", "commit", "data_hash", "torch", "device", "embedding_loss"):  # fmt: skip
        assert summary[key] is not None, key
    modes = {(reference / which / name).stat().st_mode for which in ("last", "best") for name in ("trainer.json", "model.safetensors")}
    assert len(modes) == 1, "weights that only their owner may read"


def test_the_commit_is_that_of_the_start(tiny_data, tmp_path, monkeypatch):
    """Guards against a summary that names code which was not there yet when a long run began."""
    commits = iter(["started", "committed meanwhile", "and again"])
    monkeypatch.setattr(train, "git_commit", lambda: next(commits))
    summary = train.main(arguments(tiny_data, tmp_path / "run"))
    assert summary["commit"] == "started"


def test_no_network_and_no_optional_imports(tiny_data, tmp_path, monkeypatch):
    """Guards air-gapped machines: training and sampling open no socket and import neither wandb, datasets nor matplotlib."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "for name in ('wandb', 'datasets', 'matplotlib', 'transformers'): sys.modules[name] = None  # as if not installed\n"
        "import train, sample\n"
        f"train.main({arguments(tiny_data, tmp_path / 'run', '--eval_sample_tokens=2')!r})\n"
        f"sample.main([{str(tmp_path / 'run')!r}, '--max_new_tokens=3', '--device=cpu'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert socket.socket.connect  # this process is untouched


def test_wandb_offline_writes_a_run(tiny_data, tmp_path, monkeypatch):
    """Guards the real wandb in offline mode: a run file with our numbers, no account, no network."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    out = tmp_path / "run"
    run(tiny_data, out, "--wandb=offline")
    files = list(out.rglob("*.wandb"))
    assert len(files) == 1
    deadline = time.time() + 60  # wandb's own process writes the file, and may do so after finish() on a busy machine
    while files[0].stat().st_size < 1000 and time.time() < deadline:
        time.sleep(0.2)
    assert files[0].stat().st_size > 1000
    name = checkpoint.read_json(out / "last" / "trainer.json")["wandb_id"]
    assert name in files[0].name
    run(tiny_data, out, "--resume", "--wandb=off", "--max_iters=9")
    assert checkpoint.read_json(out / "last" / "trainer.json")["wandb_id"] == name, "with wandb again, it would be another run there"


def test_wandb_without_an_account_is_one_line(tiny_data, tmp_path, monkeypatch):
    """Guards --wandb=online before `wandb login`."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for key, value in (("HOME", tmp_path), ("NETRC", tmp_path / "none"), ("WANDB_CONFIG_DIR", tmp_path)):
        monkeypatch.setenv(key, str(value))
    with pytest.raises(ValueError, match="wandb=online: .*; run `wandb login`, or use --wandb=offline"):
        run(tiny_data, tmp_path / "run", "--wandb=online")


def test_compilation_needs_a_compiler(tiny_data, tmp_path, monkeypatch, capsys):
    """Guards --compile=on from a hundred lines of torch, and from a run directory; compile=auto on a GPU does without."""
    monkeypatch.setenv("PATH", "")
    code, line = complaint(train, arguments(tiny_data, tmp_path / "run", "--compile=on"), capsys)
    assert code == 2 and "torch.compile needs" in line and not (tmp_path / "run").exists()
    gpu = torch.device("cuda")
    assert runtime.choose_compile("auto", gpu) == (False, "torch.compile needs gcc or clang, which is not there")
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(runtime.sysconfig, "get_path", lambda name: str(tmp_path))
        code, line = complaint(train, arguments(tiny_data, tmp_path / "run", "--compile=on"), capsys)
        assert code == 2 and "torch.compile needs" in line and "Python.h" in line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not runtime.choose_compile("auto", gpu)[0], "triton does without such a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert runtime.choose_compile("auto", gpu)[0] and runtime.choose_compile("on", torch.device("cpu"))[0]
    assert not runtime.choose_compile("auto", gpu, torch.bfloat16)[0], "it has no such products"
    with pytest.raises(ValueError, match="no bfloat16 for this GPU"):
        runtime.choose_compile("on", gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert runtime.choose_compile("auto", gpu, torch.bfloat16)[0]


def test_wandb_missing_is_one_line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        run(tiny_data, tmp_path / "run", "--wandb=offline")


# ----------------------------------------------------------------------------------------------------------------------
# bad input: one line, an exit status, nothing overwritten


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def complaint(script, argv: list[str], capsys) -> tuple[int, str]:
    """Exit status and what stands on stderr, as a user of the script sees it."""
    with pytest.raises(SystemExit) as exit_info, configurator.exit_on_user_error():
        script.main(argv)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return exit_info.value.code, [line for line in error.splitlines() if line.startswith("error: ")][-1]


@pytest.mark.parametrize(
    "change, status, message",
    [
        (["--learning_rte=1"], 2, "did you mean 'learning_rate'"),
        (["--n_layer=3"], 2, "it belongs to 'decoder_only'"),
        (["--n_embd=15"], 2, "not divisible"),
        (["--max_iters=ten"], 2, "an integer was expected"),
        (["--warmup_iters=7"], 2, "beyond max_iters=6"),
        (["--min_lr=1"], 2, "min_lr=1.0 must lie between"),
        (["--dtype=int8"], 2, "one of"),
        (["--model=gpt"], 2, "encoder_decoder"),
        (["--device=cuda:99"], 2, "device=cuda:99"),
        (["--vocab_size=100"], 2, "vocab_size=100 is too small"),
        (["--block_size=5000"], 2, "block_size"),
        (["--dataset=nowhere"], 1, "known sets"),
        (["--resume", "--overwrite"], 2, "exclude each other"),
        (["--init_from=nowhere"], 1, "not a directory"),
        (["--init_from="], 2, "--init_from= is empty"),
        (["--out_dir=~/run"], 2, "write $HOME"),
        (["--out_dir="], 2, "--out_dir= is empty"),  # not the folder that it would have without
    ],
)
def test_bad_settings(tiny_data, tmp_path, capsys, change, status, message):
    """Guards users: each mistake is one line on stderr with what to do, and leaves no run directory behind."""
    code, line = complaint(train, arguments(tiny_data, tmp_path / "run", *change), capsys)
    assert code == status and message in line
    assert not (tmp_path / "run").exists()


def test_existing_runs_are_never_overwritten_unless_asked(tiny_data, tmp_path, capsys, monkeypatch, reference):
    """Guards weeks of training: the same command again refuses; --resume with nothing there refuses; --overwrite starts again."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out)
    before = snapshot(out)
    code, line = complaint(train, arguments(tiny_data, out, *REFERENCE), capsys)
    assert code == 1 and "--resume" in line and "--overwrite" in line and snapshot(out) == before
    code, line = complaint(train, arguments(tiny_data, out, "--n_embd=15", "--overwrite"), capsys)
    assert code == 2 and snapshot(out) == before, "a bad setting must show before anything is deleted"
    sample_of = "--eval_sample_tokens=3 --eval_sample_prompt="
    for late in ("--wandb=offline", sample_of, sample_of + "x" * 40, f"--seed={2**64} --eval_sample_tokens=3"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "wandb", None)
            code, line = complaint(train, arguments(tiny_data, out, *REFERENCE, "--overwrite", *late.split()), capsys)
        assert code == 2 and snapshot(out) == before, late
    (tmp_path / "set").mkdir()
    for file in tiny_data.iterdir():
        shutil.copyfile(file, tmp_path / "set" / file.name)
    code, line = complaint(train, arguments(tmp_path / "set", tmp_path / "set", "--overwrite"), capsys)
    assert code == 2 and "holds what the run reads as its dataset" in line and snapshot(tmp_path / "set") == snapshot(tiny_data)
    code, line = complaint(train, arguments(tiny_data, out / "config.json", "--overwrite"), capsys)
    assert code == 1 and "is a file" in line and snapshot(out) == before
    for other in ("learning_rate=0.5 (was 0.002)", "seed=5 (was 1337)", "beta1=0.5 (was 0.9)", "batch_size=2 (was 4)"):
        words = arguments(tiny_data, out, *REFERENCE, "--resume", f"--{other.split()[0]}")
        code, line = complaint(train, words, capsys)
        assert code == 2 and other in line and snapshot(out) == before
    code, line = complaint(train, arguments(tiny_data, tmp_path / "none", "--resume"), capsys)
    assert code == 1 and "not a directory" in line and not (tmp_path / "none").exists()
    (out / "last" / "trainer.json").write_text("[1]")
    code, line = complaint(train, [f"--out_dir={out}", "--resume"], capsys)
    assert code == 2 and "trainer.json is damaged: it lacks step" in line
    shutil.rmtree(out / "last")
    code, line = complaint(train, arguments(tiny_data, out), capsys)
    assert code == 1 and "exists; --overwrite starts it again" in line, "there is nothing to resume"
    (tmp_path / "none").mkdir()
    code, line = complaint(train, arguments(tiny_data, tmp_path / "none", "--resume"), capsys)
    assert code == 1 and "no config.json" in line
    (out / "notes.txt").write_text("mine")
    run(tiny_data, out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine" and not same(weights(out), weights(reference))
    call_at(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run(tiny_data, out, "--overwrite")
    assert not (out / "summary.json").exists() and [record["step"] for record in records(out, "eval")] == [0]


def test_a_run_begins_without_anything_of_an_earlier_one(reference, tiny_data, tmp_path):
    """Guards --overwrite behind a crash: a folder under its second name would pass for a checkpoint of the new run."""
    out = shutil.copytree(reference, tmp_path / "run")
    for name in ("last", "best"):
        for suffix in (".old", ".tmp"):
            shutil.copytree(out / name, out / (name + suffix))
    settings = checkpoint.read_json(out / "config.json")
    for folder in (out, tmp_path / "new"):
        checkpoint.start_run(settings, tiny_data, folder)
    assert snapshot(out) == snapshot(tmp_path / "new")
    for which in ("last", "best"):
        with pytest.raises(FileNotFoundError, match="holds no weights"):
            checkpoint.find(out, which)


@pytest.mark.parametrize("seldom", ["--eval_interval=1000", "--log_interval=1000"])
def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny_data, tmp_path, capsys, seldom):
    """Guards both places that notice it: a log line, and an evaluation before it writes its checkpoint."""
    out = tmp_path / "run"
    code, line = complaint(
        train, arguments(tiny_data, out, "--learning_rate=1e30", "--max_iters=30", "--warmup_iters=0", seldom), capsys
    )
    assert code == 1 and "last good checkpoint" in line and "step 30" not in line
    assert all(torch.isfinite(w).all() for w in weights(out).values())


def test_bad_run_directories_for_sampling(tmp_path, capsys, reference):
    """Guards sample.py: missing, half-written and damaged run directories, prompts too long or of unknown characters."""
    import shutil

    def broken(name: str, damage) -> Path:
        shutil.copytree(reference, tmp_path / name)
        damage(tmp_path / name)
        return tmp_path / name

    half = broken("half", lambda p: [shutil.rmtree(p / which) for which in ("last", "best")])
    cut = broken(
        "cut", lambda p: (p / "best" / "model.safetensors").write_bytes((p / "best" / "model.safetensors").read_bytes()[:999])
    )
    odd = broken("odd", lambda p: (p / "config.json").write_text("{"))
    blind = broken("blind", lambda p: (p / "tokenizer.json").unlink())
    chars = broken("chars", lambda p: (p / "tokenizer.json").write_text(json.dumps({"name": "char", "chars": "abc"})))
    stepless = broken("stepless", lambda p: (p / "best" / "trainer.json").write_text("{}"))
    nothing = broken("nothing_in_it", lambda p: (p / "best" / "trainer.json").write_text("null"))
    lost = broken("lost", lambda p: (p / "best" / "model.safetensors").unlink())  # last/ is not what was asked for
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    many = "".join(map(chr, range(32, 333)))
    words = broken("words", lambda p: (p / "tokenizer.json").write_text(json.dumps({"name": "char", "chars": many})))
    for argv, status, message in (
        ([str(tmp_path / "nothing")], 1, "not a directory"),
        ([str(tmp_path)], 1, "no config.json"),
        ([str(half)], 1, "no complete best checkpoint: it holds no weights"),
        ([str(cut)], 2, "damaged"),
        ([str(odd)], 2, "damaged"),
        ([str(blind)], 1, "tokenizer.json does not exist"),
        ([str(chars), "--prompt=abcd"], 2, "character 'd' at position 3"),
        ([str(reference), "--prompt=" + "x" * 33], 2, "33 tokens, but the model has room for 32"),
        ([str(reference), "--prompt=FILE:nowhere.txt"], 1, "nowhere.txt"),
        ([str(reference), "--temperature=-1"], 2, "temperature=-1"),
        ([str(reference), "--top_p=0"], 2, "top_p=0"),
        ([str(reference), "--stream", "--num_samples=2"], 2, "num_samples=1"),
        ([str(reference), "--int8", "--check"], 2, "use one of the two"),
        ([str(stepless), "--max_new_tokens=1"], 2, "trainer.json is damaged"),
        ([str(nothing), "--max_new_tokens=1"], 2, "trainer.json is damaged"),
        ([str(lost), "--max_new_tokens=1"], 1, "no complete best checkpoint"),
        ([str(reference), f"--prompt=FILE:{tmp_path / 'latin.txt'}"], 2, "latin.txt: not utf-8 at byte 3; convert it"),
        ([str(reference), "--prompt=caf\udce9"], 2, "is not UTF-8; convert it"),
        ([str(reference), "--temperature="], 2, "--temperature= is empty"),
        ([str(reference), "--token_temperature=-1"], 2, "token_temperature=-1"),
        ([str(reference), "--top_k=1.5"], 2, "an integer such as 1 or a list of int such as 4,4,2 or none was expected"),
        ([str(words), "--max_new_tokens=1"], 2, "has 301 tokens, but the model 256"),
        ([], 2, "RUN is missing"),
    ):
        code, line = complaint(sample, argv, capsys)
        assert code == status and message in line, line


def test_sample_script(reference, capsys, monkeypatch, tmp_path):
    """Guards sample.py's front door: prompt from a file and stdin, streaming, JSON, and the same text for each of them."""
    import io

    (tmp_path / "p.txt").write_text("import ", encoding="utf-8")
    plain = sample.main([str(reference), "--prompt=import ", "--max_new_tokens=20", "--device=cpu"])
    shown = capsys.readouterr().out
    assert "import " + plain[0] in shown
    streamed = sample.main(
        [str(reference), f"--prompt=FILE:{tmp_path / 'p.txt'}", "--max_new_tokens=20", "--device=cpu", "--stream"]
    )
    assert capsys.readouterr().out == "import " + plain[0] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("import "))
    several = sample.main(
        [str(reference), "--prompt=-", "--max_new_tokens=20", "--num_samples=3", "--json", "--device=cpu", "--cache=false"]
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plain == streamed == several[:1] and report["tokens"] == 60 and report["samples"] == 3
    (tmp_path / "p.txt").write_bytes("\ufeffä".encode())  # a byte order mark, as some editors write it; and a pipe of Windows
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffä".encode()), encoding="latin-1"))
    for prompt in (f"FILE:{tmp_path / 'p.txt'}", "-"):
        sample.main([str(reference), f"--prompt={prompt}", "--max_new_tokens=1", "--json", "--device=cpu"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompt_tokens"] == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\udcff"))  # as some locales hand on a byte that is no UTF-8
    with pytest.raises(ValueError, match="is not UTF-8"):
        sample.main([str(reference), "--prompt=-"])
    with pytest.raises(ValueError, match="the prompt has 40 tokens"):
        sample.main([str(reference), f"--prompt={'x' * 40}", "--stream"])
    assert capsys.readouterr().out == "", "of a text that cannot be continued nothing is shown"
    monkeypatch.setattr(sys, "stdin", None)  # closed
    with pytest.raises(ValueError, match="there is no standard input"):
        sample.main([str(reference), "--prompt=-"])


@pytest.mark.parametrize("flags, paths", [([], [True, False]), (["--cache=false"], [False, True])])
def test_check_takes_another_path(reference, monkeypatch, capsys, flags, paths):
    """Guards --check against comparing a path with itself, which cannot fail."""
    sample_together, used = generate.sample_together, []
    monkeypatch.setattr(
        generate, "sample_together", lambda *given, **how: used.append(given[3]) or sample_together(*given, **how)
    )
    sample.main([str(reference), "--max_new_tokens=40", "--device=cpu", "--check", *flags])
    assert used == paths and "gives the same text" in capsys.readouterr().err
