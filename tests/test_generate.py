"""The cache against no cache, and the sampling loops: one text whatever the path."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate
import tokenizer
from conftest import ALL_MODELS, ALL_MODELS_IDS, make_model
from generate import Continuation, Sampling
from lookahead import Lookahead

# ----------------------------------------------------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("name, options", ALL_MODELS, ids=ALL_MODELS_IDS)
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 5], [1, 4, 7], [11, 1]])
def test_cached_equals_uncached(name, options, chunks):
    """Guards the cache: one-shot, step-by-step and chunked prefill give the logits of one full forward pass."""
    model = make_model(name, options)
    x = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(3))
    cache, parts = model.make_cache(), []
    with torch.no_grad():
        for piece in x.split(chunks, dim=1):
            parts.append(model(piece, cache=cache)[0])
        assert (torch.cat(parts, dim=1) - model(x)[0]).abs().max() < 1e-10
    assert cache.length == 12


@pytest.mark.parametrize("name, options", ALL_MODELS, ids=ALL_MODELS_IDS)
def test_truncated_cache_forgets(name, options):
    """Guards truncate(): after it, the cache must hold nothing of the tokens cut off, in any of its layers."""
    model = make_model(name, options)
    x, other = (torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(s)) for s in (4, 5))
    with torch.no_grad():
        cache = model.make_cache()
        model(x, cache=cache)
        cache.truncate(4)
        y = torch.cat((x[:, :4], other[:, 4:]), dim=1)
        tail = torch.cat((model(y[:, 4:9], cache=cache)[0], model(y[:, 9:], cache=cache)[0]), dim=1)
        assert (tail - model(y)[0][:, 4:]).abs().max() < 1e-10
    with pytest.raises(AssertionError, match="cannot truncate"):
        cache.truncate(13)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_explicit_mask_and_positions(name):
    """Guards the interface of lookahead decoding: two branches behind one cache, each blind to the other, equal two plain runs."""
    model = make_model(name, {"pos_sub": "plain"})
    prefix, a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]]), torch.tensor([[6, 7]])
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[:, :3] = True
    mask[0, 3] = mask[1, 3] = mask[1, 4] = mask[2, 5] = mask[3, 5] = mask[3, 6] = True
    with torch.no_grad():
        cache = model.make_cache()
        model(prefix, cache=cache)
        both = model(torch.cat((a, b), 1), cache=cache, positions=torch.tensor([3, 4, 3, 4]), mask=mask)[0]
        for branch, part in ((a, both[:, :2]), (b, both[:, 2:])):
            assert (model(torch.cat((prefix, branch), 1))[0][:, 3:] - part).abs().max() < 1e-10


# ----------------------------------------------------------------------------------------------------------------------
# choosing a token


def slow_filter(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> set[int]:
    """Token ids that survive, by definition: rank by value, then index; cut at k; then cut where the mass reaches top_p."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    weights = np.exp((logits[ranked] - logits[ranked[0]]) / temperature)
    kept, mass = [], 0.0
    for i, w in zip(ranked, weights / weights.sum()):
        if top_p == 1 or mass < top_p:
            kept.append(i)
        mass += w
    return set(kept)


@pytest.mark.parametrize("top_k", [None, 1, 3, 10, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.31, 1e-6])
def test_filter_equals_its_definition(top_k, top_p):
    """Guards top-k and top-p, ties included (rounded logits tie often): a masked id can never be picked."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        temperature = float(rng.uniform(0.2, 2))
        logits = np.round(rng.normal(size=(2, 24)) * 2, int(rng.integers(0, 3)))
        sampling = Sampling(temperature, top_k, top_p)
        filtered = generate.filter_logits(torch.from_numpy(logits), sampling)
        for row in range(2):
            kept = set(torch.isfinite(filtered[row]).nonzero().flatten().tolist())
            assert kept == slow_filter(logits[row], temperature, top_k, top_p)
            assert all(filtered[row, i] == logits[row, i] for i in kept)
        noise = torch.stack([generate.gumbel_noise(1, i, 7, 24) for i in range(2)])
        for row, token in enumerate(generate.pick(torch.from_numpy(logits), noise, sampling).tolist()):
            assert torch.isfinite(filtered[row, token])


def test_top_p_that_is_met_exactly_needs_no_more():
    """Guards the edge of top-p: of four equal tokens two have half of the probability, and a third one is too many."""
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)):
        filtered = generate.filter_logits(torch.zeros(1, 4, dtype=torch.float64), Sampling(1.0, None, top_p))
        assert torch.isfinite(filtered[0]).tolist() == [i < kept for i in range(4)]


def test_gumbel_max_draws_from_the_softmax():
    """Guards the coupling: temperature scales the noise, not the logits after it; chi-square over 20,000 seeds."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 4)):
        sampling = Sampling(temperature, top_k)
        expected = torch.softmax(generate.filter_logits(logits.double(), sampling) / temperature, -1)[0]
        noise = torch.stack([generate.gumbel_noise(seed, 0, 3, 6) for seed in range(20_000)])
        counts = torch.bincount(generate.pick(logits.expand(20_000, -1), noise, sampling), minlength=6).double()
        assert (counts[expected == 0] == 0).all()
        e = 20_000 * expected[expected > 0]
        chi2 = ((counts[expected > 0] - e) ** 2 / e).sum().item()
        assert chi2 < 22, f"chi-square {chi2:.1f} with {len(e) - 1} degrees of freedom"  # p < 0.001 beyond 20.5


def test_noise_is_a_function_of_its_key():
    """Guards independence: another seed, sample or position is another stream; the same key is the same one, to the bit."""
    base = generate.gumbel_noise(7, 1, 5, 1000)
    assert torch.equal(base, generate.gumbel_noise(7, 1, 5, 1000))
    for key in ((8, 1, 5), (7, 2, 5), (7, 1, 6), (7 + 2**32, 1, 5), (7, 5, 1)):
        other = generate.gumbel_noise(*key, 1000)
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.15
    assert torch.isfinite(base).all() and abs(base.mean() - 0.5772) < 0.15  # Euler's constant


def test_noise_is_finite_where_the_uniform_number_is_zero(monkeypatch):
    """Guards -log(-log(u)) at the ends of [0, 1): infinite noise would take a token whatever its logit, or be NaN if it is filtered."""
    ends = SimpleNamespace(random=lambda size: np.array([0.0, 1 - 2.0**-53]))
    monkeypatch.setattr(np.random, "Generator", lambda _: ends)
    noise = generate.gumbel_noise(0, 0, 0, 2)
    assert torch.isfinite(noise).all() and abs(noise[0]) > 3 and abs(noise[1]) > 3 and noise[0] * noise[1] < 0


def test_tokens_are_chosen_in_float64():
    """Guards the border of top-p: in bfloat16, the type of the logits, the sum of probabilities would lie on its other side."""
    logits = torch.randn(400, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling, noise = Sampling(1.0, None, 0.7), torch.stack([generate.gumbel_noise(3, i, 0, 30) for i in range(400)])
    exact = generate.filter_logits(logits.double(), sampling)
    chosen = generate.pick(logits, noise, sampling)
    assert torch.equal(chosen, (exact + noise).argmax(-1))
    assert not torch.equal(chosen, (generate.filter_logits(logits, sampling) + noise).argmax(-1)), "nothing was at a border"


def test_low_temperature_is_greedy():
    """Guards the limit: temperature 1e-4 and 0 agree, and the lowest id wins among equals."""
    logits = torch.randn(50, 40)
    noise = torch.stack([generate.gumbel_noise(0, i, 0, 40) for i in range(50)])
    assert torch.equal(generate.pick(logits, noise, Sampling(1e-4)), logits.argmax(-1))
    assert torch.equal(generate.pick(logits, None, Sampling(0.0)), logits.argmax(-1))
    tied = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert generate.pick(tied, None, Sampling(0.0)).item() == 1


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": value} for value in (-1.0, float("nan"), 1e7)), {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}, {"top_k": 2.5},
        {"seed": -1}, {"seed": 1.5},
    ],
)  # fmt: skip
def test_bad_sampling_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


# ----------------------------------------------------------------------------------------------------------------------
# loops


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, seed=5), Sampling(0.7, top_k=8, top_p=0.9)])
def test_cached_text_equals_uncached_text_beyond_the_context(name, sampling):
    """Guards the loop where the context is full and moves: 40 tokens from a model of 12 positions."""
    for options in ({"pos_sub": "plain"}, {"position": "rope"}):
        model = make_model(name, options)
        prompts = [[1, 2, 3]] * 3
        cached = generate.generate(model, prompts, 40, sampling)
        assert cached == generate.generate(model, prompts, 40, sampling, use_cache=False)
        assert all(len(output) == 40 for output in cached)
        # step by step from the definition: the context is tokens[context_start(n):n]
        tokens = [1, 2, 3]
        for n in range(3, 43):
            context = torch.tensor([tokens[generate.context_start(n, 12) :]])
            noise = generate.gumbel_noise(sampling.seed, 0, n, 31)[None] if sampling.temperature else None
            tokens.append(generate.pick(model(context)[0][:, -1], noise, sampling).item())
        assert tokens[3:] == cached[0]


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_layout_for_decoding_changes_no_value(name):
    """Guards the column-wise weights of sample.py: the same numbers in the same places, tied weights still tied."""
    model = make_model(name, {"pos_sub": "plain"})
    x = torch.randint(31, (2, 12))
    before, state = model(x)[0], {key: value.clone() for key, value in model.state_dict().items()}
    count = sum(1 for _ in model.parameters())
    torch.set_float32_matmul_precision("high")  # as runtime.start has it for training on a GPU
    generate.prepare_for_decoding(model)
    assert torch.get_float32_matmul_precision() == "highest", "a text would depend on how many tokens are computed together"
    assert not torch.backends.cudnn.allow_tf32
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert (model(x)[0] - before).abs().max() < 1e-12 and sum(1 for _ in model.parameters()) == count


def test_context_never_overflows_and_never_empties():
    for block_size in (1, 2, 3, 12):
        for n in range(1, 60):
            assert 1 <= n - generate.context_start(n, block_size) <= block_size
            if n > block_size:
                assert n - generate.context_start(n, block_size) >= max(1, block_size // 2)
        assert block_size + 1 - generate.context_start(block_size + 1, block_size) == max(1, block_size // 2)


def test_sample_number_i_does_not_depend_on_the_batch():
    """Guards reproducibility: asking for more samples must not change the first ones."""
    model = make_model("encoder_decoder", {})
    many = generate.generate(model, [[5, 6]] * 4, 9, Sampling(1.0, seed=3))
    assert many[:2] == generate.generate(model, [[5, 6]] * 2, 9, Sampling(1.0, seed=3))
    assert len({tuple(output) for output in many}) == 4
    alone = [Continuation([5, 6], 9)]
    for _ in generate.sample_together(model, alone, Sampling(1.0, seed=3), first_sample=2):
        pass
    assert alone[0].output == many[2]
    assert not model.training and generate.generate(model.train(), [[5, 6]], 9, Sampling(1.0, seed=3)) == many[:1]
    assert model.training, "it is left as it was"


def test_end_of_document_ends_one_row_only():
    """Guards batches: a row that meets EOS stops there, without it; the others go on as if nothing had happened."""
    model = make_model("decoder_only", {})
    free = generate.generate(model, [[5, 6]] * 6, 10, Sampling(1.0, seed=1))
    eos = free[0][4]
    for with_eos, without in zip(generate.generate(model, [[5, 6]] * 6, 10, Sampling(1.0, seed=1), eos=eos), free):
        assert with_eos == (without[: without.index(eos)] if eos in without else without)


def test_bad_prompts():
    """Guards what nothing can be made of, and a model in training against being left in evaluation mode by it."""
    model = make_model("decoder_only", {}).train()
    with pytest.raises(ValueError, match="max_new_tokens=-1"):  # no text has a negative length to end at
        generate.generate(model, [[1]], -1)
    for prompt, message in (([], "empty"), ([1] * 13, "13 tokens, but the model has room for 12"), ([99], "vocabulary of 31")):
        with pytest.raises(ValueError, match=message):
            generate.generate(model, [prompt], 3)
    for prompts in ("def ", [1, 2], [torch.tensor([1, 2])]):
        with pytest.raises(ValueError, match="prompts are a list of lists of token ids"):
            generate.generate(model, prompts, 3)
    with pytest.raises(ValueError, match="token ids .* whole numbers"):
        generate.generate(model, [[1.0]], 3)
    with pytest.raises(ValueError, match="BlockSampling is for models that write blocks"):
        generate.generate(model, [[1]], 3, generate.BlockSampling((Sampling(),)))
    assert model.training
    with pytest.raises(ValueError, match="training mode"):  # dropout would give another text each time
        next(generate.sample_together(model, [Continuation([1], 3)], Sampling()))
    with pytest.raises(ValueError, match="training mode"):
        Lookahead(model, Continuation([1], 3), Sampling(), None)


# ----------------------------------------------------------------------------------------------------------------------
# where a text ends


def run_continuation(pieces: list[bytes], stop: tuple[str, ...], limit: int = 1000) -> tuple[Continuation, str]:
    """Feed tokens of the byte tokenizer in groups; returns the sample and what it streamed."""
    streamed: list[str] = []
    sample = Continuation([1], limit, tokenizer.ByteTokenizer(), eos=0, stop=stop, write=streamed.append)
    for piece in pieces:
        if sample.finished:
            break
        sample.accept(list(piece))
    return sample, "".join(streamed)


def test_stop_strings_and_streaming():
    """Guards the accept routine: a stop string may straddle groups of tokens and overlap itself; streamed text == final text."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = bytes(rng.choice(list(b"ab"), size=30).tolist())
        stop = tuple("".join(rng.choice(list("ab"), size=rng.integers(2, 7))) for _ in range(rng.integers(0, 3)))
        cuts = sorted(rng.integers(0, 31, size=4))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 30])]
        sample, streamed = run_continuation([p for p in pieces if p], stop, limit=30)
        # the definition: the first token that completes a stop string ends the text, which is cut before that string
        ends = [(text.find(s.encode()) + len(s), text.find(s.encode())) for s in stop if s.encode() in text]
        first = min((end for end, _ in ends), default=None)
        expected = text if first is None else text[: min(begin for end, begin in ends if end == first)]
        assert sample.text == streamed == expected.decode()
        assert sample.reason == ("length" if first is None else "stop")


def test_streaming_inside_a_character():
    """Guards UTF-8: a character of several byte tokens is written once it is whole, never as replacement characters."""
    sample, streamed = run_continuation([bytes([b]) for b in "naïve €5 😀!".encode()], (), limit=100)
    assert streamed == "naïve €5 😀!"
    assert sample.accept([0]) == 1 and sample.reason == "eos" and sample.text == "naïve €5 😀!"
    sample, streamed = run_continuation([b"5 \xe2\x82"], (), limit=4)  # what the text ends in is not kept back
    assert sample.text == streamed == "5 \ufffd" and sample.reason == "length"
    assert Continuation([1], 0).finished
    for more in ({"stop": ("a",)}, {"write": print}):
        with pytest.raises(ValueError, match="need the tokenizer"):
            Continuation([1], 5, **more)


def test_eos_inside_an_accepted_group():
    """Guards lookahead's commit: tokens after EOS in the same group are not emitted, and the count says how many were used."""
    sample, streamed = run_continuation([], ())
    assert sample.accept(list(b"ab\0cd")) == 3
    assert sample.text == "ab" and sample.output == list(b"ab") and sample.finished and sample.reason == "eos"
