"""
Finished runs, read from their directories, and rows of them: runs with equal settings and different seeds, named after the directory
without its _seed1, -seed1 or _s1. Tables, curves and tests all start from these. Also what the scripts share to print and save a
table.
"""

import contextlib
import glob
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import is_number
from errors import naming

# Settings that do not change what is learned, or, like the seed, are what a row's spread is taken over.
NOT_OF_A_ROW = {
    "seed", "out_dir", "resume", "overwrite", "eval_interval", "log_interval", "eval_sample_tokens", "eval_sample_prompt",
    "wandb", "wandb_project", "wandb_run_name", "device", "compile", "final_eval_tokens",
    "micro_batch_size", "activation_checkpointing", "lanes",
}  # fmt: skip
NUMBERS = (  # that every summary.json has
    "val_loss", "val_bits_per_byte", "train_loss", "parameters", "flops_per_token", "tokens", "tokens_per_second", "seed", "val_tokens",
)  # fmt: skip
TEXTS = ("commit", "dataset", "data_hash")


class Run(NamedTuple):
    path: Path
    config: dict[str, object]  # the settings that define a row, without those that are null: older runs lack these
    summary: dict
    lines: list[dict]  # of metrics.jsonl, steps ascending, a step's evaluation last

    @property
    def evals(self) -> list[dict]:
        return [line for line in self.lines if line["kind"] == "eval" and is_number(line.get("val_loss"))]


class Row(NamedTuple):
    label: str
    runs: list[Run]  # seeds ascending, no seed twice

    def values(self, key: str) -> np.ndarray:
        return np.array([run.summary[key] for run in self.runs], dtype=float)

    def mean(self, key: str) -> float:
        return float(self.values(key).mean())

    def sd(self, key: str) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return float(self.values(key).std(ddof=1)) if len(self.runs) > 1 else None


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# reading


def find_runs(words: list[str]) -> list[Path]:
    """
    Directories named by words: paths, globs, or a folder of run directories. Plain files are passed over where directories
    are found too (out/* holds our own plot). Raises FileNotFoundError for what matches nothing.
    """
    found: list[Path] = []
    for word in words:
        if not word:  # an unset variable; Path("") would be the current folder
            raise ValueError("an empty word names no run directory")
        matches = [word] if Path(word).exists() else sorted(glob.glob(word))
        if not matches:
            raise FileNotFoundError(f"{word}: no such run directory")
        for path in map(Path, matches):
            inside = sorted(file.parent for file in path.glob("*/config.json"))
            found += [path] if (path / "config.json").exists() or not inside else inside
    folders: dict[Path, Path] = {}  # of several names of one directory the first
    for path in filter(Path.is_dir, found):
        folders.setdefault(path.resolve(), path)
    if not folders:
        raise FileNotFoundError(f"{', '.join(map(str, found))}: not a run directory")
    return list(folders.values())


def read_runs(paths: list[Path]) -> list[Run]:
    """
    The finished runs of language models among run directories; others are named and skipped. Raises ValueError where there
    is none.
    """
    runs, unfinished = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except ValueError as error:
            unfinished.append(str(error))
    if not runs:
        raise ValueError("no finished run of a language model: " + "; ".join(unfinished))
    for line in unfinished:
        warn(f"{line}; skipped")
    return runs


def read_run(path: Path) -> Run:
    """Raises ValueError with path and reason for what is not the finished run of a language model."""
    try:
        config, summary = (dict(json.loads((path / f"{name}.json").read_text("utf-8"))) for name in ("config", "summary"))
        settings = dict(config["train"]) | dict(config["model"])
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no {Path(error.filename).name}: not a finished run") from None
    except (ValueError, TypeError, KeyError):  # not JSON, not UTF-8, or not of such dicts
        raise ValueError(f"{path}: config.json or summary.json is half written or damaged: not a finished run") from None
    if summary.get("reconstruction"):
        raise ValueError(f"{path} is an autoencoder: it predicts tokens that it has seen, so its loss cannot be compared")
    missing = [key for key in NUMBERS if not is_number(summary.get(key))]
    missing += [key for key in TEXTS if not isinstance(summary.get(key), str)]
    if missing:
        raise ValueError(f"{path}: summary.json lacks {', '.join(missing)}: written by another version?")
    if not 0 < (loss := summary["val_loss"]) < math.inf:
        why = "a damaged file, or a text that says nothing" if math.isfinite(loss) else "it diverged"
        raise ValueError(f"{path}: its validation loss is {loss}: {why}")
    planned, steps = last_step(path, settings, summary), summary.get("steps")
    if is_number(planned) and is_number(steps) and steps < planned:  # resumed since then
        raise ValueError(f"{path}: summary.json is of step {steps} of {planned}: not a finished run")
    settings = {key: value for key, value in settings.items() if key not in NOT_OF_A_ROW and value is not None}
    if isinstance(learned := summary.get("train_hash"), str):
        settings["train_hash"] = learned[:12]
    ends = summary.get("decay_ends")
    if isinstance(ends, list) and len(ends) > 1:  # resumed with another schedule than it began with
        settings["decay_ends"] = ends
    return Run(path, settings, summary, read_lines(path / "metrics.jsonl"))


def read_lines(path: Path) -> list[dict]:
    """
    The lines of a metrics.jsonl. A run that crashed and was resumed from an earlier step writes its steps again: what
    stood there is dropped. Lines cut off by a crash, or without numbers of steps and tokens, are passed over with a warning.
    """
    if not path.exists():
        warn(f"{path} does not exist: no curve of this run")
        return []

    def place(record: dict) -> tuple:
        if not (is_number(record["step"]) and is_number(record["tokens"])):
            raise TypeError
        return record["step"], record["kind"] == "eval"  # a step is trained, then evaluated

    records: list[dict] = []
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            here = place(record)
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        while records and place(records[-1]) >= here:
            records.pop()
        records.append(record)
    if broken:
        warn(f"{path}: {broken} half-written or damaged line{'s' * (broken > 1)} passed over")
    return records


def last_step(path: Path, settings: dict, summary: dict) -> object:
    """The step at which a run is finished: that of its last checkpoint where patience has ended it, else as its settings say."""
    if not summary.get("ended_early"):
        return settings.get("max_iters")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # copied without its checkpoints
        return json.loads((path / "last" / "trainer.json").read_text("utf-8"))["step"]
    return summary.get("steps")


def judged_alike(runs: list[Run]) -> list[Run]:
    """
    Those judged on the validation tokens that the largest group of them has in common; the others are named and skipped. Raises
    ValueError where two groups are equally large, or tokenizers differ.
    """
    judged = [(run.summary["data_hash"], run.summary["val_tokens"]) for run in runs]
    (most, count), *others = Counter(judged).most_common()
    if not others or others[0][1] < count:
        for run, tokens in zip(runs, judged):
            if tokens != most:
                warn(f"{run.path} was judged on other validation tokens ({run.summary['dataset']}, {tokens[1]:,} of them); skipped")
        runs = [run for run, tokens in zip(runs, judged) if tokens == most]
    check_same_data(runs)
    return runs


def check_same_data(runs: list[Run]) -> None:
    """Raises ValueError where two runs were judged on different validation tokens or by different tokenizers."""
    first = runs[0]
    for run in runs[1:]:
        if run.summary["data_hash"] != first.summary["data_hash"]:
            a, b = (f"{r.path} ({r.summary['dataset']}, sha256 {r.summary['data_hash'][:12]})" for r in (first, run))
            raise ValueError(f"{a} and {b} were judged on different validation files: compare runs of one data set at a time")
        if run.summary["val_tokens"] != first.summary["val_tokens"]:
            raise ValueError(
                f"{first.path} was judged on {first.summary['val_tokens']:,} validation tokens, {run.path} on "
                f"{run.summary['val_tokens']:,}: evaluate both with the same --final_eval_tokens (--resume does only that)"
            )
        if not math.isclose(bits_per_nat(run), bits_per_nat(first), rel_tol=1e-6):
            raise ValueError(
                f"{first.path} and {run.path} count different bytes per token: their tokenizers differ, or one is older and took the "
                "mean of its whole file under --final_eval_tokens (--resume evaluates it again)"
            )


def bits_per_nat(run: Run) -> float:
    """Bits per byte for a nat per token: 1 / (ln 2 * bytes per token), a constant of validation file and tokenizer."""
    return run.summary["val_bits_per_byte"] / run.summary["val_loss"]


def row_name(run: Path) -> str:
    """The name of a run directory without its seed."""
    return " ".join(re.sub(r"[_-](seed[_-]?|s)\d+$", "", run.resolve().name).splitlines())


def group(runs: list[Run], by_name: bool = False) -> list[Row]:
    """
    Rows of runs with equal settings and training data and, `by_name`, equal names but for the seed, the lowest validation loss first;
    older runs do not tell their data, and count as trained on that of the first that does.
    """

    def settings(run: Run) -> str:
        return json.dumps({key: value for key, value in run.config.items() if key != "train_hash"}, sort_keys=True)

    told = {settings(run): run.config["train_hash"] for run in reversed(runs) if "train_hash" in run.config}
    groups: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        name = row_name(run.path) if by_name else None
        seeds = groups.setdefault((settings(run), run.config.get("train_hash", told.get(settings(run))), name), {})
        seed = run.summary["seed"]
        if seed in seeds:
            warn(f"{run.path} has settings and seed of {seeds[seed].path}: skipped; if their code differs, --by_name compares them")
        else:
            seeds[seed] = run
    rows = labelled([Row("", [seeds[seed] for seed in sorted(seeds)]) for seeds in groups.values()])
    return sorted(rows, key=lambda row: row.mean("val_loss"))


def labelled(rows: list[Row]) -> list[Row]:
    """The rows named after their directories. Where names are equal, with the folder or, if that is equal too, settings that differ."""
    paths = [row.runs[0].path.resolve() for row in rows]
    names = [row_name(path) for path in paths]
    folders = [{path.parent.name for path, other in zip(paths, names) if other == name} for name in names]
    names = [f"{path.parent.name}/{name}" if len(of) > 1 else name for path, name, of in zip(paths, names, folders)]
    found: dict[str, Row] = {}
    for name, row in zip(names, rows, strict=True):
        twins = [other.runs[0].config for other, other_name in zip(rows, names, strict=True) if other_name == name]
        own = row.runs[0].config.items()
        apart = [f"{key}={str(value)[:24]}" for key, value in own if any(twin.get(key) != value for twin in twins)]
        label = f"{name} ({' '.join(apart[:3])})" if apart else name
        while label in found:  # twins in folders of one name, or of settings that differ further on
            label += "'"
        found[label] = row._replace(label=label)
    return list(found.values())


# writing


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Columns padded to equal width; all but the first are numbers and right-aligned. A | in a name does not end its cell."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def text(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"| {'-' * widths[0]} | " + " | ".join("-" * (width - 1) + ":" for width in widths[1:]) + " |"
    return "\n".join([text(header), rule, *map(text, lines)])


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(Path(path)):
        Path(path).write_text(text + "\n", encoding="utf-8")
