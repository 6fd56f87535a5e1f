"""compare.py: rows, statistics, refusals and curves, on run directories written here in train.py's format."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compare
import configurator
import curves
import trainer
from runs import NOT_OF_A_ROW, read_lines

ROOT = Path(__file__).parent.parent
BYTES_PER_TOKEN = 4.2


def write_run(folder: Path, seed=1, val_loss=3.4, *, train=None, model=None, evals=None, summary=None) -> Path:
    """A finished run directory."""
    folder.mkdir(parents=True)
    settings = {
        "model": "decoder_only",
        "dataset": "wikipedia",
        "seed": seed,
        "out_dir": str(folder),
        "max_iters": 9000,
        "learning_rate": 9e-4,
        "device": "cuda",
        "wandb": "off",
        "resume": False,
    } | (train or {})
    config = {"train": settings, "model": {"n_layer": 26, "n_embd": 160} | (model or {})}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    evals = [{"step": s, "val_loss": 11 - s, "train_loss": 11 - s} for s in range(4)] if evals is None else evals
    lines = [json.dumps({"tokens": 1000 * record["step"], "kind": "eval"} | record) + "\n" for record in evals]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    numbers = {
        "run": folder.name,
        "model": "decoder_only",
        "dataset": "wikipedia",
        "parameters": 16_036_800,
        "flops_per_token": 112_345_678,
        "steps": 9000,
        "tokens": 1_440_000_000,
        "train_loss": val_loss - 0.4,
        "val_loss": val_loss,
        "val_bits_per_byte": val_loss / math.log(2) / BYTES_PER_TOKEN,
        "best_val_loss": val_loss,
        "best_step": 9000,
        "seconds": 7000.0,
        "tokens_per_second": 201_234.0,
        "peak_memory_bytes": 3 * 2**30,
        "seed": seed,
        "commit": "0123456789abcdef",
        "data_hash": "ab" * 32,
        "val_tokens": 4_000,
        "torch": "2.13.0",
        "device": "NVIDIA A100",
        "dtype": "bfloat16",
        "compiled": True,
        "world_size": 1,
    } | (summary or {})
    (folder / "summary.json").write_text(json.dumps(numbers), encoding="utf-8")
    return folder


def write_realistic(root: Path, names: dict[str, tuple], seeds, steps, tokens_per_step, vocab_size, byte_level=False) -> None:
    """Learning curves with the noise of seeds: names maps a run to (final val, final train, embedding loss at the end or None)."""
    per_token = 1.0 if byte_level else BYTES_PER_TOKEN
    for index, (name, (val_end, train_end, embedding_end)) in enumerate(names.items()):
        for seed in seeds:
            random = np.random.default_rng([index, seed])
            shift, evals = random.normal(0, 0.003), []
            for step in steps:
                done = step / steps[-1]
                start = math.log(vocab_size)
                fall = (start - val_end) * (1 + 120 * done) ** -0.75
                tail = 0.04 * val_end * (1 - done)
                record = {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "val_loss": val_end + fall + tail + shift + random.normal(0, 0.002),
                    "train_loss": train_end
                    + fall
                    + 1.6 * tail
                    + shift
                    + (val_end - train_end) * 0.8 * (1 - done) ** 2
                    + random.normal(0, 0.004),
                }
                if embedding_end:
                    record["embedding_loss"] = math.exp(math.log(embedding_end) * done**0.35 + random.normal(0, 0.2))
                evals.append(record)
            final = evals[-1]["val_loss"]
            write_run(
                root / f"{name}_seed{seed}",
                seed,
                final,
                model={"variant": name},
                evals=evals,
                summary={
                    "val_bits_per_byte": final / math.log(2) / per_token,
                    "train_loss": evals[-1]["train_loss"],
                    "tokens": steps[-1] * tokens_per_step,
                    "dataset": "stdlib" if byte_level else "wikipedia",
                    "tokens_per_second": 200_000 + 500 * seed,
                },
            )


def write_published_like(root: Path) -> None:
    """The eight published runs with three seeds each."""
    endings = {
        "encdec_cosine": (3.387, 2.993, 8.6e-9),
        "encdec_mse": (3.385, 2.998, 4.1e-9),
        "encdec_plain": (3.413, 3.043, None),
        "encdec_possub": (3.381, 2.979, None),
        "encdec_mse_possub": (3.378, 2.982, 4.7e-9),
        "baseline": (3.424, 2.937, None),
        "baseline_small": (3.416, 2.958, None),
        "baseline_dropout": (3.398, 3.174, None),
    }
    write_realistic(root, endings, (1, 2, 3), range(0, 9001, 500), 160_000, 50257)


def write_quickstart_like(root: Path) -> None:
    """Two byte-level runs, one seed, few evaluations."""
    endings = {"quickstart_encdec": (1.42, 1.30, None), "quickstart_baseline": (1.45, 1.31, None)}
    write_realistic(root, endings, (1337,), range(0, 2001, 250), 8192, 256, byte_level=True)


def rows_of(*folders: Path) -> dict[str, compare.Row]:
    return {row.label: row for row in compare.group(compare.read_runs(compare.find_runs([str(f) for f in folders])))}


def table_after(text: str, first: str, number: int = 0) -> list[list[str]]:
    """Cells of the table number 0, 1, ... whose header begins with `first`: header, rule, lines."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith(f"| {first} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number]]


# statistics


@pytest.mark.parametrize(
    "nu, t, p",
    [
        (1, 12.706, 0.05),
        (2, 4.303, 0.05),
        (4, 4.604, 0.01),
        (10, 2.228, 0.05),
        (30, 2.750, 0.01),
        (120, 1.980, 0.05),
        (2, 0.0, 1.0),
        (1, 1.0, 0.5),
    ],
)
def test_t_distribution_against_the_printed_table(nu, t, p):
    """Guards a one-sided p, or n in place of n - 1: both turn noise into a finding."""
    assert compare.t_two_sided(t, nu) == pytest.approx(p, rel=2e-3)
    assert compare.t_two_sided(-t, nu) == compare.t_two_sided(t, nu)
    if 0 < p < 1:
        assert compare.t_critical(nu, p) == pytest.approx(t, rel=1e-3)


def test_t_distribution_in_closed_form():
    """nu = 1 and 2 have elementary tails; guards the quadrature far out, where p is tiny."""
    for t in (0.1, 1.7, 30.0, 4e4):
        assert compare.t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-6)
        s = math.sqrt(t * t + 2)
        assert compare.t_two_sided(t, 2) == pytest.approx(2 / (s * (s + t)), rel=1e-9)  # 1 - t / s without cancellation


def test_paired_p_is_uniform_when_there_is_no_difference(tmp_path):
    """Monte Carlo: of rows that differ by noise alone, one in twenty is called clear of it, and the interval holds 0 as often."""
    random = np.random.default_rng(0)
    called, covered, total = 0, 0, 3000
    for _ in range(total):
        shared, noise = random.normal(3.4, 0.5, 4), random.normal(0, 0.01, (2, 4))
        rows = [
            compare.Row(name, [compare.Run(tmp_path, {}, {"seed": s, "val_loss": shared[s] + own[s]}, []) for s in range(4)])
            for name, own in zip("ab", noise, strict=True)
        ]
        result = compare.difference(*rows)
        called += result.verdict == "clear of the noise"
        covered += result.low <= 0 <= result.high
    assert called / total == pytest.approx(0.05, abs=0.015) and covered == total - called


def test_paired_difference_uses_common_seeds_only(tmp_path):
    """Guards pairing by position: seeds 1, 2, 3 against 2, 3, 4 have two pairs, not three."""
    for seed, a, b in ((1, 9.0, None), (2, 3.40, 3.50), (3, 3.44, 3.52), (4, None, 1.0)):
        if a:
            write_run(tmp_path / f"a_seed{seed}", seed, a)
        if b:
            write_run(tmp_path / f"b_seed{seed}", seed, b, model={"n_layer": 2})
    rows = rows_of(tmp_path)
    result = compare.difference(rows["b"], rows["a"])
    d = [0.10, 0.08]
    error = statistics.stdev(d) / math.sqrt(2)
    assert result.seeds == 2 and result.mean == pytest.approx(statistics.mean(d))
    assert (result.low, result.high) == pytest.approx((0.09 - 12.7062 * error, 0.09 + 12.7062 * error), rel=1e-4)
    assert result.p == pytest.approx(1 - 2 / math.pi * math.atan(0.09 / error)) and result.verdict == "inside the noise"


def test_one_seed_cannot_tell(tmp_path, capsys):
    """Guards a verdict from one seed, and a standard deviation of one number."""
    write_run(tmp_path / "a", 1, 3.4)
    write_run(tmp_path / "b", 1, 3.5, model={"n_layer": 2})
    write_run(tmp_path / "c", 2, 3.6, model={"n_layer": 3})
    compare.main([str(tmp_path / "*"), "--plot=none"])
    text = capsys.readouterr().out
    assert "- `b`: +0.1000: one seed: cannot tell" in text and "- `c`: +0.2000: one seed: cannot tell" in text
    assert "nan" not in text and " ± 0" not in text and "clear of" not in text


def test_one_new_run_beside_several(tmp_path, capsys):
    """
    Guards the user who ran a config once, with a seed of their own or one of three: held against three runs, a loss is out of the
    ordinary as often as it should be, by Student's test of two samples, written out here.
    """
    for seed, loss in ((1, 3.40), (2, 3.44), (3, 3.42)):
        write_run(tmp_path / f"a_s{seed}", seed, loss)
    for name, loss, seed, verdict in (("near", 3.50, 1337, "inside"), ("again", 3.50, 2, "inside"), ("far", 3.70, 1337, "clear of")):
        write_run(tmp_path / "new" / name, seed, loss, model={"n_layer": len(name)})
        rows = rows_of(*tmp_path.glob("a_s*"), tmp_path / "new" / name)
        result = compare.difference(rows[name], rows["a"])
        error = 0.02 * math.sqrt(1 + 1 / 3)  # one deviation of 3 runs serves both; t of 2 degrees of freedom is 4.3027
        assert (result.low, result.high) == pytest.approx((loss - 3.42 - 4.3027 * error, loss - 3.42 + 4.3027 * error), abs=1e-5)
        assert result.seeds == 0 and result.verdict == f"{verdict} the noise, not paired: fewer than two seeds in common"
    compare.main([str(tmp_path / "a_s*"), str(tmp_path / "new" / "far"), "--plot=none"])
    assert "- `far`: +0.2800 (95 % interval +0.1806 to +0.3794, p = 0.0067): clear of the noise, not" in capsys.readouterr().out
    random, called = np.random.default_rng(0), 0
    for _ in range(2000):
        losses = random.normal(3.4, 0.01, 5)
        a, b = (compare.Row(name, [compare.Run(tmp_path, {}, {"seed": s, "val_loss": losses[s]}, []) for s in seeds])
                for name, seeds in (("a", (0, 1, 2)), ("b", (3, 4))))  # fmt: skip
        called += compare.difference(b, a).p < 0.05
    assert called / 2000 == pytest.approx(0.05, abs=0.015)


def test_only_tests_are_counted(tmp_path, capsys):
    """Guards "3 comparisons at p < 0.05 each" where one of the three rows has a single seed, as the reference has, and no p."""
    for name, seeds in (("a", (1,)), ("b", (1, 2)), ("c", (1, 2)), ("d", (1,))):
        for seed in seeds:
            write_run(tmp_path / f"{name}_s{seed}", seed, 3.0 + ord(name) * seed / 100, model={"name": name})
    compare.main([str(tmp_path), "--reference=a", "--plot=none"])
    assert "\n2 comparisons at p < 0.05 each" in capsys.readouterr().out


def test_equal_losses_are_not_a_finding(tmp_path):
    """Guards 0 / 0 where two rows agree to the last digit, and x / 0 where they differ by a constant."""
    for seed in (1, 2, 3):
        for name, more in (("a", 0.0), ("b", 0.0), ("c", 0.5)):
            write_run(tmp_path / f"{name}_s{seed}", seed, 3.0 + more, model={"name": name})
    rows = rows_of(tmp_path)
    same, other = (compare.difference(rows[name], rows["a"]) for name in "bc")
    assert (same.p, same.verdict, other.p, other.verdict) == (1.0, "inside the noise", 0.0, "clear of the noise")


# rows


def test_runs_are_grouped_over_seeds_and_nothing_else(tmp_path):
    """Guards averaging runs of different settings because their directories have similar names."""
    a = [
        write_run(tmp_path / f"a-seed{s}", s, 3.0 + s / 100, train={"device": f"cuda:{s}", "resume": s == 2, "lanes": s})
        for s in (3, 1, 2)
    ]
    b = [write_run(tmp_path / "b_13", 1, 3.5, train={"learning_rate": 1e-3})]
    c = [write_run(tmp_path / f"c_s{s}", s, 3.6, train={"learning_rate": s}) for s in (1, 2)]
    rows = rows_of(*a, *b, *c)
    assert list(rows) == ["a", "b_13", "c (learning_rate=1)", "c (learning_rate=2)"]
    assert [run.path for run in rows["a"].runs] == sorted(a) and [run.path for run in rows["b_13"].runs] == b
    assert [run.path for label in list(rows)[2:] for run in rows[label].runs] == c


def test_how_steps_are_computed_is_no_setting_of_a_row(tmp_path):
    """Guards seeds that are rows of their own because one machine has more cores or less memory, and a mean over batch sizes."""
    ways = {"lanes": 2, "micro_batch_size": 4, "activation_checkpointing": True, "eval_interval": 50, "log_interval": 1}
    a = [write_run(tmp_path / f"a_s{seed}", seed, 3.0, train={key: ways[key]}) for seed, key in enumerate(ways)]
    others = {"batch_size": 4, "gradient_accumulation_steps": 2, "grad_clip": 1.0, "dtype": "float32"}
    b = [write_run(tmp_path / f"b_s{seed}", seed, 3.1, train={key: others[key]}) for seed, key in enumerate(others, len(a))]
    assert sorted(len(row.runs) for row in rows_of(*a, *b).values()) == [1] * len(b) + [len(a)]
    assert configurator.annotations(trainer.TrainConfig).keys() >= NOT_OF_A_ROW, "a setting has another name now"


def test_a_run_given_twice_or_copied_counts_once(tmp_path, capsys):
    """Guards a copied directory that halves the spread."""
    a, copy = write_run(tmp_path / "a", 1, 3.0), write_run(tmp_path / "a_again", 1, 3.0)
    assert len(rows_of(a, a, tmp_path / "." / "a")["a"].runs) == 1 and capsys.readouterr().err == ""
    assert len(rows_of(a, copy)["a"].runs) == 1
    assert f"{copy} has settings and seed of {a}: skipped" in capsys.readouterr().err


def test_runs_come_in_the_order_in_which_they_are_named(tmp_path):
    """Guards evaluate.py's lines: a run that a second name stands for as well was moved behind those named after it."""
    a, b, again = write_run(tmp_path / "a", 1, 3.0), write_run(tmp_path / "b", 2, 3.0), tmp_path / "c"
    again.symlink_to(a)
    assert compare.find_runs([str(a), str(b), str(again)]) == [a, b]
    assert compare.find_runs([str(again), str(tmp_path / "?")]) == [again, b]


def test_a_setting_that_is_null_is_one_that_older_runs_lack(tmp_path):
    """Guards a row that falls into two of one name because the code has learned a setting between its seeds."""
    write_run(tmp_path / "a_s1", 1, 3.0)
    write_run(tmp_path / "a_s2", 2, 3.1, train={"init_from": None}, model={"window": None})
    write_run(tmp_path / "b_s2", 2, 3.2, model={"window": 8})
    rows = rows_of(tmp_path)
    assert {label: len(row.runs) for label, row in rows.items()} == {"a": 2, "b": 1}


def test_seeds_of_other_training_data_are_another_row(tmp_path):
    """Guards a mean over runs whose data set had grown between the seeds; the validation file, alone compared before, had not."""
    for seed, data in ((1, None), (2, "aa" * 32), (3, "aa" * 32), (4, "bb" * 32)):
        write_run(tmp_path / f"a_s{seed}", seed, 3.0 + seed, summary={} if data is None else {"train_hash": data})
    rows = rows_of(tmp_path)
    seeds = {label: [run.summary["seed"] for run in row.runs] for label, row in rows.items()}
    assert list(seeds.values()) == [[1, 2, 3], [4]] and "a (train_hash=bbbbbbbbbbbb)" in seeds


def test_versions_of_the_code_are_told_apart_by_name(tmp_path, capsys):
    """Guards a change of the code, which no setting tells: it was left out as a copy, or averaged with what it was compared with."""
    for seed in (1, 2):
        write_run(tmp_path / f"before_s{seed}", seed, 3.0 + seed / 10)
        write_run(tmp_path / f"after_s{seed}", seed, 2.0 + seed / 10, summary={"commit": "fedcba9876+"})
    compare.main([str(tmp_path), "--plot=none"])
    assert "before_s1 has settings and seed of" in (err := capsys.readouterr().err) and "--by_name compares them" in err
    rows = compare.main([str(tmp_path), "--plot=none", "--by_name"])
    assert [(row.label, len(row.runs)) for row in rows] == [("after", 2), ("before", 2)]
    assert [row.mean("val_loss") for row in rows] == pytest.approx([2.15, 3.15])
    told = capsys.readouterr()
    assert told.err == "" and "several names" not in told.out
    compare.main([str(tmp_path / "before_s1"), str(tmp_path / "after_s2"), "--plot=none"])
    assert "`before` holds runs of several names and commits, before, after: --by_name keeps them apart." in capsys.readouterr().out


def test_twins_are_told_apart_in_few_words(tmp_path):
    """Guards a label of hundreds of characters, and one for two rows, of which --reference and the picture know only one."""
    many = {f"setting_{i}": i for i in range(40)}
    runs = [write_run(tmp_path / "stdlib" / "baseline_s1", 1, 3.0)]
    runs += [write_run(tmp_path / "small" / "baseline_s1", 1, 3.1, model=many)]
    assert list(rows_of(*runs)) == ["stdlib/baseline", "small/baseline"]
    runs += [write_run(tmp_path / "small" / "baseline_s2", 1, 3.2, model={"setting_0": "x" * 99})]
    assert list(rows_of(*runs)) == [
        "stdlib/baseline",
        "small/baseline (setting_0=0 setting_1=1 setting_2=2)",
        f"small/baseline (setting_0={'x' * 24})",
    ]
    for folder in "ab":
        for seed, length in ((1, 30), (2, 31)):
            path = tmp_path / folder / "small" / f"baseline_s{seed}"
            runs += [write_run(path, 1, 3.3, model={"setting_0": "x" * 99, "last": folder * length})]
    labels = list(rows_of(*runs))
    assert len(set(labels)) == len(labels) == 7 and max(map(len, labels)) < 100


def test_table_numbers_equal_a_slow_computation(tmp_path, capsys):
    """Guards population standard deviations, wrong columns and an unsorted table."""
    write_published_like(tmp_path / "out")
    compare.main(
        [str(tmp_path / "out" / "*"), "--plot=none", f"--output={tmp_path / 'new' / 't.md'}", f"--json={tmp_path / 't.json'}"]
    )
    text = capsys.readouterr().out
    assert (tmp_path / "new" / "t.md").read_text(encoding="utf-8") == text
    lines = table_after(text, "run")
    header, cells = lines[0], {line[0]: line for line in lines[2:]}
    assert len(cells) == 8 and all(len(line) == len(header) for line in lines)
    numbers = {row["run"]: row for row in json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["rows"]}
    for name, line in cells.items():
        seeds = [json.loads((tmp_path / "out" / f"{name}_seed{s}" / "summary.json").read_text()) for s in (1, 2, 3)]
        column = {key: [seed[key] for seed in seeds] for key in seeds[0]}
        mean = {key: statistics.mean(column[key]) for key in ("val_loss", "train_loss", "val_bits_per_byte")}
        expected = {
            "parameters": "16,036,800",
            "FLOPs/token": "112 M",
            "tokens": "1.44 G",
            "seeds": "3",
            "commit": "0123456",
            "train loss": f"{mean['train_loss']:.4f}",
            "bits per byte": f"{mean['val_bits_per_byte']:.4f}",
            "validation loss": f"{mean['val_loss']:.4f} ± {statistics.stdev(column['val_loss']):.4f}",
            "tokens/s": "201 k",
            "peak memory": "3.00 GiB",
        }
        assert {key: line[header.index(key)] for key in expected} == expected
        assert numbers[name]["val_loss"]["values"] == column["val_loss"]
        assert numbers[name]["val_loss"]["sd"] == pytest.approx(statistics.stdev(column["val_loss"]))
    losses = [float(line[header.index("validation loss")].split()[0]) for line in lines[2:]]
    assert losses == sorted(losses)
    assert text.count("clear of the noise") + text.count("inside the noise") == 7 and "p is not corrected" in text


def test_tokens_of_a_row_are_those_of_all_its_seeds(tmp_path, capsys):
    """Guards runs that `patience` ended early, of which a row had the tokens of the first."""
    for seed, tokens in ((1, 2_000_000), (2, 4_000_000)):
        write_run(tmp_path / f"a_s{seed}", seed, 3.0, summary={"tokens": tokens})
    compare.main([str(tmp_path / "*"), "--plot=none", f"--json={tmp_path / 'table.json'}"])
    [line] = table_after(text := capsys.readouterr().out, "run")[2:]
    assert line[3] == "3.00 M" and "The runs differ in training tokens." in text
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["tokens"] == 3_000_000


def test_bits_of_codes_stand_beside_the_bound_that_holds_them(tmp_path, capsys):
    """Guards models over codes, whose loss is two: a column of its own, of the right rows, and none where no run has codes."""
    for seed, bits in ((1, 3.0), (2, 3.5)):
        write_run(tmp_path / f"codes_s{seed}", seed, 3.0, summary={"code_bits_per_byte": bits})
        write_run(tmp_path / f"plain_s{seed}", seed, 2.0, model={"n_layer": 2})
    compare.main([str(tmp_path), "--plot=none"])
    header, _, plain, codes = table_after(capsys.readouterr().out, "run")
    at = header.index("of codes")
    assert header[at - 1] == "bits per byte" and (plain[0], plain[at], codes[0], codes[at]) == ("plain", "–", "codes", "3.2500")
    compare.main([str(tmp_path / "plain*"), "--plot=none"])
    assert "of codes" not in capsys.readouterr().out


def test_what_makes_rows_unequal_is_said(tmp_path, capsys):
    """Guards a comparison over unequal budgets, or over uncommitted code, that looks like any other."""
    write_run(tmp_path / "a_s1", 1, 3.0, summary={"commit": "0123456789+"})
    write_run(tmp_path / "a_s2", 2, 3.0, summary={"commit": "fedcba9876"})
    write_run(tmp_path / "b", 1, 3.5, model={"n_layer": 2}, summary={"tokens": 5})
    compare.main([str(tmp_path), "--plot=none"])
    text = capsys.readouterr().out
    assert " 0123456+ fedcba9 |" in text and "A commit with + had uncommitted changes." in text
    assert "The runs differ in training tokens. The runs differ in commits." in text and "differ in devices" not in text
    write_run(tmp_path / "c", 1, 3.5, model={"n_layer": 3}, summary={"device": "cpu", "dtype": "float32", "parameters": 16_830_000})
    compare.main([str(tmp_path), "--plot=none"])
    assert "The runs differ in devices. The runs differ in dtypes." in (text := capsys.readouterr().out) and "parameters than" not in text
    assert "holds runs in" not in text
    write_run(tmp_path / "a_s3", 3, 3.0, summary={"dtype": "bfloat16"})
    write_run(tmp_path / "a_s4", 4, 3.0, summary={"dtype": "float32"})
    compare.main([str(tmp_path), "--plot=none"])
    assert "`a` holds runs in bfloat16 and in float32." in capsys.readouterr().out
    write_run(tmp_path / "d", 1, 3.5, model={"n_layer": 4}, summary={"parameters": 17_640_480})
    compare.main([str(tmp_path), "--plot=none"])
    assert "The largest has 10% more parameters than the smallest." in capsys.readouterr().out


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (999, "999"),
        (999.9, "1.00 k"),
        (1000, "1.00 k"),
        (9_500, "9.50 k"),
        (9_996, "10.0 k"),
        (12_345, "12.3 k"),
        (99_960, "100 k"),
        (999_600, "1.00 M"),
        (1_440_000_000, "1.44 G"),
        (2.5e13, "25.0 T"),
    ],
)
def test_count(value, text):
    """Guards rounding across a prefix, such as 1000 k."""
    assert compare.count(value) == text


def test_reference_and_published(tmp_path, capsys):
    """Guards a reference that is ignored, and a published row that drifts from the paper's table."""
    write_published_like(tmp_path)
    compare.main([str(tmp_path), "--reference=baseline", "--published", "--plot=none"])
    text = capsys.readouterr().out
    assert "Differences in validation loss from `baseline`" in text and re.search(
        r"- `encdec_mse_possub`: -0\.0[45]\d\d \(", text
    )
    for train, val in (
        (2.993, 3.387),
        (2.998, 3.385),
        (3.043, 3.413),
        (2.979, 3.381),
        (2.982, 3.378),
        (2.937, 3.424),
        (2.958, 3.416),
        (3.174, 3.406),
    ):
        assert re.search(rf" {train:.3f} \| +{val:.3f} ", text)
    ours = {line[0]: line[6] for line in table_after(text, "run")[2:]}
    assert {line[0]: line[6] for line in table_after(text, "published run")[2:]} == ours
    assert "one seed each" in text and "attention dropout still on" in text
    with pytest.raises(ValueError, match="--reference=baselin: no such row; one of .*did you mean 'baseline'?"):
        compare.main([str(tmp_path), "--reference=baselin", "--plot=none"])


# what is refused, and what is skipped with a word


def test_different_validation_data_is_refused(tmp_path):
    """Guards a table over two data sets or two tokenizers, in which the smaller number means nothing."""
    a = write_run(tmp_path / "a", 1, 3.0)
    b = write_run(tmp_path / "b", 1, 1.0, summary={"data_hash": "cd" * 32, "dataset": "stdlib"})
    c = write_run(tmp_path / "c", 1, 3.0, summary={"val_bits_per_byte": 3.0 / math.log(2) / (BYTES_PER_TOKEN + 0.01)})
    with pytest.raises(ValueError, match=r"a \(wikipedia, sha256 abab.*b \(stdlib, sha256 cdcd"):
        compare.main([str(a), str(b), "--plot=none"])
    part = write_run(tmp_path / "part", 1, 2.0, summary={"val_tokens": 100})
    with pytest.raises(ValueError, match="4,000 validation tokens, .*part on 100"):
        compare.main([str(a), str(part), "--plot=none"])
    with pytest.raises(ValueError, match="a and .*c .*tokenizers differ"):
        compare.main([str(a), str(c), "--plot=none"])


def test_runs_on_other_data_do_not_spoil_a_folder(tmp_path, capsys):
    """Guards out/* after a day of trying things: what most runs were judged on is compared, in whatever order they are found."""
    for name, seed in (("b", 1), ("c", 2), ("d", 3)):
        write_run(tmp_path / "out" / name, seed, 3.0)
    write_run(tmp_path / "out" / "a", 1, 1.0, summary={"data_hash": "cd" * 32, "dataset": "numbers"})
    write_run(tmp_path / "out" / "e", 4, 2.0, summary={"val_tokens": 100})
    rows = compare.main([str(tmp_path / "out"), "--plot=none"])
    assert [[run.path.name for run in row.runs] for row in rows] == [["b", "c", "d"]]
    said = capsys.readouterr().err
    assert "a was judged on other validation tokens (numbers, 4,000 of them); skipped" in said
    assert "e was judged on other validation tokens (wikipedia, 100 of them); skipped" in said


def test_unfinished_runs_are_named_and_skipped(tmp_path, capsys):
    """Guards a table that silently lacks a run, and a traceback for a run that is still going."""
    write_run(tmp_path / "a", 1, 3.0)
    (write_run(tmp_path / "going") / "summary.json").unlink()
    (write_run(tmp_path / "cut") / "summary.json").write_text('{"val_loss": 3.', encoding="utf-8")
    (write_run(tmp_path / "old") / "summary.json").write_text('{"val_loss": 3.0}', encoding="utf-8")
    write_run(tmp_path / "diverged", 1, float("nan"))
    write_run(tmp_path / "auto", 1, 0.1, summary={"reconstruction": True})
    (tmp_path / "plot.png").write_bytes(b"not a directory")
    compare.main([str(tmp_path / "*"), "--plot=none"])
    warnings = capsys.readouterr().err
    for words in (
        "going has no summary.json",
        "cut: config.json or summary.json is half written",
        "old: summary.json lacks",
        "it diverged",
        "auto is an autoencoder: it predicts tokens that it has seen",
    ):
        assert words in warnings
    with pytest.raises(ValueError, match="no finished run.*: .*going has no summary.json"):
        compare.main([str(tmp_path / "going"), "--plot=none"])


def test_a_summary_from_before_a_run_was_resumed_is_not_its_result(tmp_path, capsys):
    """Guards a run that goes on to more steps and stands in the table with its old numbers, or a finished one that is refused."""
    write_run(tmp_path / "going", 1, 3.0, train={"max_iters": 8000}, summary={"steps": 4000})
    write_run(tmp_path / "less", 1, 3.1, train={"max_iters": 2000}, summary={"steps": 4000})  # resumed with less: nothing to do
    write_run(tmp_path / "none", 1, 3.2, train={"max_iters": 0}, summary={"steps": 0})
    write_run(tmp_path / "old", 1, 3.3, train={"max_iters": None}, summary={"steps": None})
    assert list(rows_of(tmp_path)) == ["less", "none", "old"]
    assert "going: summary.json is of step 4000 of 8000: not a finished run; skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "[]", "half written or damaged"),
        ("config.json", '{"train": {}}', "half written or damaged"),
        ("config.json", '{"train": {}, "model": null}', "half written or damaged"),
        ("summary.json", "[]", "summary.json lacks val_loss"),
        ("summary.json", "null", "half written or damaged"),
        ("summary.json", b'{"run": "\xff\xfe"}', "half written or damaged"),
        ("summary.json", {"val_loss": None}, "summary.json lacks val_loss"),
        ("summary.json", {"val_loss": "3.0"}, "summary.json lacks val_loss"),
        ("summary.json", {"val_loss": 0.0}, "its validation loss is 0.0: a damaged file"),
        ("summary.json", {"seed": [1]}, "summary.json lacks seed"),
        ("summary.json", {"data_hash": None, "commit": 7}, "summary.json lacks commit, data_hash"),
    ],
)
def test_damaged_runs_are_named_and_skipped(tmp_path, capsys, name, content, message):
    """Guards a traceback that costs the table of all other runs."""
    write_run(tmp_path / "a", 1, 3.0)
    file = write_run(tmp_path / "b", 1, 3.1, model={"n_layer": 2}) / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text(encoding="utf-8")) | content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [row.label for row in compare.main([str(tmp_path), "--plot=none"])] == ["a"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'b'}: " in warning and message in warning and warning.endswith("; skipped")


def test_what_a_table_can_do_without(tmp_path, capsys):
    """Guards a traceback because of a number that is only shown."""
    write_run(tmp_path / "a", 1, 3.0, summary={"decay_ends": 7, "peak_memory_bytes": "much"})
    assert [row.label for row in compare.main([str(tmp_path), "--plot=none"])] == ["a"]
    assert "| – |" in " ".join(capsys.readouterr().out.split())


def test_damaged_evaluations_are_passed_over(tmp_path, capsys):
    """Guards a traceback for lines without tokens, with a step in quotes, or whose loss is null or missing."""
    pytest.importorskip("matplotlib")
    good = [{"step": s, "val_loss": 5.0 - s, "train_loss": 5.0 - s} for s in range(4)]
    no_loss = [{"step": 5, "val_loss": None}, {"step": 6}, {"step": 7, "val_loss": "1.0"}]
    damaged = [{"step": "8", "tokens": 9, "val_loss": 1.0}, {"step": 9, "tokens": None, "val_loss": 1.0}]
    run = write_run(tmp_path / "a", evals=good + no_loss)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for record in (*damaged, {"step": 10, "val_loss": 1.0}):
            file.write(json.dumps({"kind": "eval"} | record) + "\n")
    (row,) = compare.main([str(run), f"--plot={tmp_path / 'p'}"])
    printed = capsys.readouterr()
    assert "3 half-written or damaged lines passed over" in printed.err and (tmp_path / "p.png").exists()
    end = compare.ending(row.runs[0])
    assert (end.best, end.best_step, end.last) == (2.0, 3, 2.0)
    assert compare.curve(row, "val_loss")[1].tolist() == [[5.0, 4.0, 3.0, 2.0]]


def test_values_that_are_empty_are_refused(tmp_path):
    """Guards a picture with the name .png, and a file that was asked for and is not there."""
    for key in ("plot", "json", "output", "metrics"):
        with pytest.raises(ValueError, match=f"--{key}= is empty"):
            compare.main([str(write_run(tmp_path / key)), f"--{key}="])


def test_names_with_a_bar_or_a_line_break(tmp_path, capsys):
    """Guards a name that ends its cell or its line, and so breaks the table."""
    write_run(tmp_path / "a|b", 1, 3.0)
    write_run(tmp_path / "c\nd", 1, 3.1, model={"n_layer": 2})
    compare.main([str(tmp_path), "--plot=none"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| a\\|b |") and lines[3].startswith("| c d  |")
    assert {len(line) for line in lines[:4]} == {len(lines[0])} and "- `c d`: +0.1000: one seed: cannot tell" in lines


def test_what_is_not_a_run_directory_is_an_error(tmp_path):
    """Guards an empty table, and checks status and message as a shell sees them."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for word, message in (
        ("nothing", "nothing: no such run directory"),
        ("no*", "no such run directory"),
        ("file", "not a run dir"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            compare.main([str(tmp_path / word)])
    for argv, status, message in (
        (["", str(tmp_path)], 2, "error: an empty word names no run directory\n"),
        ([str(tmp_path / "no*")], 1, f"error: {tmp_path / 'no*'}: no such run directory\n"),
        (["a", "--plt=x"], 2, "error: unknown key 'plt'; did you mean 'plot'?\n"),
    ):
        result = subprocess.run([sys.executable, "compare.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (status, message)


def test_repeated_and_half_written_lines(tmp_path, capsys):
    """Guards a resumed run drawn twice, and a log cut by a crash: at its end, and inside once the resumed run went on."""
    run = write_run(tmp_path / "a", evals=[])
    lines = [
        {"step": s, "tokens": s, "kind": "eval", "val_loss": float(v), "train_loss": 1.0}
        for s, v in ((0, 9), (10, 8), (20, 7), (25, 6), (20, 5), (30, 4))
    ]  # crashed after 25, resumed from 10 with another interval
    lines.insert(2, {"step": 15, "kind": "train", "tokens": 15, "loss": 1.0})
    # logged before the evaluation of its step, and to be dropped
    lines.insert(4, {"step": 25, "kind": "train", "tokens": 25, "loss": 2.0})
    text = "\n".join(map(json.dumps, lines))

    def evals(run: Path) -> list[tuple]:
        records = read_lines(run / "metrics.jsonl")
        assert [record["step"] for record in records if record["kind"] == "train"] == [15]
        return [(record["step"], record["val_loss"]) for record in records if record["kind"] == "eval"]

    (run / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
    assert evals(run) == [(0, 9), (10, 8), (20, 5), (30, 4)]
    assert capsys.readouterr().err == ""
    cut = text.replace('{"step": 25, "tokens"', '{"step": 22, "tok{"step": 25, "tokens"')[:-30]
    (run / "metrics.jsonl").write_text(cut, encoding="utf-8")
    assert evals(run) == [(0, 9), (10, 8), (20, 5)]
    assert "2 half-written or damaged lines passed over" in capsys.readouterr().err


# how the curves end


def test_lowest_and_last_point_equal_a_slow_computation(tmp_path, capsys):
    """Guards the lowest of the mean curve in place of the mean of the lowest, a wrong stretch of training, and a changed sign."""
    curves_of = {
        "over": ([9, 4, 2, 3, 3.5], [9, 4, 3, 1, 1.5]),
        "down": ([9, 7, 6, 5, 4], [9, 8, 6, 4, 3]),
        "level": ([9, 3, 2, 2, 2],),
    }
    for name, seeds in curves_of.items():
        for seed, losses in enumerate(seeds, 1):
            evals = [{"step": 10 * i, "val_loss": loss, "train_loss": loss} for i, loss in enumerate(losses)]
            write_run(tmp_path / f"{name}_s{seed}", seed, evals=evals, model={"name": name})
    compare.main([str(tmp_path / "*"), "--plot=none", f"--json={tmp_path / 't.json'}"])
    text = capsys.readouterr().out
    for line in table_after(text, "run", 1)[2:]:
        steps, best, last, change = [], [], [], []
        for run in sorted(tmp_path.glob(f"{line[0]}_s*")):
            logged = list(map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
            losses = [record["val_loss"] for record in logged]
            steps.append(logged[losses.index(min(losses))]["step"])
            best.append(min(losses))
            last.append(losses[-1])
            change.append(losses[-1] - losses[-2])  # five evaluations: the last but one is a quarter before the end
        means = [f"{statistics.mean(best):.4f}", f"{statistics.mean(steps):.0f}", f"{statistics.mean(last):.4f}"]
        assert [cell.split()[0] for cell in line[1:5]] == [*means, f"{statistics.mean(change):+.4f}"]
        if len(best) > 1:
            assert [line[i].split()[-1] for i in (1, 3, 4)] == [f"{statistics.stdev(v):.4f}" for v in (best, last, change)]
        assert line[5] == {"over": "rising", "down": "still falling", "level": "flat"}[line[0]]
    assert "over the last 25 % of the training tokens" in text
    rows = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["rows"]
    assert {row["run"]: [w["best"] for w in row["windows"]] for row in rows} == {
        name: [min(losses) for losses in runs] for name, runs in curves_of.items()
    }


def test_the_end_is_a_tenth_of_training(tmp_path):
    """Guards a change between the last two evaluations where these are close together: a curve that falls would look flat."""
    evals = [{"step": step, "val_loss": 100.0 - step, "train_loss": 0.0} for step in (*range(0, 100, 4), 97, 98, 99, 100)]
    (run,) = compare.read_runs([write_run(tmp_path / "a", evals=evals)])
    end = compare.ending(run)
    assert (end.best, end.best_step, end.last) == (0.0, 100, 0.0)
    assert end.change == -12.0 and end.share == pytest.approx(0.12)  # from step 88, the last one at 90 or before
    tenths = [{"step": step, "val_loss": 100.0 - step, "train_loss": 0.0} for step in range(0, 101, 10)]
    (run,) = compare.read_runs([write_run(tmp_path / "d", evals=tenths)])
    assert compare.ending(run).change == -10.0  # from step 90 itself
    (run,) = compare.read_runs([write_run(tmp_path / "b", evals=evals[:1])])
    assert compare.ending(run) is None  # a run of no steps
    evals[5]["val_loss"] = math.nan  # for a while
    (run,) = compare.read_runs([write_run(tmp_path / "c", evals=evals)])
    assert compare.ending(run) == end


def test_flat_is_a_share_of_the_loss_and_memory_the_most_of_all_seeds(tmp_path, capsys):
    """Guards a verdict in nats, which would call every small loss flat, and a peak that is that of the luckiest seed."""
    for name, last in (("large", 100.0), ("small", 1.0)):
        for seed, gib in ((1, 2), (2, 5), (3, 4)):
            evals = [{"step": 10 * i, "val_loss": last + fall, "train_loss": 0.0} for i, fall in enumerate((last, 0.1, 0.0))]
            summary = {"peak_memory_bytes": gib * 2**30}
            write_run(tmp_path / f"{name}_s{seed}", seed, evals=evals, model={"name": name}, summary=summary)
    compare.main([str(tmp_path), "--plot=none"])
    text = capsys.readouterr().out
    assert {line[0]: line[5] for line in table_after(text, "run", 1)[2:]} == {"large": "flat", "small": "still falling"}
    header, *lines = table_after(text, "run")
    assert {line[header.index("peak memory")] for line in lines[1:]} == {"5.00 GiB"}


def test_a_curve_that_ends_in_nan_has_diverged(tmp_path, capsys):
    """Guards "still falling" for a curve that left the numbers, its lowest point lost, and a JSON that no other program reads."""
    nan = float("nan")
    for name, losses in (("a", [9, 2, 3, nan]), ("b", [9, nan, 5, 4]), ("c", [9, 5, nan, nan])):
        evals = [{"step": 10 * i, "val_loss": float(loss), "train_loss": 1.0} for i, loss in enumerate(losses)]
        numbers = {"train_loss": nan if name == "c" else 2.0}
        write_run(tmp_path / name, 1, 3.0, evals=evals, model={"name": name}, summary=numbers)
    compare.main([str(tmp_path / "?"), "--plot=none", f"--json={tmp_path / 't.json'}"])
    lines = {line[0]: line[1:] for line in table_after(capsys.readouterr().out, "run", 1)[2:]}
    assert lines["a"] == ["2.0000", "10", "nan", "+nan", "diverged"]
    assert lines["c"] == ["5.0000", "10", "nan", "+nan", "diverged"]
    assert lines["b"] == ["4.0000", "30", "4.0000", "-1.0000", "still falling"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    numbers = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"), parse_constant=refuse)
    windows = {row["run"]: row["windows"][0] for row in numbers["rows"]}
    assert windows["a"] == {"best": 2.0, "best_step": 10, "last": None, "change": None, "share": pytest.approx(1 / 3)}
    assert [row["train_loss"]["mean"] for row in numbers["rows"]] == [2.0, 2.0, None]


def test_a_change_inside_the_spread_over_seeds_is_unclear(tmp_path, capsys):
    """Guards "rising" for seeds of which some rise and some fall; with one seed there is no spread, and what it did is said."""
    changes = {"noise": (0.02, -0.01, 0.03), "rise": (0.02, 0.021, 0.03), "fall": (-0.02, -0.021, -0.03), "one": (0.02,)}
    changes["spread"] = (0.02, 0.005, 0.03)  # all rise, by 1.5 standard deviations
    for name, of in changes.items():
        for seed, change in enumerate(of, 1):
            evals = [{"step": i, "val_loss": loss, "train_loss": 1.0} for i, loss in enumerate((9.0, 1.5, 1.5 + change))]
            write_run(tmp_path / f"{name}_s{seed}", seed, evals=evals, model={"name": name})
    compare.main([str(tmp_path), "--plot=none"])
    text = capsys.readouterr().out
    verdicts = {line[0]: line[5] for line in table_after(text, "run", 1)[2:]}
    assert verdicts == {"noise": "unclear", "rise": "rising", "fall": "still falling", "one": "rising", "spread": "unclear"}
    assert "unclear: more, but the 95 % interval of its mean over seeds holds 0" in text


def test_train_logs_what_the_best_point_is_made_of(tmp_path):
    """Guards names: the lowest evaluation of a real run, out of its lines, is what train.py found and kept as best/."""
    import train

    flags = "--n_layer=1 --n_embd=8 --n_head=2 --block_size=16 --batch_size=2 --max_iters=6 --warmup_iters=1 --eval_interval=2"
    flags += (
        f" --eval_iters=1 --final_eval_tokens=100 --learning_rate=0.5 --device=cpu --dtype=float32 --out_dir={tmp_path / 'a'}"
    )
    summary = train.main(["--model=decoder_only", "--dataset=stdlib", *flags.split()])
    (run,) = compare.read_runs([tmp_path / "a"])
    end = compare.ending(run)
    assert (end.best, end.best_step) == (summary["best_val_loss"], summary["best_step"])
    assert [line["step"] for line in run.evals] == [0, 2, 4, 6] and end.last == run.evals[-1]["val_loss"]


# curves


def test_curve_takes_the_steps_that_all_seeds_have(tmp_path):
    """Guards a mean over another set of seeds at every step."""
    for seed, steps in ((1, (0, 2, 4, 6)), (2, (0, 4, 6, 8))):
        write_run(tmp_path / f"a_s{seed}", seed, evals=[{"step": s, "val_loss": s * seed, "train_loss": 0} for s in steps])
    tokens, losses = compare.curve(rows_of(tmp_path)["a"], "val_loss")
    assert tokens.tolist() == [0, 4000, 6000] and losses.tolist() == [[0, 4, 6], [0, 8, 12]]
    assert len(compare.curve(rows_of(tmp_path)["a"], "embedding_loss")[0]) == 0
    (write_run(tmp_path / "a_s3", 3) / "metrics.jsonl").unlink()
    again, same = compare.curve(rows_of(tmp_path)["a"], "val_loss")
    assert again.tolist() == tokens.tolist() and same.tolist() == losses.tolist(), "a seed without a log hides no curve"


@pytest.fixture
def saved(monkeypatch) -> list:
    """The figures that would be written, to look into."""
    figure, found = pytest.importorskip("matplotlib.figure"), []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **options: found.append(self))
    return found


def test_panels_of_losses_show_a_slow_computation(saved, tmp_path):
    """Guards lines that are no means, bands, limits and stretches of training of other values, and exchanged axes or losses."""
    random, tokens = np.random.default_rng(0), np.arange(0.0, 1001.0, 100.0)
    fall = 9 * np.exp(-tokens / 200)
    ends, levels = {"a": (3, 8), "b": (1, 11)}, {"val_loss": 4.0, "train_loss": 2.0}  # seeds, evaluations: b trained for longer
    rows = {
        label: {key: (tokens[:n], level + fall[:n] + random.random((seeds, n))) for key, level in levels.items()}
        for label, (seeds, n) in ends.items()
    }
    rows["a"]["embedding_loss"], rows["b"]["embedding_loss"] = rows["a"]["val_loss"], (tokens[:0], np.zeros((0, 0)))
    curves.draw_losses(rows, 0.25, str(tmp_path / "p"))
    whole, last, against, embedding = saved[0].axes
    val, train, since = [], [], []  # points of each row's means
    for row in rows.values():
        for key, points in (("val_loss", val), ("train_loss", train)):
            points.append([(x, statistics.mean(y)) for x, y in zip(row[key][0], row[key][1].T)])
        since.append([i for i, x in enumerate(row["val_loss"][0]) if x >= 400])

    def points(line) -> list[tuple]:
        return [pytest.approx(point) for point in line.get_xydata()]

    def limits(values: list[float]):
        margin = 0.05 * (max(values) - min(values))
        return pytest.approx((min(values) - margin, max(values) + margin))

    assert list(map(points, whole.lines)) == val + train
    assert whole.get_ylim() == limits([y for line in val + train for _, y in line[1:]])
    assert list(map(points, last.lines)) == [[line[i] for i in late] for line, late in zip(val, since)]
    assert last.get_ylim() == limits([line[i][1] for line, late in zip(val, since) for i in late])
    assert list(map(points, against.lines)) == [[(x[i][1], y[i][1]) for i in late] for x, y, late in zip(train, val, since)]
    assert against.xaxis_inverted() and embedding.get_yscale() == "log" and points(embedding.lines[0]) == val[0]
    (band,), values = whole.collections, rows["a"]["val_loss"][1]  # of three seeds, not of one, nor of training
    edges = {(x, float(edge[i])) for edge in (values.min(0), values.max(0)) for i, x in enumerate(tokens[:8])}
    assert set(map(tuple, band.get_paths()[0].vertices.tolist())) == edges


def test_the_axis_of_bits_per_byte(saved, tmp_path):
    """Guards bits per byte that are nats per bit, or those of another vocabulary."""
    compare.main([str(write_run(tmp_path / "a")), f"--plot={tmp_path / 'p'}"])
    saved[0].draw_without_rendering()
    nats, bits = saved[0].axes[1].get_ylim(), saved[0].axes[1].child_axes[0].get_ylim()
    assert bits == pytest.approx([y / math.log(2) / BYTES_PER_TOKEN for y in nats])


def test_rows_part_where_they_end_apart():
    """Guards a picture of overfitting for runs that were apart on the way, or by the noise of their windows."""

    def parted(val: list[float], train: list[float], later: int = 0) -> bool:
        row = {"val_loss": (np.arange(2.0), np.array([val])), "train_loss": (np.arange(2.0) + later, np.array([train]))}
        return curves.has_parted(row)

    assert parted([3.0, 2.12], [3.0, 2.0]) and not parted([3.0, 2.08], [3.0, 2.0]) and not parted([9.0, 2.0], [3.0, 2.0])
    assert not parted([3.0, 2.12], [3.0, 2.0], later=1), "not logged together"


def test_axes_of_metrics(saved, tmp_path):
    """Guards a logarithm of what is not positive or hardly varies, and limits lost to a value that left the numbers."""
    values = {"wide": (1.0, 100.0), "narrow": (1.0, 99.0), "zero": (0.0, 100.0), "negative": (-1.0, 100.0), "fifth": (1.0, 2.0)}
    rows = {"a": {key: (np.arange(2.0), np.array([pair])) for key, pair in values.items()}}
    curves.draw_metrics(rows, tuple(values), str(tmp_path / "p"))
    assert [ax.get_yscale() for ax in saved[0].axes] == ["log", "linear", "linear", "linear", "linear"]  # and no empty sixth
    ax = saved[0].axes[1]
    for some, low, high in (([1.0, math.inf, 2.0, math.nan], 0.95, 2.05), ([3.0, 3.0], 2.99, 3.01)):
        curves.set_limits(ax, np.array(some))
        assert ax.get_ylim() == pytest.approx((low, high))


@pytest.mark.parametrize("write, panels", [(write_published_like, 3), (write_quickstart_like, 2)])
def test_plot_files(tmp_path, capsys, write, panels):
    """Guards an empty or unreadable picture, and a legend that lacks a row."""
    image = pytest.importorskip("matplotlib.image")
    write(tmp_path / "out")
    rows = compare.main([str(tmp_path / "out"), f"--plot={tmp_path / 'plots' / 'curves.png'}"])
    assert f"curves: {(tmp_path / 'plots' / 'curves.png').as_posix()}" in capsys.readouterr().out
    pixels = (image.imread(tmp_path / "plots" / "curves.png")[:, :, :3] * 255).astype(np.uint8)
    assert pixels.shape[1] >= 1200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    counted = {
        colour: int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(2).sum()) for colour in curves.COLOURS
    }
    assert all(counted[colour] > 300 for colour in curves.COLOURS[: len(rows)]), counted
    svg = (tmp_path / "plots" / "curves.svg").read_text(encoding="utf-8")
    assert all(row.label in svg for row in rows) and ("Embedding loss" in svg) == (panels == 3)
    assert "nats per token" in svg and "bits per byte" in svg and "training tokens" in svg


def test_a_plot_sets_validation_against_training_where_they_part(tmp_path):
    """Guards the picture of overfitting: there for one such row among others, away without, drawn from that row's own losses."""
    pytest.importorskip("matplotlib")
    steps = [{"step": s, "val_loss": 4 - 0.1 * s, "train_loss": 4 - 0.1 * s} for s in range(6)]
    write_run(tmp_path / "fits", evals=steps)
    compare.main([str(tmp_path / "fits"), f"--plot={tmp_path / 'a'}"])
    assert "equal training loss" not in (tmp_path / "a.svg").read_text(encoding="utf-8")
    write_run(
        tmp_path / "overfits", model={"n_layer": 8}, evals=[step | {"train_loss": 4 - 0.4 * step["step"]} for step in steps]
    )
    compare.main([str(tmp_path / "fits"), str(tmp_path / "overfits"), f"--plot={tmp_path / 'b'}"])
    svg = (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "equal training loss" in svg and ">loss on training windows (nats per token)<" in svg
    rows = {row.label: {key: compare.curve(row, key) for key in curves.LOSSES} for row in rows_of(tmp_path).values()}
    assert [label for label, of in rows.items() if curves.has_parted(of)] == ["overfits"]


def test_a_dollar_in_a_name_is_shown(tmp_path):
    """Guards a name that is read as a formula: an error of its parser, and no picture."""
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "cost_$x^$")
    write_run(tmp_path / "$5", model={"n_layer": 2})
    compare.main([str(tmp_path), f"--plot={tmp_path / 'p'}"])
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert ">cost_$x^$<" in svg and ">$5<" in svg


def test_many_rows_leave_room_for_the_panels(tmp_path):
    """Guards panels squeezed flat by a legend of 60 lines, and two rows that look the same."""
    image = pytest.importorskip("matplotlib.image")
    heights = []
    for number in (2, 60):
        drawn = {f"{'a_long_name_' * 8}{i}": {"x": (np.arange(3.0), np.full((1, 3), 1.0 + i))} for i in range(number)}
        curves.draw_metrics(drawn, ("x",), str(tmp_path / f"p{number}"))
        heights.append(image.imread(tmp_path / f"p{number}.png").shape[0])
    assert heights[1] - heights[0] > 58 * 0.2 * 150  # lines of 0.2 inches
    styles = curves.styles({str(i): {} for i in range(64)}).values()
    assert len({(style["color"], style["marker"]) for style in styles}) == 64


def test_one_seed_that_is_stuck_does_not_flatten_the_others(tmp_path):
    """Guards axes that reach to the top of a band: the numbers at their ticks end near the highest mean, not the highest seed."""
    pytest.importorskip("matplotlib")
    for seed in (1, 2, 3):
        stuck = 9.0 if seed == 3 else None
        evals = [{"step": s, "val_loss": stuck or 3 - s / 10, "train_loss": stuck or 3 - s / 10} for s in range(10)]
        write_run(tmp_path / f"a_s{seed}", seed, evals=evals)
    compare.main([str(tmp_path), f"--plot={tmp_path / 'p'}"])
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    ticks = [float(text) for text in re.findall(r">(\d\.\d+)</text>", svg)]
    assert len(ticks) > 8 and max(ticks) < 5.5


def test_the_table_stands_without_matplotlib_or_curves(tmp_path, capsys, monkeypatch):
    """Guards a missing extra, or missing metrics, that cost the table."""
    run = write_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    compare.main([str(run), f"--plot={tmp_path / 'p'}"])
    printed = capsys.readouterr()
    assert "| a " in printed.out and "pip install matplotlib" in printed.err
    (run / "metrics.jsonl").unlink()
    compare.main([str(run), f"--plot={tmp_path / 'p'}"])
    printed = capsys.readouterr()
    assert "| a " in printed.out and "nothing to plot" in printed.err and not (tmp_path / "p.png").exists()


def write_metrics(root: Path) -> None:
    """Two rows of two seeds; only the first logs gains, in its evaluations; both log a gradient norm while they train."""
    for name, gain in (("a", True), ("b", False)):
        for seed in (1, 2):
            lines = []
            for step in range(0, 50, 5):
                lines += [
                    {"step": step, "kind": "train", "grad_norm": 1.0 / (step + seed), "embedding_loss": 7.0, "note": "text"}
                ]
                if step % 10 == 0:
                    more = {"gain_encoder": seed * 10.0**-step, "embedding_loss": float(step)} if gain else {}
                    lines += [{"step": step, "val_loss": 9.0 - step / 10 - seed, "train_loss": 1.0} | more]
            write_run(root / f"{name}_s{seed}", seed, evals=lines, model={"name": name})


def test_metrics_of_evaluations_and_of_training(tmp_path):
    """Guards a key that both kinds of line have, of other tokens each, drawn as one zigzag; and train lines that are not found."""
    write_metrics(tmp_path)
    rows = rows_of(tmp_path)
    tokens, values = compare.curve(rows["a"], "embedding_loss")
    assert tokens.tolist() == [0, 10e3, 20e3, 30e3, 40e3] and values.tolist() == [[0, 10, 20, 30, 40]] * 2
    tokens, values = compare.curve(rows["b"], "grad_norm")
    assert tokens.tolist() == [1000.0 * step for step in range(0, 50, 5)]
    assert values.tolist() == [[1.0 / (step + seed) for step in range(0, 50, 5)] for seed in (1, 2)]
    assert len(compare.curve(rows["b"], "gain_encoder")[0]) == len(compare.curve(rows["a"], "note")[0]) == 0


def test_metrics_plot(tmp_path, capsys):
    """Guards a panel or a row that is missing, a row without values in the legend, and gains near 0 on a linear axis."""
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path / "out")
    plot = tmp_path / "gains"
    compare.main([str(tmp_path / "out"), "--metrics=gain_encoder,grad_norm", f"--plot={plot}"])
    svg = plot.with_suffix(".svg").read_text(encoding="utf-8")
    assert ">gain_encoder<" in svg and ">grad_norm<" in svg and "Embedding loss" not in svg and "bits per byte" not in svg
    assert ">a<" in svg and ">b<" in svg and ">lowest to highest seed<" in svg
    compare.main([str(tmp_path / "out"), "--metrics=gain_encoder", f"--plot={plot}"])
    svg = plot.with_suffix(".svg").read_text(encoding="utf-8")
    assert ">a<" in svg and ">b<" not in svg and "grad_norm" not in svg
    assert re.search(r"10\^\{-[34]\d\}", svg)  # a power of ten at the axis; which ones are labelled, versions of matplotlib differ in


def test_metrics_of_summaries_have_a_column(tmp_path, capsys):
    """Guards a metric that can be drawn but not read, and a mean over the seeds that have it."""
    for seed, found in ((1, {"top5": 0.5, "kinds": [1, 2]}), (2, {"top5": 0.75})):
        write_run(tmp_path / f"a_s{seed}", seed, 3.0, summary=found)
        write_run(tmp_path / f"b_s{seed}", seed, 3.1, model={"n_layer": 2}, summary=found if seed == 1 else {})
    compare.main([str(tmp_path), "--metrics=top5", "--plot=none", f"--json={tmp_path / 'all.json'}"])
    header, _, *lines = table_after(capsys.readouterr().out, "run")
    assert header[-1] == "top5" and [line[-1] for line in lines] == ["0.6250 ± 0.1768", "–"]
    a, b = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert a["top5"]["values"] == [0.5, 0.75] and "top5" not in b
    with pytest.raises(ValueError, match="--metrics says what to draw"):  # a list is no number
        compare.main([str(tmp_path), "--metrics=top5,kinds", "--plot=none"])
    with pytest.raises(ValueError, match="--metrics=top5: a number of summary.json, with no curve to draw: --plot=none gives its column"):
        compare.main([str(tmp_path), "--metrics=top5"])


def test_metrics_that_nobody_logged(tmp_path, capsys):
    """Guards an empty panel: what is wrong is said, once, before any table, with what there is."""
    write_metrics(tmp_path)
    for words, message in (
        (["--metrics=gain_encodr"], "--metrics=gain_encodr: no run logged that; did you mean gain_encoder? there are embedding_loss, "),
        (
            ["--metrics=xyz"],
            "--metrics=xyz: no run logged that; there are embedding_loss, gain_encoder, grad_norm, train_loss, val",
        ),
        (["--metrics=grad_norm,note"], "--metrics=note: no run logged that"),
        (["--metrics=grad_norm", "--plot=none"], "--metrics says what to draw to --plot, which is none"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            compare.main([str(tmp_path), *words])
    assert capsys.readouterr().out == ""
    write_run(tmp_path / "c_s1", 1, evals=[{"step": 1, "kind": "train", "odd": 1.0}], model={"name": "c"})
    write_run(tmp_path / "c_s2", 2, evals=[{"step": 2, "kind": "train", "odd": 1.0}], model={"name": "c"})
    with pytest.raises(ValueError, match="--metrics=odd: in no row is there a step at which all seeds logged it"):
        compare.main([str(tmp_path), "--metrics=odd"])


def test_small_files_redraw_everything(tmp_path):
    """Guards a table or picture that depends on more than the three small files of each run, or on where these lie, or on time."""
    pytest.importorskip("matplotlib")
    write_quickstart_like(tmp_path / "out")
    for run in (tmp_path / "out").iterdir():
        (tmp_path / "results" / run.name).mkdir(parents=True)
        for name in ("config.json", "metrics.jsonl", "summary.json"):
            shutil.copy(run / name, tmp_path / "results" / run.name / name)
    drawn = []
    for place in ("out", "results"):
        folder = tmp_path / place
        compare.main([str(folder), f"--output={folder / 'table.md'}", f"--plot={folder / 'curves'}"])
        drawn.append([(folder / name).read_bytes() for name in ("table.md", "curves.png", "curves.svg")])
    assert drawn[0] == drawn[1]
