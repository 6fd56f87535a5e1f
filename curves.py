"""
Learning curves as pictures. What is to be drawn comes as {label of a row: {key: curve}}: a line for the mean over seeds, in a
band from the lowest to the highest of them. A row has one colour and marker in all panels of a picture, by its place among all
rows, whether or not it has something to show.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]  # training tokens (N,), values (seeds, N); N = 0 without values
Curves = dict[str, dict[str, Curve]]

LOSSES = ("val_loss", "train_loss", "embedding_loss")  # what draw_losses() draws
# Okabe & Ito, "Color Universal Design" (2008), with grey for their yellow, which is too light for a line on white
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888"]
MARKERS = "os^DvPX*"
SETTINGS = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "compare",
    "svg.fonttype": "none",
}


def styles(curves: Curves) -> dict[str, dict]:
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)], "markersize": 5}
        for i, label in enumerate(curves)
    }


def draw_lines(ax, curves: Curves, key: str, since: float = 0, markers: int = 1, **options) -> np.ndarray:
    """A line and band a row from `since` tokens on, with about so many markers; returns every value drawn."""
    drawn = [np.zeros(0)]
    for label, style in styles(curves).items():
        tokens, values = curves[label][key]
        if not (tokens >= since).any():
            continue
        values, tokens = values[:, tokens >= since], tokens[tokens >= since]
        marked = list(range(len(tokens) - 1, -1, -max(1, len(tokens) // markers)))  # from the end, at equal distances
        ax.plot(tokens, values.mean(0), **style | {"linewidth": 1.7, "markevery": marked} | options)
        if len(values) > 1 and "linestyle" not in options:
            ax.fill_between(tokens, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)
        drawn.append(values.ravel())
    return np.concatenate(drawn)


def set_limits(ax, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.05 * (values.max() - values.min()) or 0.01
        ax.set_ylim(values.min() - margin, values.max() + margin)


def save(panels: list[Callable], curves: Curves, prefix: str, dashed: str | None = None) -> list[Path]:
    """
    Let each panel draw into axes of its own, and write PREFIX.png and PREFIX.svg with one legend for all; `dashed` says what
    dashed lines are. Raises ImportError without matplotlib, ValueError for a prefix that names no file.
    """
    if not Path(prefix).name or prefix.endswith("/"):
        raise ValueError(f"plot={prefix} is a folder; give the beginning of two file names, such as {prefix}curves")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    lines = -(-len(panels) // columns)
    width = 12 if columns > 1 else 7
    shown = {label: some for label, of in curves.items() if (some := [c for c in of.values() if len(c[0])])}
    with matplotlib.rc_context(SETTINGS):
        # in a label a $ would start a formula
        handles = [
            Line2D([], [], label=label.replace("$", r"\$"), linewidth=1.7, **style)
            for label, style in styles(curves).items()
            if label in shown
        ]
        if dashed:
            handles.append(Line2D([], [], color="#444444", linewidth=0.9, linestyle="--", label=dashed))
        if any(len(values) > 1 for some in shown.values() for _, values in some):
            handles.append(Patch(color="#444444", alpha=0.18, linewidth=0, label="lowest to highest seed"))
        # about 12 characters an inch, handles included, fit beside each other
        fitting = 140 * width // 12 // (max(map(len, shown)) + 8)
        legend_columns = max(1, min(5, len(handles), fitting))
        legend_lines = -(-len(handles) // legend_columns)
        # room for two lines of the legend is in the first panel's height, and more of them do not squeeze the panels
        height = 5.2 + 3.8 * (lines - 1) + 0.24 * max(0, legend_lines - 2)
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, panel in zip(axes, panels):
            ax.set_xlabel("training tokens")
            ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
            panel(ax)
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, frameon=False)
        stem = prefix.removesuffix(".png").removesuffix(".svg")
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=150)
        figure.savefig(f"{stem}.svg", metadata={"Date": None})  # equal curves, equal file
    return [Path(f"{stem}.png"), Path(f"{stem}.svg")]


def both_losses(of: dict[str, Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, validation and training losses, all (N,), means over seeds; N = 0 where the two were not logged together."""
    (tokens, val), (train_tokens, train) = of["val_loss"], of["train_loss"]
    if not len(tokens) or not np.array_equal(tokens, train_tokens):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    return tokens, val.mean(0), train.mean(0)


def has_parted(of: dict[str, Curve]) -> bool:
    """Whether a row ends with its validation loss more than 5 % above its training loss."""
    tokens, val, train = both_losses(of)
    return len(tokens) > 0 and val[-1] > 1.05 * train[-1]


def draw_losses(curves: Curves, bits_per_nat: float, prefix: str) -> list[Path]:
    """
    The keys of LOSSES: validation and training, validation closer, one against the other where they part, and the embedding loss
    where there is one.
    """
    end = max(of["val_loss"][0].max(initial=0) for of in curves.values())

    def means(since: float, *keys: str) -> np.ndarray:  # without the bands: one seed that is stuck would flatten all rows
        some = [of[key] for of in curves.values() for key in keys if len(of[key][0])]
        return np.concatenate([values[:, tokens >= since].mean(0) for tokens, values in some])

    def whole(ax) -> None:
        draw_lines(ax, curves, "val_loss")
        draw_lines(ax, curves, "train_loss", linestyle="--", linewidth=0.9, marker="")
        # the first drop, from ln(vocab_size), would flatten everything after it
        set_limits(ax, means(0.1 * end, "val_loss", "train_loss"))
        ax.set(title="Loss on validation and training windows", ylabel="loss (nats per token)")

    def last_part(ax) -> None:
        draw_lines(ax, curves, "val_loss", 0.4 * end, markers=4)
        set_limits(ax, means(0.4 * end, "val_loss"))
        ax.set(title="Validation, last 60 % of training", ylabel="validation loss (nats per token)")
        right = ax.secondary_yaxis("right", functions=(lambda y: y * bits_per_nat, lambda y: y / bits_per_nat))
        right.set_ylabel("bits per byte")

    def one_against_the_other(ax) -> None:
        for label, style in styles(curves).items():
            tokens, val, train = both_losses(curves[label])
            late = tokens >= 0.4 * end
            ax.plot(train[late], val[late], **style | {"linewidth": 1.7})
        ax.invert_xaxis()  # training goes to the right
        ax.xaxis.set_major_formatter("{x:g}")
        labels = dict(xlabel="loss on training windows (nats per token)", ylabel="validation loss (nats per token)")
        ax.set(title="Validation at equal training loss, last 60 %", **labels)

    def embedding(ax) -> None:
        draw_lines(ax, curves, "embedding_loss")
        ax.set(yscale="log", title="Embedding loss", ylabel="embedding loss (unweighted)")

    panels = [whole, last_part]
    panels += [one_against_the_other] * any(map(has_parted, curves.values()))
    panels += [embedding] * any(len(of["embedding_loss"][0]) for of in curves.values())
    return save(panels, curves, prefix, dashed="training windows")


def draw_metrics(curves: Curves, keys: tuple[str, ...], prefix: str) -> list[Path]:
    """A panel for each key, logarithmic where all its values are positive and the largest is 100 times the smallest or more."""

    def panel(ax, key: str) -> None:
        values = draw_lines(ax, curves, key, markers=4)
        if values.min() > 0 and values.max() >= 100 * values.min():
            ax.set_yscale("log")
        ax.set_title(key)

    return save([functools.partial(panel, key=key) for key in keys], curves, prefix)
