"""Lookahead decoding against plain decoding: the same text, whatever is guessed; and the mask, the cache, the coupling."""

import contextlib
import gc
import json
import random
import re
import time
import types
from pathlib import Path

import pytest
import torch

import checkpoint
import configurator
import generate
import lookahead
import sample
import tokenizer
from conftest import ALL_MODELS, make_model
from generate import Continuation, Sampling
from lookahead import Lookahead, Setting, layout
from model import Cache

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(case: dict) -> Continuation:
    case["streamed"] = []
    more = (tokenizer.ByteTokenizer(), case["eos"], case["stop"], case["streamed"].append)
    return Continuation(case["prompt"], case["max_new_tokens"], *more)


def result(text: Continuation, case: dict) -> tuple:
    return text.output, text.reason, text.text, "".join(case["streamed"])


def plain(case: dict) -> tuple:
    text = start(case)
    for _ in generate.sample_together(case["model"], [text], case["sampling"]):
        pass
    return result(text, case)


def ahead(case: dict, between=lambda run: None) -> tuple[tuple, Lookahead, list[int]]:
    """Result, the finished run, and how many tokens each step emitted."""
    run, emitted = Lookahead(case["model"], start(case), case["sampling"], case["setting"]), []
    while not run.sample.finished:
        between(run)
        emitted.append(run.step())
    return result(run.sample, case), run, emitted


def random_case(seed: int, temperature: float | None = None, models=ALL_MODELS) -> dict:
    """A tiny model and all that can be asked of it. Few tokens and large weights make it repeat itself, as trained ones do."""
    rng = random.Random(seed)
    name, options = rng.choice(models)
    vocab_size, block_size = rng.choice([4, 7, 31]), rng.choice([12, 12, 24])
    dtype = rng.choice([torch.float64, torch.float32])
    temperature = rng.choice([0.0, 0.3, 0.8, 1.0]) if temperature is None else temperature
    sizes = rng.randint(0, 6), rng.randint(2, 5), rng.randint(0, 4), rng.choice([1, 1, 1, 2, 3])  # W, N, G, M
    return {
        "model": make_model(name, options, seed, dtype, vocab_size=vocab_size, block_size=block_size),
        "sampling": Sampling(temperature, rng.choice([None, None, 3]), rng.choice([1.0, 1.0, 0.9]), seed),
        "prompt": [rng.randrange(vocab_size) for _ in range(rng.choice([1, 1, 2, 5, block_size]))],
        "max_new_tokens": rng.choice([1, 9, 25, 40]),  # often beyond the context
        "eos": rng.choice([None, None, rng.randrange(vocab_size)]),
        "stop": rng.choice([(), (), (chr(rng.randrange(vocab_size)) + chr(rng.randrange(vocab_size)),)]),
        "setting": Setting(*sizes, from_text=rng.random() < 0.5),
    }


PLAIN_MODELS = [("encoder_decoder", {}), ("decoder_only", {})]  # for tests whose seeds suit a model: ALL_MODELS may grow

# ----------------------------------------------------------------------------------------------------------------------
# the same text


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.8, 1.0])
def test_lookahead_equals_plain(temperature):
    """Guards everything at once: 520 random cases, token for token, and that drafts were really accepted in them."""
    steps = tokens = 0
    for seed in range(130):
        case = random_case(1000 * int(10 * temperature) + seed, temperature)
        expected = plain(case)
        found, run, emitted = ahead(case)
        assert found == expected, f"{seed=} {case['setting']}"
        assert run.accepted == sum(emitted) - run.steps + (run.sample.reason == "eos"), "a step has one pick that was no draft"
        steps, tokens = steps + run.steps, tokens + sum(emitted)
    assert tokens / steps > 1.15, f"only {tokens / steps:.2f} tokens a step: this test would see nothing"


def test_a_text_may_end_inside_an_accepted_draft():
    """Guards the end of a text: EOS, a stop string and the last token, each placed so that an accepted draft goes on behind it."""
    placed = {"eos": 0, "stop": 0, "length": 0}
    for seed in range(24):
        case = random_case(4000 + seed) | {"max_new_tokens": 40, "eos": None, "stop": (), "setting": Setting(4, 4, 4)}
        (output, *_), _, emitted = ahead(case)
        ends = [sum(emitted[: i + 1]) for i in range(len(emitted))]
        inside = [t for t in range(1, 40) if t + 1 not in ends]  # not the last token of its step
        for t in inside[:8]:
            stop = bytes(output[t - 1 : t + 1])
            for reason, change in (
                ("eos", {"eos": output[t]} if output.index(output[t]) == t else {}),
                ("stop", {"stop": (stop.decode(),)} if bytes(output).find(stop) == t - 1 else {}),
                ("length", {"max_new_tokens": t + 1} if t == inside[0] else {}),
            ):
                if change:
                    found = ahead(case | change)[0]
                    assert found == plain(case | change) and found[1] == reason
                    assert len(found[0]) == t + (reason != "eos")
                    placed[reason] += 1
    assert min(placed.values()) >= 10, placed


def test_the_number_of_a_sample_is_that_of_its_noise():
    """Guards texts that are numbered: sample 3 of lookahead is sample 3 of plain decoding, and not sample 0."""
    case = random_case(11, 0.8) | {"max_new_tokens": 30, "eos": None, "stop": (), "setting": Setting(3, 3, 3)}
    text, run = start(case), Lookahead(case["model"], start(case), case["sampling"], case["setting"], number=3)
    for _ in generate.sample_together(case["model"], [text], case["sampling"], first_sample=3):
        pass
    while not run.sample.finished:
        run.step()
    assert run.sample.output == text.output != plain(case)[0]


@pytest.mark.parametrize("setting", [(1, 2, 0), (1, 2, 3), (3, 2, 3), (1, 5, 2), (0, 4, 3), (6, 4, 0), (9, 16, 2)])
def test_extreme_settings(setting):
    """Guards N = 2, one column, none, no drafts, and steps longer than the context; at most N tokens a step."""
    for seed in range(8):
        case = random_case(seed) | {"setting": Setting(*setting), "max_new_tokens": 30, "eos": None, "stop": ()}
        found, run, emitted = ahead(case)
        assert found == plain(case)
        assert 1 <= min(emitted) <= max(emitted) <= setting[1]
        assert setting[2] > 0 or max(emitted) == 1


def test_junk_in_pool_and_window_never_changes_the_text():
    """Guards verification: drafts are not trusted, whoever wrote them."""
    rng = random.Random(0)

    def junk(run):
        V, N = run.model.config.vocab_size, run.setting.ngram
        run.window = [[rng.randrange(V) for _ in row] for row in run.window]
        for _ in range(2 * V):
            before = rng.choice([rng.choices(range(V), k=run.setting.match), run.sample.tokens[-run.setting.match :]])
            run.pool.add(before, tuple(rng.choices(range(V), k=N - 1)), rng.choice([0, len(run.sample.tokens) - 1]))

    accepted = 0
    for seed in range(60):
        case = random_case(5000 + seed)
        found, run, _ = ahead(case, junk)
        assert found == plain(case)
        accepted += run.accepted
    assert accepted > 30


def test_setting_may_change_between_steps():
    """Guards lookahead=auto: plain steps and others in one text, and it ends on a setting and says why."""
    case = random_case(3) | {"max_new_tokens": 400, "eos": None, "stop": (), "setting": None}
    expected = plain(case)
    run = Lookahead(case["model"], start(case), case["sampling"], None)
    said = [line for line in lookahead.tune(run, steps=6) if line]
    assert len(said) == 1 and "is the fastest here" in said[0] and str(run.setting or "plain") in said[0]
    settings = [None, Setting(2, 3, 2), Setting(8, 5, 8), Setting(1, 2, 1)]
    while not run.sample.finished:
        run.use(settings[run.steps % 4])
        run.step()
        if not run.sample.finished:
            run.step()
    assert result(run.sample, case) == expected
    short = Lookahead(case["model"], start(case | {"max_new_tokens": 8}), case["sampling"], None)
    said = [line for line in lookahead.tune(short, steps=6) if line]
    assert short.sample.finished and "the text ended before all settings were tried" in said[0], "no word of what was fastest"
    shorter = Lookahead(case["model"], start(case | {"max_new_tokens": 6}), case["sampling"], None)
    said = [line for line in lookahead.tune(shorter, steps=6) if line]
    assert shorter.setting is None and "its last steps were plain" in said[0], "a setting that made no step is said to have made some"


# ----------------------------------------------------------------------------------------------------------------------
# one step


def by_definition(W: int, N: int, drafts: int, length: int) -> tuple[list[tuple], dict[tuple, set[tuple]]]:
    """Names of the slots in order, and whom each one sees, as the specification lists them."""
    y = ("y",)
    names, sees = [y], {y: {y}}
    for d in range(drafts):
        for k in range(length):
            names.append(("draft", d, k))
            sees[names[-1]] = {y} | {("draft", d, j) for j in range(k + 1)}
    for level in range(N - 1):
        for i in range(W):
            if (level, i) != (0, 0):
                names.append(("window", level, i))
                line = {y} | {("window", 0, j) for j in range(1, i + 1)}
                sees[names[-1]] = line | {("window", other, i) for other in range(1, level + 1)}
    return names, sees


@pytest.mark.parametrize(
    "W, N, drafts, length", [(5, 4, 2, 3), (1, 2, 3, 1), (4, 2, 0, 1), (0, 4, 2, 3), (3, 3, 4, 1), (2, 5, 1, 4)]
)
def test_each_slot_is_a_text_of_its_own(W, N, drafts, length):
    """Guards mask and positions: a slot's logits are those of a separate plain pass over its own chain, float64."""
    shape = layout(W, N, drafts, length, CPU)
    names, sees = by_definition(W, N, drafts, length)
    assert len(names) == len(shape.mask) == 1 + drafts * length + max(0, (N - 1) * W - 1)
    for slot, name in enumerate(names):
        assert {names[i] for i in shape.mask[slot].nonzero().flatten().tolist()} == sees[name]
        offset = {"y": lambda: 0, "draft": lambda d, k: 1 + k, "window": lambda level, i: level + i}[name[0]](*name[1:])
        assert shape.offsets[slot] == offset
    for name, options in ALL_MODELS:
        model = make_model(name, options, block_size=24)
        prefix, new = torch.randint(31, (1, 7)), torch.randint(31, (1, len(names)))
        cache = model.make_cache(64)
        with torch.no_grad():
            model(prefix, cache=cache)
            mask = torch.cat((torch.ones(len(names), 7, dtype=torch.bool), shape.mask), dim=1)
            logits = model(new, cache=cache, positions=shape.offsets + 7, mask=mask)[0][0]
            for slot, seen in enumerate(shape.mask):
                alone = model(torch.cat((prefix, new[:, seen]), dim=1))[0][0, -1]
                assert (logits[slot] - alone).abs().max() < 1e-10


def test_the_cache_after_every_step_is_that_of_the_text():
    """Guards the commit: keys and values of all layers equal those of a plain pass over the same tokens."""
    moved = 0
    for seed in range(12):
        case = random_case(6000 + seed) | {"max_new_tokens": 30, "eos": None, "stop": ()}
        case["model"].double()
        run = Lookahead(case["model"], start(case), case["sampling"], case["setting"])
        while not run.sample.finished:
            moved += run.step() > 1
            context = run.sample.tokens[run.start : run.start + run.cache.length]
            fresh = run.model.make_cache()
            with torch.no_grad():
                run.model(torch.tensor([context]), cache=fresh)
            for one, other in zip(run.cache.layers, fresh.layers):
                for a, b in zip(one.kv, other.kv):
                    assert (a[:, :, : fresh.length] - b[:, :, : fresh.length]).abs().max() < 1e-10
    assert moved > 20


def test_pool():
    """Guards the pool: bounded, the latest first, and before them guesses for that very position."""
    pool = lookahead.Pool(2)
    for rest, position in (((1, 1), 5), ((2, 2), 6), ((1, 1), 7), ((3, 3), 8)):
        pool.add([4, 9], rest, position)
    assert pool.drafts([4, 9], 0, 2) == [(3, 3), (1, 1)] and pool.drafts([4, 9], 7, 2) == [(1, 1), (3, 3)]
    assert pool.drafts([5, 9], 0, 2) == pool.drafts([9], 0, 2) == pool.drafts([4, 9], 0, 0) == []
    pool.add([4, 9], (3, 4), 9)
    assert pool.drafts([4, 9], 0, 1) == [(3,)], "two drafts that begin alike are one when they are cut"


@pytest.mark.parametrize("match", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 3])
def test_drafts_continue_the_last_tokens_of_the_text(window, match, monkeypatch):
    """Guards what a draft is kept behind (no text can show it): the M tokens up to its position, in the text or in a line of guesses."""
    noted = []
    add = lookahead.Pool.add

    def noting(pool, before, rest, position):
        noted.append((list(before), rest, position))
        add(pool, before, rest, position)

    monkeypatch.setattr(lookahead.Pool, "add", noting)
    more = {"setting": Setting(window, 3, 2, match), "eos": None, "stop": (), "max_new_tokens": 9, "prompt": [1, 2, 1, 2]}
    found = set()
    for seed in range(6):
        case = random_case(9000 + seed) | more
        run = Lookahead(case["model"], start(case), Sampling(0.8, seed=seed), case["setting"])
        while not run.sample.finished:
            p, levels = len(run.sample.tokens) - 1, [list(level) for level in run.window]
            noted.clear()
            run.step()
            for before, rest, at in noted:
                guessed = at + 2 > p  # the text has no such trigram yet
                if guessed and not levels:  # random ones of a first step
                    continue
                line = run.sample.tokens[: p + 1] + (levels[0][1:] if guessed else [])
                assert before == line[max(0, at + 1 - match) : at + 1]
                assert rest[:-1] == ((levels[1][at - p],) if guessed else tuple(line[at + 1 : at + 2]))
                found.add(guessed)
    assert found == ({False, True} if window else {False})


def test_a_step_with_nothing_to_check_is_a_plain_step():
    """Guards speed: where nothing is drafted, neither mask nor positions are made, and the products are those of one row."""
    case = random_case(5) | {"setting": Setting(0, 3, 2, 16), "eos": None, "stop": (), "max_new_tokens": 9, "prompt": [1, 2]}
    run, given = Lookahead(case["model"], start(case), case["sampling"], case["setting"]), []
    forward = run.forward
    run.forward = lambda idx, cache, *more: given.append((idx.shape, more)) or forward(idx, cache, *more)
    while not run.sample.finished:
        run.step()
    assert given[1:] == 8 * [((1, 1), ())]


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_guesses_keep_their_positions(temperature):
    """
    Guards the window and the pool (no text can show them): levels move down by one, and where there is noise by a column for each
    token of a draft accepted; an n-gram of column i is a guess for position p + i.
    """
    accepted = 0
    for seed in range(6):
        more = {"setting": Setting(6, 3, 3), "eos": None, "stop": (), "max_new_tokens": 8, "prompt": [1, 2]}
        case = random_case(9000 + seed) | more
        run = Lookahead(case["model"], start(case), Sampling(temperature, seed=seed), case["setting"])
        while not run.sample.finished:
            before, first, p = run.window, run.start, len(run.sample.tokens) - 1
            emitted = run.step()
            width = min(6, first + run.block_size - 1 - p)  # columns for which there is room
            if before and run.start == first and width > 0:
                assert max(at for grams in run.pool.grams.values() for at in grams.values()) == p + width - 1
            drop = emitted - 1 if temperature > 0 else 0
            if before and run.start == first and len(run.sample.tokens) < 10:
                assert run.window[0][: 6 - drop] == before[1][drop:]
                accepted += drop
    assert accepted > 0 or temperature == 0


def test_noise_behind_the_text_is_forgotten():
    """Guards memory: with 50,257 tokens a row of noise is 0.4 MB, and each position needs one."""
    case = random_case(1) | {"max_new_tokens": 60, "eos": None, "stop": (), "setting": Setting(4, 4, 4)}
    run = Lookahead(case["model"], start(case), Sampling(1.0), case["setting"])
    while not run.sample.finished:
        run.step()
        assert len(run.noise._drawn) <= 4 + 4  # positions p+1 .. p+N+W-1


# ----------------------------------------------------------------------------------------------------------------------
# would a mistake be seen?


def drafts_see_the_window(mask, drafts, length):
    mask[1 : 1 + drafts * length, 1 + drafts * length :] = True


def drafts_see_their_neighbours(mask, drafts, length):
    mask[1 : 1 + drafts * length, 1 : 1 + drafts * length] = True


def drafts_do_not_see_the_last_token(mask, drafts, length):
    mask[1 : 1 + drafts * length, 0] = False


def nothing_is_moved(self, length, start, count):
    self.length = length + count


def the_next_slot_is_kept(self, length, start, count):
    keep(self, length, min(start + 1, self.length - count), count)


keep = Cache.keep


def texts_differ() -> bool:
    for seed in range(40):
        case = random_case(7000 + seed) | {"setting": Setting(4, 4, 4), "max_new_tokens": 30, "eos": None, "stop": ()}
        if ahead(case)[0] != plain(case):
            return True
    return False


@pytest.mark.parametrize("mutate", [drafts_see_the_window, drafts_see_their_neighbours, drafts_do_not_see_the_last_token])
def test_a_wrong_mask_is_noticed(mutate, monkeypatch):
    """Guards the tests above: with such a mask their texts differ."""

    def wrong(window, ngram, drafts, length, device):
        right = layout(window, ngram, drafts, length, device)
        mask = right.mask.clone()
        mutate(mask, drafts, length)
        return right._replace(mask=mask)

    monkeypatch.setattr(lookahead, "layout", wrong)
    assert texts_differ()


@pytest.mark.parametrize("wrong", [nothing_is_moved, the_next_slot_is_kept])
def test_a_wrong_commit_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr(Cache, "keep", wrong)
    assert texts_differ()


def test_without_a_mistake_nothing_differs():
    assert not texts_differ()


# ----------------------------------------------------------------------------------------------------------------------
# low precision


def test_bfloat16_differs_only_at_near_ties(capsys, monkeypatch):
    """Guards the claim for half precision: where texts differ, the two tokens scored alike within the rounding of logits."""
    seen: list[tuple[int, torch.Tensor]] = []  # position and logits of every pick
    pick, rows, rows_at = generate.pick, generate.Noise.rows, generate.Noise.rows_at

    def recording_pick(logits, noise, sampling):
        seen.extend(zip(positions, logits.double()))
        return pick(logits, noise, sampling)

    positions = []
    monkeypatch.setattr(generate, "pick", recording_pick)
    monkeypatch.setattr(
        generate.Noise, "rows", lambda self, i, p: (positions.__setitem__(slice(None), [p]), rows(self, i, p))[1]
    )
    monkeypatch.setattr(
        generate.Noise, "rows_at", lambda self, i, p: (positions.__setitem__(slice(None), p), rows_at(self, i, p))[1]
    )
    texts, diverged = 40, 0
    for seed in range(texts):
        case = random_case(8000 + seed) | {"max_new_tokens": 40, "eos": None, "stop": (), "setting": Setting(3, 3, 3)}
        case["sampling"] = Sampling(case["sampling"].temperature, seed=seed)
        case["model"].float()
        with torch.autocast("cpu", torch.bfloat16):
            seen.clear()
            one, by_plain = plain(case)[0], dict(seen)
            seen.clear()
            other = ahead(case)[0][0]
        if one == other:
            continue
        diverged += 1
        at = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
        position, t = len(case["prompt"]) + at, case["sampling"].temperature
        noise = generate.gumbel_noise(seed, 0, position, case["model"].config.vocab_size)
        rounding = min(
            (logits - by_plain[position]).abs().max()
            for p, logits in seen
            if p == position and (logits + t * noise).argmax() == other[at]
        )
        score = by_plain[position] + t * noise
        gap = score[one[at]] - score[other[at]]
        assert gap < 10 * rounding, f"{seed=} {gap=} {rounding=}"
    with capsys.disabled():
        print(f" [bfloat16: {diverged} of {texts} texts of 40 tokens differ, each from a near-tie on]", end="")


# ----------------------------------------------------------------------------------------------------------------------
# why common noise


def test_coupling_formula():
    """Guards the analysis: the formula against 20,000 draws by our own noise and pick, and between its bounds."""
    generator = torch.Generator().manual_seed(0)
    for K in (2, 5, 12):
        a, b = (2 * torch.randn(K, generator=generator, dtype=torch.float64) for _ in range(2))
        b = 0.5 * a + 0.5 * b
        p, q = a.softmax(0), b.softmax(0)
        common, independent = lookahead.coupling(p, q)
        noise = torch.stack([generate.gumbel_noise(seed, 0, 1, K) for seed in range(20_000)])
        other = torch.stack([generate.gumbel_noise(seed, 1, 1, K) for seed in range(20_000)])
        i, j, k = (generate.pick(x.expand(20_000, -1), g, Sampling(1.0)) for x, g in ((a, noise), (b, noise), (b, other)))
        assert abs((i == j).double().mean() - common) < 0.015  # 4 standard deviations
        assert abs((i == k).double().mean() - independent) < 0.015
        distance = (p - q).abs().sum().item() / 2
        assert (1 - distance) / (1 + distance) <= common <= 1 - distance
        assert lookahead.coupling(p, p)[0] == pytest.approx(1)
    assert lookahead.coupling(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == (0.0, 0.0)
    p, q = torch.rand(700, generator=generator), torch.rand(700, generator=generator)  # more than one piece
    p[:300], q[500:] = 0, 0
    p, q = p.double() / p.double().sum(), q.double() / q.double().sum()
    slow = sum(1 / sum(max(p[j] / p[k], q[j] / q[k]) for j in range(0, 700)) for k in range(300, 302))
    fast = 1 / torch.maximum(p / p[300:302, None], q / q[300:302, None]).sum(1)
    assert fast.sum() == pytest.approx(slow.item()) and lookahead.coupling(p, q)[0] > slow


# ----------------------------------------------------------------------------------------------------------------------
# shapes that never change


def test_static_cache_equals_the_growing_one():
    """Guards the static cache: the same logits, in one go, in pieces and behind each other, float64."""
    for name, options in ALL_MODELS:
        model = make_model(name, options)
        x = torch.randint(31, (2, 12))
        for chunks in ([5, 1, 1, 2, 3], [1] * 12):
            cache = model.make_cache(static=True)
            with torch.no_grad():
                parts = [model(piece, cache=cache)[0] for piece in x.split(chunks, dim=1)]
                assert (torch.cat(parts, dim=1) - model(x)[0]).abs().max() < 1e-10
            assert cache.length == 12


@pytest.mark.parametrize("name, options", [ALL_MODELS[3], ("decoder_only", {"pos_sub": "plain"})])
def test_compiled_step(name, options):
    """Guards torch.compile: one graph without breaks serves all steps, and the text is the same beyond the context."""
    torch._dynamo.reset()
    model = make_model(name, options)
    one, other = Continuation([1, 2, 3], 30), Continuation([1, 2, 3], 30)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in generate.sample_together(model, [one], Sampling(0.8), compile="aot_eager"):
            pass
    for _ in generate.sample_together(model, [other], Sampling(0.8)):
        pass
    assert one.output == other.output


# ----------------------------------------------------------------------------------------------------------------------
# the front door


def write_run(folder: Path, name: str = "encoder_decoder", **options) -> Path:
    """A run directory of an untrained byte model."""
    model = make_model(name, options, dtype=torch.float32, **({"vocab_size": 256, "block_size": 48} | options))
    folder.mkdir(parents=True)
    settings = {"train": {"model": name}, "model": configurator.to_dict(model.config)}
    checkpoint.write_json(folder / "config.json", settings)
    tokenizer.save(tokenizer.ByteTokenizer(), folder)
    checkpoint.save(folder / "last", model, None, {"step": 1})
    return folder


def test_sample_script_with_lookahead(tmp_path, capsys, monkeypatch):
    """Guards sample.py: the same text with each setting, --check says so, and it exits 1 where lookahead is made wrong."""
    run = str(write_run(tmp_path / "run"))
    common = [run, "--device=cpu", "--prompt=ab", "--max_new_tokens=60", "--temperature=0.3", "--top_k=4"]
    texts = sample.main(common)
    for word in ("4,3,4", "1,2,1", "0,4,4", "auto"):
        capsys.readouterr()
        assert sample.main([*common, f"--lookahead={word}", "--check", "--json"]) == texts
        shown = capsys.readouterr()
        report = json.loads(shown.out.splitlines()[-1])
        assert report["same"] is True and "gives the same text" in shown.err
        assert report["tokens_per_step"] == pytest.approx(60 / report["steps"]) and "tokens/step" in shown.err
    assert sample.main([*common, "--cache=false", "--check"]) == texts
    assert sample.main([*common, "--lookahead=4,3,4", "--stream"]) == texts
    capsys.readouterr()
    assert sample.main([*common, "--lookahead=0,4,4", "--prompt_lookup=false", "--json"]) == texts
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["drafted"], report["steps"]) == (0, 60), "without window and lookup nothing is guessed"
    monkeypatch.setattr(lookahead, "agreement", lambda first, draft, picks: [first, *draft])
    with pytest.raises(SystemExit) as stopped:
        sample.main([*common, "--lookahead=4,3,4", "--check"])
    assert stopped.value.code == 1 and re.search(r"ANOTHER text, sample 0 from its token \d+ on, at", capsys.readouterr().err)
    runs = [[Continuation([1], 9) for _ in range(2)] for _ in range(3)]
    for number, outputs in enumerate(([[4, 5, 6], [7, 8]], [[4, 5, 6], [7, 9]], [[4, 5], [7, 8]])):
        for one, output in zip(runs[number], outputs):
            one.accept(output)
    assert sample.first_difference(runs[0], runs[1]) == (1, 1) and sample.first_difference(runs[2], runs[0]) == (0, 2)


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--lookahead=4,3"], "integers W,N,G such as"),
        (["--lookahead=4,3,4,1,1"], "integers W,N,G such as"),
        (["--lookahead=a,b,c"], "integers W,N,G such as"),
        (["--lookahead=4,1,4"], "N=1 is out of range"),
        (["--lookahead=-1,3,4"], "W=-1 is out of range"),
        (["--lookahead=4,3,65"], "G=65 is out of range"),
        (["--lookahead=4,3,4,0"], "M=0 is out of range"),
        (["--lookahead=4,3,4", "--num_samples=2"], "one text at a time"),
        (["--lookahead=4,3,4", "--cache=false"], "cache=true"),
        (["--lookahead=auto", "--compile"], "compile=false"),
    ],
)
def test_bad_lookahead(bad, message):
    with pytest.raises(ValueError, match=message):
        sample.main(["out/none", *bad])


def test_no_collection_goes_through_what_is_loaded(tmp_path, monkeypatch):
    """Guards lookahead=auto: the pause of Python's collector, as long as the trial of a setting, made one look ten times as slow."""
    run, frozen = str(write_run(tmp_path / "run")), []
    step = Lookahead.step
    monkeypatch.setattr(Lookahead, "step", lambda self: (frozen.append(gc.get_freeze_count()), step(self))[1])
    sample.main([run, "--device=cpu", "--prompt=ab", "--max_new_tokens=8", "--lookahead=auto"])
    assert min(frozen) > 10_000 and gc.get_freeze_count() == 0, "all that is loaded, while it samples; and nothing afterwards"


def test_the_choice_is_said_behind_the_text(tmp_path, capfd):
    """Guards a line about lookahead=auto in the middle of a text that is streamed."""
    run = str(write_run(tmp_path / "run"))
    [text] = sample.main([run, "--device=cpu", "--prompt=ab", "--max_new_tokens=90", "--lookahead=auto", "--stream"])
    said = capfd.readouterr()
    assert text in said.out and said.err.count("lookahead=auto: ") == 1
    with open(tmp_path / "both", "w") as both, contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        sample.main([run, "--device=cpu", "--prompt=ab", "--max_new_tokens=90", "--lookahead=auto", "--stream"])
    assert text in (tmp_path / "both").read_text().partition("lookahead=auto: ")[0]


def test_auto_prefers_what_is_faster(monkeypatch):
    """Guards the choice: a clock that runs faster for lookahead makes it plain decoding, and the other way round."""
    case = random_case(2) | {"max_new_tokens": 900, "eos": None, "stop": ()}
    for slow_plain in (True, False):
        run, clock = Lookahead(case["model"], start(case), case["sampling"], None), [0.0]
        step = run.step

        def timed_step(run=run, step=step, clock=clock, slow_plain=slow_plain):
            clock[0] += 100.0 if (run.setting is None) == slow_plain else 1.0
            return step()

        run.step = timed_step
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: clock[0])
        list(lookahead.tune(run))
        assert (run.setting is None) != slow_plain


def test_auto_does_not_count_a_moved_context(monkeypatch):
    """Guards the choice of lookahead=auto: whichever setting is on trial when half the context is read again would look slow."""
    others = 0
    for number in (0, 11, 23, 32):
        case = random_case(number, models=PLAIN_MODELS) | {"max_new_tokens": 400, "eos": None, "stop": (), "setting": None}
        run, read, steps = Lookahead(case["model"], start(case), case["sampling"], None), [0], []

        def reading(idx, *rest, forward=run.forward, read=read):  # a clock of 16 ticks a pass, and one a token
            read[0] += 16 + idx.size(1)
            return forward(idx, *rest)

        def watched(run=run, step=run.step, read=read, steps=steps):
            began, context = read[0], run.start
            steps.append((step(), read[0] - began, run.start != context))

        run.forward, run.step = reading, watched
        monkeypatch.setattr(lookahead, "time", types.SimpleNamespace(perf_counter=lambda read=read: read[0]))
        list(lookahead.tune(run, steps=9))
        fastest = []
        for moves in (False, True):
            speeds = {}
            for i, setting in enumerate((None, *lookahead.AUTO)):
                timed = [(made, ticks) for made, ticks, moved in steps[9 * i + 3 : 9 * i + 9] if moves or not moved]
                speeds[setting] = sum(made for made, _ in timed) / sum(ticks for _, ticks in timed)
            fastest.append(max(speeds, key=speeds.get))
        assert run.setting == fastest[0]
        others += fastest[0] != fastest[1]
    assert others > 0, "no moved context decides: this test would see nothing"


def test_auto_chooses_the_fastest(monkeypatch):
    """Guards the choice of lookahead=auto: by tokens a second of the later steps, measured with a clock that ticks once a step."""
    case = random_case(3, models=PLAIN_MODELS) | {"max_new_tokens": 400, "eos": None, "stop": (), "setting": None}
    run = Lookahead(case["model"], start(case), case["sampling"], None)
    monkeypatch.setattr(lookahead, "time", types.SimpleNamespace(perf_counter=lambda: run.steps))
    lengths, said = [len(run.sample.tokens)], []
    for line in lookahead.tune(run, steps=9):
        lengths.append(len(run.sample.tokens))
        said += [line] if line else []
    tried = (None, *lookahead.AUTO)  # nine steps each, of which the first three do not count
    speeds = {setting: (lengths[9 * i + 9] - lengths[9 * i + 3]) / 6 for i, setting in enumerate(tried)}
    assert speeds[None] == 1 and max(speeds.values()) > 1.5 and run.setting == max(speeds, key=speeds.get)
    assert ", ".join(f"{setting or 'plain'} {speed:.0f}" for setting, speed in speeds.items()) in said[0]
