"""Works in turns: A B C, then C B A, and so on, so that what slows the machine down for a while slows all of them."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_turns(works: dict[str, Callable[[int], T]], amount: int, repeats: int, warm_up: int) -> dict[str, list[tuple[float, T]]]:
    """(seconds, result) of each work(amount), `repeats` times, every other time in reverse, after a work(warm_up) of each."""
    timed = {name: [] for name in works}
    for work in works.values():
        work(warm_up)
    for repeat in range(repeats):
        for name in list(works)[:: 1 if repeat % 2 == 0 else -1]:
            began = time.perf_counter()
            result = works[name](amount)
            timed[name].append((time.perf_counter() - began, result))
    return timed


def rate(runs: list[tuple[float, T]]) -> float:
    """Median of the results per second."""
    return statistics.median(amount / seconds for seconds, amount in runs)
