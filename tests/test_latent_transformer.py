"""The latent transformer: what each part may see, one code path for training and sampling, and whole runs on pairs and on text."""

import json
import math
import shutil
import warnings
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import checkpoint
import evaluate
import generate
import generate_blocks
import sample
import tokenizer
import train
from data.pairs import prepare
from generate import BlockSampling, Continuation, Sampling
from latent.latent_transformer import LatentTransformer, LatentTransformerConfig
from validation import exact_pairs

TINY = dict(
    vocab_size=19, block_size=24, target_size=8, latent_factor=4, n_layer=2, n_decoder_layer=1, n_head=2, n_embd=12,
    latent_dim=6, codebook_size=7, startup_steps=0,
)  # fmt: skip
OPTIONS = [
    {"task": "text"},
    {"task": "text", "bottleneck": "rq", "codebook_levels": 3},
    {"task": "text", "target_size": 4, "bias": True},  # one latent, one code: no code follows another one
    {"task": "pairs", "block_size": 22, "target_size": 16},
    {"task": "pairs", "block_size": 22, "target_size": 16, "bottleneck": "dvq", "codebook_levels": 2},
    {"task": "pairs", "block_size": 22, "target_size": 16, "bottleneck": "semhash", "codebook_size": 8},
    {"task": "pairs", "block_size": 22, "target_size": 16, "bottleneck": "gumbel", "latent_factor": 2},
    {"task": "text", "target_size": 4, "latent_factor": 1},  # nothing is made shorter or longer
]


def make_model(seed: int = 0, **options) -> LatentTransformer:
    """Tiny, in float64, with weights of order one: at initialisation attention is almost uniform and would hide a wrong mask."""
    torch.manual_seed(seed)
    model = LatentTransformer(LatentTransformerConfig(**(TINY | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for quantizer in getattr(model.bottleneck, "quantizers", ()):
        quantizer.codebook.initialized.fill_(True)
    return model.double().eval()


def rows(model: LatentTransformer, lengths=((5, 13), (2, 4), (6, 16)), seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Text, or pairs whose sides have these lengths (x with SEP, y with its end), as (idx, targets)."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (len(lengths), config.block_size + 1), generator=generator)
    idx, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    if config.task == "pairs":
        for row, (x, y) in enumerate(lengths):
            targets[row, : x - 1] = targets[row, x - 1 + y :] = -1
    return idx, targets


def parts(model: LatentTransformer, idx: torch.Tensor, targets: torch.Tensor) -> SimpleNamespace:
    """Everything that a pass in evaluation computes."""
    with torch.no_grad():
        prefix, real, starts, y = model.split(idx, targets)
        z, codes, _ = model.bottleneck(*model.ae(y))
        h, states = model.lp(prefix, real, starts, codes)
        code_logits = [model.code_logits(states[..., d, :], d) for d in range(model.config.codebook_levels)]
        x = model.ad(z, codes[..., 0] >= 0, h, real, starts)
        logits = F.linear(x, model.wte.weight)
    return SimpleNamespace(
        prefix=prefix, real=real, starts=starts, y=y, codes=codes, code_logits=code_logits, logits=logits, h=h
    )


# ----------------------------------------------------------------------------------------------------------------------
# what each part sees


def test_targets_of_pairs():
    """Guards the cut: x with SEP right-aligned, y from its first target on, wherever they stand in their row."""
    model = make_model(**OPTIONS[3])
    idx, targets = rows(model)
    prefix, real, starts, y = model.split(idx, targets)
    for row, (x, n) in enumerate(((5, 13), (2, 4), (6, 16))):
        assert torch.equal(prefix[row, 6 - x :], idx[row, :x]) and real[row].tolist() == [False] * (6 - x) + [True] * x
        assert torch.equal(y[row, 0, :n], targets[row, x - 1 : x - 1 + n]) and (y[row, 0, n:] == -1).all()
    assert starts.tolist() == [6]


@pytest.mark.parametrize("training", [False, True])
def test_targets_of_text(training):
    """Guards the cuts: every target is what follows the text before its start; in evaluation all of them, once."""
    model = make_model().train(training)
    idx, targets = rows(model)
    offsets = set()
    for seed in range(20):
        torch.manual_seed(seed)
        prefix, real, starts, y = model.split(idx, targets)
        text = torch.cat((idx, targets[:, -1:]), dim=1)
        assert torch.equal(prefix, idx) and real is None and y.shape == (3, 3, 8)
        offsets.add(int(starts[0]) - 1)
        for j, start in enumerate(starts.tolist()):
            expected = text[:, start : start + 8]
            assert torch.equal(y[:, j, : expected.size(1)], expected) and (y[:, j, expected.size(1) :] == -1).all()
    assert offsets == {0} if not training else len(offsets) > 5 and max(offsets) < 8


@pytest.mark.parametrize("options", OPTIONS)
def test_autoencoder_sees_its_own_target_alone(options):
    """Guards ae: other text around a target changes none of its latents; another token in it does."""
    model = make_model(**options)
    idx, targets = rows(model)
    *_, y = model.split(idx, targets)
    with torch.no_grad():
        before, real = model.ae(y)
        alone = torch.stack([model.ae(y[:, j : j + 1])[0][:, 0] for j in range(y.size(1))], dim=1)
        assert (before - alone)[real].abs().max() < 1e-12
        for j in range(y.size(1)):
            other = y.clone()
            other[:, j, 0] = (other[:, j, 0] + 1) % 19
            changed = (model.ae(other)[0] - before).abs().amax(-1) > 1e-9
            assert changed[:, j, 0].all() and not changed[:, torch.arange(y.size(1)) != j].any()
        # what is behind the end is -1; a longer capacity changes nothing either
        longer, more = model.ae(F.pad(y, (0, 8), value=-1))
        assert (longer[:, :, : before.size(2)] - before)[real].abs().max() < 1e-12 and more.sum() == real.sum()


@pytest.mark.parametrize("options", OPTIONS)
def test_prior_is_causal_over_codes(options):
    """Guards lp: another code changes the logits of later codes of its own target, and nothing else."""
    model = make_model(**options)
    found = parts(model, *rows(model))
    B, J, M, D = found.codes.shape

    def flat(codes):
        h, states = model.lp(found.prefix, found.real, found.starts, codes.view(B, J, M, D))
        return states.flatten(2, 3), h

    with torch.no_grad():
        codes = found.codes.clamp(min=0).flatten(2)  # (B, J, n)
        before, h = flat(codes)
        for j in range(J):
            for i in range(M * D):
                other = codes.clone()
                other[:, j, i] = (other[:, j, i] + 1) % 7
                after, h_after = flat(other)
                changed = (after - before).abs().amax(-1) > 1e-12
                assert torch.equal(h_after, h) and not changed[:, torch.arange(J) != j].any()
                assert not changed[:, j, : i + 1].any() and changed[:, j, i + 1 :].all()


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_text_behind_a_target_is_not_seen(options):
    """Guards the masks of the one pass: redrawing all text from the start of a target on leaves its prediction as it was."""
    model = make_model(**options)
    idx, targets = rows(model)
    N, before = model.config.target_size, parts(model, idx, targets)
    generator = torch.Generator().manual_seed(5)
    for j, start in enumerate(before.starts.tolist()):
        other = idx.clone()
        other[:, start:] = torch.randint(19, other[:, start:].shape, generator=generator)
        shifted = torch.cat((other[:, 1:], targets[:, -1:]), dim=1)
        after = parts(model, other, shifted)
        for a, b in zip(before.code_logits, after.code_logits):
            assert (
                torch.equal(a[:, j, 0], b[:, j, 0]) or a is not before.code_logits[0]
            )  # the first code: from the prefix alone
            assert torch.equal(a[:, :j], b[:, :j])
        with torch.no_grad():  # tokens, given the codes that they had
            z = model.bottleneck.decode(before.codes)
            x = model.ad(z, before.codes[..., 0] >= 0, after.h, None, before.starts)
        assert (F.linear(x, model.wte.weight) - before.logits)[:, : j + 1].abs().max() < 1e-12
        if start > 1:
            other = idx.clone()
            other[:, start - 1] = (other[:, start - 1] + 1) % 19
            assert ((parts(model, other, targets).code_logits[0] - before.code_logits[0])[:, j, 0].abs().amax(-1) > 1e-9).all()
    assert before.logits.shape[1:3] == (24 // N, N)


@pytest.mark.parametrize("options", OPTIONS)
def test_decoder_does_not_see_what_is_padded_behind(options):
    """Guards the parallel decoder: latents that are not real, many or few, change no logits of the real ones."""
    model = make_model(**options)
    found = parts(model, *rows(model))
    real = found.codes[..., 0] >= 0
    tokens = real.repeat_interleave(model.config.latent_factor, dim=2)
    torch.manual_seed(7)
    with torch.no_grad():
        z = model.bottleneck.decode(found.codes)
        z = torch.cat((torch.where(real[..., None], z, 9.0), torch.randn_like(z)), dim=2)
        more = torch.cat((real, torch.zeros_like(real)), dim=2)
        x = model.ad(z, more, found.h, found.real, found.starts)
        longer = F.linear(x, model.wte.weight)[:, :, : found.logits.size(2)]
    assert (longer - found.logits)[tokens].abs().max() < 1e-12


def test_latents_stand_where_their_blocks_begin():
    """Guards the positions on the way up: latent i of a target at s looks at the prefix as the only one of a target at s + i S does."""
    model = make_model(**OPTIONS[3])
    model.decoder = torch.nn.ModuleList()  # that, and convolutions, look at neighbours
    with torch.no_grad():
        for convolution in model.up_convolutions:
            convolution.norm.weight.zero_()
        z, h = torch.randn(1, 1, 4, 6, dtype=torch.float64), torch.randn(1, 22, 12, dtype=torch.float64)
        real, prefix = torch.ones(1, 1, 4, dtype=torch.bool), torch.arange(22)[None] < 6
        together = model.ad(z, real, h, prefix, torch.tensor([6])).unflatten(2, (4, 4))
        for i in range(4):
            alone = model.ad(z[:, :, i : i + 1], real[:, :, :1], h, prefix, torch.tensor([6 + 4 * i]))
            assert (together[:, :, i] - alone).abs().max() < 1e-5
            assert (
                i == 0
                or (alone - model.ad(z[:, :, i : i + 1], real[:, :, :1], h, prefix, torch.tensor([6]))).abs().max() > 1e-3
            )


def test_rows_and_padding_of_pairs_do_not_matter():
    """Guards pairs: alone or in a batch, and whatever ids stand in the padding, a pair has the same loss."""
    model = make_model(**OPTIONS[3])
    idx, targets = rows(model)
    with torch.no_grad():
        whole = model.measure(idx, targets)
        one_by_one = [model.measure(idx[i : i + 1], targets[i : i + 1]) for i in range(3)]
        other = idx.clone()
        other[1, 6:] = 3  # behind SEP and y
        again = model.measure(other, targets)
    for name, value in whole.items():
        assert torch.allclose(value, sum(part[name] for part in one_by_one), atol=1e-9)
        assert torch.allclose(value, again[name], atol=1e-12)
    assert whole["tokens"] == 13 + 4 + 16 and whole["codes"] == 4 + 1 + 4
    nothing = model.measure(idx, torch.full_like(targets, -1))
    assert all((nothing[name] == 0).all() for name in whole)


def test_the_bound_counts_codes_ends_and_tokens():
    """Guards the honest number against a computation by hand, one pair at a time: codes, the end code, tokens given the codes."""
    model = make_model(**OPTIONS[4])
    lengths, D = ((5, 13), (2, 4), (6, 16)), 2
    idx, targets = rows(model, lengths)
    found, nats, ends = parts(model, idx, targets), 0.0, 0.0
    for row, (x, y) in enumerate(lengths):
        m = -(-y // 4)
        for i in range(m):
            for d in range(D):
                nats -= found.code_logits[d][row, 0, i].log_softmax(-1)[found.codes[row, 0, i, d]]
        if m < 4:
            ends -= found.code_logits[0][row, 0, m].log_softmax(-1)[7]
        for t in range(y):
            nats -= found.logits[row, 0, t].log_softmax(-1)[targets[row, x - 1 + t]]
    with torch.no_grad():
        losses, sums = model(idx, targets)[1], model.measure(idx, targets)
    assert abs(losses["token"] - (nats + ends) / 33) < 1e-10 and abs(sums["end_nats"] - ends) < 1e-5
    assert abs(sums["code_nats"].sum() + sums["token_nats"] - nats - ends) < 1e-10
    summary = model.summarize(sums)
    assert abs(summary["end_bits_per_token"] * 33 * torch.log(torch.tensor(2.0)) - ends) < 1e-5
    bits = summary["code_bits_per_token"] + summary["token_bits_per_token"]
    assert abs(bits * torch.log(torch.tensor(2.0)) - losses["token"]) < 1e-6
    assert abs(sum(summary["code_loss"]) / D - losses["code"]) < 1e-6


@pytest.mark.parametrize("options", OPTIONS)
def test_the_total_adds_up(options):
    """Guards what is minimised: nats per token, per code and not per token, not at all before codes mean anything, and weights."""
    model = make_model(**options, commitment_weight=3.0, usage_weight=5.0).train()
    idx, targets = rows(model)
    torch.manual_seed(0)  # cuts and noise
    losses, sums = model(idx, targets)[1], model.eval().measure(idx, targets)
    extra = sum(factor * losses[name] for name, factor in (("commitment", 3.0), ("usage", 5.0)) if name in losses)
    assert "semhash" in options.values() or extra > 0
    assert abs(losses["total"] - losses["reconstruction"] - losses["code"] - extra) < 1e-10
    losses, summary = model(idx, targets)[1], model.summarize(sums)
    per_level = sums["code_nats"] / (sums["codes"] / model.config.codebook_levels)
    assert abs(losses["code"] - sums["code_nats"].sum() / sums["codes"]) < 1e-6
    assert abs(sum(summary["code_loss"]) / model.config.codebook_levels - losses["code"]) < 1e-6
    assert torch.allclose(torch.tensor(summary["code_loss"]).double(), per_level)
    for quantizer in getattr(model.bottleneck, "quantizers", ()):
        quantizer.codebook.initialized.fill_(False)
        losses = model.train()(idx, targets)[1]
        assert losses["total"] == losses["reconstruction"] and losses["code"] > 0 == losses["commitment"]


# ----------------------------------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_equal_teacher_forcing(options):
    """
    Guards sampling: reading the prefix and then code by code through a cache gives the logits of the one training pass, and
    write() gives those of its tokens. Angles of right-aligned prefixes are float32, hence 1e-5 for pairs.
    """
    model = make_model(**options)
    pairs, D = model.config.task == "pairs", model.config.codebook_levels
    found = parts(model, *rows(model))
    for row in range(3):
        for j, start in enumerate(found.starts.tolist()):
            prefix = found.prefix[row, :start]
            prefix = prefix[found.real[row]] if pairs else prefix
            codes = found.codes[row, j][found.codes[row, j, :, 0] >= 0]  # (m, D)
            with torch.no_grad():
                cache = model.make_cache()
                h = model.read(model.wte(prefix[None]), cache)
                state = h[:, -1]
                for i, code in enumerate(codes.flatten()):
                    logits = model.code_logits(state, i % D)[0]
                    assert (logits - found.code_logits[i % D][row, j, i // D]).abs().max() < (1e-5 if pairs else 1e-10)
                    state = model.read(model.embed_codes(code.view(1, 1), i), cache)[:, -1]
                written = model.write(codes[None], h)[0]
            expected = found.logits[row, j, : len(written)]
            assert (written - expected).abs().max() < (1e-4 if pairs else 1e-10)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_sampling_equals_uncached(options, temperature):
    """Guards the cache: with or without it, alone or together, sampling writes the same tokens, beyond the context as well."""
    model = make_model(**options)
    pairs = model.config.task == "pairs"
    how = BlockSampling((Sampling(temperature),), Sampling(temperature))
    prompts = torch.randint(19, (3, 5), generator=torch.Generator().manual_seed(3)).tolist()

    def run(some, cache, first=0):
        samples = [Continuation(prompt, 70) for prompt in some]
        for _ in generate.sample_together(model, samples, how, cache, first):
            pass
        return [one.output for one in samples]

    together = run(prompts, True)
    assert together == run(prompts, False) and together[1:2] == run(prompts[1:2], True, 1)
    assert all(0 < len(one) <= 16 for one in together) if pairs else all(len(one) == 70 for one in together)


def test_sampled_text_is_read_again():
    """Guards exact text feedback: the second target is what a prompt with the first one in it would have got."""
    model = make_model()
    (both,) = generate.generate(model, [[1, 2, 3]], 16, Sampling(0.0))
    (second,) = generate.generate(model, [[1, 2, 3, *both[:8]]], 8, Sampling(0.0))
    assert both[8:] == second


def drawn_codes(model: LatentTransformer, how: BlockSampling, prompts: list[list[int]], length: int) -> list[torch.Tensor]:
    """The codes (B, m, D) of each target that is written behind the prompts."""
    drawn, write = [], model.write
    model.write = lambda codes, h: drawn.append(codes) or write(codes, h)
    for _ in generate.sample_together(model, [Continuation(prompt, length) for prompt in prompts], how):
        pass
    return drawn


def test_each_code_has_its_own_noise_and_the_settings_of_its_level(monkeypatch):
    """Guards the keys of the noise: drawn by it alone, codes of a target are not alike; and top_k=1, which leaves one code a level."""
    keys, block_noise = [], generate_blocks.block_noise
    monkeypatch.setattr(generate_blocks, "block_noise", lambda seed, *more: keys.append((seed, more[1])) or block_noise(seed, *more))
    model = make_model(bottleneck="rq", codebook_levels=3, codebook_size=64)
    targets = drawn_codes(model, BlockSampling((Sampling(1e6),), Sampling(1e6)), [[1, 2, 3]], 32)
    assert len(targets) == 4 and all(len(set(codes.flatten().tolist())) > 3 for codes in targets)
    assert len(keys) == len(set(keys)) == 8  # codes and tokens of each
    how = BlockSampling((Sampling(1.0, top_k=1), Sampling(2.0), Sampling(2.0)))
    (codes,) = drawn_codes(make_model(bottleneck="rq", codebook_levels=3), how, [[1, 2, 3]] * 30, 8)
    used = [len(set(level)) for level in codes[:, 0].T.tolist()]
    assert used[0] == 1 and used[1] > 2 and used[2] > 2


def test_nothing_stands_behind_an_end():
    """Guards batches: an answer that has ended does not go on because another one does."""
    model = make_model(**OPTIONS[3])
    (codes,) = drawn_codes(model, BlockSampling((Sampling(10.0),)), [[1, 2, 3]] * 60, 16)
    real = codes[..., 0] >= 0  # (B, m)
    assert not (real[:, 1:] & ~real[:, :-1]).any() and len(set(real.sum(1).tolist())) > 2
    with pytest.raises(ValueError, match="the prompt has 7 tokens, but the model has room for 6"):
        drawn_codes(model, BlockSampling((Sampling(0.0),)), [[1] * 7], 16)


# ----------------------------------------------------------------------------------------------------------------------
# training


def test_warm_up():
    """Guards the schedules: a falling share of true tokens, or all of them until startup_steps; never in evaluation."""
    for startup, shares in (("mix", (1.0, 0.5, 0.01, 0.0)), ("target", (1.0, 1.0, 1.0, 0.0))):
        model = make_model(startup=startup, startup_steps=100, target_size=24).train()
        idx, targets = rows(model, lengths=((1, 1),) * 50)
        torch.manual_seed(0)
        prefix, _, starts, y = model.split(idx, targets)
        for step, share in zip((0, 50, 99, 100), shares):
            model.steps.fill_(step)
            fed, where_fed = model.warm_up(prefix, starts, y)
            assert abs(where_fed.double().mean() - share) < 0.05
            assert torch.equal(fed[:, :, 1:], y[:, :, :-1].clamp(min=0)) and (fed[:, 0, 0] == prefix[:, starts[0] - 1]).all()
        model.steps.fill_(0)
        assert model.eval().warm_up(prefix, starts, y) == (None, None)


def test_fed_decoder_does_not_see_its_own_token():
    """Guards the shift: fed true tokens, the decoder predicts each from those before it, as a language model does."""
    model = make_model(startup_steps=100, **OPTIONS[3]).train()
    idx, targets = rows(model)
    prefix, real, starts, y = model.split(idx, targets)
    z = torch.randn(3, 1, 4, 6, dtype=torch.float64)
    latent_real = torch.ones(3, 1, 4, dtype=torch.bool)
    h, _ = model.lp(prefix, real, starts, torch.zeros(3, 1, 4, 1, dtype=torch.int64))

    def run(y):
        fed, where_fed = model.warm_up(prefix, starts, y)
        assert where_fed.all()
        return model.ad(z, latent_real, h, real, starts, fed, where_fed)

    with torch.no_grad():
        before = run(y.clamp(min=0))
        other = y.clamp(min=0)
        other[:, :, 5] = (other[:, :, 5] + 1) % 19
        changed = ((run(other) - before).abs().amax(-1) > 1e-12)[:, 0]
    assert not changed[:, :6].any() and changed[:, 6:].all()


def test_where_fed_decides():
    """Guards the mix: where the decoder is not fed it hears its latents, whatever the token is, and where it is fed the token."""
    model = make_model(**OPTIONS[3])
    prefix, real, starts, y = model.split(*rows(model))
    z, latent_real = torch.randn(3, 1, 4, 6, dtype=torch.float64), torch.ones(3, 1, 4, dtype=torch.bool)
    where_fed = torch.arange(16).expand_as(y) == 5
    with torch.no_grad():
        h, _ = model.lp(prefix, real, starts, torch.zeros(3, 1, 4, 1, dtype=torch.int64))
        plain = model.ad(z, latent_real, h, real, starts)
        fed = [model.ad(z, latent_real, h, real, starts, y.clamp(min=0) * 0 + token, where_fed) for token in (3, 4)]
        nowhere = model.ad(z, latent_real, h, real, starts, y.clamp(min=0), where_fed & False)
    assert torch.equal(nowhere, plain)
    for one, other in ((plain, fed[0]), (fed[0], fed[1])):
        assert torch.equal(one[:, :, :5], other[:, :, :5]) and ((one - other)[:, :, 5].abs().amax(-1) > 1e-9).all()


def test_mixtures_get_colder():
    """Guards gumbel's schedules: training at a later step is colder and noisier, and evaluation knows no step."""
    model = make_model(**OPTIONS[6], anneal_steps=10)
    idx, targets = rows(model)

    def loss(step: int) -> torch.Tensor:
        model.steps.fill_(step)
        torch.manual_seed(0)
        return model(idx, targets)[1]["reconstruction"]

    with torch.no_grad():
        assert loss(0) == loss(5) == loss(10)
        model.train()
        assert loss(0) != loss(5) != loss(10) == loss(20)


@pytest.mark.parametrize("options", OPTIONS[5:])
def test_codes_do_not_depend_on_the_precision(options):
    """Guards autocast: the bottleneck computes in float32, on latents of whatever precision, so its logits are not rounded."""
    model = make_model(**options).float()
    seen = []
    model.bottleneck.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        codes = model.sums(*rows(model, ((6, 16),) * 300))[2]
    bottled = model.bottleneck(seen[0], codes[..., 0] >= 0, model.steps)
    assert torch.equal(bottled.codes, codes)


def test_dropout_is_for_training():
    """Guards attention's dropout, which no module holds: none in evaluation, some in training."""
    model = make_model(dropout=0.3, **OPTIONS[3])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what is left is in the attention weights
    idx, targets = rows(model)
    with torch.no_grad():
        a, b = (model(idx, targets)[1]["token"] for _ in range(2))
        c, d = (model.train()(idx, targets)[1]["token"] for _ in range(2))
    assert a == b and c != d


@pytest.mark.parametrize("quantize_after, freeze_after, ready_at", [(1, 3, 23), (30, 33, 30)])
def test_codebooks_are_made_before_they_are_frozen(quantize_after, freeze_after, ready_at):
    """Guards the order: k-means at the step it is told, or when it has latents enough; random codebooks are never frozen."""
    model = make_model(**OPTIONS[3], quantize_after=quantize_after, freeze_codes_after=freeze_after, codebook_size=4).train()
    model.bottleneck.quantizers[0].codebook.initialized.fill_(False)
    for step in range(1, 36):
        with torch.no_grad():
            model(*rows(model))  # 9 latents, and 200 are enough
        model.after_step()
        assert model.bottleneck.ready == (step >= ready_at)
        assert model.frozen == (step >= max(ready_at, freeze_after)) == (model.backbone_rate(step) == 0.0)


def test_frozen_encoder_has_no_gradient():
    """Guards clipping, which would count gradients that move nothing, and DDP, which waits for one of every parameter."""
    for frozen in (False, True):
        model = make_model(**OPTIONS[3], quantize_after=1, freeze_codes_after=3).train()
        model.steps.fill_(3 if frozen else 2)
        model(*rows(model))[1]["total"].backward()
        for part in (model.convolutions, model.encoder, model.down, model.to_latent):
            assert all((p.grad.abs().sum() == 0) == frozen for p in part.parameters())
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("bottleneck", ["vq", "gumbel", "semhash"])
def test_vectors_of_frozen_codes_are_those_of_evaluation(bottleneck, monkeypatch):
    """Guards frozen codes: bfloat16 would change some, noise would blur their vectors, and nobody applies collected statistics."""
    model = make_model(bottleneck=bottleneck, codebook_size=8, quantize_after=1, freeze_codes_after=3).float().train()
    text, seen, ad = rows(model, [()] * 40), [], model.ad
    monkeypatch.setattr(model, "ad", lambda z, *rest: seen.append(z) or ad(z, *rest))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(0))  # cuts where evaluation does
    for steps, frozen in ((2, False), (3, True)):
        model.steps.fill_(steps)
        for training in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training):
                model.train(training)(*text)
        assert torch.equal(seen[-2], seen[-1]) == frozen
        for quantizer in getattr(model.bottleneck, "quantizers", ()):
            assert (quantizer.codebook.pending_count.sum() > 0) != frozen
            quantizer.codebook.pending_count.zero_()


def test_frozen_codebooks_stay():
    """Guards freeze_codes_after: until then codebooks move with the data, from then on they do not, and nothing is left over."""
    model = make_model(quantize_after=1, freeze_codes_after=3).train()
    seen = []
    for _ in range(4):
        model(*rows(model))
        model.after_step()
        codebook = model.bottleneck.quantizers[0].codebook
        seen.append(codebook.codes.clone())
        assert codebook.pending_count.sum() == 0, "what a step has collected is applied by it, the last one before they stay too"
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])


@pytest.mark.parametrize("options", [{}, {"freeze_codes_after": 2, "quantize_after": 1}], ids=["learning", "frozen"])
def test_compiles_without_graph_breaks(options):
    """Guards compile=on: one graph of a training step before codes are frozen and one after, with the plain losses and gradients."""
    found = []
    for backend in (None, "aot_eager"):
        model, steps = make_model(**OPTIONS[4], **options).train(), []
        call = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
        for step in range(4):
            assert model.backbone_rate(step) == (step < 2 or not options)
            model.zero_grad()
            losses = call(*rows(model))[1]
            losses["total"].backward()
            steps.append([losses["token"].detach(), *(p.grad.clone() for p in model.parameters())])
            model.after_step()
        found.append(steps)
        assert all(p.grad.any() != bool(options) for p in model.to_latent.parameters())
    for plain, compiled in zip(*found):
        for a, b in zip(plain, compiled, strict=True):
            assert (a - b).norm() <= 1e-9 * (1 + a.norm())


def test_gradients_reach_every_parameter():
    """
    Guards wiring: after the warm-up reconstruction trains encoder and decoder, the code loss the prior, and no part is idle, for
    which AdamW would keep no state to resume from and DDP would wait in vain.
    """
    for options in OPTIONS:
        model = make_model(**options).train()
        losses = model(*rows(model))[1]
        losses["reconstruction"].backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.convolutions.parameters() if p.requires_grad)
        model.zero_grad()
        losses["code"].backward(retain_graph=True)
        for part in (model.convolutions, model.encoder, model.to_latent, model.bottleneck):  # codes are labels
            assert all(p.grad is None or p.grad.abs().sum() == 0 for p in part.parameters())
        losses["total"].backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
        single = options.get("target_size") == model.config.latent_factor
        assert idle == (["code_embedding.weight"] if single else []), idle


RUN = (
    "--model=latent_transformer --n_embd=24 --n_head=2 --n_layer=1 --n_decoder_layer=1 --latent_dim=8 --codebook_size=16 "
    "--warmup_iters=2 --eval_iters=1 --batch_size=8 --learning_rate=1e-2 --device=cpu --dtype=float32 --log_interval=5"
)
PAIRS = ("--task=pairs", "--block_size=24", "--target_size=16", "--latent_factor=4")


STEADY = ("--learning_rate=5e-3", "--min_lr=4e-3")


def run(data, out, *more) -> dict:
    return train.main([f"--dataset={data}", f"--out_dir={out}", *RUN.split(), *more])


@pytest.fixture(scope="session")
def few_pairs(tmp_path_factory):
    """16 pairs of words, which are on both sides."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [f"{n}\t{prepare.in_words(n)}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 20, 34, 56, 78, 90)]
    (folder / "few.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare.main(["--input", str(folder / "few.tsv"), "--out_dir", str(folder / "set"), "--val_fraction", "0.5"])
    return folder / "set"


def state(out) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(str(out / "last" / "model.safetensors"))


@pytest.mark.parametrize(
    "more", ["--bottleneck=vq", "--bottleneck=rq --codebook_levels=2 --startup=target", "--bottleneck=gumbel --anneal_steps=6"]
)
def test_resume_equals_an_unbroken_run(few_pairs, tmp_path, more):
    """Guards exact resumption, bit for bit: warm-up, schedules, noise, codebooks and the latents they are made of."""
    halves, full = tmp_path / "halves", tmp_path / "full"
    options = (*PAIRS, *more.split(), "--startup_steps=4", "--quantize_after=4", "--dropout=0.1", "--eval_interval=4")
    lr = "--lr_decay_iters=8"
    run(few_pairs, halves, *options, lr, "--max_iters=5")
    run(few_pairs, halves, *options, lr, "--max_iters=8", "--resume")
    summary = run(few_pairs, full, *options, lr, "--max_iters=8")
    first, second = state(halves), state(full)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((halves / "summary.json").read_text())["val_loss"] == summary["val_loss"]


def test_frozen_codes_stay_as_they_are(few_pairs, tmp_path):
    """Guards freeze_codes_after in training: an encoder or token embedding that moves on would give the prior new codes to learn."""
    options = (
        *PAIRS,
        "--startup_steps=1",
        "--codebook_size=4",
        "--quantize_after=2",
        "--freeze_codes_after=14",
        "--lr_decay_iters=17",
    )
    data, codes, reads = train.dataloader.open_data(few_pairs, 24), [], []
    x, y = data.gather("train", list(range(len(data.bounds["train"]))))
    for steps in (12, 14, 17):
        run(few_pairs, tmp_path, *options, f"--max_iters={steps}", *(["--resume"] if steps > 12 else []))
        model = checkpoint.load_run(tmp_path, "last")[0]
        prefix, real, starts, targets = model.split(x, y)
        with torch.no_grad():
            latent, latent_real = model.ae(targets)
            z, found, _ = model.bottleneck(latent, latent_real)
            codes.append((latent, z, found))
            reads.append(model.lp(prefix, real, starts, found)[1])
    assert all(torch.equal(one, other) for one, other in zip(codes[1], codes[2]))
    assert not torch.equal(codes[0][0], codes[1][0]) and not torch.equal(codes[0][1], codes[1][1])
    assert not torch.equal(reads[1], reads[2])  # the prior goes on
    run(few_pairs, tmp_path / "next", *options, f"--init_from={tmp_path}", "--max_iters=12")
    model = checkpoint.load_run(tmp_path / "next", "last")[0]
    assert model.steps == 12, "a new run counts its own steps"
    with torch.no_grad():
        assert not torch.equal(model.ae(targets)[0], codes[-1][0]), "so its codes are not frozen from the start"


def test_learns_pairs_by_heart(few_pairs, tiny_data, tmp_path, capsys):
    """Guards the whole way, prepare.py to sample.py: questions seen in training are answered exactly with one parallel decode."""
    out = tmp_path / "run"
    length = ("--startup_steps=30", "--quantize_after=60", "--max_iters=300", "--eval_interval=300")
    summary = run(few_pairs, out, *PAIRS, *length, *STEADY)
    assert 0.0 <= summary["exact_pairs"] <= 1.0 and summary["pairs"] >= 1 and len(summary["code_usage"]) == 1
    model = checkpoint.load_run(out, "last")[0]
    data = train.dataloader.open_data(few_pairs, 24)
    questions = list(data.questions("train", 100))
    answers = [generate.generate(model, [q], 17, Sampling(0.0), eos=0)[0] for q, _ in questions]
    assert answers == [answer for _, answer in questions]
    losses = model(*data.gather("train", list(range(len(questions)))))[1]
    assert losses["reconstruction"] < 0.05 and losses["token"] < 0.3
    question, answer = (bytes(side).decode() for side in questions[0])
    capsys.readouterr()
    arguments = [str(out), "--temperature=0", "--checkpoint=last", "--device=cpu"]
    assert (
        sample.main([*arguments, f"--prompt={question[:-1]}"]) == sample.main([*arguments, f"--prompt={question}"]) == [answer]
    )
    assert capsys.readouterr().out == (question + answer + "\n") * 2
    with pytest.raises(ValueError, match="is a set of text; give one of pairs"):  # a number would come out, of other windows
        evaluate.main([str(out), f"--dataset={tiny_data}", "--device=cpu"])
    with pytest.raises(ValueError, match="answers whole questions only"):  # it was never shown half an answer
        sample.main([*arguments, f"--prompt={question}{answer[:2]}"])


def test_plain_models_learn_pairs_too(few_pairs, tmp_path):
    """Guards the comparison: the auto-regressive model reads the same windows, is judged on answers alone, and answers prompts."""
    out = tmp_path / "run"
    shape = (
        "--model=decoder_only --position=rope --block_size=24 --n_layer=2 --n_head=2 --n_embd=24 --batch_size=8 --dtype=float32"
    )
    length = "--max_iters=200 --warmup_iters=2 --eval_interval=200 --eval_iters=1 --device=cpu"
    summary = train.main([f"--dataset={few_pairs}", f"--out_dir={out}", *shape.split(), *length.split(), *STEADY])
    assert summary["val_tokens"] == sum(len(a) + 1 for _, a in train.dataloader.open_data(few_pairs, 24).questions("val", 99))
    data, model = train.dataloader.open_data(few_pairs, 24), checkpoint.load_run(out, "last")[0]
    seen = SimpleNamespace(questions=lambda *_: data.questions("train", 99), block_size=24, meta=data.meta)
    assert exact_pairs(model, seen) == (1.0, len(list(data.questions("train", 99))))


def test_continues_text(wide_data, tmp_path, capsys):
    """Guards text: trained on windows, continued target after target, with a bound in summary.json."""
    out = tmp_path / "run"
    more = (
        "--block_size=32 --target_size=8 --latent_factor=4 --startup_steps=3 --quantize_after=3 --max_iters=6 --eval_interval=3"
    )
    data = shutil.copytree(wide_data, tmp_path / "data")
    chars = "".join(map(chr, range(256, 512)))  # two bytes each
    tokenizer.save(tokenizer.get("char", chars=chars), data)
    summary = run(data, out, *more.split(), "--final_eval_tokens=300")
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2) / 2, rel=1e-12)
    assert abs(summary["code_bits_per_byte"] + summary["token_bits_per_byte"] - summary["val_bits_per_byte"]) < 1e-4
    assert summary["end_bits_per_byte"] == 0.0
    (again,) = evaluate.main([str(out), "--final_eval_tokens=300", "--device=cpu", f"--dtype={summary['dtype']}"])
    assert {"code_bits_per_byte", "code_usage"} <= again.keys() & summary.keys(), "the bound alone says nothing of the codes"
    same = again.keys() & summary.keys() - {"run"}
    assert {key: again[key] for key in same} == {key: summary[key] for key in same} and len(same) > 8
    assert f" bits per byte, {again['code_bits_per_byte']:.4f} of them of codes, over 300 tokens" in capsys.readouterr().out
    (text,) = sample.main(
        [str(out), f"--prompt={chars[:4]}", "--max_new_tokens=50", "--device=cpu", "--check", "--temperature=0.9", "--eos=0"]
    )
    assert text
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"train"' in line][-1]
    assert {"reconstruction_loss", "code_loss", "commitment_loss"} <= last.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 64, "target_size": 32, "bottleneck": "gumbel"},
        {"block_size": 64, "target_size": 32, "bottleneck": "rq", "codebook_levels": 4},
        {"block_size": 64, "target_size": 32, "bottleneck": "dvq", "codebook_levels": 4},
        {"task": "pairs", "block_size": 64, "target_size": 48, "bottleneck": "gumbel"},
    ],
)
def test_flops_count_every_product(options):
    """
    Guards the comparison of costs by torch's counter of a real step: what runs once for several tokens, keys of the prefix, a head
    for each level that sees only codes of this level, the search for the nearest code.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = (  # in float64, in which attention is torch's
        make_model(**options, n_embd=48, latent_dim=32, codebook_size=300, vocab_size=300).double().train()
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        idx, targets = rows(model, ((16, 48),) * 2)
        model(idx, targets)[1]["total"].backward()
    assert 0.995 < counter.get_total_flops() / idx.numel() / model.flops_per_token() < 1.005


# ----------------------------------------------------------------------------------------------------------------------
# what is wrong


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent_factor": 3}, "factor=3 tokens per latent"),
        ({"target_size": 6}, "target_size=6 is not a multiple of latent_factor=4"),
        ({"task": "pairs", "target_size": 24}, "leaves no room for x"),
        ({"target_size": 16}, "block_size=24 is not a multiple of target_size=16"),
        ({"n_head": 5}, "n_embd=12 is not divisible by n_head=5"),
        ({"quantize_after": 50, "freeze_codes_after": 50}, "freeze_codes_after=50 is not beyond quantize_after=50"),
        ({"startup_steps": -1}, "startup_steps=-1 must not be negative"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bottleneck": "vae"}, "bottleneck=vae: choose one of"),
    ],
)
def test_settings_that_cannot_work(options, message):
    """Guards clear lines: each names the key, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        LatentTransformerConfig(**(TINY | options))


def test_codes_without_codebooks_can_be_frozen_at_once():
    """Guards the refusal above for bottlenecks that wait for no k-means: quantize_after says nothing about them."""
    for bottleneck in ("gumbel", "semhash"):
        options = TINY | {"bottleneck": bottleneck, "codebook_size": 8, "freeze_codes_after": 50}
        assert LatentTransformerConfig(**options).freeze_codes_after == 50


def test_the_longest_pairs_fit(few_pairs):
    """
    Guards against settings refused for nothing: sides as long as there is room; and what is said of a warm-up, of codes or of their
    freezing that a run does not reach, if it is none shorter by a step.
    """
    data = train.dataloader.open_data(few_pairs, 24)
    room = {"block_size": data.longest_x + data.longest_y, "target_size": data.longest_y, "latent_factor": 2}
    steps = {"startup_steps": 8, "quantize_after": 8, "freeze_codes_after": 9}
    model = make_model(task="pairs", **room | steps)
    for quantizer in model.bottleneck.quantizers:
        quantizer.codebook.initialized.fill_(False)
    with warnings.catch_warnings(record=True, action="always") as caught:
        model.check(data, 10)
        model.check(data, 0)  # evaluate.py
        assert not caught
        model.check(data, 8)
        for quantizer in model.bottleneck.quantizers:
            quantizer.codebook.initialized.fill_(True)
        model.check(data, 8)  # codes of init_from
    ends = ("never decodes from latents alone", "never freezes its codes", "never trains on codes")
    said = [str(warning.message) for warning in caught]
    keys = ("startup_steps", "freeze_codes_after", "quantize_after")
    expected = [f"{key}={steps[key]} is not below max_iters=8: this run {end}" for key, end in zip(keys, ends)]
    assert said == expected + expected[:2], "where codes are those of init_from, the last is none"
    frozen = make_model(task="pairs", **room | {"startup_steps": 1, "quantize_after": 2, "freeze_codes_after": 5, "dropout": 0.1})
    with pytest.raises(ValueError, match="dropout=0.1 they would differ from step to step; set one of the two to 0"):
        frozen.check(data, 10)


def test_runs_that_cannot_work(few_pairs, tiny_data, tmp_path):
    """Guards clear lines before the run directory is made: pairs too long, the wrong kind of set."""
    out = tmp_path / "run"
    for data, more, message in (
        (
            few_pairs,
            ["--task=pairs", "--block_size=24", "--target_size=8"],
            "an y of 14 tokens, its end included, .* room for 8",
        ),
        (few_pairs, ["--task=pairs", "--block_size=18", "--target_size=16"], "an x of 3 tokens.*room for 2"),
        (
            few_pairs,
            ["--task=pairs", "--block_size=10", "--target_size=8"],
            "a pair of 1[5-7] tokens before its end, but block_size=10",
        ),
        (few_pairs, ["--task=text", "--block_size=24", "--target_size=8"], "task=text, but .* is a set of pairs"),
        (tiny_data, PAIRS, "task=pairs, but .* is a set of text"),
        (few_pairs, [*PAIRS, "--target_size=8", "--bottleneck=fsq"], "bottleneck"),
    ):
        with pytest.raises(ValueError, match=message):
            run(data, out, "--max_iters=1000", *more)
        assert not out.exists()
    with pytest.raises(ValueError, match="is a set of pairs, but autoencoder is made for whole texts"):
        train.main([f"--dataset={few_pairs}", f"--out_dir={out}", "--model=autoencoder", "--block_size=24", "--device=cpu"])
