"""
One honest table from run directories, with what clears the noise of the seeds and what does not, and the curves.

    python compare.py out/encdec_* out/baseline_*
    python compare.py out --reference=baseline --output=results/table.md --plot=results/curves
    python compare.py out --metrics=gain_embedding,gain_encoder --plot=results/gains

Runs with equal settings and different seeds form a row, named after the directory without its _seed1, -seed1 or _s1.
Every loss is in nats per token; the validation loss is that of the last weights over the whole validation file.
"""

import difflib
import functools
import glob
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import curves
from configurator import choice_text, configure, exit_on_user_error, is_number, refuse_empty


@dataclass(frozen=True)
class CompareConfig:
    reference: str | None = None  # row that the others are tested against; none: the one with the lowest validation loss
    published: bool = False  # add the eight published runs
    plot: str | None = "out/compare"  # draw the curves to PLOT.png and PLOT.svg; none: do not
    metrics: tuple[str, ...] | None = None  # draw these keys of metrics.jsonl instead of the losses: KEY,KEY
    output: str | None = None  # also write the Markdown to this file
    json: str | None = None  # also write the numbers to this file

    def __post_init__(self):
        refuse_empty(self, "plot", "metrics", "output", "json")


# Settings that do not change what is learned, or, like the seed, are what a row's spread is taken over.
NOT_OF_A_ROW = {
    "seed", "out_dir", "resume", "overwrite", "eval_interval", "log_interval", "eval_sample_tokens", "eval_sample_prompt",
    "wandb", "wandb_project", "wandb_run_name", "device", "compile", "final_eval_tokens",
    "micro_batch_size", "lanes", "activation_checkpointing",
}  # fmt: skip
NUMBERS = (  # that every summary.json has
    "val_loss", "val_bits_per_byte", "train_loss", "parameters", "flops_per_token", "tokens", "tokens_per_second", "seed", "val_tokens",
)  # fmt: skip
TEXTS = ("commit", "dataset", "data_hash")

# README of the original encoder-decoder code: name, embedding loss, its weight, pos_sub, train loss, validation loss
PUBLISHED = [
    ("encdec_mse_possub", "mse", "8", "plain", 2.982, 3.378),
    ("encdec_possub", "none", "–", "plain", 2.979, 3.381),
    ("encdec_mse", "mse", "1", "none", 2.998, 3.385),
    ("encdec_cosine", "cosine", "1", "none", 2.993, 3.387),
    ("baseline_dropout", "–", "–", "–", 3.174, 3.406),
    ("encdec_plain", "none", "–", "none", 3.043, 3.413),
    ("baseline_small", "–", "–", "–", 2.958, 3.416),
    ("baseline", "–", "–", "–", 2.937, 3.424),
]
PUBLISHED_NOTE = (
    "Published: one seed each, Wikipedia with the GPT-2 vocabulary, judged on random validation windows (about 2.0 M tokens, "
    "sampling error about 0.004), so these numbers and the ones above come from different validation samples. "
    "`baseline_dropout` was judged with attention dropout still on."
)


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
        matches = [word] if Path(word).exists() else sorted(glob.glob(word))
        if not matches:
            raise FileNotFoundError(f"{word}: no such run directory")
        for path in map(Path, matches):
            inside = sorted(file.parent for file in path.glob("*/config.json"))
            found += [path] if (path / "config.json").exists() or not inside else inside
    folders = [path for path in dict.fromkeys(found) if path.is_dir()]
    if not folders:
        raise FileNotFoundError(f"{', '.join(map(str, found))}: not a run directory")
    return list({path.resolve(): path for path in reversed(folders)}.values())[::-1]


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
        raise ValueError(f"{path}: its validation loss is {loss}: {'impossible' if math.isfinite(loss) else 'it diverged'}")
    planned, steps = settings.get("max_iters"), summary.get("steps")
    if is_number(planned) and is_number(steps) and steps < planned:  # resumed since then
        raise ValueError(f"{path}: summary.json is of step {steps} of {planned}: not a finished run")
    settings = {key: value for key, value in settings.items() if key not in NOT_OF_A_ROW and value is not None}
    if isinstance(learned := summary.get("train_hash"), str):
        settings["train_hash"] = learned[:12]
    if len(ends := summary.get("decay_ends") or ()) > 1:  # resumed with another schedule than it began with
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
            raise ValueError(f"{first.path} and {run.path} count different bytes per token: their tokenizers differ")


def bits_per_nat(run: Run) -> float:
    """Bits per byte for a nat per token: 1 / (ln 2 * bytes per token), a constant of validation file and tokenizer."""
    return run.summary["val_bits_per_byte"] / run.summary["val_loss"]


def group(runs: list[Run]) -> list[Row]:
    """
    Rows of runs with equal settings and training data, the lowest validation loss first; older runs do not tell their data, and
    count as trained on that of the first that does. Equal names get their folder, or the settings that differ.
    """

    def settings(run: Run) -> str:
        return json.dumps({key: value for key, value in run.config.items() if key != "train_hash"}, sort_keys=True)

    told = {settings(run): run.config["train_hash"] for run in reversed(runs) if "train_hash" in run.config}
    groups: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault((settings(run), run.config.get("train_hash", told.get(settings(run)))), {})
        seed = run.summary["seed"]
        if seed in seeds:
            warn(f"{run.path} has settings and seed of {seeds[seed].path}: skipped")
        else:
            seeds[seed] = run
    rows = [Row("", [seeds[seed] for seed in sorted(seeds)]) for seeds in groups.values()]
    paths = [row.runs[0].path.resolve() for row in rows]
    names = [" ".join(re.sub(r"[_-](seed[_-]?|s)\d+$", "", path.name).splitlines()) for path in paths]
    folders = [{path.parent.name for path, other in zip(paths, names) if other == name} for name in names]
    names = [f"{path.parent.name}/{name}" if len(of) > 1 else name for path, name, of in zip(paths, names, folders)]
    labelled: dict[str, Row] = {}
    for name, row in zip(names, rows, strict=True):
        twins = [other.runs[0].config for other, other_name in zip(rows, names, strict=True) if other_name == name]
        own = row.runs[0].config.items()
        apart = [f"{key}={str(value)[:24]}" for key, value in own if any(twin.get(key) != value for twin in twins)]
        label = f"{name} ({' '.join(apart[:3])})" if apart else name
        while label in labelled:  # twins in folders of one name, or of settings that differ further on
            label += "'"
        labelled[label] = row._replace(label=label)
    return sorted(labelled.values(), key=lambda row: row.mean("val_loss"))


# statistics

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def t_two_sided(t: float, nu: int) -> float:
    """
    P(|T| >= |t|) of Student's t with nu degrees of freedom. With x = sqrt(nu) tan(theta) the density is proportional to
    cos(theta)^(nu - 1), which is smooth on a finite interval: Gauss-Legendre with 64 nodes gives it to about 1e-13.
    """

    def integral(start: float) -> float:  # from start to pi/2
        half = (math.pi / 2 - start) / 2
        return float(half * (WEIGHTS * np.cos(start + half * (NODES + 1)) ** (nu - 1)).sum())

    return integral(math.atan(abs(t) / math.sqrt(nu))) / integral(0.0)


@functools.cache
def t_critical(nu: int, p: float = 0.05) -> float:
    """The t with t_two_sided(t, nu) = p, by bisection."""
    low, high = 0.0, 1.0
    while t_two_sided(high, nu) > p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, nu) > p else (low, middle)
    return high


def half_interval(values: np.ndarray) -> float:
    """Half the width of the 95 % t-interval of the mean of two or more values."""
    return t_critical(len(values) - 1) * (float(values.std(ddof=1)) / math.sqrt(len(values)))


class Ending(NamedTuple):
    """How the validation loss of a run went at its evaluations, all on the same windows, with the weights of that step."""

    best: float  # the lowest
    best_step: int
    last: float
    change: float  # from the last evaluation that lies at least a tenth of the training tokens before the end
    share: float  # of the training tokens in which that change came about


def ending(run: Run) -> Ending | None:
    """None for a run without two evaluations so far apart. A loss that is not finite counts only where it is the last."""
    evals = run.evals
    finite = [line for line in evals if math.isfinite(line["val_loss"])]
    earlier = [line for line in finite if line["tokens"] <= 0.9 * evals[-1]["tokens"]][-1:]
    if not earlier or not evals[-1]["tokens"]:
        return None
    best, last = min(finite, key=lambda line: line["val_loss"]), evals[-1]
    change, share = last["val_loss"] - earlier[0]["val_loss"], 1 - earlier[0]["tokens"] / last["tokens"]
    return Ending(best["val_loss"], best["step"], last["val_loss"], change, share)


class Difference(NamedTuple):
    run: str
    reference: str
    seeds: int  # that both rows have
    mean: float  # nats per token; positive: worse than the reference
    low: float | None  # 95 % interval
    high: float | None
    p: float | None
    verdict: str


def paired_difference(row: Row, reference: Row) -> Difference:
    """Paired t-test of the validation losses over the seeds that both rows have."""
    a, b = ({run.summary["seed"]: run.summary["val_loss"] for run in r.runs} for r in (row, reference))
    d = np.array([a[seed] - b[seed] for seed in a if seed in b])
    n = len(d)
    if n < 2:
        mean = float(d[0]) if n else row.mean("val_loss") - reference.mean("val_loss")
        verdict = "one seed: cannot tell" if n else "no seed in common: cannot tell"
        return Difference(row.label, reference.label, n, mean, None, None, None, verdict)
    mean, error = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(n)
    p = t_two_sided(mean / error, n - 1) if error else float(mean == 0)
    margin = half_interval(d)
    verdict = "clear of the noise" if p < 0.05 else "inside the noise"
    return Difference(row.label, reference.label, n, mean, mean - margin, mean + margin, p, verdict)


# text


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Columns padded to equal width; all but the first are numbers and right-aligned. A | in a name does not end its cell."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def text(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"| {'-' * widths[0]} | " + " | ".join("-" * (width - 1) + ":" for width in widths[1:]) + " |"
    return "\n".join([text(header), rule, *map(text, lines)])


def count(value: float) -> str:
    """Three digits and a prefix: 94.2 M."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.{max(0, 2 - int(math.log10(value / factor * 1.0005)))}f}{prefix}"
    return f"{value:.3g}"


def with_sd(values: np.ndarray, sign: str = "") -> str:
    sd = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.4f}{sd}"


def short_commit(run: Run) -> str:
    return run.summary["commit"][:7] + "+" * run.summary["commit"].endswith("+")  # a + marks uncommitted changes


def table(rows: list[Row]) -> str:
    header = [
        "run", "parameters", "FLOPs/token", "tokens", "seeds", "train loss", "validation loss", "bits per byte", "tokens/s",
        "peak memory", "commit",
    ]  # fmt: skip
    lines = []
    for row in rows:
        first = row.runs[0].summary
        memory = max(run.summary.get("peak_memory_bytes") or 0 for run in row.runs)
        lines.append(
            [
                row.label,
                f"{first['parameters']:,}",
                count(first["flops_per_token"]),
                count(first["tokens"]),
                str(len(row.runs)),
                f"{row.mean('train_loss'):.4f}",
                with_sd(row.values("val_loss")),
                f"{row.mean('val_bits_per_byte'):.4f}",
                count(row.mean("tokens_per_second")),
                f"{memory / 2**30:.2f} GiB" if memory else "–",
                " ".join(sorted({short_commit(run) for run in row.runs})),
            ]
        )
    return markdown_table(header, lines)


def table_notes(rows: list[Row]) -> str:
    first = rows[0].runs[0].summary
    data = f"{first['dataset']}, sha256 {first['data_hash'][:12]}"
    judged = f"validation with the last weights over {first['val_tokens']:,} tokens ({data}), training on sample windows"
    notes = [f"Losses in nats per token, mean ± sample standard deviation over seeds; {judged}."]
    for key, what in (("tokens", "training tokens"), ("commit", "commits"), ("device", "devices"), ("dtype", "dtypes")):
        if len({str(run.summary.get(key)) for row in rows for run in row.runs}) > 1:
            notes.append(f"The runs differ in {what}.")
    if any(short_commit(run).endswith("+") for row in rows for run in row.runs):
        notes.append("A commit with + had uncommitted changes.")
    return " ".join(notes)


FLAT = 0.005  # of the loss: less than that up or down at the end of training is called flat


def endings_text(rows: list[Row]) -> str:
    """The lowest and the last point of each row's curve, and whether it still moves; empty where no row has a curve."""
    lines, shares = [], set()
    for row in rows:
        endings = [e for e in map(ending, row.runs) if e]
        if not endings:
            continue
        best, best_step, last, change, share = map(np.array, zip(*endings, strict=True))
        moved = change.mean()
        if not math.isfinite(moved):
            verdict = "diverged"
        elif abs(moved) < FLAT * last.mean():
            verdict = "flat"
        elif len(change) > 1 and abs(moved) <= half_interval(change):
            verdict = "unclear"
        else:
            verdict = "rising" if moved > 0 else "still falling"
        lines.append([row.label, with_sd(best), f"{best_step.mean():,.0f}", with_sd(last), with_sd(change, "+"), verdict])
        shares |= {f"{100 * s:.3g} %" for s in share}
    if not lines:
        return ""
    header = ["run", "lowest on windows", "mean step", "last on windows", "change at the end", "curve"]
    note = (
        "Validation loss at the evaluations, on sample windows that are the same at every step, so not comparable with the whole "
        f"file above. Change: over the last {' or '.join(sorted(shares))} of the training tokens; flat: less than "
        f"{100 * FLAT:g} % of the loss; unclear: more, but the 95 % interval of its mean over seeds holds 0. A learning rate that "
        "has decayed flattens a curve, too. The lowest point is chosen on the windows that it is measured on."
    )
    return markdown_table(header, lines) + "\n\n" + note


def differences_text(differences: list[Difference]) -> str:
    lines = [f"Differences in validation loss from `{differences[0].reference}`, paired by seed, two-sided t-test:", ""]
    for d in differences:
        tested = f" (95 % interval {d.low:+.4f} to {d.high:+.4f}, {d.seeds} seeds, p = {d.p:.2g})" if d.p is not None else ""
        lines.append(f"- `{d.run}`: {d.mean:+.4f}{tested}: {d.verdict}")
    if (tests := sum(d.p is not None for d in differences)) > 1:
        lines += ["", f"{tests} comparisons at p < 0.05 each; p is not corrected for their number."]
    return "\n".join(lines)


def published_text(rows: list[Row]) -> str:
    here = {row.label: with_sd(row.values("val_loss")) for row in rows}
    lines = [
        [name, loss, weight, pos_sub, f"{train:.3f}", f"{val:.3f}", here.get(name, "–")]
        for name, loss, weight, pos_sub, train, val in PUBLISHED
    ]
    header = ["published run", "embedding loss", "weight", "pos_sub", "train loss", "validation loss", "validation loss above"]
    return markdown_table(header, lines) + "\n\n" + PUBLISHED_NOTE


# curves


def curve(row: Row, key: str) -> curves.Curve:
    """
    (tokens (N,), values (seeds, N)) of `key` where every seed of the row logged it; N = 0 without such values. Taken from
    train lines only where eval lines lack the key: these have the embedding loss as well, but of other tokens each time.
    """
    tokens: list[float] = []
    runs: list[dict[float, float]] = []
    for kind in ("eval", "train"):
        if not tokens:
            of_kind = [[line for line in run.lines if line["kind"] == kind] for run in row.runs if run.lines]
            runs = [{line["tokens"]: line[key] for line in lines if is_number(line.get(key))} for lines in of_kind]
            tokens = sorted(set.intersection(*map(set, runs))) if runs else []
    return np.array(tokens, dtype=float), np.array([[run[t] for t in tokens] for run in runs], dtype=float)


def check_metrics(rows: list[Row], keys: tuple[str, ...]) -> None:
    """Raises ValueError for a key without a curve in any row, naming keys like it."""
    lines = (line for row in rows for run in row.runs for line in run.lines)
    known = sorted({key for line in lines for key, value in line.items() if is_number(value)} - {"step", "tokens"})
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            raise ValueError(
                f"--metrics={key}: no run logged that; "
                + (f"near it are {', '.join(near)}" if near else f"there are {', '.join(known) or 'no metrics at all'}")
            )
        if not any(len(curve(row, key)[0]) for row in rows):
            raise ValueError(f"--metrics={key}: in no row is there a step at which all seeds logged it")


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def as_json(rows: list[Row], differences: list[Difference]) -> str:
    first = rows[0].runs[0].summary
    keys = ("val_loss", "train_loss", "val_bits_per_byte", "tokens_per_second")
    lines = [
        {
            "run": row.label,
            **{key: row.runs[0].summary.get(key) for key in ("model", "parameters", "flops_per_token", "tokens")},
            "seeds": [run.summary["seed"] for run in row.runs],
            "paths": [str(run.path) for run in row.runs],
            "commits": [run.summary["commit"] for run in row.runs],
            "windows": [e._asdict() if e else None for e in map(ending, row.runs)],
            **{key: {"mean": row.mean(key), "sd": row.sd(key), "values": row.values(key).tolist()} for key in keys},
        }
        for row in rows
    ]
    data = {
        "dataset": first["dataset"],
        "data_hash": first["data_hash"],
        "rows": lines,
        "differences": [difference._asdict() for difference in differences],
    }
    # JSON knows no NaN, but json.dumps writes one
    return json.dumps(json.loads(json.dumps(data), parse_constant=lambda nan: None), indent=2)


def main(argv: list[str] | None = None) -> list[Row]:
    """Print the comparison and write what was asked for; returns the rows, the lowest validation loss first."""
    settings = configure(argv, [CompareConfig], positional="RUN ...", description=__doc__)
    options: CompareConfig = settings.sections[0]
    runs = read_runs(find_runs(settings.words))
    check_same_data(runs)
    rows = group(runs)
    labels = [row.label for row in rows]
    name = labels[0] if options.reference is None else options.reference
    if name not in labels:
        raise ValueError(f"--reference={name}: no such row; {choice_text(name, labels)} was expected")
    reference = rows[labels.index(name)]
    differences = [paired_difference(row, reference) for row in rows if row is not reference]
    if options.metrics and options.plot is None:
        raise ValueError("--metrics says what to draw to --plot, which is none: give it a path")
    check_metrics(rows, options.metrics or ())

    parts = [table(rows), table_notes(rows)]
    parts += [text] if (text := endings_text(rows)) else []
    parts += [differences_text(differences)] if differences else []
    parts += [published_text(rows)] if options.published else []
    text = "\n\n".join(parts)
    print(text)
    for path, content in ((options.output, text), (options.json, as_json(rows, differences))):
        if path is not None:
            write(path, content)
    if options.plot is not None:
        keys = options.metrics or curves.LOSSES
        drawn = {row.label: {key: curve(row, key) for key in keys} for row in rows}
        if not any(len(of[keys[0]][0]) for of in drawn.values()):
            warn("no run has evaluations in its metrics.jsonl: nothing to plot")
            return rows
        try:
            if options.metrics:
                files = curves.draw_metrics(drawn, keys, options.plot)
            else:
                files = curves.draw_losses(drawn, bits_per_nat(runs[0]), options.plot)
        except ImportError:
            warn("no plot without matplotlib: pip install matplotlib (or --plot=none)")
        else:
            print(f"\ncurves: {', '.join(file.as_posix() for file in files)}")
    return rows


if __name__ == "__main__":
    with exit_on_user_error():
        main()
