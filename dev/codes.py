"""
How much of the codes of an autoencoder is settled by the tokens of their own block, over the validation file.

    python -m dev.codes out/latent/rqvae_stdlib ...

An encoder that sees the text so far may give the same S tokens other codes elsewhere. For D levels, over all complete blocks:

    repeated   share of the blocks, of those whose tokens occur more than once, that have the commonest codes of their tokens
    unsettled  H(k_1..k_d | tokens) in bits for d = 1..D, over the blocks whose tokens occur COMMON times or more: empirical
               entropies, which are too small where a code is rare

A prior has to predict the unsettled bits as well, and they say nothing of the block.
"""

import math
from collections import Counter, defaultdict
from pathlib import Path

import torch

import checkpoint
import configurator
import dataloader
from errors import exit_on_user_error

COMMON = 20


def entropy(counts: Counter) -> float:
    """Bits of a draw from what was counted."""
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def settled(blocks: list[tuple[int, ...]], stacks: list[tuple[int, ...]]) -> dict[str, float | list[float]]:
    """The quantities at the top, for blocks of S tokens and their stacks of D codes; nan where no block occurs often enough."""
    of_tokens: dict[tuple, Counter] = defaultdict(Counter)
    for block, stack in zip(blocks, stacks, strict=True):
        of_tokens[block][stack] += 1
    twice = [codes for codes in of_tokens.values() if codes.total() > 1]
    common = [codes for codes in of_tokens.values() if codes.total() >= COMMON]
    n_twice, n_common = (sum(codes.total() for codes in some) for some in (twice, common))

    def unsettled(depth: int) -> float:
        bits = 0.0
        for codes in common:
            prefixes = Counter()
            for stack, count in codes.items():
                prefixes[stack[:depth]] += count
            bits += prefixes.total() * entropy(prefixes)
        return bits / n_common if common else math.nan

    return {
        "repeated": sum(max(codes.values()) for codes in twice) / n_twice if twice else math.nan,
        "unsettled": [unsettled(depth) for depth in range(1, len(stacks[0]) + 1)],
    }


@torch.no_grad()
def measure(run: Path) -> dict[str, float | list[float]]:
    """The quantities at the top for a run. Raises ValueError if it is no autoencoder."""
    settings, name, config = checkpoint.read_config(run)
    if name != "autoencoder":
        raise ValueError(f"{run} is a run of model={name}; codes are those of an autoencoder")
    data = dataloader.open_data(dataloader.prepare_if_missing(settings["dataset"]), config.block_size, "val")
    model = checkpoint.load_autoencoder(run)
    T, S = config.block_size, config.latent_factor
    windows = torch.from_numpy(data.val[: len(data.val) // T * T].astype("int64")).view(-1, T)
    codes = torch.cat([model.encode(rows) for rows in windows.split(64)])  # (n, M, D)
    return settled([tuple(b) for b in windows.view(-1, S).tolist()], [tuple(k) for k in codes.flatten(0, 1).tolist()])


def main(argv: list[str] | None = None) -> dict[str, dict]:
    settings = configurator.configure(argv, [], positional="RUN ...", description=__doc__)
    rows = {run: measure(Path(run)) for run in settings.words}
    for run, found in rows.items():
        bits = ", ".join(f"{value:.2f}" for value in found["unsettled"])
        print(f"{run}: {found['repeated']:.2%} of repeated blocks have the commonest codes; unsettled bits by level: {bits}")
    return rows


if __name__ == "__main__":
    with exit_on_user_error():
        main()
