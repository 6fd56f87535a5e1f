"""The benchmark runs, on a tiny model, and its arithmetic is right. How fast anything is, no test can know."""

import dataclasses
import json
import types

import pytest
import torch
from test_lookahead import write_run

import bench
import checkpoint
import configurator
import dataloader
import generate
import lookahead
import runtime
import tokenizer
from benchmarks import sampling, timing, training
from conftest import TINY_BASELINE, TINY_ENCODER_DECODER
from data import corpus


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_bench_sample(name, tmp_path, capsys):
    """Guards bench.py: every variant makes all its tokens, and the line of JSON says what the table says."""
    run = write_run(tmp_path / "run", name)
    rows = bench.main(["sample", f"--run={run}", "--tokens=12", "--repeats=2", "--batch=3", "--device=cpu", "--threads=1"])
    *table, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["rows"] == rows and report["threads"] == 1
    assert [row["variant"] for row in rows][:3] == ["plain cached", "plain uncached", "plain cached, batch 3"]
    assert all(row["tokens_per_step"] == 1 for row in rows[:3]) and rows[0]["ratio"] == 1
    assert sum(line.startswith("| ") for line in table) == len(rows) + 2
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["tokens_per_step"] >= 1


def test_bench_sample_of_validation_prompts(tmp_path):
    """Guards tokens/step over many prompts: each is continued once, from where the pieces of the validation data begin."""
    run = write_run(tmp_path / "run", "decoder_only")
    config = json.loads((run / "config.json").read_text())
    block_size = config["model"]["block_size"]
    corpus.write_dataset(["ab" * 20 + f" number {i}. " for i in range(60)], tokenizer.get("byte"), tmp_path / "set", 0.2, "a test")
    (run / "config.json").write_text(json.dumps(config | {"train": config["train"] | {"dataset": str(tmp_path / "set")}}))
    prompts = sampling.validation_prompts(str(run), 3, block_size)
    val = dataloader.open_data(tmp_path / "set", block_size).val.tolist()
    for i, prompt in enumerate(prompts):
        start = i * (len(val) - block_size // 2) // 3
        assert prompt == val[start : start + block_size // 2]
    rows = bench.main(["sample", f"--run={run}", "--val_prompts=3", "--tokens=12", "--repeats=1", "--device=cpu", "--threads=1"])
    model = checkpoint.load_run(run, "best", torch.device("cpu"))[0]
    generate.prepare_for_decoding(model)
    steps = 0
    for prompt in prompts:
        ahead = lookahead.Lookahead(model, generate.Continuation(prompt, 12), generate.Sampling(0.0, seed=1337), lookahead.AUTO[-1])
        while not ahead.sample.finished:
            ahead.step()
        steps += ahead.steps
    (row,) = [row for row in rows if row["variant"] == f"lookahead {lookahead.AUTO[-1]}"]
    assert row["tokens_per_step"] == 36 / steps
    with pytest.raises(ValueError, match="val_prompts=3"):
        bench.main(["sample", "--val_prompts=3"])


def test_bench_latent(tmp_path, capsys):
    """Guards the comparison: blocks and single tokens of the same number of texts, each beside the baseline of its batch size."""
    rows = bench.main(["latent", "--tokens=16", "--repeats=1", "--batch=3", "--device=cpu", "--threads=1"])
    *table, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["rows"] == rows and sum(line.startswith("| ") for line in table) == 10 + 2
    assert [row["batch"] for row in rows] == [1, 3] * 5
    assert [row["tokens_per_step"] for row in rows] == [1, 1, 4, 4, 4, 4, 8, 8, 8, 8]
    for row in rows:
        assert row["ratio"] == row["tokens_per_second"] / rows[row["batch"] == 3]["tokens_per_second"]
    run = write_run(tmp_path / "run", "decoder_only")
    with pytest.raises(ValueError, match="run=... one over codes"):
        bench.main(["latent", f"--run={run}", "--device=cpu"])


def test_bench_latent_on_pairs(tmp_path):
    """Guards the count of whole answers: one that ends early is as short as it is, and a question needs its separator."""
    run, baseline = write_run(tmp_path / "run", "decoder_only"), write_run(tmp_path / "baseline", "decoder_only")
    sizes = dict(task="pairs", block_size=24, target_size=16, n_layer=1, n_decoder_layer=1, n_embd=16)
    config = checkpoint.CONFIGS["latent_transformer"](**sizes)
    settings = {"train": {"model": "latent_transformer"}, "model": configurator.to_dict(config)}
    checkpoint.write_json(run / "config.json", settings)
    torch.manual_seed(0)
    checkpoint.save(run / "last", checkpoint.build("latent_transformer", config), None, {"step": 1})
    command = ["latent", f"--run={run}", f"--baseline={baseline}", "--prompt=4711", "--temperature=0", "--repeats=1", "--batch=3",
               "--device=cpu", "--threads=1"]  # fmt: skip
    for folder in (run, baseline):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"separator": 9}))
    rows = bench.main(command)
    for folder, row in zip((baseline, run), rows[::2]):
        model = checkpoint.load_run(folder)[0]
        sample = generate.Continuation([*b"4711", 9], model.config.block_size, eos=0)
        steps = sum(1 for _ in generate.sample_together(model, [sample], generate.Sampling(0.0)))
        assert row["tokens_per_step"] == (len(sample.output) + (sample.reason == "eos")) / steps
    assert [row["batch"] for row in rows] == [1, 3, 1, 3] and rows[2]["tokens_per_step"] == rows[3]["tokens_per_step"] > 1
    (baseline / "config.json").write_text(json.dumps(json.loads((baseline / "config.json").read_text()) | {"separator": None}))
    with pytest.raises(ValueError, match="only one is on pairs"):
        bench.main(command)


def test_in_turns(monkeypatch):
    """Guards the medians and the order: with a clock of our own, rates are exact."""
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def run(tokens):
            calls.append(name)
            clock[0] += seconds.pop(0)
            return 2 * tokens, tokens

        return run

    variants = [sampling.Variant("a", work("a", [9, 1, 4, 2])), sampling.Variant("b", work("b", [9, 8, 8, 8]), 2)]
    a, b = sampling.sampled(variants, 16, 3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert a == ("a", 16.0, 2.0) and b == ("b", 4.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# train


def tiny_sizes(monkeypatch) -> None:
    shapes = {
        name: {key: value for key, value in shape.items() if key not in ("vocab_size", "block_size")}
        for name, shape in (("encoder_decoder", TINY_ENCODER_DECODER), ("decoder_only", TINY_BASELINE))
    }
    monkeypatch.setitem(training.SIZES, "stdlib", (31, 12, 3, shapes))


THEIR_MODEL = """
from __future__ import annotations
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert not config.bias and config.dropout == 0 and config.n_layer == 3
        print("number of parameters")
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.out = torch.nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = self.out(self.table(idx))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_bench_train(tmp_path, capsys, monkeypatch):
    """Guards the comparison: all variants in one table, theirs first and through the same steps; the columns follow from the speed."""
    tiny_sizes(monkeypatch)
    monkeypatch.setattr(training, "matrix_peak", lambda machine, n: {torch.float32: 2e9, torch.bfloat16: 4e9}[machine.dtype])
    (tmp_path / "model.py").write_text(THEIR_MODEL)
    small = ["train", "--size=stdlib", "--compile=off", "--steps=1", "--repeats=2", "--device=cpu", "--threads=1"]
    rows = bench.main([*small, f"--compare_with={tmp_path / 'model.py'}"])
    *table, line = capsys.readouterr().out.splitlines()
    names = [f"{name} {dtype}" for name in ("nanogpt", "encoder_decoder", "decoder_only") for dtype in ("float32", "bfloat16")]
    assert [row["variant"] for row in rows] == names and json.loads(line)["rows"] == rows
    assert sum(line.startswith("| ") for line in table) == 6 + 2
    config = checkpoint.CONFIGS["decoder_only"](**TINY_BASELINE)
    flops = checkpoint.build("decoder_only", config).flops_per_token()
    for row in rows:
        assert row["ratio"] == row["tokens_per_second"] / rows[0]["tokens_per_second"] and row["peak_memory_bytes"] is None
        assert row["share_of_peak"] == row["flops_per_second"] / (2e9 if "float32" in row["variant"] else 4e9)
        if "encoder" not in row["variant"]:
            assert row["flops_per_second"] == row["tokens_per_second"] * flops
    quick = bench.main([*small, "--quick", "--models=decoder_only"])
    assert [row["variant"] for row in quick] == ["decoder_only float32"] and quick[0]["peak_memory_bytes"] > 2**20
    (tmp_path / "other.py").write_text("GPT = None")
    with pytest.raises(ValueError, match="no classes GPT and GPTConfig"):
        bench.main([*small, f"--compare_with={tmp_path / 'other.py'}"])
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        bench.main([*small, "--compare_with=nowhere.py"])


def test_training_is_a_whole_optimizer_step():
    """Guards the measured work: it moves the weights as a plain loop does, leaves no gradient behind, and counts its tokens."""
    weights, tokens = [], torch.randint(31, (3, 13), generator=torch.Generator().manual_seed(0))
    for size, graphs, lanes in ((None, False, 1), (3, False, 1), (2, False, 1), (2, True, 1), (2, False, 2)):  # none: a plain loop
        torch.manual_seed(0)
        model = checkpoint.build("decoder_only", checkpoint.CONFIGS["decoder_only"](**TINY_BASELINE)).double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if size is None:
            for _ in range(3):
                optimizer.zero_grad()
                model(tokens[:, :-1], tokens[:, 1:])[1]["total"].backward()
                optimizer.step()
        else:
            machine = dataclasses.replace(runtime.start("cpu", "float64", "off"), graphs=graphs)
            assert training.optimizer_steps(model, optimizer, tokens, machine, size, lanes)(3) == 3 * 3 * 12
            assert all(not p.grad.any() if graphs else p.grad is None for p in model.parameters())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert (weights[0] - weights[2]).abs().max() < 1e-12, "micro-batches of 2 and of 1 count by their sequences"
    assert (weights[0] - weights[4]).abs().max() < 1e-12, "lanes count by their sequences, one without any not at all"


def test_matrix_peak(monkeypatch):
    """Guards the arithmetic: 2 n^3 operations in the shortest of five times."""
    times = iter([0, 5, 0, 3, 0, 2, 0, 8, 0, 4])
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    assert training.matrix_peak(runtime.start("cpu", "float32", "off"), 4) == 2 * 64 / 2


def test_memory_is_that_of_a_process_of_its_own():
    """Guards peak memory: what this process once had must not count, and each variant must get the settings of the table."""
    fill = torch.ones(2**28)  # 1 GiB
    del fill
    config = training.TrainBench(size="stdlib", batch=1, memory=True, device="cpu", threads=1)
    peak = training.memory_alone(config, models=("decoder_only",), dtypes=("float32",), compile=("off",))
    assert 50 * 2**20 < peak < min(2**30, runtime.start("cpu", "float32", "off").peak_memory_bytes())


# ----------------------------------------------------------------------------------------------------------------------
# data


def test_bench_data(tmp_path, capsys, monkeypatch):
    """Guards the pair: both tokenize all of the same text, ours as data/text/prepare.py does, and batches come from the result."""
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding("b", pat_str=r"\w+|\W", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    monkeypatch.setattr(tokenizer, "get", lambda name: tokenizer.TiktokenTokenizer(name, encoding))
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"document {i} " * 9 for i in range(80)))
    small = ["data", "--quick", "--batches=3", "--batch=2", "--block_size=16", "--threads=2", f"--input={text}"]
    rows = bench.main(small)
    *table, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["rows"] == rows and sum(line.startswith("| ") for line in table) == 3 + 2
    assert (report["megabytes"], report["repeats"], report["threads"]) == (2, 1, 2), "what was measured, not what was asked for"
    assert [row["variant"].split(",")[0] for row in rows] == ["tiktoken", "data/corpus.py", "dataloader.py"]
    assert rows[0]["ratio"] == 1 and rows[1]["ratio"] == rows[1]["bytes_per_second"] / rows[0]["bytes_per_second"]
    assert rows[2]["batches_per_second"] > 0 and "80 documents" in table[0]
    monkeypatch.undo()
    rows = bench.main([*small[:-1], "--tokenizer=byte", "--megabytes=1"])
    assert len(rows) == 2 and rows[0]["bytes_per_second"] > 0


# ----------------------------------------------------------------------------------------------------------------------
# compare


def test_compare(tmp_path, capsys):
    """Guards the ratios: B / A of each speed and memory of rows of one name, other settings and missing rows said."""
    report = {"bench": "train", "threads": 1, "rows": [
        {"variant": "a", "tokens_per_second": 10.0, "ratio": 1.0, "peak_memory_bytes": None},
        {"variant": "b", "tokens_per_second": 20.0, "ratio": 2.0, "peak_memory_bytes": 400}]}  # fmt: skip
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a table\n{}\n" + json.dumps(report) + "\n")
    report |= {"threads": 2}
    report["rows"] = [report["rows"][1] | {"tokens_per_second": 30.0, "peak_memory_bytes": 100}, {"variant": "c"}]
    two.write_text(json.dumps(report))
    for words in (["compare", str(one), str(two)], ["--compare", str(one), str(two)]):
        rows = bench.main(words)
        out = capsys.readouterr().out
        assert [(row["variant"], row["quantity"], row["ratio"]) for row in rows] == [
            ("b", "tokens_per_second", 1.5), ("b", "peak_memory_bytes", 0.25)]  # fmt: skip
        assert "threads 1 -> 2" in out and f"not in {two}: a" in out and f"not in {one}: c" in out
        assert json.loads(out.splitlines()[-1])["rows"] == rows
    two.write_text(json.dumps(report | {"bench": "data"}))
    with pytest.raises(ValueError, match="only equals can be compared"):
        bench.main(["compare", str(one), str(two)])
    two.write_text("nothing")
    with pytest.raises(ValueError, match="no line of JSON"):
        bench.main(["compare", str(one), str(two)])
    with pytest.raises(FileNotFoundError, match="save what a benchmark prints"):
        bench.main(["compare", str(one), str(tmp_path / "none")])
    with pytest.raises(ValueError, match="takes two files"):
        bench.main(["compare", str(one)])


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "FILE_B ... is missing"),
        (["smaple"], "did you mean 'sample'"),
        (["sample", "--tokens=0"], "tokens=0"),
        (["latent", "--batch=0"], "batch=0"),
        (["sample", "--batc=1"], "did you mean 'batch'"),
        (["sample", "more"], "unexpected word 'more'"),
        (["train", "--models=gpt"], "models=gpt: one of nanogpt, encoder_decoder"),
        (["train", "--dtypes=float64"], "dtypes=float64"),
        (["train", "--models=nanogpt"], "nothing to measure"),
        (["train", "--steps=0"], "steps=0"),
        (["train", "--micro_batch=2", "--lanes=4"], "a lane needs one of the 2 sequences at a time"),
        (["data", "--batches=0"], "batches=0"),
    ],
)
def test_bad_words(argv, message):
    with pytest.raises(ValueError, match=message):
        bench.main(argv)
