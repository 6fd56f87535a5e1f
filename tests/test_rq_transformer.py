"""The prior over codes: one code path for training and steps, what it may see, the bound, sampling, and whole runs."""

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

import bench
import checkpoint
import evaluate
import generate
import generate_blocks
import sample
import tokenizer
import train
from code_stepper import BlockWriter, CodeStepper
from conftest import write_tokens
from data.pairs import prepare as pairs
from generate import BlockSampling, Continuation, Sampling
from latent import codes
from latent.autoencoder import Autoencoder, AutoencoderConfig
from latent.rq_transformer import RQTransformer, RQTransformerConfig, soft_codes
from model import Context, rotary_angles
from trainer import TrainConfig

AUTOENCODER = dict(
    vocab_size=31, block_size=24, latent_factor=4, latent_dim=6, codebook_size=7, codebook_levels=3,
    n_encoder_layer=1, n_decoder_layer=1, n_head=2, n_embd=12,
)  # fmt: skip
PRIOR = dict(n_spatial_layer=2, n_depth_layer=2, n_head=2, n_embd=12)
TOKENS = {"prior": {"autoencoder": None}}  # codes are the tokens
LEARNED = {"prior": {"code_vectors": "learned"}}


def disturb(module: torch.nn.Module) -> None:
    """Weights of order one: at initialisation attention is almost uniform and would hide a wrong mask."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def make_autoencoder(seed: int = 0, **options) -> Autoencoder:
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderConfig(**(AUTOENCODER | options)))
    disturb(autoencoder)
    autoencoder.quantizer.codebook.initialized.fill_(True)
    return autoencoder.double().eval()


def make_prior(seed: int = 0, prior: dict | None = None, **options) -> RQTransformer:
    """A tiny prior with its tiny autoencoder, or without one, in float64."""
    if prior is not None and prior.get("autoencoder", "") is None:
        sizes = {key: AUTOENCODER[key] for key in ("vocab_size", "block_size", "latent_factor")}
        autoencoder, config = None, RQTransformerConfig(**(PRIOR | sizes | prior | options))
        torch.manual_seed(seed)
    else:
        autoencoder = make_autoencoder(seed, **options)
        config = RQTransformerConfig(**(PRIOR | (prior or {}))).fitted_to(autoencoder)
    model = RQTransformer(config)
    disturb(model)
    model.double().eval()
    if autoencoder is not None:
        model.attach(autoencoder)
    return model


def random_codes(model: RQTransformer, rows: int = 2, seed: int = 1) -> torch.Tensor:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (rows, config.blocks, config.codebook_levels), generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# what the model computes


@pytest.mark.parametrize("options", [{}, {"codebook_levels": 1}, {"shared_codebook": True}, {"latent_factor": 8}, TOKENS, LEARNED])
@pytest.mark.parametrize("prefill", [0, 1, 3])
def test_steps_equal_teacher_forcing(options, prefill):
    """
    Guards the loop that the original got wrong twice: one position late, and a depth transformer without a prefix. Steps through
    both caches, with or without a prefill, give the logits of one teacher-forced pass at every position and depth.
    """
    model = make_prior(**options)
    codes, D = random_codes(model), model.config.codebook_levels
    prefill = min(prefill, model.config.blocks - 1)
    with torch.no_grad():
        expected, table = model.logits(codes), model.table()
        spatial, depth = model.spatial.make_cache(), model.depth.make_cache()
        for m in range(prefill, model.config.blocks):
            h = model.states(codes[:, :m], table, spatial)[:, -1]
            depth.truncate(0)
            for d in range(D):
                step = model.code_logits(h, codes[:, m, :d], table, depth)
                assert step.shape[1] == 1 and (step[:, 0] - expected[:, m, d]).abs().max() < 1e-10, (m, d)
            assert spatial.length == m + 1 and depth.length == D


@pytest.mark.parametrize(
    "options, prior",
    [
        ({}, {}),
        ({"codebook_levels": 1}, {"bias": True}),
        ({"shared_codebook": True}, {"n_head": 4}),
        ({}, {"code_vectors": "learned"}),
        ({}, {"autoencoder": None}),
    ],
)
def test_a_code_stepper_takes_the_models_own_steps(options, prior):
    """Guards the matrix-vector path of sampling one text: logits at every position and depth, behind prefills of 1 and 3 stacks."""
    model = make_prior(prior=prior, **options)
    codes, D = random_codes(model, rows=1), model.config.codebook_levels
    with torch.inference_mode():
        expected, table = model.logits(codes)[0], model.table()
        step, depth = CodeStepper(model, table), model.depth.make_cache()
        for prefill in (1, 3):
            spatial = model.spatial.make_cache()
            model.states(codes[:, : prefill - 1], table, spatial)
            for m in range(prefill, model.config.blocks):
                h = step.state(codes[0, m - 1].tolist(), spatial)
                depth.truncate(0)
                for d in range(D):
                    logits = step.logits(h, codes[0, m, :d].tolist(), depth)
                    assert (logits - expected[m, d]).abs().max() < 1e-10
            assert spatial.length == model.config.blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_text_in_half_precision(dtype):
    """Guards the packed steps against a table that autocast leaves in half precision: a crash in float16, a rounded state in bfloat16."""
    model, prompt = make_prior().float(), [3, 1, 4, 1]
    with torch.autocast("cpu", dtype=dtype):
        alone = generate.generate(model, [prompt], 9, Sampling(0.8))
        assert len(alone[0]) == 9 and alone == generate.generate(model, [prompt] * 2, 9, Sampling(0.8))[:1]


@pytest.mark.parametrize(
    "options",
    [{}, {"latent_factor": 8, "bias": True}, {"latent_factor": 1, "position": "learned"}, {"n_embd": 15, "n_head": 3},
     {"shared_codebook": True, "n_decoder_layer": 3}, {"codebook_kind": "simvq", "codebook_levels": 1}],
)  # fmt: skip
def test_a_block_writer_takes_the_decoders_own_steps(options):
    """Guards the packed path from codes to tokens: every option, behind blocks that decode() has put into the cache, or none."""
    model = make_prior(**options)
    autoencoder, codes = model.autoencoder, random_codes(model, rows=1)
    with torch.inference_mode():
        expected = autoencoder.decode(codes)[0].unflatten(0, (-1, model.config.latent_factor))  # (M, S, V)
        write = BlockWriter(autoencoder)
        for prefill in (0, 2):
            cache = autoencoder.make_decoder_cache()
            autoencoder.decode(codes[:, :prefill], cache)
            written = torch.stack([write(stack.tolist(), cache) for stack in codes[0, prefill:]])
            assert (written - expected[prefill:]).abs().max() < 1e-10 * expected.abs().max()
            assert cache.length == codes.size(1) * model.config.latent_factor


@pytest.mark.parametrize("options", [{}, TOKENS, LEARNED])
def test_codes_are_predicted_in_raster_order(options):
    """Guards causality: another code (m, d) changes the logits of (m, d + 1), or of the next stack, and none up to (m, d)."""
    model = make_prior(**options)
    codes = random_codes(model)
    M, D, K = model.config.blocks, model.config.codebook_levels, model.config.codebook_size
    with torch.no_grad():
        before = model.logits(codes).flatten(1, 2)  # (B, M D, K), raster order
        for place in range(M * D):
            other = codes.flatten(1).clone()
            other[:, place] = (other[:, place] + 1 + place % (K - 1)) % K
            after = model.logits(other.view_as(codes)).flatten(1, 2)
            assert torch.equal(after[:, : place + 1], before[:, : place + 1]), place
            if place + 1 < M * D:
                assert ((after - before)[:, place + 1].abs().amax(-1) > 1e-6).all(), place


@pytest.mark.parametrize("shared", [False, True])
def test_order_of_a_stack_matters(shared):
    """Guards the embedding: with one table for all depths, (1, 2, 3) and (3, 2, 1) would be the same context."""
    model = make_prior(shared_codebook=shared)
    codes = random_codes(model)
    codes[:, 0] = torch.tensor([1, 2, 3])
    turned = codes.clone()
    turned[:, 0] = torch.tensor([3, 2, 1])
    with torch.no_grad():
        a, b = (model.states(c[:, :-1], model.table()) for c in (codes, turned))
    assert torch.equal(a[:, 0], b[:, 0]) and ((a - b)[:, 1:].abs().amax(-1) > 1e-3).all()


def test_one_level_is_a_plain_transformer():
    """Guards the wiring: with D = 1 it is an ordinary auto-regressive transformer over codes, written out here."""
    model = make_prior(codebook_levels=1)
    codes = random_codes(model)[..., 0]  # (B, M)
    B, M = codes.shape
    book = model.autoencoder.quantizer.vectors()[0]
    with torch.no_grad():
        x = book[codes[:, :-1]] / book.pow(2).mean().sqrt() @ model.project[0]
        x = torch.cat((model.start.expand(B, 1, -1), x), dim=1)  # (B, M, C): shifted right behind the start
        rotary = {6: rotary_angles(torch.arange(M), 6)}
        for block in model.spatial.blocks:
            x = block(x, Context(torch.ones(M, M, dtype=torch.bool).tril(), False, rotary, 0, 0.0))
        x = x + model.wpe_depth[0]
        for block in model.depth.blocks:  # each position sees itself
            x = block(x, Context(torch.eye(M, dtype=torch.bool), False, {}, 0, 0.0))
        assert (model.heads[0](x) - model(codes[..., None])[0][:, :, 0]).abs().max() < 1e-10


def test_depth_transformer_written_out():
    """Guards its input: h_m, then W of the sum of the codes so far, each plus its p_d; another input would train as well."""
    model = make_prior()
    codes = random_codes(model)
    books = torch.stack(model.autoencoder.quantizer.vectors())
    with torch.no_grad():
        e = [books[d][codes[..., d]] / books[d].pow(2).mean().sqrt() @ model.project[d] for d in range(3)]  # (B, M, C) each
        h = model.states(codes[:, :-1], model.table())
        assert (h - model.spatial(torch.cat((model.start.expand(2, 1, -1), sum(e)[:, :-1]), dim=1), None)).abs().max() < 1e-10
        v = torch.stack([h, e[0] @ model.from_sum.weight.T, (e[0] + e[1]) @ model.from_sum.weight.T], dim=2) + model.wpe_depth
        x, causal = v.flatten(0, 1), Context(torch.ones(3, 3, dtype=torch.bool).tril(), False, {}, 0, 0.0)
        for block in model.depth.blocks:
            x = block(x, causal)
        expected = torch.stack([model.heads[d](x[:, d]) for d in range(3)], dim=1).unflatten(0, (2, -1))
        assert (expected - model(codes)[0]).abs().max() < 1e-10


def test_learned_vectors_can_be_those_of_the_codebook():
    """Guards the table that takes their place, and its gradient: with their values, losses and all other gradients are the same."""
    model, learned = make_prior(), make_prior(**LEARNED)
    missing = learned.load_state_dict({name: value for name, value in model.state_dict().items() if name != "project"}, strict=False)
    assert missing.missing_keys == ["project"] and learned.vectors is None and learned.autoencoder is not None
    with torch.no_grad():
        learned.project.copy_(model.table())
    x = torch.randint(31, (2, 24), generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        losses = [one.train(training)(x, x)[1] for one in (model, learned)]
        assert losses[0].keys() == losses[1].keys() and all(abs(losses[0][key] - losses[1][key]) < 1e-10 for key in losses[0])
        for one, loss in zip((model, learned), losses):
            one.zero_grad()
            loss["total"].backward()
        for (name, a), b in zip(model.named_parameters(), learned.parameters()):
            expected = a.grad if name != "project" else None
            assert expected is None or (expected - b.grad).abs().max() < 1e-10, name
        through = torch.bmm(model.vectors.mT, learned.project.grad)  # the chain rule, by hand
        assert (through - model.project.grad).abs().max() < 1e-10


def test_empty_blocks_do_not_count():
    """Guards the mask: -1 (no text) adds nothing to the loss and the number of tokens."""
    model = make_prior().train()
    codes = random_codes(model)
    short = codes[:, :4].clone()
    padded = codes.clone()
    padded[:, 4:] = -1
    expected, found = (model(c, c)[1] for c in (short, padded))
    assert all(abs(expected[name] - found[name]) < 1e-12 for name in ("code", "token", "total"))
    full = F.cross_entropy(model.logits(short).flatten(0, 2), short.flatten(), reduction="none")
    assert abs(found["total"] - full.mean()) < 1e-12 and abs(found["token"] - full.sum() / (2 * 4 * 4)) < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# the bound, soft targets, and the autoencoder that is not a part


@pytest.mark.parametrize("real", [24, 22, 9, 1])
def test_the_bound_is_what_a_slow_loop_finds(real):
    """Guards the honest number: nats of every code of every block with text, and of every token given the codes, per token."""
    model = make_prior()
    config = model.config
    x = torch.randint(31, (3, 24), generator=torch.Generator().manual_seed(2))
    y = torch.full_like(x, 5)
    y[1, real:] = -1
    y[2, 5:] = -1
    nats_codes, nats_tokens, tokens = torch.zeros(3), 0.0, 0
    with torch.no_grad():
        for row, length in enumerate((24, real, 5)):
            text = x[row : row + 1, :length]
            codes = model.autoencoder.encode(text)
            prior, given_codes = model.logits(codes).log_softmax(-1)[0], model.autoencoder.decode(codes).log_softmax(-1)[0]
            for m in range(-(-length // config.latent_factor)):
                for d in range(config.codebook_levels):
                    nats_codes[d] -= prior[m, d, codes[0, m, d]]
            nats_tokens -= sum(given_codes[t, text[0, t]] for t in range(length))
            tokens += length
        bound = (nats_codes.sum() + nats_tokens) / tokens
        assert abs(model(x, y)[1]["token"] - bound) < 1e-6
        said = model.summarize(model.measure(x, y))
    bits = torch.log(torch.tensor(2.0)) * (said["code_bits_per_token"] + said["token_bits_per_token"])
    assert abs(bits - bound) < 1e-6 and said["token_bits_per_token"] > 0
    stacks = sum(-(-length // config.latent_factor) for length in (24, real, 5))
    assert said["code_loss"] == pytest.approx((nats_codes / stacks).tolist(), rel=1e-5)


@pytest.mark.parametrize("real", [24, 22, 9, 1])
@pytest.mark.parametrize("training", [False, True])
def test_where_codes_are_the_tokens_their_nats_are_those_of_the_text(real, training):
    """
    Guards the likelihood, which is no bound then: the sum over single tokens of what the model says of them behind those before,
    computed anew for each, in texts that end inside a block as well.
    """
    model = make_prior(**TOKENS).train(training)
    S, x = model.config.latent_factor, torch.randint(31, (2, 24), generator=torch.Generator().manual_seed(2))
    y = torch.full_like(x, 5)
    y[1, real:] = -1
    nats = torch.zeros(S, dtype=torch.float64)
    with torch.no_grad():
        for text in (x[:1], x[1:, :real]):
            alone = model(text, text)[1]["token"] * text.size(1) + nats.sum()
            for t in range(text.size(1)):
                seen = F.pad(text[:, :t], (0, (t // S + 1) * S - t))  # zeros stand where nothing may look
                nats[t % S] -= model.logits(seen.unflatten(1, (-1, S)))[0, t // S, t % S].log_softmax(-1)[text[0, t]]
            assert abs(alone - nats.sum()) < 1e-10
    losses = model(x, y)[1]
    assert all(abs(losses[name] - nats.sum() / (24 + real)) < 1e-10 for name in ("token", "code", "total"))
    said = model.eval().summarize(model.measure(x, y))
    assert said.keys() == {"code_loss"}
    counts = torch.tensor([len(range(d, 24, S)) + len(range(d, real, S)) for d in range(S)])
    assert said["code_loss"] == pytest.approx((nats / counts).tolist())


def test_soft_codes_are_draws_and_their_distribution():
    """Guards Lee's targets: Q is softmax(-distance^2 / tau) of the residual of what was *drawn*; tau -> 0 gives the hard codes."""
    model = make_prior()
    quantizer, z = model.autoencoder.quantizer, torch.randn(500, 6, dtype=torch.float64)
    codes, targets = soft_codes(z, quantizer.vectors(), 0.7)
    residual, surprise = z, 0.0
    for d, book in enumerate(quantizer.vectors()):
        q = (-(residual[:, None] - book).pow(2).sum(-1) / 0.7).softmax(-1)
        assert (q - targets[:, d]).abs().max() < 1e-9
        surprise += (-q.gather(1, codes[:, d : d + 1]).log().mean() / -(q * q.log()).sum(-1).mean()).item() / 3
        residual = residual - book[codes[:, d]]
    assert 0.8 < surprise < 1.2, "codes are not draws from Q"
    assert torch.equal(soft_codes(z, quantizer.vectors(), 1e-6)[0], quantizer.encode(z))


def test_soft_labels_are_for_training_only():
    """Guards the evaluation: random codes would make its likelihood that of another model; blocks without text stay out."""
    model = make_prior(prior={"soft_labels": 2.0})
    x = torch.randint(31, (3, 24), generator=torch.Generator().manual_seed(3))
    y = x.clone()
    y[0, 10:] = -1
    assert model(x, y)[1]["token"] == model(x, y)[1]["token"]
    model.train()
    losses = [model(x, y)[1] for _ in range(2)]
    assert losses[0]["total"] != losses[1]["total"] and model.sums(x, y)["codes"].tolist() == 3 * [6 + 6 + 3]
    assert abs(losses[0]["token"] * (10 + 24 + 24) - losses[0]["code"] * 15 * 3) < 1e-9
    losses[0]["total"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_autoencoder_is_attached_but_no_part(tmp_path):
    """Guards the freeze: not trained, not counted, not stored, not switched to training; but it moves with the model."""
    model = make_prior()
    assert not any("autoencoder" in name or "vectors" in name for name in model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == model.get_num_params() + model.wpe_depth.numel()
    before = {name: value.clone() for name, value in model.autoencoder.state_dict().items()}
    model.attach(model.autoencoder.train())
    model.train()
    assert not model.autoencoder.training
    codes = random_codes(model)
    model(codes, codes)[1]["total"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.autoencoder.parameters())
    model.float()
    assert model.autoencoder.wte.weight.dtype == torch.float32 == model.vectors.dtype
    assert all(torch.equal(value.float(), before[name].float()) for name, value in model.autoencoder.state_dict().items())


@pytest.mark.parametrize("soft_labels", [0.0, 1e-6])
def test_codes_do_not_depend_on_the_precision(soft_labels):
    """Guards bfloat16: the text of evaluation and of soft labels has the codes that were stored, which are float32's."""
    model = make_prior(prior={"soft_labels": soft_labels}).float().train()
    x = torch.randint(31, (40, 24), generator=torch.Generator().manual_seed(4))
    codes = model.autoencoder.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(x, None)[0], codes) and torch.equal(model.autoencoder.encode(x), codes)
        rounded = model.autoencoder.quantizer.encode(*model.autoencoder.compress(x, None))
        assert not torch.equal(rounded, codes), "rounding changes no code: this test would see nothing"
        assert torch.equal(model.eval().encode(x, None)[0], codes)
    used = []
    seen = lambda *_: used.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))  # noqa: E731
    model.autoencoder.down.register_forward_pre_hook(seen)
    model.train().encode(x, None)
    assert used == [("highest", False)], "on a GPU products and convolutions would be TF32"


@pytest.mark.parametrize(
    "options",
    [{"latent_dim": 4, "codebook_size": 16}, {"codebook_size": 64, "prior": {"code_vectors": "learned"}}, TOKENS | {"vocab_size": 16}],
)
def test_flops_are_those_of_a_step(options):
    """
    Guards the comparison at equal FLOPs, against torch's counter: W runs for all codes of a stack but the first. The table of
    codes, made once a step, is small here beside all else.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    prior = {"n_embd": 48, "n_spatial_layer": 3} | options.get("prior", {})
    model = make_prior(**(options | {"prior": prior}), block_size=64).train()  # in float64 its attention is torch's
    codes = random_codes(model, rows=16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(codes, codes)[1]["total"].backward()
    assert 0.995 < counter.get_total_flops() / (16 * 64) / model.flops_per_token() < 1.005


def test_another_autoencoder_is_refused():
    """Guards the hash: with other codebooks every code would mean something else, and nothing would notice."""
    model, other = make_prior(), make_autoencoder(seed=5)
    with pytest.raises(
        ValueError, match=f"{other.codebook_hash()[:12]}.*{model.config.codebook_hash[:12]}.*train this model again"
    ):
        model.attach(other)
    with pytest.raises(ValueError, match="train this model again"):
        dataclasses.replace(model.config).fitted_to(other, {"codebook_hash": model.config.codebook_hash})
    with pytest.raises(ValueError, match="latent_factor=8, but the autoencoder .* has 4: set --latent_factor=4"):
        model.config.fitted_to(other, {"latent_factor": 8})


def test_codebook_vectors_are_those_of_the_copy():
    """Guards a run that is resumed, bit for bit: its copy of a float64 autoencoder is float32, like the run, and E is a product."""
    autoencoder = make_autoencoder(codebook_kind="simvq")
    disturb(autoencoder)  # by what float32 does not hold
    config = RQTransformerConfig(**PRIOR).fitted_to(autoencoder)
    models, kept = [RQTransformer(config) for _ in range(2)], copy.deepcopy(autoencoder).float().double()
    for model, loaded in zip(models, (autoencoder, kept)):
        model.attach(loaded)
    assert models[0].vectors.dtype == torch.float32 and torch.equal(models[0].vectors, models[1].vectors)


# ----------------------------------------------------------------------------------------------------------------------
# sampling

GREEDY = BlockSampling((Sampling(temperature=0.0),))
MIXED = BlockSampling(
    (Sampling(0.9, seed=3), Sampling(1.3, 4, seed=3), Sampling(0.6, None, 0.8, seed=3)), Sampling(0.7, seed=3)
)


def continued(model, prompts, tokens, sampling, **how) -> list[Continuation]:
    samples = [Continuation(prompt, tokens) for prompt in prompts]
    for _ in generate.sample_together(model, samples, sampling, **how):
        pass
    return samples


def slow_greedy(model: RQTransformer, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Text and the codes of its last context: at every depth the whole teacher-forced model, of which one number is used."""
    S, M, D = model.config.latent_factor, model.config.blocks, model.config.codebook_levels
    text, codes = prompt[:1] * (-len(prompt) % S) + prompt, None
    begin = len(text)
    with torch.no_grad():
        while len(text) < begin + tokens:
            if codes is None or codes.size(1) == M:
                blocks = len(text) // S if codes is None and len(text) < M * S else M // 2
                codes = model.autoencoder.encode(torch.tensor([text[-blocks * S :]]))
            codes = torch.cat((codes, torch.zeros(1, 1, D, dtype=torch.int64)), dim=1)
            for d in range(D):
                codes[0, -1, d] = model.logits(codes)[0, -1, d].argmax()
            text += model.autoencoder.decode(codes)[0, -S:].argmax(-1).tolist()
    return text[begin : begin + tokens], codes


@pytest.mark.parametrize("length", [1, 3, 4, 9, 20, 23, 24])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_sampling_is_the_argmax_of_teacher_forcing(length, use_cache):
    """
    Guards the whole loop, far beyond the context: what is sampled is the argmax of the teacher-forced model on its own output,
    for prompts shorter than a block, of broken blocks, and as long as the context.
    """
    model = make_prior(seed=length)
    prompt = torch.randint(31, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    (sample,) = continued(model, [prompt], 50, GREEDY, use_cache=use_cache)
    expected, codes = slow_greedy(model, prompt, 50)
    assert sample.output == expected and sample.reason == "length" and len(set(expected)) > 2
    logits = model.logits(codes)[:, -1]
    assert torch.equal(logits.argmax(-1), codes[:, -1])


@pytest.mark.parametrize("length", [1, 3, 4, 9, 20, 23, 24])
@pytest.mark.parametrize("use_cache", [True, False])
def test_where_codes_are_the_tokens_each_is_the_argmax_behind_those_before(length, use_cache):
    """Guards prompts that end inside a block, whose rest is chosen behind them, alone and in a batch, and contexts that are full."""
    model = make_prior(seed=length, **TOKENS)
    S, M = model.config.latent_factor, model.config.blocks
    text = torch.randint(31, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    samples = continued(model, [text, text[::-1]], 50, GREEDY, use_cache=use_cache)
    assert samples[0].output == continued(model, [text], 50, GREEDY, use_cache=use_cache)[0].output
    first = 0
    with torch.no_grad():
        for _ in range(50):
            if len(text) - first == M * S:
                first += M // 2 * S
            seen = torch.tensor([text[first:] + [0] * (S - len(text) % S)]).unflatten(1, (-1, S))
            text = [*text, model.logits(seen)[0, -1, len(text) % S].argmax().item()]
    assert samples[0].output == text[length:] and len(set(text[length:])) > 2


def test_where_codes_are_the_tokens_a_text_goes_on_as_it_would_have():
    """Guards the noise and the settings of levels in a block that the prompt begins: they are of the place in the block."""
    model, sampling = make_prior(**TOKENS), BlockSampling(tuple(Sampling(0.5 + d, 3 + d, seed=3) for d in range(4)))
    text = [3, 1, *continued(model, [[3, 1]], 16, sampling)[0].output]
    for length in range(3, 12):
        assert continued(model, [text[:length]], 18 - length, sampling)[0].output == text[length:], length


@pytest.mark.parametrize(
    "options",
    [{}, {"latent_factor": 8}, {"block_size": 4}, {"latent_factor": 1, "codebook_kind": "simvq"}, TOKENS | {"latent_factor": 3}],
)
def test_texts_do_not_depend_on_batch_or_cache(options):
    """Guards the noise and the caches: sample i is the same text in a batch, alone, and computed without caches."""
    model = make_prior(**options)
    length = min(6, model.config.block_size)
    prompts = [list(range(i, i + length)) for i in range(3)]
    together = [sample.output for sample in continued(model, prompts, 60, MIXED)]
    assert together == [sample.output for sample in continued(model, prompts, 60, MIXED, use_cache=False)]
    for i, prompt in enumerate(prompts):
        assert continued(model, [prompt], 60, MIXED, first_sample=i)[0].output == together[i]
    assert together[0] != continued(model, prompts[:1], 60, MIXED, first_sample=1)[0].output


def test_codes_are_drawn_with_the_settings_of_their_level():
    """Guards per-depth settings: top_k=1 on the first level leaves one code there, and the others stay free."""
    model = make_prior()
    drawn = []
    model.autoencoder.decode = lambda codes, cache=None, f=model.autoencoder.decode: (
        drawn.append(codes[:, -1]) or f(codes, cache)
    )
    sampling = BlockSampling((Sampling(1.0, top_k=1), Sampling(2.0), Sampling(2.0)))
    continued(model, [[1, 2, 3, 4]] * 40, 4, sampling)
    used = [len(set(level)) for level in drawn[-1].T.tolist()]
    assert used[0] == 1 and used[1] > 2 and used[2] > 2
    with pytest.raises(ValueError, match="2 values of temperature, top_k or top_p for a model of 3 code levels"):
        continued(model, [[1]], 4, BlockSampling(sampling.levels[:2]))


def test_every_block_has_its_own_noise():
    """Guards the keys of the noise: when it alone decides, no two blocks are alike, neither in their codes nor in their tokens."""
    model, free = make_prior(codebook_size=64), Sampling(1e6)
    for sampling in (BlockSampling((free,)), BlockSampling((Sampling(0.0),), free)):
        drawn = []
        expand = model.autoencoder.quantizer.decode
        model.autoencoder.quantizer.decode = lambda codes, f=expand, to=drawn: to.append(codes[0, -1].tolist()) or f(codes)
        text = continued(model, [[1, 2, 3, 4]] * 2, 40, sampling)[0].output  # one alone would not call decode()
        model.autoencoder.quantizer.decode = expand
        blocks = drawn if sampling.levels[0] is free else [text[i : i + 4] for i in range(0, 40, 4)]
        assert len({tuple(block) for block in blocks}) == 10 and len({block[0] for block in blocks}) > 5


def test_tokens_have_other_noise_than_codes(monkeypatch):
    """Guards the keys of the noise: tokens that were drawn with the noise of their block's codes would depend on them twice."""
    model, keys, block_noise = make_prior(), [], generate_blocks.block_noise
    monkeypatch.setattr(generate_blocks, "block_noise", lambda seed, *more: keys.append((seed, more[1])) or block_noise(seed, *more))
    continued(model, [[1, 2, 3, 4]], 20, BlockSampling((Sampling(1.0),), Sampling(1.0)))
    assert len(keys) == len(set(keys)) == 10  # five blocks, codes and tokens of each


def test_texts_end_inside_a_block():
    """Guards accept(): an end-of-document token, a stop string, or the last token may come in the middle of a block."""
    model = make_prior(vocab_size=256)
    text = continued(model, [[10, 11]], 40, MIXED)[0].output
    place = next(i for i in range(5, 40) if i % 4 == 1 and text[i] not in text[:i])
    assert generate.generate(model, [[10, 11]], 40, MIXED, eos=text[place]) == [text[:place]]
    assert generate.generate(model, [[10, 11]], 7, MIXED) == [text[:7]]
    stop, written = bytes(text[5:7]).decode("latin-1"), []
    latin = tokenizer.CharTokenizer("".join(map(chr, range(256))))
    sample = Continuation([10, 11], 40, latin, stop=(stop,), write=written.append)
    for _ in generate.sample_together(model, [sample], MIXED):
        pass
    assert (sample.reason, len(sample.output)) == ("stop", 7) and sample.output == text[:7]
    assert "".join(written) == sample.text


def test_a_short_prompt_is_filled_in_front():
    """Guards the block border: "ab" is continued as the line break, once or more, and "ab" are."""
    model = make_prior(vocab_size=256)

    def text(prompt: str) -> list[int]:
        sample = Continuation(list(prompt.encode()), 20, tokenizer.ByteTokenizer())
        for _ in generate.sample_together(model, [sample], GREEDY):
            pass
        return sample.output

    assert text("ab") == text("\n\nab") and text("abcde") == text("\n\n\nabcde") != text("abcd")
    chars = Continuation([2, 1], 1, tokenizer.CharTokenizer("abc"))
    assert generate_blocks.filler(chars) == 2 == generate_blocks.filler(Continuation([2, 1], 1))
    with pytest.raises(ValueError, match="one token a step, not blocks"):
        continued(model, [[1]], 4, GREEDY, compile="eager")


# ----------------------------------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd=10 is not divisible by n_head=4"),
        ({"n_depth_layer": 0}, "n_depth_layer=0: at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"soft_labels": -1.0}, "soft_labels=-1.0: a temperature"),
        ({"soft_labels": 0.5, "code_offsets": 2}, "leave code_offsets at 1"),
        ({"block_size": 10}, "block_size=10 is not a multiple of latent_factor=4"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RQTransformerConfig(**options)


def test_settings_of_an_autoencoder_that_is_not_there(tmp_path):
    """Guards a comparison of soft labels, or of offsets, with nothing; and a vocabulary that comes from the data set afterwards."""
    with pytest.warns(UserWarning, match="soft_labels, code_offsets without effect: autoencoder=none"):
        config = RQTransformerConfig(autoencoder=None, soft_labels=0.5, code_offsets=3, latent_factor=8)
    assert (config.soft_labels, config.codebook_size, config.codebook_levels) == (0.0, 256, 8)
    with pytest.warns(UserWarning, match="codebook_size without effect: autoencoder=none, so it is 256"):
        RQTransformerConfig(autoencoder=None, codebook_size=64)
    with warnings.catch_warnings(action="error"):
        own = RQTransformerConfig(autoencoder=None, latent_factor=8)
        assert RQTransformerConfig(**vars(own)) == own  # read again from its config.json
    assert dataclasses.replace(config, vocab_size=300).codebook_size == 300
    other = write_tokens(tmp_path / "data", np.arange(3000) % 3, np.arange(300) % 3, vocab_size=3)
    with warnings.catch_warnings(action="error"):  # nobody gave the codebook_size that it has before
        assert train.open_data(TrainConfig(dataset=str(other)), own, None, {})[1].codebook_size == 3


# ----------------------------------------------------------------------------------------------------------------------
# whole runs

TINY = {
    "autoencoder": "--model=autoencoder --latent_dim=8 --codebook_size=8 --codebook_levels=2 --n_encoder_layer=1 --n_decoder_layer=1 "
    "--n_head=2 --n_embd=16 --block_size=32 --quantize_after=10 --max_iters=30 --eval_interval=30",
    "rq_transformer": "--model=rq_transformer --n_spatial_layer=1 --n_depth_layer=1 --n_head=2 --n_embd=16 --max_iters=6 "
    "--eval_interval=3",
}  # fmt: skip
SHORT = "--warmup_iters=2 --eval_iters=2 --log_interval=1 --batch_size=4 --device=cpu --dtype=float32 --final_eval_tokens=400"


def run(model: str, data: Path, out: Path, *more: str) -> dict:
    return train.main([f"--dataset={data}", f"--out_dir={out}", *TINY[model].split(), *SHORT.split(), *more])


@pytest.fixture(scope="module")
def autoencoder_run(tiny_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "autoencoder"
    run("autoencoder", tiny_data, out)
    return out


@pytest.fixture
def own_autoencoder(autoencoder_run, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(autoencoder_run, tmp_path / "autoencoder"))


@pytest.mark.parametrize(
    "more", [["--dropout=0.1", "--code_offsets=2", "--code_vectors=learned"], ["--soft_labels=0.5"]], ids=["stored", "soft"]
)
def test_resumed_equals_unbroken(own_autoencoder, tiny_data, tmp_path, more):
    """
    Guards resuming, bit for bit: the order of stored codes, dropout, and the draws of soft labels are functions of the step. Where
    the autoencoder's run is gone, the copy in the run serves.
    """
    more = [f"--autoencoder={own_autoencoder}", "--lr_decay_iters=6", *more]
    summary = run("rq_transformer", tiny_data, tmp_path / "a", *more)
    run("rq_transformer", tiny_data, tmp_path / "b", *more, "--max_iters=3")
    shutil.rmtree(own_autoencoder)
    run("rq_transformer", tiny_data, tmp_path / "b", *more, "--resume")
    a, b = (safetensors.torch.load_file(tmp_path / name / "last" / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not any("autoencoder" in key for key in a)
    assert summary["val_bits_per_byte"] == pytest.approx(summary["code_bits_per_byte"] + summary["token_bits_per_byte"])
    assert len(summary["code_loss"]) == 2 and all(loss < 3 for loss in summary["code_loss"])


def test_a_run_whose_codes_are_the_tokens(tiny_data, tmp_path, capsys):
    """Guards what needs no autoencoder: training, resuming bit for bit, evaluate.py, and samples of a prompt that ends in a block."""
    more = ["--autoencoder=none", "--latent_factor=8", "--block_size=32", "--lr_decay_iters=6", "--dropout=0.1", "--eval_sample_tokens=9"]
    summary = run("rq_transformer", tiny_data, tmp_path / "a", *more)
    run("rq_transformer", tiny_data, tmp_path / "b", *more, "--max_iters=3")
    run("rq_transformer", tiny_data, tmp_path / "b", *more, "--resume")
    a, b = (safetensors.torch.load_file(tmp_path / name / "last" / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert "code_bits_per_byte" not in summary and not (tmp_path / "a" / "autoencoder").exists()
    (found,) = evaluate.main([str(tmp_path / "a"), "--dtype=float32", "--final_eval_tokens=400"])
    assert found["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6)
    assert "validation loss" in (said := capsys.readouterr().out) and "of codes" not in said
    words = [str(tmp_path / "a"), "--prompt=def f", "--max_new_tokens=70", "--device=cpu"]
    together = sample.main([*words, "--num_samples=2", "--check"])
    assert sample.main([*words, "--stream", "--cache=false", "--check"]) == together[:1]
    with pytest.raises(ValueError, match="token_temperature is of tokens behind codes, but here the codes are the tokens"):
        sample.main([*words, "--token_temperature=0.5"])


def test_learns_codes_by_heart(tmp_path):
    """Guards the whole chain: autoencoder, stored codes, prior, sampling; a text with period 24 is continued as it was."""
    text = np.resize(np.frombuffer(b"the quick brown foxes.. ", dtype=np.uint8), 4000)
    data = write_tokens(tmp_path / "data", text, text[:500])
    run("autoencoder", data, tmp_path / "autoencoder", "--max_iters=250", "--eval_interval=250", "--learning_rate=3e-3",
        "--n_embd=32", "--codebook_size=16", "--log_interval=50", "--warmup_iters=20")  # fmt: skip
    summary = run("rq_transformer", data, tmp_path / "prior", f"--autoencoder={tmp_path / 'autoencoder'}", "--max_iters=150",
                  "--eval_interval=150", "--learning_rate=1e-2", "--n_embd=32", "--code_offsets=4")  # fmt: skip
    assert summary["val_bits_per_byte"] < 0.5 and summary["best_step"] == 150
    words = ["--prompt=the quick brown ", "--temperature=0", "--max_new_tokens=18", "--device=cpu", "--check"]
    assert sample.main([str(tmp_path / "prior"), *words]) == ["foxes.. the quick "]


def test_a_run_directory_is_all_that_sampling_needs(own_autoencoder, tiny_data, tmp_path, capsys):
    """Guards self-containment: with the autoencoder's run, its store of codes and the data set gone, the same text comes out."""
    out = tmp_path / "prior"
    (own_autoencoder / "codes").mkdir(exist_ok=True)  # all that a user who is not root has to be able to write
    for folder in (own_autoencoder, own_autoencoder / "best"):
        folder.chmod(0o555)
    run("rq_transformer", tiny_data, out, f"--autoencoder={own_autoencoder}", "--eval_sample_tokens=9")
    for folder in (own_autoencoder, own_autoencoder / "best"):
        folder.chmod(0o755)
    assert "sample: " in capsys.readouterr().out
    copies = (out / "autoencoder", out / "autoencoder" / "best")
    assert all(folder.stat().st_mode & 0o200 for folder in copies), "a copy that --overwrite could not remove"
    words = [str(out), "--prompt=def f", "--max_new_tokens=70", "--device=cpu", "--temperature=1.0,0.8", "--top_k=5"]
    before = sample.main([*words, "--num_samples=2", "--token_temperature=0.5", "--check"])
    shutil.rmtree(own_autoencoder)
    assert sample.main([*words, "--num_samples=2", "--token_temperature=0.5"]) == before
    assert sample.main([*words, "--stream", "--token_temperature=0.5", "--dtype=float32"]) == before[:1]
    for flags, message in (
        (["--lookahead=auto"], "lookahead drafts single tokens"),
        (["--temperature=1,2,3"], "3 values of temperature.* 2 code levels"),
        (["--int8"], "int8=true is for encoder-decoders"),
        (["--compile"], "write one token a step, not blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([str(out), "--device=cpu", *flags])


def test_the_sample_of_an_evaluation_is_that_of_sample_py(own_autoencoder, tiny_data, tmp_path):
    """Guards the block in which a prompt begins: without the tokenizer it is filled with other tokens, and the text is another."""
    run("rq_transformer", tiny_data, tmp_path / "prior", f"--autoencoder={own_autoencoder}")
    model, text, _ = checkpoint.load_run(tmp_path / "prior")
    disturb(model)
    disturb(model.autoencoder)
    config = TrainConfig(eval_sample_tokens=40, eval_sample_prompt="d")
    written = Continuation(text.encode("d"), 40, text, text.eos)
    for _ in generate.sample_together(model, [written], Sampling(seed=config.seed)):
        pass
    assert train.make_sampler(config, model, SimpleNamespace(folder=tiny_data))() == text.decode(written.output)


def test_a_run_begins_behind_its_codes(autoencoder_run, tiny_data, tmp_path, monkeypatch):
    """Guards a Ctrl-C while the text is encoded: a run directory without a checkpoint would be in the way of the same command."""
    out, word = tmp_path / "prior", f"--autoencoder={autoencoder_run}"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(codes, "extract", interrupted)
        run("rq_transformer", tiny_data, out, word, "--code_offsets=3")
    assert not out.exists()
    assert run("rq_transformer", tiny_data, out, word, "--code_offsets=3")["steps"] == 6


def test_an_autoencoder_that_changes_while_its_codes_are_made(own_autoencoder, tiny_data, tmp_path, monkeypatch):
    """Guards a run that nothing could load: its copy is of the autoencoder that made the codes, not of what is on the disk by then."""
    extract, was = codes.extract, checkpoint.load_autoencoder(own_autoencoder)

    def meanwhile(folder, data, autoencoder, *more):
        extract(folder, data, autoencoder, *more)
        run("autoencoder", tiny_data, own_autoencoder, "--seed=5", "--overwrite")

    with monkeypatch.context() as patch:
        patch.setattr(codes, "extract", meanwhile)
        run("rq_transformer", tiny_data, tmp_path / "prior", f"--autoencoder={own_autoencoder}", "--code_offsets=2")
    assert checkpoint.load_autoencoder(own_autoencoder).codebook_hash() != was.codebook_hash()
    copy = checkpoint.load_run(tmp_path / "prior")[0].autoencoder
    assert copy.config == was.config
    assert all(torch.equal(a, b) for a, b in zip(was.state_dict().values(), copy.state_dict().values(), strict=True))


def test_stores_of_other_offsets_stay(own_autoencoder, tiny_data, tmp_path, capsys):
    """Guards minutes of encoding: two priors that differ in code_offsets share an autoencoder, and neither replaces the other's store."""
    said = []
    for offsets in (2, 1, 2, 1):
        capsys.readouterr()
        more = [f"--autoencoder={own_autoencoder}", f"--code_offsets={offsets}", "--overwrite"]
        run("rq_transformer", tiny_data, tmp_path / "prior", *more)
        said.append("encoding the training text" in capsys.readouterr().out)
    assert said[2:] == [False, False] and said[0]


def test_sampling_does_without_the_compiler(own_autoencoder, tiny_data, tmp_path):
    """Guards the first block of a text, which took a second longer: what torch.compile has to see as one piece imported it."""
    out = tmp_path / "prior"
    run("rq_transformer", tiny_data, out, f"--autoencoder={own_autoencoder}")
    code = "import sys, sample; sample.main(sys.argv[1:]); assert 'torch._dynamo' not in sys.modules"
    words = [str(out), "--prompt=def", "--max_new_tokens=20", "--device=cpu"]
    subprocess.run([sys.executable, "-c", code, *words], cwd=Path(__file__).parent.parent, check=True, capture_output=True)


def test_bench_sample_has_what_the_model_has(own_autoencoder, tiny_data, tmp_path, capsys):
    """Guards rows that compare a thing with itself under another name: int8, lookahead and GPT-2 are not for models over codes."""
    run("rq_transformer", tiny_data, tmp_path / "prior", f"--autoencoder={own_autoencoder}")
    rows = bench.main(["sample", f"--run={tmp_path / 'prior'}", "--tokens=9", "--repeats=1", "--batch=2", "--device=cpu"])
    assert [row["variant"] for row in rows] == ["plain cached", "plain uncached", "plain cached, batch 2"]
    with pytest.raises(ValueError, match="is an autoencoder, which continues no text"):
        bench.main(["sample", f"--run={own_autoencoder}", "--device=cpu"])


def test_settings_of_codes_are_refused_by_plain_models(tiny_data, tmp_path):
    """Guards sample.py: a setting that does nothing would be believed to have done something."""
    run_small = ["--model=decoder_only", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--max_iters=1"]
    train.main([f"--dataset={tiny_data}", f"--out_dir={tmp_path / 'plain'}", *run_small, *SHORT.split(), "--warmup_iters=0"])
    for flags, message in (
        (["--temperature=1,2"], "give one value"),
        (["--token_temperature=0.5"], "no token_temperature"),
        (["--temperature=1,2", "--top_k=1,2,3"], "temperature has 2, top_k has 3"),
        (["--top_p=0.5,1.5"], "top_p=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([str(tmp_path / "plain"), "--device=cpu", *flags])


def test_other_codebooks_are_refused_wherever_they_meet(own_autoencoder, tiny_data, tmp_path, capsys):
    """Guards the hash at the start of a run and when it is sampled; one that is resumed has its own copy of the autoencoder."""
    out, word = tmp_path / "prior", f"--autoencoder={own_autoencoder}"
    run("rq_transformer", tiny_data, out, word)
    old = json.loads((out / "config.json").read_text())["model"]["codebook_hash"]
    run("autoencoder", tiny_data, own_autoencoder, "--seed=5", "--overwrite")
    with pytest.raises(ValueError, match="trained on the codes of another autoencoder"):
        run("rq_transformer", tiny_data, tmp_path / "new", word, f"--init_from={out}")
    with pytest.raises(ValueError, match=f"{old[:12]}.*train this model again"):
        run("rq_transformer", tiny_data, tmp_path / "new", word, f"--codebook_hash={old}")
    capsys.readouterr()
    assert run("rq_transformer", tiny_data, out, word, "--resume", "--max_iters=7")["steps"] == 7
    assert "goes on with its own copy" in capsys.readouterr().out
    assert isinstance(sample.main([str(out), "--device=cpu"])[0], str), "it has its own copy"
    shutil.rmtree(out / "autoencoder")
    shutil.copytree(own_autoencoder, out / "autoencoder")
    with pytest.raises(ValueError, match=f"{old[:12]}.*train this model again"):
        sample.main([str(out), "--device=cpu"])


def test_a_resumed_run_keeps_its_own_decoder(own_autoencoder, tiny_data, tmp_path):
    """Guards the bound in summary.json: the decoder of the original may have been trained on, with the codes as they were."""
    out, word = tmp_path / "prior", f"--autoencoder={own_autoencoder}"
    run("rq_transformer", tiny_data, out, word)
    shutil.copytree(out, tmp_path / "other")
    shutil.copytree(own_autoencoder, tmp_path / "before")
    more = ("rq_transformer", tiny_data)
    expected = run(*more, tmp_path / "other", word, "--resume", "--max_iters=7")
    again = [f"--init_from={tmp_path / 'before'}", "--freeze_codes=true", "--learning_rate=0.05", "--overwrite"]
    run("autoencoder", tiny_data, own_autoencoder, *again)
    assert run(*more, out, word, "--resume", "--max_iters=7")["val_loss"] == expected["val_loss"]


def test_autoencoders_that_cannot_serve(own_autoencoder, tiny_data, tmp_path):
    """Guards the lines a user reads: no run, a run of another model, codebooks that are still random, another data set."""
    out, word = tmp_path / "prior", f"--autoencoder={own_autoencoder}"
    with pytest.raises(ValueError, match="autoencoder=nowhere: nowhere is not a directory"):
        run("rq_transformer", tiny_data, out, "--autoencoder=nowhere")
    with pytest.raises(ValueError, match="latent_factor=8, but the autoencoder"):
        run("rq_transformer", tiny_data, out, word, "--latent_factor=8")
    other = write_tokens(tmp_path / "data", np.arange(3000) % 3, np.arange(300) % 3, vocab_size=3)
    tokenizer.save(tokenizer.CharTokenizer("abc"), other)
    with pytest.raises(ValueError, match="has another tokenizer than"):
        run("rq_transformer", other, out, word)
    (tmp_path / "qa.tsv").write_text("".join(f"{i}\tyes\n" for i in range(40)), encoding="utf-8")
    pairs.main(["--input", str(tmp_path / "qa.tsv"), "--out_dir", str(tmp_path / "pairs"), "--val_fraction", "0.3"])
    with pytest.raises(ValueError, match="is a set of pairs, but rq_transformer is made for whole texts"):
        run("rq_transformer", tmp_path / "pairs", out, word)
    shutil.rmtree(own_autoencoder / "codes", ignore_errors=True)
    (own_autoencoder / "codes").write_text("")  # in the way, as somebody else's folder is
    with pytest.raises(OSError, match=r"autoencoder/codes/1: .*; the codes of .* make a copy of its run where you may write"):
        run("rq_transformer", tiny_data, out, word)
    (own_autoencoder / "codes").unlink()
    checkpoint.write_json(own_autoencoder / "best" / "trainer.json", {"step": 1})  # as if it had been best before its end
    for again in ((), ("--overwrite",)):
        run("rq_transformer", tiny_data, out, word, *again)
        assert checkpoint.read_json(out / "autoencoder" / "best" / "trainer.json")["step"] == 1
    with pytest.raises(ValueError, match="is the run of another model, rq_transformer"):
        run("rq_transformer", tiny_data, tmp_path / "b", f"--autoencoder={out}")
    run("autoencoder", tiny_data, own_autoencoder, "--max_iters=2", "--eval_interval=1", "--overwrite")
    with pytest.raises(ValueError, match="before its codebooks were made of data"):
        run("rq_transformer", tiny_data, tmp_path / "b", word)
    assert not (tmp_path / "b").exists()
