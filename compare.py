"""
One honest table from run directories, paired tests over seeds, which say what clears their noise and what does not, and the curves.

    python compare.py out/encdec_* out/baseline_*
    python compare.py out --reference=baseline --output=results/table.md --plot=results/curves
    python compare.py out --metrics=gain_embedding,gain_encoder --plot=results/gains

Runs with equal settings and different seeds form a row, named after the directory without its _seed1, -seed1 or _s1. With --by_name
they must also have that name in common, so that two versions of the code are two rows.
Every loss is in nats per token (of bytes: per byte); the validation loss is that of the last weights over the whole validation file.
"""

import functools
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import curves
from configurator import check_given, choice_text, configure, is_number, nearest
from errors import exit_on_user_error
from runs import Row, Run, bits_per_nat, find_runs, group, judged_alike, markdown_table, read_runs, row_name, warn, write


@dataclass(frozen=True)
class CompareConfig:
    reference: str | None = None  # row that the others are tested against; none: the one with the lowest validation loss
    published: bool = False  # add the eight published runs
    plot: str | None = "out/compare"  # draw the curves to PLOT.png and PLOT.svg; none: do not
    metrics: tuple[str, ...] | None = None  # KEY,KEY: draw these of metrics.jsonl, not the losses; those in summary.json are columns too
    by_name: bool = False  # runs of one row are also named alike: for changes of the code, which no setting tells
    output: str | None = None  # also write the Markdown to this file
    json: str | None = None  # also write the numbers to this file

    def __post_init__(self):
        check_given(self, "plot", "metrics", "output", "json")


CODES = "code_bits_per_byte"  # that summaries of models over codes have, too

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
    "sampling error about 0.004), so these numbers and the ones above come from different validation samples; "
    "losses of other tokens, such as bytes, cannot be compared with them at all. "
    "`baseline_dropout` was judged with attention dropout still on."
)


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
    seeds: int  # that both rows have; 0: fewer than two, so not paired
    mean: float  # nats per token; positive: worse than the reference
    low: float | None  # 95 % interval
    high: float | None
    p: float | None
    verdict: str


def difference(row: Row, reference: Row) -> Difference:
    """
    Paired t-test of the validation losses over the seeds that both rows have. Where they have fewer than two in common, Student's test
    of two samples, which holds losses of both to scatter alike, so that one new run can be held against several.
    """
    a, b = ({run.summary["seed"]: run.summary["val_loss"] for run in r.runs} for r in (row, reference))
    d = np.array([a[seed] - b[seed] for seed in a if seed in b])
    if (n := len(d)) > 1:
        nu, mean, error = n - 1, float(d.mean()), float(d.std(ddof=1)) / math.sqrt(n)
    else:
        n, nu, mean = 0, len(a) + len(b) - 2, row.mean("val_loss") - reference.mean("val_loss")
        if nu < 1:
            return Difference(row.label, reference.label, n, mean, None, None, None, "one seed: cannot tell")
        squares = sum(float(np.var(list(losses.values()))) * len(losses) for losses in (a, b))
        error = math.sqrt(squares / nu * (1 / len(a) + 1 / len(b)))
    p, margin = t_two_sided(mean / error, nu) if error else float(mean == 0), t_critical(nu) * error
    verdict = ("clear of" if p < 0.05 else "inside") + " the noise" + (", not paired: fewer than two seeds in common" if n == 0 else "")
    return Difference(row.label, reference.label, n, mean, mean - margin, mean + margin, p, verdict)


# text


def count(value: float) -> str:
    """Three digits and a prefix: 94.2 M."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + prefix
    return f"{value:.3g}"


def with_sd(values: np.ndarray, sign: str = "") -> str:
    sd = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.4f}{sd}"


def short_commit(run: Run) -> str:
    return run.summary["commit"][:7] + "+" * run.summary["commit"].endswith("+")  # a + marks uncommitted changes


def in_summaries(rows: list[Row], keys: tuple[str, ...]) -> list[str]:
    """Those of the keys that all runs of some row have as a number in summary.json."""
    return [key for key in keys if any(all(is_number(run.summary.get(key)) for run in row.runs) for row in rows)]


def table(rows: list[Row], metrics: tuple[str, ...] = ()) -> str:
    """Markdown; with a column for each of the metrics that summaries have as a number."""
    shown, coded = in_summaries(rows, metrics), any(CODES in run.summary for row in rows for run in row.runs)
    lines = []
    for row in rows:
        first = row.runs[0].summary
        memory = max(filter(is_number, (run.summary.get("peak_memory_bytes") for run in row.runs)), default=0)
        of_codes = f"{row.mean(CODES):.4f}" if all(CODES in run.summary for run in row.runs) else "–"
        lines.append([
            ("run", row.label),
            ("parameters", f"{first['parameters']:,}"),
            ("FLOPs/token", count(first["flops_per_token"])),
            ("tokens", count(row.mean("tokens"))),
            ("seeds", str(len(row.runs))),
            ("train loss", f"{row.mean('train_loss'):.4f}"),
            ("validation loss", with_sd(row.values("val_loss"))),
            ("bits per byte", f"{row.mean('val_bits_per_byte'):.4f}"),
            *([("of codes", of_codes)] if coded else []),  # the rest of the bits: of tokens given their codes
            ("tokens/s", count(row.mean("tokens_per_second"))),
            ("peak memory", f"{memory / 2**30:.2f} GiB" if memory else "–"),
            ("commit", " ".join(sorted({short_commit(run) for run in row.runs}))),
            *((key, with_sd(row.values(key)) if in_summaries([row], (key,)) else "–") for key in shown),
        ])  # fmt: skip
    return markdown_table([name for name, _ in lines[0]], [[cell for _, cell in line] for line in lines])


APART = 0.05  # models of the published table, meant to be of one size, differ by 4 %


def table_notes(rows: list[Row]) -> str:
    first = rows[0].runs[0].summary
    data = f"{first['dataset']}, sha256 {first['data_hash'][:12]}"
    judged = f"validation with the last weights over {first['val_tokens']:,} tokens ({data}), training on sample windows"
    notes = [f"Losses in nats per token, mean ± sample standard deviation over seeds; {judged}."]
    for key, what in (("tokens", "training tokens"), ("commit", "commits"), ("device", "devices"), ("dtype", "dtypes")):
        if len({str(run.summary.get(key)) for row in rows for run in row.runs}) > 1:
            notes.append(f"The runs differ in {what}.")
    sizes = [row.runs[0].summary["parameters"] for row in rows]
    if (apart := max(sizes) / min(sizes) - 1) > APART:
        notes.append(f"The largest has {apart:.0%} more parameters than the smallest.")
    for row in rows:
        dtypes = sorted({run.summary["dtype"] for run in row.runs if run.summary.get("dtype")})  # several with dtype=auto
        if len(dtypes) > 1:
            notes.append(f"`{row.label}` holds runs in {' and in '.join(dtypes)}.")
        names = {row_name(run.path): None for run in row.runs}
        if len(names) > 1 and len({short_commit(run) for run in row.runs}) > 1:
            notes.append(f"`{row.label}` holds runs of several names and commits, {', '.join(names)}: --by_name keeps them apart.")
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
        seeds = f"{d.seeds} seeds, " if d.seeds else ""
        tested = f" (95 % interval {d.low:+.4f} to {d.high:+.4f}, {seeds}p = {d.p:.2g})" if d.p is not None else ""
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
    (tokens (N,), values (seeds, N)) of `key` where every seed of the row logged it; N = 0 without such values. Taken from train
    lines only where eval lines lack the key: train lines have the embedding loss as well, but of other tokens each time.
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
    """Raises ValueError for a key without a curve in any row, naming those there are."""
    lines = (line for row in rows for run in row.runs for line in run.lines)
    known = sorted({key for line in lines for key, value in line.items() if is_number(value)} - {"step", "tokens"})
    for key in keys:
        if key not in known:
            if in_summaries(rows, (key,)):
                raise ValueError(f"--metrics={key}: a number of summary.json, with no curve to draw: --plot=none gives its column")
            near = nearest(key, known)
            raise ValueError(
                f"--metrics={key}: no run logged that; "
                + (f"did you mean {near}? " if near else "")
                + f"there are {', '.join(known) or 'no metrics at all'}"
            )
        if not any(len(curve(row, key)[0]) for row in rows):
            raise ValueError(f"--metrics={key}: in no row is there a step at which all seeds logged it")


def as_json(rows: list[Row], differences: list[Difference], metrics: tuple[str, ...]) -> str:
    first = rows[0].runs[0].summary
    keys = ("val_loss", "train_loss", "val_bits_per_byte", "tokens_per_second")
    lines = [
        {
            "run": row.label,
            **{key: row.runs[0].summary.get(key) for key in ("model", "parameters", "flops_per_token")},
            "tokens": row.mean("tokens"),
            "seeds": [run.summary["seed"] for run in row.runs],
            "paths": [str(run.path) for run in row.runs],
            "commits": [run.summary["commit"] for run in row.runs],
            "windows": [e._asdict() if e else None for e in map(ending, row.runs)],
            **{key: {"mean": row.mean(key), "sd": row.sd(key), "values": row.values(key).tolist()}
               for key in (*keys, *in_summaries([row], metrics))},
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
    runs = judged_alike(read_runs(find_runs(settings.words)))
    rows = group(runs, options.by_name)
    labels = [row.label for row in rows]
    name = labels[0] if options.reference is None else options.reference
    if name not in labels:
        raise ValueError(f"--reference={name}: no such row; {choice_text(name, labels)} was expected")
    reference = rows[labels.index(name)]
    differences = [difference(row, reference) for row in rows if row is not reference]
    metrics = options.metrics or ()
    if options.plot is None and len(in_summaries(rows, metrics)) < len(metrics):
        raise ValueError("--metrics says what to draw to --plot, which is none: give it a path")
    check_metrics(rows, () if options.plot is None else metrics)

    parts = [table(rows, metrics), table_notes(rows)]
    parts += [text] if (text := endings_text(rows)) else []
    parts += [differences_text(differences)] if differences else []
    parts += [published_text(rows)] if options.published else []
    text = "\n\n".join(parts)
    print(text)
    for path, content in ((options.output, text), (options.json, as_json(rows, differences, metrics))):
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
