"""A few tokens at a time on packed weights, against the models' own cached forward pass."""

import types

import pytest
import torch

import stepper
from conftest import ALL_MODELS, make_model

STEPPED = [(name, options) for name, options in ALL_MODELS if "window" not in options]


def paths(model, tokens: torch.Tensor, n_prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T - n_prompt, V) of all tokens behind the prompt: by the stepper, and by the model."""
    ours, theirs = model.make_cache(), model.make_cache()
    with torch.inference_mode():
        step = stepper.Stepper(model)
        for cache in (ours, theirs):
            model(tokens[None, :n_prompt], cache=cache)
        stepped = torch.cat([step([token], ours) for token in tokens[n_prompt:].tolist()])
        plain = torch.cat([model(token.view(1, 1), cache=theirs)[0][0] for token in tokens[n_prompt:]])
    assert ours.length == theirs.length == len(tokens)
    for one, other in zip(ours.layers, theirs.layers):  # what it leaves behind must serve the general path as well
        error = (one.kv.double() - other.kv.double()).norm() / one.kv.norm()
        assert error < (1e-10 if plain.dtype == torch.float64 else 0.03)
    return stepped, plain


@pytest.mark.parametrize("name, options", STEPPED, ids=[str(options) for _, options in STEPPED])
def test_steps_equal_the_models_own(name, options):
    """Guards every option: a norm, bias, rotation or order that the packed weights forget, or another slot of the cache."""
    model, onednn = make_model(name, options), torch._C._get_mkldnn_enabled()
    tokens = torch.randint(model.config.vocab_size, (model.config.block_size,))
    for n_prompt in (1, 5):
        stepped, plain = paths(model, tokens, n_prompt)
        assert (stepped - plain).abs().max() < 1e-10 * plain.abs().max()
    assert torch._C._get_mkldnn_enabled() == onednn, "everything else would be computed without it from now on"


@pytest.mark.parametrize("name, options", STEPPED, ids=[str(options) for _, options in STEPPED])
def test_rows_with_a_mask_equal_the_models_own(name, options):
    """Guards lookahead's step: rows at positions other than their slots that see some of the keys, and only some of them read."""
    model = make_model(name, options)
    tokens, held, n = torch.randint(model.config.vocab_size, (model.config.block_size,)), 3, 7
    positions = held + torch.tensor([0, 1, 2, 1, 2, 2, 3])
    mask = torch.rand(n, held + n) < 0.5
    mask |= torch.arange(held + n) == held + torch.arange(n)[:, None]  # itself at least
    read = torch.tensor([0, 2, 6])
    ours, theirs = model.make_cache(), model.make_cache()
    with torch.inference_mode():
        for cache in (ours, theirs):
            model(tokens[None, :held], cache=cache)
        stepped = stepper.Stepper(model)(tokens[:n].tolist(), ours, positions, mask, read)
        plain = model(tokens[None, :n], cache=theirs, positions=positions, mask=mask)[0][0, read]
    assert (stepped - plain).abs().max() < 1e-10 * plain.abs().max()
    assert ours.length == theirs.length == held + n
    for one, other in zip(ours.layers, theirs.layers):
        assert (one.kv - other.kv).abs().max() < 1e-10 * one.kv.abs().max()


def test_bfloat16_weights():
    """Guards the half-precision products: as far from float32 as autocast's own logits, not further."""
    model = make_model("encoder_decoder", {}, dtype=torch.float32, n_embd=32, n_head=4, n_cross_head=8)
    tokens = torch.randint(model.config.vocab_size, (model.config.block_size,))
    exact = paths(model, tokens, 3)[1]
    with torch.autocast("cpu", torch.bfloat16):
        stepped, plain = paths(model, tokens, 3)
    assert 0 < (stepped - exact).norm() <= 1.5 * (plain - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_logits_are_not_rounded_to_half_precision(name):
    """Guards the choice of tokens: in bfloat16 the two largest logits are often equal, and then rounding would choose."""
    model = make_model(name, {}, dtype=torch.float32)
    tokens = torch.randint(model.config.vocab_size, (model.config.block_size,))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for logits in (*paths(model, tokens, 3), model(tokens[None])[0]):
            assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_int8_weights():
    """Guards the 8-bit products: close to float32, row by row scaled; and a text by them is nearly the text without."""
    model = make_model("encoder_decoder", {"bias": True}, dtype=torch.float32, n_embd=32, n_head=4, n_cross_head=8)
    tokens = torch.randint(model.config.vocab_size, (model.config.block_size,))
    with torch.inference_mode():
        for width in range(128, 162):  # at most of them the operator itself reads beyond the end
            weight, x = torch.randn(70, width) * torch.logspace(-3, 3, 70)[:, None], torch.randn(width)
            product = stepper.RoundedProduct(weight, None, torch.int8)(x[None])[0]
            assert ((product - weight @ x).abs() / (weight.norm(dim=1) * x.norm())).max() < 0.003
        caches = [model.make_cache() for _ in range(2)]
        steps = [stepper.Stepper(model), stepper.Stepper(model, int8=True)]
        for cache in caches:
            model(tokens[None, :3], cache=cache)
        exact, rounded = (torch.cat([step([i], cache) for i in tokens[3:].tolist()]) for step, cache in zip(steps, caches))
    assert 0 < (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_threads_change_speed_only(name, two_threads):
    """Guards texts against the machine's load: which number of threads is faster is measured, so no bit may depend on it."""
    model = make_model(name, {}, dtype=torch.float32, n_embd=96, vocab_size=500)
    tokens, made = torch.randint(500, (9,)).tolist(), []
    for threads in (1, 2):
        step, cache = stepper.Stepper(model), model.make_cache()
        step.pace.turns = [threads]
        made.append([step([token], cache) for token in tokens])
        made[-1].append(step([1, 2, 3], cache, torch.arange(9, 12), torch.ones(3, 12, dtype=torch.bool)))
        assert torch.get_num_threads() == 2, "everything else would be computed on one thread from now on"
    assert all(torch.equal(one, other) for one, other in zip(*made))


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_number_of_threads_is_kept(faster, two_threads, monkeypatch):
    """Guards the choice: both are tried equally often, an even number of steps, and slow ones not for long."""
    clock = [0.0]
    monkeypatch.setattr(stepper, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    for seconds, tried in ((0.001, 32), (0.02, 6)):  # the slower one takes twice that, so 0.04 s three times
        pace, used = stepper.Pace(), []
        for _ in range(40):
            with stepper.stepping(pace):
                used.append(torch.get_num_threads())
                clock[0] += seconds if used[-1] == faster else 2 * seconds
        assert used[:tried] == [1, 2] * (tried // 2) and used[tried:] == [faster] * (40 - tried)


def test_who_has_a_stepper():
    """Guards the general path for everything else."""
    assert stepper.can_step(make_model("encoder_decoder", {})) and stepper.can_step(make_model("decoder_only", {}))
    assert not stepper.can_step(make_model("decoder_only", {"window": 3})) and not stepper.can_step(torch.nn.Linear(2, 2))
    assert not stepper.can_step(make_model("encoder_decoder", {"latent_factor": 2, "latent_dim": 4, "codebook_size": 8}))
