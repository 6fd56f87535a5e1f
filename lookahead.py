"""
Lookahead decoding (Fu et al. 2024, arXiv:2402.02057) that samples: several tokens a step, and token for token the text of
plain decoding, at any temperature.

Why that is possible. With the noise of generate.py, plain decoding is a deterministic function: the token after a prefix is
pick(logits(prefix), noise[position]). So a draft, wherever it comes from, can be *checked*: its first token must be the one that
is picked after the text, its second the one picked after the first, and so on. Drafts decide how many tokens a step emits,
never which (Daliri, Musco and Suresh 2024, arXiv:2408.07978). The guesses below use the same noise: two different
distributions with common noise choose the same token far more often than with independent noise, see `coupling`.

One step is one forward pass over the last token y_p, which stands at position p and is not in the cache yet, and over

    drafts     up to G continuations of y_p from a pool of n-grams, each N-1 tokens at p+1, p+2, ..., that were seen behind the
               text's last M tokens, y_p among them. A byte says little of the next one, three say much (dev/LOG.md)
    window     N-1 levels of W guesses; column i of level l stands at p+l+i. Level 0 is one line of text that begins with y_p;
               column i of a higher level continues the column below it. What is picked after the last level completes W n-grams
               for the pool; then all levels move down by one, and it becomes the last.

All of them see the cache. Behind it, each token sees its own chain only: y_p, then what it continues, then itself. So the
window never sees a draft, nor a draft the window or another draft. Then the cache keeps y_p and the accepted tokens.

Shapes: T tokens of this step, S = cached + T keys, R tokens whose picks are read, V vocabulary.
"""

import functools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

import generate
from generate import Continuation, Sampling


@dataclass(frozen=True)
class Setting:
    """Size of a step: up to (N-1) * (W + G) tokens, one more where W = 0."""

    window: int  # W, columns of guesses; 0: none, all drafts come from the text
    ngram: int  # N: a step emits 1..N tokens
    drafts: int  # G, n-grams that are checked in a step, and kept for each M tokens
    match: int = 1  # M, last tokens of the text that an n-gram has to continue
    from_text: bool = True  # the pool also takes the n-grams of prompt and output ("prompt lookup")

    def __post_init__(self):
        bounds = ("W", self.window, 0, 64), ("N", self.ngram, 2, 16), ("G", self.drafts, 0, 64), ("M", self.match, 1, 16)
        for name, value, least, most in bounds:
            if not least <= value <= most:
                raise ValueError(f"lookahead: {name}={value} is out of range; {name} from {least} to {most} is possible")

    def __str__(self) -> str:
        return f"{self.window},{self.ngram},{self.drafts}" + f",{self.match}" * (self.match > 1)


def parse(word: str) -> Setting:
    """A setting from "W,N,G" or "W,N,G,M". Raises ValueError."""
    try:
        numbers = [int(part) for part in word.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4):
        raise ValueError(f"lookahead={word}: integers W,N,G such as 4,3,4 or W,N,G,M such as 0,8,1,3 are needed, or auto, or none")
    return Setting(*numbers)


# ----------------------------------------------------------------------------------------------------------------------
# drafts


class Pool:
    """For each M tokens, the last `capacity` of what was seen behind them: tuples of N-1 tokens."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.grams: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}  # M tokens -> {rest: where it was seen}, latest last

    def add(self, before: list[int], rest: tuple[int, ...], position: int) -> None:
        """Note what was seen, or guessed, behind M tokens of which the last stands at `position`."""
        grams = self.grams.setdefault(tuple(before), {})
        grams.pop(rest, None)
        grams[rest] = position
        if len(grams) > self.capacity:
            del grams[next(iter(grams))]

    def drafts(self, before: list[int], position: int, length: int) -> list[tuple[int, ...]]:
        """What may follow these M tokens, cut to `length` tokens: guesses for that very position first, then the latest."""
        grams = self.grams.get(tuple(before), {})
        latest = list(reversed(grams))
        latest.sort(key=lambda rest: grams[rest] != position)
        return list(dict.fromkeys(rest[:length] for rest in latest)) if length > 0 else []


# ----------------------------------------------------------------------------------------------------------------------
# one step


class Layout(NamedTuple):
    """The tokens of a step, in order: y_p, the drafts, level 0 without its column 0 (which is y_p), levels 1..N-2."""

    offsets: torch.Tensor  # (T,) the position of each token, from p
    mask: torch.Tensor  # bool (T, T), the slots that it sees, itself last: a text of its own after the cache
    read: torch.Tensor  # (R,) slots whose picks are needed: y_p, the drafts, the last level
    picks: list[int]  # (R,) for each of these the position of the token that is picked, from p


@functools.lru_cache(maxsize=1024)
def layout(window: int, ngram: int, drafts: int, length: int, device: torch.device) -> Layout:
    """The step of `window` columns of N-1 levels and of so many drafts of so many tokens."""
    chains, offsets = [[0]], [0]

    def behind(slot: int, offset: int) -> int:
        chains.append([*chains[slot], len(chains)])
        offsets.append(offset)
        return len(chains) - 1

    read = [0]
    for _ in range(drafts):
        slot = 0
        for k in range(length):
            slot = behind(slot, 1 + k)
            read.append(slot)
    column = [0] * min(window, 1)  # the newest slot of each column
    for i in range(1, window):
        column.append(behind(column[-1], i))
    for level in range(1, ngram - 1):
        column = [behind(slot, level + i) for i, slot in enumerate(column)]
    read += column
    mask = torch.zeros(len(chains), len(chains), dtype=torch.bool)
    for slot, chain in enumerate(chains):
        mask[slot, chain] = True
    picks = [offsets[slot] + 1 for slot in read]
    return Layout(torch.tensor(offsets, device=device), mask.to(device), torch.tensor(read, device=device), picks)


def agreement(first: int, draft: tuple[int, ...], picks: list[int]) -> list[int]:
    """What to emit if `draft` was checked: the pick after the text, and the one after each of its tokens that was right."""
    emitted = [first]
    for token, following in zip(draft, picks):
        if token != emitted[-1]:
            break
        emitted.append(following)
    return emitted


# ----------------------------------------------------------------------------------------------------------------------
# the loop


class Lookahead:
    """
    One text that is being continued. `step` makes it longer until `sample.finished`; `setting` may be changed between steps,
    None is plain decoding. After each step the cache holds all of the context but its last token; before the first, and where the
    context has moved, it is empty.
    """

    def __init__(
        self, model: torch.nn.Module, sample: Continuation, sampling: Sampling, setting: Setting | None, number: int = 0
    ):
        generate.check_prompts(model, [sample.tokens])
        if getattr(model.config, "latent_factor", 0) > 0:
            raise ValueError("lookahead looks at several texts in one step, but latents are made of one; use lookahead=none")
        self.model, self.sample, self.sampling, self.number = model, sample, sampling, number
        self.device, self.block_size = next(model.parameters()).device, model.config.block_size
        self.noise = generate.Noise(sampling, model.config.vocab_size)
        self.random = random.Random(0)  # fills columns of which nothing is known; no part of the text
        self.steps = self.drafted = self.accepted = 0  # forward passes, tokens of drafts, and those of them that were right
        self.forward = generate.cached_step(model)
        self.use(setting)

    def use(self, setting: Setting | None) -> None:
        """Go on with another setting, an empty pool, and a cache that has room for it."""
        self.setting, self.start, self.window, self.noted = setting, -1, [], 0
        self.pool = Pool(setting.drafts if setting else 0)

    @torch.inference_mode()
    def step(self) -> int:
        """Emit one token or more, or end the text; returns how many tokens it became longer by."""
        tokens, before = self.sample.tokens, len(self.sample.tokens)
        start = generate.context_start(before, self.block_size)
        if start != self.start:  # the context moves: positions in the model begin again, those of the noise go on
            scratch = (self.setting.ngram - 1) * (self.setting.window + self.setting.drafts) if self.setting else 0
            self.start, self.cache, self.window = start, self.model.make_cache(self.block_size + scratch), []
        self.steps += 1
        if self.setting is None or before - start - self.cache.length > 1:
            new = torch.tensor([tokens[start + self.cache.length :]], device=self.device)
            logits = self.forward(new, self.cache)
            chosen = generate.pick(logits, self.noise.rows_at(self.number, [before]), self.sampling)
            self.sample.accept(chosen.tolist())
        else:
            self.look_ahead()
        held = self.cache.length - (len(tokens) - 1 - start)
        assert self.sample.finished or held == 0, f"the cache holds {held} tokens more than the context without its last one"
        return len(tokens) - before

    def look_ahead(self) -> None:
        """One step as at the top of this file. It is smaller where the context ends, or there are no drafts, down to y_p alone."""
        tokens, cache, W, N, M = self.sample.tokens, self.cache, self.setting.window, self.setting.ngram, self.setting.match
        p, held = len(tokens) - 1, cache.length
        room = self.start + self.block_size - len(tokens)  # positions of the context after y_p
        # column i of the last level stands N - 2 + i behind y_p, which must not be more than `room`
        width, length = max(0, min(W, room - N + 3)), min(N - 1, room)
        if self.setting.from_text:
            for i in range(max(self.noted, M - 1), len(tokens) - N + 1):
                self.pool.add(tokens[i - M + 1 : i + 1], tuple(tokens[i + 1 : i + N]), i)
            self.noted = max(self.noted, len(tokens) - N + 1)
        if not self.window:
            self.window = [self.random.choices(tokens, k=W) for _ in range(N - 1)]
        if W > 0:
            self.window[0][0] = tokens[p]
        drafts = self.pool.drafts(tokens[-M:], p, length)

        shape = layout(width, N, len(drafts), length, self.device)
        new = [tokens[p], *(token for draft in drafts for token in draft), *self.window[0][1:width]]
        new += [token for row in self.window[1:] for token in row[:width]]
        idx = torch.tensor([new], device=self.device)
        if len(shape.picks) == 1:  # y_p alone: a plain step
            logits = self.forward(idx, cache)
        else:
            mask = torch.ones(len(new), held + len(new), dtype=torch.bool, device=self.device)
            mask[:, held:] = shape.mask
            logits = self.forward(idx, cache, shape.offsets + (p - self.start), mask, shape.read)  # (R, V)
        noise = self.noise.rows_at(self.number, [p + offset for offset in shape.picks])
        picks = generate.pick(logits, noise, self.sampling).tolist()

        runs = [agreement(picks[0], draft, picks[1 + i * length :]) for i, draft in enumerate(drafts)] or [picks[:1]]
        best = max(range(len(runs)), key=lambda i: len(runs[i]))
        used = self.sample.accept(runs[best])  # fewer than offered where the text ends
        cache.keep(held + 1, held + 1 + best * length, used - 1)
        self.drafted, self.accepted = self.drafted + len(drafts) * length, self.accepted + used - 1

        last = picks[len(picks) - width :]  # these continue the columns
        for i, token in enumerate(last):
            line = tokens[max(0, p - M + 1) : p] + self.window[0][: i + 1]  # level 0 begins with y_p
            self.pool.add(line[-M:], (*(row[i] for row in self.window[1:]), token), p + i)
        # a column less for each draft token accepted: the others keep their positions, hence their noise
        drop = min(used - 1, W) if self.sampling.temperature > 0 else 0
        last += self.random.choices(tokens, k=W - width)
        self.window = [row[drop:] + self.random.choices(tokens, k=drop) for row in (*self.window[1:], last)]


AUTO = (Setting(0, 8, 1, 3), Setting(0, 4, 4), Setting(4, 3, 4), Setting(5, 4, 4), Setting(10, 5, 10))  # tried by `tune`


def tune(run: Lookahead, steps: int = 12) -> Iterator[str]:
    """
    Make `steps` steps with plain decoding and with each setting of AUTO, and stay with the one that made the most tokens a second.
    They are steps of the text itself; only its context is read again for each setting. Yields after every step; at last, why.
    """
    speeds = {}
    for setting in (None, *AUTO):
        if not run.sample.finished:
            run.use(setting)
        seconds, made = 0.0, 0
        for number in range(steps):
            if run.sample.finished:
                yield f"lookahead=auto: the text ended before all settings were tried; its last steps were {run.setting or 'plain'}"
                return
            began, before, start = time.perf_counter(), len(run.sample.tokens), run.start
            run.step()
            # not the first, whose pool is next to empty, nor what moves the context, which may happen to any setting
            if number >= steps // 3 and run.start == start:
                seconds, made = seconds + time.perf_counter() - began, made + len(run.sample.tokens) - before
            yield ""
        speeds[setting] = made / max(seconds, 1e-9)
    best = max(speeds, key=speeds.get)
    run.use(best)
    tried = ", ".join(f"{setting or 'plain'} {speed:.0f}" for setting, speed in speeds.items())
    yield f"lookahead=auto: {best or 'plain decoding'} is the fastest here (tokens/s: {tried})"


# ----------------------------------------------------------------------------------------------------------------------
# why common noise


def coupling(p: torch.Tensor, q: torch.Tensor) -> tuple[float, float]:
    """
    The probability that a draft is right: P(I = J) for I drawn from p (K,) and J from q (K,), both with argmax(log + Gumbel
    noise), with common noise and with independent noise:

        common       sum_k 1 / sum_j max(p_j / p_k, q_j / q_k),  between (1 - TV) / (1 + TV) and 1 - TV
        independent  sum_k p_k q_k

    where TV is their total variation distance. arXiv:2408.07978. Memory O(K), time O(K^2).
    """
    p, q = (x.double() / x.double().sum() for x in (p, q))
    common = 0.0
    for k in ((p > 0) & (q > 0)).nonzero().flatten().split(256):
        common += (1 / torch.maximum(p / p[k, None], q / q[k, None]).sum(dim=1)).sum().item()
    return common, (p * q).sum().item()
