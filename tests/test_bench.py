"""The benchmark runs, on a tiny model, and its arithmetic is right. How fast anything is, no test can know."""

import json

import pytest
from test_lookahead import write_run

import bench


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


def test_bench_latent(tmp_path, capsys):
    """Guards the comparison: blocks and single tokens of the same number of texts, each beside the baseline of its batch size."""
    rows = bench.main(["latent", "--tokens=16", "--repeats=1", "--batch=3", "--device=cpu", "--threads=1"])
    *table, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["rows"] == rows and sum(line.startswith("| ") for line in table) == 6 + 2
    assert [row["batch"] for row in rows] == [1, 3] * 3
    assert [row["tokens_per_step"] for row in rows] == [1, 1, 4, 4, 8, 8]
    for row in rows:
        assert row["ratio"] == row["tokens_per_second"] / rows[row["batch"] == 3]["tokens_per_second"]
    run = write_run(tmp_path / "run", "decoder_only")
    with pytest.raises(ValueError, match="run=... one over codes"):
        bench.main(["latent", f"--run={run}", "--device=cpu"])


def test_in_turns(monkeypatch):
    """Guards the medians and the order: with a clock of our own, rates are exact."""
    import torch

    clock, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def run(tokens):
            calls.append(name)
            clock[0] += seconds.pop(0)
            return 2 * tokens, tokens

        return run

    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    variants = [bench.Variant("a", work("a", [9, 1, 4, 2]), model), bench.Variant("b", work("b", [9, 8, 8, 8]), model)]
    a, b = bench.in_turns(variants, 16, 3, {"b": 2})
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert a == ("a", 16.0, 2.0, 16 * 400 / 2 / 1e9) and b == ("b", 4.0, 1.0, 16 * 400 / 8 / 1e9)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "sample.latent is missing"),
        (["smaple"], "did you mean 'sample'"),
        (["sample", "--tokens=0"], "tokens=0"),
        (["latent", "--batch=0"], "batch=0"),
        (["sample", "--batc=1"], "did you mean 'batch'"),
    ],
)
def test_bad_words(argv, message):
    with pytest.raises(ValueError, match=message):
        bench.main(argv)
