"""
What a model is judged by: its loss over a validation file, each token once, in nats per token and bits per byte, and what it says
of itself. train.py at its end and evaluate.py say the same.

Shapes: x and y (B, T) of a batch are tokens and the ones that follow, -1 where nothing is to be predicted.
"""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch

import dataloader
import generate
import runtime
import tokenizer

FULL_EVAL_TOKENS = 8192  # in a batch of the full evaluation: fixed, so that its sum is the same whatever batch_size is


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], machine: runtime.Runtime
) -> tuple[float, int]:
    """
    Mean loss, nats per token, over batches (x, y) of which every process brings its share, and the number of tokens. Weighted by
    tokens, so how they are cut into batches does not matter.
    """
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, y in batches:
        x, y = x.to(machine.device), y.to(machine.device)
        with machine.autocast():
            mean = model(x, y)[1]["token"]
        tokens = (y >= 0).sum().cpu()
        total += mean.cpu().double() * tokens  # in this order: Apple GPUs have no float64
        count += tokens
    total, count = machine.sum_over_processes(total), machine.sum_over_processes(count)
    return (total / count).item(), int(count)


def measured(
    model: torch.nn.Module,
    data: dataloader.TokenData,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    machine: runtime.Runtime,
    bytes_per_target: float,
) -> dict[str, float | int | list]:
    """
    What a model says of itself on batches (x, y) of data, this process's share of them; nothing if it has nothing to say.
    `bytes_per_target` makes bits per byte of its bits per token.
    """
    if not hasattr(model, "measure"):
        return {}
    model.eval()
    # a process may get no batch at all, but has to sum up as many numbers as the others: begin with one in which nothing counts
    nothing = torch.zeros(1, data.block_size, dtype=torch.int64)
    sums: dict[str, torch.Tensor] = {}
    for x, y in itertools.chain([(nothing, nothing - 1)], batches):
        with machine.autocast():
            part = model.measure(x.to(machine.device), y.to(machine.device))
        sums = {name: sums.get(name, 0) + value for name, value in part.items()}
    found = model.summarize({name: machine.sum_over_processes(value) for name, value in sums.items()})
    of_tokens = {name: value for name, value in found.items() if name.endswith("bits_per_token")}
    return found | {f"{name.removesuffix('token')}byte": bits / bytes_per_target for name, bits in of_tokens.items()}


def targets_of(data: dataloader.TokenData) -> int:
    """How many targets the validation file has: all its tokens but the first, or of pairs the second sides."""
    return data.meta["val"].get("target_tokens", len(data.val) - 1)


def whole_file(
    data: dataloader.TokenData, machine: runtime.Runtime, first_targets: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    This process's share of the validation file in fixed order, batches of windows, all of it or its first targets. The first
    process says how far it is.
    """
    rows = max(1, FULL_EVAL_TOKENS // data.block_size)
    windows = data.full_windows("val", rows, machine.rank, machine.world_size, first_targets)
    if not machine.is_main:
        return windows
    targets = targets_of(data)
    share = min(targets, first_targets or targets) / machine.world_size
    return runtime.with_progress(windows, share, "evaluated", lambda batch: int((batch[1] >= 0).sum()))


def bytes_per_target(data: dataloader.TokenData, first_targets: int | None) -> float:
    """
    Mean length in bytes of what whole_file() judges. Only the targets of a part are counted, which needs the tokenizer; for all of
    them it is the number of meta.json, so that it is the same wherever all are judged.
    """
    if first_targets is None or first_targets >= targets_of(data):
        return data.bytes_per_token
    lengths, total, count = tokenizer.load(data.folder).byte_lengths(), 0, 0
    for _, y in data.full_windows("val", rows=max(1, 2**20 // data.block_size), first_targets=first_targets):  # of 8 MiB
        targets = y[y >= 0].numpy()
        total, count = total + int(lengths[targets].sum()), count + len(targets)
    return total / count


def judge(
    model: torch.nn.Module, data: dataloader.TokenData, machine: runtime.Runtime, first_targets: int | None = None
) -> dict[str, float | int | list]:
    """
    What summary.json and evaluate.py say of a model: its loss on the validation file or its first targets, in nats per token and
    in bits per byte (or that it is `reconstruction`, of what the model sees), and what it says of itself.
    """
    loss, tokens = mean_loss(model, whole_file(data, machine, first_targets), machine)
    length = bytes_per_target(data, first_targets)
    kind = {"reconstruction": True} if model.reconstructs else {"val_bits_per_byte": loss / math.log(2) / length}
    about = measured(model, data, whole_file(data, machine, first_targets), machine, length)
    return {"val_loss": loss, "val_tokens": tokens, **kind, **about}


def in_words(found: dict) -> str:
    """What judge() found, in a line; of what a model says of its codes only their part of the bits."""
    if found.get("reconstruction"):
        kind, rest = "reconstruction loss", f"{found['token_accuracy']:.2%} right"
    else:
        kind, rest = "loss", f"{found['val_bits_per_byte']:.4f} bits per byte"
        rest += f", {found['code_bits_per_byte']:.4f} of them of codes," if "code_bits_per_byte" in found else ""
    return f"validation {kind} {found['val_loss']:.4f} nats per token, {rest} over {found['val_tokens']:,} tokens"


EXACT_PAIRS = 1000  # unseen pairs to answer after training


def exact_pairs(model: torch.nn.Module, data: dataloader.PairData) -> tuple[float, int]:
    """
    The share of the first EXACT_PAIRS validation pairs that the model answers exactly, greedily, its end included; and how many
    there were.
    """
    model.eval()
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}  # prompts sampled together have one length
    for question, answer in data.questions("val", EXACT_PAIRS):
        by_length.setdefault(len(question), []).append((question, answer))
    right, total = 0, 0
    for pairs in by_length.values():
        room = data.block_size + 1 - len(pairs[0][0])  # for the longest answer and its end
        for first in range(0, len(pairs), 100):
            some = pairs[first : first + 100]
            samples = [generate.Continuation(question, room, eos=data.meta["end"]) for question, _ in some]
            for _ in generate.sample_together(model, samples, generate.Sampling(0.0)):
                pass
            right += sum(sample.output == answer and sample.reason == "eos" for sample, (_, answer) in zip(samples, some))
        total += len(pairs)
    return right / total, total
