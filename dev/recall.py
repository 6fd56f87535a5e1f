"""
Where the loss of runs falls: on tokens that could have been copied from the context, or on the others. Runs that differ only in
their seed are one row, as in compare.py, and a row is a column here.

    python -m dev.recall out/stdlib/baseline_s? out/stdlib/encdec_plain_s? --json=out/recall.json

For every token y_t of the validation file that a run is judged on, m is the length of the longest end x_{t-m+1} .. x_t of the
context that stands earlier in the context as well. The token after it there (after the latest of equally long ones) is y_t or
another one; who copies on is right on the former. Over the tokens of a group:

    share    of all tokens
    NAME     loss, mean nats a token; mean ± standard deviation over the runs of a row. The first row has the lowest over all
    behind   share * (loss - loss of the first row): what the group adds to the difference over all tokens

And whether a model copies at all: half a window of text from the validation file and the same text once more, READINGS of them, the
loss of the first reading and of the second, in which everything but its beginning can be copied (arXiv:2209.11895, section 3). With
--layers also both losses without each attention layer, whose output is replaced by 0: which layers does copying need?
"""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import configurator
import dataloader
import runtime
from errors import exit_on_user_error
from model import CrossAttention, SelfAttention
from runs import Run, find_runs, group, judged_alike, markdown_table, read_runs, write
from validation import whole_file

READINGS = 128
LENGTHS = (1, 3, 8)  # the groups of m begin here
GROUPS = (
    "m = 0",
    "m = 1 or 2, then y", "m = 3 to 7, then y", "m > 7, then y",
    "m = 1 or 2, then another", "m = 3 to 7, then another", "m > 7, then another",
)  # fmt: skip


@dataclass(frozen=True)
class RecallConfig:
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of matrix products
    layers: bool = False  # read a text twice without each attention layer, too
    json: str | None = None  # also write the numbers to this file

    def __post_init__(self):
        configurator.check_given(self, "json")


def matches(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For contexts x and next tokens y, both (B, T): m (B, T), and whether the token after the earlier place is y_t (B, T)."""
    longest, copied = np.zeros(x.shape, dtype=np.int64), np.zeros(x.shape, dtype=bool)
    for back in range(x.shape[1] - 1, 0, -1):  # the nearest last: of equally long ones it counts
        differs = x[:, back:] != x[:, :-back]  # (B, T - back), for t = back .. T - 1
        here = np.arange(differs.shape[1])
        length = here - np.maximum.accumulate(np.where(differs, here, -1), axis=1)
        better = (length > 0) & (length >= longest[:, back:])
        longest[:, back:] = np.where(better, length, longest[:, back:])
        copied[:, back:] = np.where(better, x[:, 1 : x.shape[1] - back + 1] == y[:, back:], copied[:, back:])
    return longest, copied


def groups_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index into GROUPS (B, T) of the tokens y after the contexts x, both (B, T)."""
    longest, copied = matches(x, y)
    of_length = np.searchsorted(LENGTHS, longest, side="right")  # 0: none
    return np.where((longest > 0) & ~copied, of_length + len(LENGTHS), of_length)


def token_losses(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, machine: runtime.Runtime) -> np.ndarray:
    """Nats (B, T) of the tokens y after the contexts x, both (B, T); 0 where y is -1."""
    with machine.autocast():
        logits = model(x.to(machine.device))[0].float()  # (B, T, V)
    return F.cross_entropy(logits.mT, y.to(machine.device), ignore_index=-1, reduction="none").cpu().numpy()


def read_twice(model: torch.nn.Module, data: dataloader.TokenData, machine: runtime.Runtime) -> tuple[float, float]:
    """Mean nats of a token in the first and in the second reading of a text, without its first token."""
    half = min(data.block_size // 2, len(data.val))
    starts = np.linspace(0, len(data.val) - half, READINGS).astype(np.int64)
    text = torch.from_numpy(data.val[starts[:, None] + np.arange(half)].astype(np.int64))  # (n, T / 2)
    twice = torch.cat((text, text), dim=1)
    parts = [token_losses(model, rows[:, :-1], rows[:, 1:], machine) for rows in twice.split(8)]
    losses = np.concatenate(parts)  # (n, T - 1)
    return float(losses[:, : half - 1].mean()), float(losses[:, half:].mean())


def read_without(model: torch.nn.Module, data: dataloader.TokenData, machine: runtime.Runtime) -> dict[str, tuple[float, float]]:
    """read_twice without each attention layer, by its name."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (SelfAttention, CrossAttention)):
            hook = layer.register_forward_hook(lambda _layer, _inputs, output: torch.zeros_like(output))
            found[name] = read_twice(model, data, machine)
            hook.remove()
    return found


@torch.no_grad()
def measure(run: Run, machine: runtime.Runtime, layers: bool) -> dict[str, str | float | list | dict]:
    """
    `tokens` and `nats` of each group and `first` and `second` reading for a run, of its last weights, or of the best where only
    these were kept; with `layers` also both readings `without` each attention layer. Raises ValueError for models that predict no
    next token of a text, and for another validation file than that of the run.
    """
    which = checkpoint.find_first(run.path, "last", "best").name.removesuffix(".old")
    model = checkpoint.load_run(run.path, which, machine.device)[0].to(machine.weight_dtype)
    if model.reconstructs or model.writes_blocks or checkpoint.separator(run.path) is not None:
        raise ValueError(f"{run.path} predicts no next token from a text alone; leave it out")
    name = run.summary["dataset"]
    data = dataloader.open_data(dataloader.prepare_if_missing(name), model.config.block_size, "val")
    if data.val_hash != run.summary["data_hash"]:
        raise ValueError(f"{name} has another validation file now than when {run.path} was trained on it; make that one again")
    tokens, nats = np.zeros(len(GROUPS), dtype=np.int64), np.zeros(len(GROUPS))
    for x, y in whole_file(data, machine, run.summary["val_tokens"]):
        counted = (y >= 0).flatten().numpy()
        of_group = groups_of(x.numpy(), y.numpy()).ravel()[counted]
        tokens += np.bincount(of_group, minlength=len(GROUPS))
        nats += np.bincount(of_group, token_losses(model, x, y, machine).ravel()[counted], minlength=len(GROUPS))
    first, second = read_twice(model, data, machine)
    found = {"run": str(run.path), "tokens": tokens.tolist(), "nats": nats.tolist(), "first": first, "second": second}
    return found | ({"without": read_without(model, data, machine)} if layers else {})


def spread(values: np.ndarray) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def table(rows: dict[str, list[dict]]) -> str:
    """The quantities at the top. Raises ValueError where runs were judged in windows of different lengths."""
    tokens = np.array(next(iter(rows.values()))[0]["tokens"])
    losses = {}  # label: (runs, groups and all)
    for label, runs in rows.items():
        if any(run["tokens"] != tokens.tolist() for run in runs):
            raise ValueError(f"{label} sees contexts of another length than {next(iter(rows))}; compare runs of one block_size")
        nats = np.array([run["nats"] for run in runs])
        losses[label] = np.c_[nats, nats.sum(1)] / np.maximum(np.r_[tokens, tokens.sum()], 1)
    share = np.r_[tokens, tokens.sum()] / tokens.sum()
    first = next(iter(losses.values())).mean(0)
    lines = []
    for i, name in enumerate([*GROUPS, "all"]):
        line = [name, f"{share[i]:.1%}"]
        for label, of_runs in losses.items():
            line.append(spread(of_runs[:, i]))
            if label != next(iter(losses)):
                line.append(f"{share[i] * (of_runs[:, i].mean() - first[i]):+.4f}")
        lines.append(line)
    labels = list(losses)
    return markdown_table(["context", "share", labels[0], *(part for label in labels[1:] for part in (label, "behind"))], lines)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    settings = configurator.configure(argv, [RecallConfig], positional="RUN ...", description=__doc__)
    config: RecallConfig = settings.sections[0]
    machine = runtime.start(config.device, config.dtype, "off")
    found = group(judged_alike(read_runs(find_runs(settings.words))))
    rows = {row.label: [measure(run, machine, config.layers) for run in row.runs] for row in found}
    print(table(rows))
    for label, of_row in rows.items():
        readings = {"": [(run["first"], run["second"]) for run in of_row]}
        readings |= {f" without {name}": [run["without"][name] for run in of_row] for name in of_row[0].get("without", ())}
        for without, pairs in readings.items():
            first, second = map(spread, np.array(pairs).T)
            print(f"{label}{without}: a text read twice costs {first}, then {second} nats per token")
    if config.json is not None:
        write(config.json, json.dumps(rows))
    return rows


if __name__ == "__main__":
    with exit_on_user_error():
        main()
