"""
What training made of the embedding tables: norms, cosines and spectra of tokens and positions, a line for each row of runs.

    python -m dev.embeddings results/models/* --plot=out/embeddings --json=out/embeddings.json
    python -m dev.embeddings out/embeddings.json        # table and pictures again, from the numbers

Tables: wte (V, C) of the tokens that the validation file has, the others never being read; wpe (T, C), or, in a model with
rotary positions that subtracts, wpe_next. For each table X, and X' its rows less their mean:

    norm         mean |x|
    common       |mean x| / norm: 1 if all rows are one vector
    rank         effective number of directions of X', (sum s^2)^2 / sum s^4 for singular values s; C if they are equal
    neighbours   mean cosine of x'_t and x'_{t+1} (positions only)
    overlap      share of the variance of tokens inside the directions that hold 90 % of the variance of positions, divided by
                 what random tokens would have there: 1 = unrelated, 0 = orthogonal
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import checkpoint
import configurator
import curves
import dataloader
from errors import exit_on_user_error
from runs import find_runs, group, markdown_table, read_runs, warn, write


@dataclass(frozen=True)
class EmbeddingsConfig:
    plot: str | None = "out/embeddings"  # draw to PLOT.png and PLOT.svg; none: do not
    json: str | None = None  # also write the numbers to this file

    def __post_init__(self):
        configurator.check_given(self, "plot", "json")


def tables(run: Path) -> dict[str, torch.Tensor]:
    """`tokens` (N, C) and, if the run has a table of them, `positions` (T, C), float64, of the last weights, or of the best."""
    weights = safetensors.torch.load_file(str(checkpoint.find_first(run, "last", "best") / "model.safetensors"))
    named = {key.removeprefix("transformer.").removesuffix(".weight"): value.double() for key, value in weights.items()}
    tokens = named["wte"] if "wte" in named else named.get("lm_head")  # tied: stored once
    if tokens is None:
        raise ValueError(f"{run} has no table of tokens, as a model over codes has none; leave it out")
    settings, _, config = checkpoint.read_config(run)
    data = dataloader.open_data(dataloader.prepare_if_missing(settings["dataset"]), config.block_size, "val")
    found = {"tokens": tokens[torch.from_numpy(np.unique(data.val).astype(np.int64))]}
    positions = named.get("wpe", named.get("wpe_next"))
    return found if positions is None else found | {"positions": positions}


def measure(run: Path) -> dict[str, float | list[float]]:
    """The quantities at the top, by name, and the curves to draw: singular values, and the norm of each position."""
    found: dict[str, float | list[float]] = {}
    centred, bases = {}, {}
    read = tables(run)
    for name, x in read.items():
        mean = x.mean(0)
        centred[name] = x - mean
        s, basis = torch.linalg.svd(centred[name], full_matrices=False)[1:]
        norm = x.norm(dim=1).mean()
        energy = s**2 / (s**2).sum()
        bases[name] = basis[: int((energy.cumsum(0) < 0.9).sum()) + 1]  # (k, C), the directions that hold 90 %
        found |= {
            f"{name}_norm": norm.item(),
            f"{name}_common": (mean.norm() / norm).item(),
            f"{name}_rank": (1 / (energy**2).sum()).item(),
            f"{name}_spectrum": (s / s.norm()).tolist(),
        }
    if "positions" in centred:
        x, basis, tokens = centred["positions"], bases["positions"], centred["tokens"]
        inside = (tokens @ basis.T).square().sum() / tokens.square().sum()
        found |= {
            "positions_neighbours": torch.cosine_similarity(x[:-1], x[1:]).mean().item(),
            "overlap": (inside / (len(basis) / tokens.size(1))).item(),
            "positions_norms": read["positions"].norm(dim=1).tolist(),
        }
    return found


SHOWN = ("tokens_norm", "positions_norm", "tokens_common", "positions_common", "tokens_rank", "positions_rank",
         "positions_neighbours", "overlap")  # fmt: skip
PANELS = {  # key: title, label of the x axis, of the y axis
    "tokens_spectrum": ("Tokens", "direction", "singular value, share of the norm"),
    "positions_spectrum": ("Positions", "direction", "singular value, share of the norm"),
    "positions_norms": ("Norm of a position's embedding", "position", "norm"),
}


def table(rows: dict[str, list[dict]]) -> str:
    lines = []
    for label, runs in rows.items():
        cells = []
        for key in SHOWN:
            values = np.array([run[key] for run in runs if key in run])
            sd = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{sd}" if len(values) else "–")
        lines.append([label, str(len(runs)), *cells])
    return markdown_table(["run", "seeds", *(key.replace("_", " ") for key in SHOWN)], lines)


def draw(rows: dict[str, list[dict]], prefix: str) -> list[Path]:
    """A line for the mean over seeds, in a band from the lowest to the highest of them."""
    drawn: curves.Curves = {}
    for label, runs in rows.items():
        drawn[label] = {}
        for key in PANELS:
            values = np.array([run[key] for run in runs if key in run])
            drawn[label][key] = (np.arange(1.0, values.shape[-1] + 1) if values.size else np.zeros(0), values)

    def panel(ax, key: str) -> None:
        curves.draw_lines(ax, drawn, key, markers=4)
        title, x, y = PANELS[key]
        ax.set(title=title, xlabel=x, ylabel=y, yscale="log")
        if key.endswith("spectrum"):
            ax.set_ylim(bottom=1e-3)

    return curves.save([functools.partial(panel, key=key) for key in PANELS], drawn, prefix)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    settings = configurator.configure(argv, [EmbeddingsConfig], positional="RUN ...", description=__doc__)
    options: EmbeddingsConfig = settings.sections[0]
    if settings.words[0].endswith(".json"):
        rows = checkpoint.read_json(Path(settings.words[0]))
    else:
        grouped = group(read_runs(find_runs(settings.words)))
        rows = {row.label: [{"run": str(run.path)} | measure(run.path) for run in row.runs] for row in grouped}
    print(table(rows))
    if options.json is not None:
        write(options.json, json.dumps(rows))
    if options.plot is not None:
        try:
            print(f"\npictures: {', '.join(file.as_posix() for file in draw(rows, options.plot))}")
        except ImportError:
            warn("no plot without matplotlib: pip install matplotlib (or --plot=none)")
    return rows


if __name__ == "__main__":
    with exit_on_user_error():
        main()
