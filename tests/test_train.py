"""The training loop and what it writes, on real text with tiny models."""

import dataclasses
import json
import math
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import dataloader
import generate
import runtime
import sample
import train
from conftest import ROOT, make_model, write_tokens
from data.pairs import prepare as pairs
from errors import exit_on_user_error
from runs import read_runs
from tiny_runs import REFERENCE, SHORT, arguments, call_at, complaint, crash, records, run, same, snapshot, weights
from trainer import TrainConfig, Trainer, learning_rate, make_optimizer
from validation import mean_loss, whole_file

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
    for asked in ("q7\t", "q7\n", "q7\t\n"):  # each of them the same question
        assert sample.main([word.replace("q7", asked) for word in command])[0] == sample.main(command)[0]
    with pytest.raises(ValueError, match="the prompt is empty"):
        sample.main([word for word in command if "q7" not in word])
    capsys.readouterr()
    train.main([*words, "--overwrite", "--eval_sample_tokens=12"])  # without a prompt it is the first question
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample: ")]
    first = next(dataloader.open_data(tmp_path / "set", 32).questions("val", 1))[0]
    prompt = f"--prompt={bytes(first[:-1]).decode()}"
    assert shown[-1] == f"sample: {sample.main([prompt if 'q7' in word else word for word in command])[0]!r}"
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
        monkeypatch.setattr("validation.FULL_EVAL_TOKENS", rows * 32)
        loss, count = mean_loss(model, whole_file(data, machine), machine)
        losses.append(loss)
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
        monkeypatch.setattr("validation.FULL_EVAL_TOKENS", rows * 32)
        loss, count = mean_loss(model, whole_file(data, machine, first_targets=100), machine)
        assert count == 100 and abs(loss - part / 100) < 1e-11


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
    assert abs(mean_loss(model, trainer.eval_batches("val"), trainer.machine)[0] - model(x, y)[1]["token"].item()) < 1e-12


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
    assert (summary["best_step"], summary["steps"]) == (7, 9), "evaluations count, not steps"
    assert checkpoint.read_json(tmp_path / "odd" / "last" / "trainer.json")["step"] == 9, "it ends where it was saved"
    losses[:] = [5.0, 3.0, *[6.0] * 9]
    of_data = iter([False] * 3 + [True] * 9)  # in steps 3, 6, 9: until then codes mean nothing
    monkeypatch.setattr(train, "measured", lambda *_: {"codes_of_data": next(of_data)})
    summary = run(tiny_data, tmp_path / "codes", "--max_iters=30", "--patience=2")
    assert (summary["steps"], summary["best_step"], summary["best_val_loss"]) == (18, 12, 6.0), "best/ has codes that mean something"
    monkeypatch.setattr(train, "measured", lambda *_: {"codes_of_data": False})
    summary = run(tiny_data, tmp_path / "none", "--max_iters=9")
    assert (summary["best_step"], summary["best_val_loss"]) == (3, 3.0), "among such without, the lowest counts"
    losses[:] = [3.0, 5.0, *[6.0] * 9]
    of_data = iter([False] + [True] * 9)  # from step 0 on, as its weights are those of a run
    monkeypatch.setattr(train, "measured", lambda *_: {"codes_of_data": next(of_data)})
    summary = run(tiny_data, tmp_path / "on", "--max_iters=9", "--patience=3", f"--init_from={tmp_path / 'none'}")
    assert (summary["best_step"], summary["best_val_loss"]) == (3, 5.0), "codes made of data, after a run that had none"


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
        assert (late != sample_of) or "eval_sample_prompt is empty" in line
    code, line = complaint(train, arguments(tiny_data, out, *REFERENCE, "--overwrite", f"--init_from={out}"), capsys)
    assert code == 2 and "what the run reads as its init_from" in line and snapshot(out) == before
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
    older = json.loads((out / "config.json").read_text())
    del older["train"]["beta1"]  # as of a version without that setting: then the run had its default
    (tmp_path / "now.json").write_bytes((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(older))
    code, line = complaint(train, arguments(tiny_data, out, *REFERENCE, "--resume", "--beta1=0.5"), capsys)
    assert code == 2 and "beta1=0.5 (was 0.9)" in line
    (tmp_path / "now.json").replace(out / "config.json")
    code, line = complaint(train, arguments(tiny_data, tmp_path / "none", "--resume"), capsys)
    assert code == 1 and "not a directory" in line and not (tmp_path / "none").exists()
    state, config = ((out / name).read_text() for name in ("last/trainer.json", "config.json"))
    for name, whole, damaged, message in (
        ("last/trainer.json", state, "{}", "trainer.json is damaged: it lacks step"),
        ("last/trainer.json", state, "[1]", "trainer.json is damaged ([1] instead of keys"),
        ("last/trainer.json", state, state.replace('"seconds": ', '"seconds": null, "was": '), "its seconds is None"),
        ("config.json", config, config.replace('"dataset": ', '"dataset": 3, "was": '), "config.json is damaged: it lacks"),
        ("config.json", config, config.replace('"flags": [', '"flags": [null, '), "config.json is damaged: it lacks"),
    ):
        (out / name).write_text(damaged)
        code, line = complaint(train, [f"--out_dir={out}", "--resume"], capsys)
        assert code == 2 and message in line and "start the run again" in line, damaged
        (out / name).write_text(whole)
    shutil.rmtree(out / "last")
    code, line = complaint(train, arguments(tiny_data, out), capsys)
    assert code == 1 and "exists; --overwrite starts it again" in line, "there is nothing to resume"
    (tmp_path / "none").mkdir()
    code, line = complaint(train, arguments(tiny_data, tmp_path / "none", "--resume"), capsys)
    assert code == 1 and "no config.json" in line
    shutil.copytree(reference, tmp_path / "runs" / "best")  # a folder of runs is no run, and its runs are not parts of one
    for words in ([], ["--overwrite"]):
        code, line = complaint(train, arguments(tiny_data, tmp_path / "runs", *words), capsys)
        assert code == 1 and "is no run, but has best" in line and snapshot(tmp_path / "runs" / "best") == snapshot(reference)
        code, line = complaint(train, [*arguments(tiny_data, tmp_path), *words], capsys)  # it would hide them from compare.py
        assert code == 1 and "is no run, but holds runs" in line and not (tmp_path / "config.json").exists()
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
    assert code == 1 and f"--init_from={out} --out_dir=..." in line and "step 30" not in line
    assert all(torch.isfinite(w).all() for which in ("last", "best") for w in weights(out, which).values())
    run(tiny_data, tmp_path / "again", f"--init_from={out}")  # as it says


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


def test_weights_that_do_not_fit_are_explained_by_the_settings(tiny_data, tmp_path, capsys, reference):
    """Guards init_from against torch's list of missing keys, which says neither which setting differs nor that nothing is damaged."""
    for words, model, message in (
        (["--n_embd=8"], "encoder_decoder", f"init_from={reference} does not fit: it has n_embd=16 (here 8); set the same"),
        ([], "decoder_only", f"init_from={reference} is a run of model=encoder_decoder, whose weights are not for this model"),
    ):
        options = [*REFERENCE[:3], f"--init_from={reference}", *words] if model == "encoder_decoder" else [f"--init_from={reference}"]
        code, line = complaint(train, arguments(tiny_data, tmp_path / "never", *options, model=model), capsys)
        assert code == 2 and message in line and "damaged" not in line
    assert not (tmp_path / "never").exists()


def test_warnings_are_lines(capsys):
    """Guards what a user reads against the place in the code where a warning was raised."""
    with exit_on_user_error():
        warnings.warn("nothing was learned", stacklevel=1)
    assert capsys.readouterr().err == "warning: nothing was learned\n"


def test_stop_at_a_line_end(reference, capsys):
    """Guards --stop='\\n' against a search for a backslash and an n, which no text ends at."""
    given = [str(reference), "--temperature=2", "--seed=3", "--max_new_tokens=400", "--device=cpu"]
    (whole,), (cut,) = sample.main(given), sample.main([*given, "--stop=\\n"])
    assert "\n" in whole and cut == whole.split("\n")[0]
