"""Several processes, compilation, tied weights."""

import functools
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoint
import dataloader
import runtime
import sample
import tokenizer
import train
from conftest import make_model
from tiny_runs import REFERENCE, arguments, command, complaint, records, run, snapshot, weights
from trainer import TrainConfig, Trainer
from validation import whole_file

WATCHED = """
import atexit, pathlib, runpy, sys
atexit.register(sys.stderr.write, "the interpreter was shut down\\n")
del sys.argv[0]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("model", ["encoder_decoder", "decoder_only"])
def test_two_processes_equal_one(tiny_data, tmp_path, model):
    """
    Guards DDP: two gloo processes with the same seed give one process's losses, evaluations and summary to 1e-5. And their end: an
    interpreter that is shut down beside gloo's threads is aborted by them now and then, and the run, complete, fails.
    """
    more = ("--gradient_accumulation_steps=2", "--grad_clip=1.0")
    more += ("--embedding_loss=mse", "--dropout=0.1") if model == "encoder_decoder" else ()
    uneven = ("--micro_batch_size=3",) if model == "decoder_only" else ()  # 4 sequences each as 3 + 1; dropout would differ
    (tmp_path / "watched.py").write_text(WATCHED, encoding="utf-8")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "watched.py"))
    process = command(tiny_data, tmp_path / "two", *more, *uneven, model=model, launcher=launcher)
    one = run(tiny_data, tmp_path / "one", *more, model=model)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 0 and "shut down" not in complaints, complaints
    assert printed.count("done: validation loss") == 1, "only one process may speak"
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["world_size"] == 2 and abs(one["val_loss"] - two["val_loss"]) < 1e-5 and one["tokens"] == two["tokens"]
    for kind, keys in (("train", ("loss", "token_loss", "grad_norm", "lr")), ("eval", ("train_loss", "val_loss"))):
        a, b = records(tmp_path / "one", kind), records(tmp_path / "two", kind)
        assert len(a) == len(b)
        for key in keys:
            assert np.allclose([r[key] for r in a], [r[key] for r in b], atol=1e-5, rtol=0), key


def test_what_one_process_refuses_is_no_traceback_of_the_others(tiny_data, tmp_path, reference):
    """Guards one clear message: process 0 finds that a run is there already, and the others, which wait for it, cannot know why."""
    shutil.copytree(reference, tmp_path / "run")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = command(tiny_data, tmp_path / "run", *REFERENCE, launcher=launcher)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode != 0 and complaints.count("error: ") == 1 and "--resume" in complaints, complaints
    assert "[rank" not in complaints and "process 1 ends because another one has ended" in complaints, complaints


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_process_that_fails_alone_does_not_wait_for_the_others(tiny_data, tmp_path, monkeypatch, reference, backend):
    """Guards its message: NCCL leaves only together, so with it this process would wait for those that wait for it."""
    left = []
    monkeypatch.setattr(runtime.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runtime.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(runtime.dist, "destroy_process_group", lambda: left.append(backend))
    monkeypatch.setattr("latent.quantize.distributed", lambda: False)
    with pytest.raises(FileExistsError):
        run(tiny_data, reference, *REFERENCE)
    assert left == ([] if backend == "nccl" else ["gloo"])
    run(tiny_data, tmp_path / "run", *REFERENCE)
    assert left[-1:] == [backend]


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
    with pytest.raises(ValueError, match="each of 2 processes needs a GPU of its own"):
        runtime.choose_device("cuda:1", 0, 2)
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
    monkeypatch.setattr("validation.FULL_EVAL_TOKENS", 10 * 32)
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
    """Guards warm starts: zero further steps from another run's weights give that run's loss, under another window a warning."""
    start = (*REFERENCE, f"--init_from={reference}", "--max_iters=0")
    with warnings.catch_warnings(record=True) as told:
        summary = run(tiny_data, tmp_path / "next", *start)
    best = json.loads((reference / "summary.json").read_text())
    assert best["best_step"] == 6 and abs(summary["val_loss"] - best["val_loss"]) < 1e-12
    assert not any("init_from" in str(warning.message) for warning in told)
    with pytest.warns(UserWarning, match=r"window=0 \(here 4\)"):
        run(tiny_data, tmp_path / "window", *start, "--window=4")
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


@pytest.mark.parametrize(
    "content", [b"hello", b"", {"weights": 1}, {"model": "gpt2"}, {"model": {}, "model_args": "x"}], ids=lambda content: str(content)
)
def test_init_from_what_is_no_checkpoint(tiny_data, tmp_path, capsys, content):
    """Guards --init_from=FILE.pt: text, nothing, and a file of torch without a model end in one line."""
    path = tmp_path / "some.pt"
    torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
    code, line = complaint(train, arguments(tiny_data, tmp_path / "run", f"--init_from={path}", model="decoder_only"), capsys)
    assert code == 2 and "is no checkpoint of nanoGPT" in line and not (tmp_path / "run").exists()
