"""Runs that were stopped, and go on as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import checkpoint
import train
from conftest import ROOT, make_model
from runs import group, read_runs
from tiny_runs import REFERENCE, arguments, call_at, command, complaint, crash, records, run, same, weights


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
    assert state["dtype"] == "float32" and "until here it was trained in" not in capsys.readouterr().out
    path.write_text(json.dumps(state | {"dtype": "bfloat16"}))  # by a CPU that has it, under dtype=auto
    assert run(tiny_data, old, "--max_iters=4", "--resume")["decay_ends"] == [4], "no step was made under another schedule"
    assert "until here it was trained in bfloat16, from now on in float32" in capsys.readouterr().out
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
    assert process.returncode == -how, complaints
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
    with pytest.raises(SystemExit, match="143"):
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
    with pytest.raises(FloatingPointError, match="the loss became nan by step 4; start again"):
        run(tiny_data, tmp_path, "--learning_rate=1e30", "--warmup_iters=0", "--eval_interval=1000", "--log_interval=1000", "--overwrite")
    assert all(torch.isfinite(w).all() for w in weights(tmp_path).values())


SIGNALLED = """
import os, signal, sys, time
import checkpoint, errors, train, trainer
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
    with errors.exit_on_user_error():
        train.main(sys.argv[1:])
finally:
    sys.stdout.write(f"rank {rank} stopped\\n")  # in one piece: both write into one pipe
    sys.stdout.flush()
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


def test_disk_that_is_full_at_the_start(tiny_data, tmp_path):
    """Guards a full disk that is reported without a name, or under that of the data set's file, and the run that follows it."""
    words = arguments(tiny_data, tmp_path / "run")
    code = (
        "import resource, runpy, sys\n"
        f"sys.argv = ['train.py', *{words!r}]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path / 'run' / 'config.json'}: File too large\n")
    train.main(words)


def test_checkpoints_behind_links(tiny_data, tmp_path, reference):
    """Guards a run whose last/ was moved to another disk: the link has to be replaced, or the second save finds it in its way."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out)
    for name in ("last", "best"):
        (out / name).rename(tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
    resumed = (*REFERENCE, "--resume", "--max_iters=12", "--lr_decay_iters=none")
    train.main(arguments(tiny_data, out, *resumed))
    assert not (out / "last").is_symlink() and not (out / "last.old").exists() and checkpoint.find(out, "last") == out / "last"
    assert same(weights(tmp_path), weights(reference)), "what the link led to stays as it is"
    (out / "best").exists() and shutil.rmtree(out / "best")
    (out / "best").symlink_to(tmp_path / "best")
    train.main(arguments(tiny_data, out, "--overwrite", "--max_iters=0"))
    assert not (out / "best").is_symlink() and same(weights(tmp_path, "best"), weights(reference, "best"))


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
