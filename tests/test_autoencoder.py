"""The text autoencoder: what its codes and logits may depend on, its statistics, and a whole run of it through the scripts."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoint
import compare
import evaluate
import sample
import tokenizer
import train
from conftest import ROOT, write_tokens
from dev import codes
from latent.autoencoder import Autoencoder, AutoencoderConfig

TINY = dict(vocab_size=31, block_size=16, latent_factor=4, n_encoder_layer=2, n_decoder_layer=2, n_head=2, n_embd=12,
            latent_dim=6, codebook_size=8, codebook_levels=3, quantize_after=0)  # fmt: skip
# every value of every option that the forward pass looks at stands in at least one of these
OPTIONS = [
    {},
    {"position": "learned", "latent_factor": 2, "bias": True},
    {"latent_factor": 8, "codebook_kind": "simvq"},
    {"latent_factor": 1, "shared_codebook": True, "quantizer_gradient": "rotation"},
    {"encoder_context": "block", "position": "learned"},
]
IDS = ["-".join(map(str, o.values())) or "default" for o in OPTIONS]


def make(dtype: torch.dtype = torch.float64, **options) -> Autoencoder:
    """A tiny autoencoder with weights of order one, so that everything depends on everything that it may depend on."""
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(**(TINY | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "codebook" in name else 0.3))
    return model.to(dtype).eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def right_padded(idx: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Targets of which only the first `lengths` of each row are real."""
    return torch.where(torch.arange(idx.size(1)) < torch.tensor(lengths)[:, None], idx, -1)


def buffers(model: Autoencoder) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def initialized(**options) -> Autoencoder:
    """One whose codebooks come from its own latents."""
    model = make(**options).train()
    for seed in range(100):
        model(tokens(16, 16, seed), tokens(16, 16, seed))
        model.after_step()
        if model.quantizer.initialized and seed > 3:
            return model.eval()
    raise AssertionError("no k-means after 100 steps")


# ----------------------------------------------------------------------------------------------------------------------
# what depends on what


@pytest.mark.parametrize("bias", [True, False])
def test_latents_have_one_scale(bias):
    """Guards ln_latent: a gain or a bias that is trained would shrink all latents to please the commitment loss."""
    with torch.no_grad():
        latents, _ = make(bias=bias).compress(tokens(3, 16), None)
    assert latents.mean(-1).abs().max() < 1e-10 and (latents.var(-1, unbiased=False) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_codes_of_a_prefix_are_those_of_the_text(options):
    """Guards continuation: one symmetric convolution or look ahead, and a prompt gets other codes than the text it begins."""
    model = make(**options)
    S, idx = model.config.latent_factor, tokens(5, 16)
    codes = model.encode(idx)
    assert codes.shape == (5, 16 // S, 3) and codes.unique().numel() > 3
    for length in range(1, 16):
        prefix = model.encode(idx[:, :length])
        assert prefix.shape[1] == math.ceil(length / S)
        assert torch.equal(prefix[:, : length // S], codes[:, : length // S])


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("context", ["prefix", "block"])
def test_what_a_latent_knows(context, factor):
    """Guards encoder_context: one kernel or mask too wide, and the same tokens have other codes elsewhere; one too narrow, and
    a latent misses a token of its block."""
    model = make(encoder_context=context, latent_factor=factor, position="learned" if factor == 2 else "rope")
    idx = tokens(4, 16)
    before = model.compress(idx, None)[0]
    for position in range(16):
        changed = idx.clone()
        changed[:, position] = (changed[:, position] + 7) % 31
        moved = (model.compress(changed, None)[0] != before).any(-1)  # (B, M)
        own = position // factor
        assert moved[:, own].all() and not moved[:, :own].any()
        assert (moved[:, own + 1 :].all() if context == "prefix" else not moved[:, own + 1 :].any())
    if context == "block":
        shifted = model.compress(torch.cat((tokens(4, factor, seed=2), idx[:, :-factor]), 1), None)[0]
        assert (shifted[:, 1:] - before[:, :-1]).abs().max() < 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_logits_depend_on_blocks_up_to_their_own(options):
    """Guards streaming: bit for bit nothing of a later block, but all of the own one and of the earlier ones."""
    model = make(**options)
    S, idx = model.config.latent_factor, tokens(4, 16)
    before, codes = model(idx)[0], model.encode(idx)
    for block in range(16 // S):
        changed = idx.clone()
        changed[:, block * S : (block + 1) * S] = (changed[:, block * S : (block + 1) * S] + 7) % 31
        after = model(changed)[0]
        assert torch.equal(after[:, : block * S], before[:, : block * S])
        assert not torch.equal(after[:, block * S :], before[:, block * S :])
        other = codes.clone()
        other[:, block] = (other[:, block] + 1) % 8
        changed_positions = (model.decode(other) != before).any(-1)
        assert not changed_positions[:, : block * S].any() and changed_positions[:, block * S :].all()


def test_a_block_is_decoded_as_a_whole():
    """Guards the mask: under a plain causal one the first token of a block would be guessed before its others are looked at."""
    model, codes = make(), torch.zeros(1, 4, 3, dtype=torch.int64)
    before = model.decode(codes)
    bump = torch.zeros(1, 16, 12).double()
    bump[:, 7] = torch.arange(12) / 4  # in front of the trunk, at the last position of block 1
    model.up.register_forward_hook(lambda module, inputs, output: output + bump)
    changed = (model.decode(codes) != before).any(-1)[0]
    assert changed.tolist() == [False] * 4 + [True] * 12


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_decoding_codes_is_the_second_half_of_forward(options):
    """Guards decode(): whatever is sampled from codes must be what was trained, at any length, partial blocks included."""
    model = make(**options)
    S = model.config.latent_factor
    for length in sorted({1, max(S - 1, 1), S, min(S + 1, 16), min(3 * S + 1, 16)}):
        idx = tokens(3, length)
        logits, losses = model(idx)
        assert losses == {} and logits.shape == (3, length, 31)
        decoded = model.decode(model.encode(idx))
        assert decoded.shape == (3, math.ceil(length / S) * S, 31)
        assert (decoded[:, :length] - logits).abs().max() < 1e-12  # the output layer sums in another order for another length
        loss = model(idx, idx)[1]["token"]
        assert abs(loss - torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten())) < 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 1, 1), (1, 3)])
def test_decoding_in_chunks_is_decoding_at_once(options, chunks):
    """Guards the cache: positions and masks of the blocks behind those already there; and going back after truncate()."""
    model = make(**options, block_size=4 * options.get("latent_factor", 4))
    S, codes = model.config.latent_factor, torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(3))
    whole, cache, parts = model.decode(codes), model.make_decoder_cache(), []
    for chunk in codes.split(chunks, dim=1):
        parts.append(model.decode(chunk, cache))
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10 and cache.length == 4 * S
    cache.truncate(2 * S)
    assert (model.decode(codes[:, 2:], cache) - whole[:, 2 * S :]).abs().max() < 1e-10
    with pytest.raises(ValueError, match="do not fit into the context"):
        model.decode(codes[:, :1], cache)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_padding_and_other_rows_change_nothing(options):
    """Guards masks: pads in the codes, the losses, or the codebooks' statistics, and any normalization over the batch."""
    lengths = [16, 5, 8, 1]
    idx = tokens(4, 16)
    model = make(**options)
    S, targets = model.config.latent_factor, right_padded(idx, lengths)
    codes = model.encode(idx, targets >= 0)
    for row, length in enumerate(lengths):
        alone = model.encode(idx[row : row + 1, :length])[0]
        assert torch.equal(codes[row, : len(alone)], alone) and (codes[row, len(alone) :] == -1).all()
    other_pads = torch.where(targets >= 0, idx, (idx + 11) % 31)
    trained = []
    for inputs in (idx, other_pads):
        model = make(**options).train()
        losses = model(inputs, targets)[1]
        losses["total"].backward()
        grads = [p.grad for p in model.parameters()]
        trained.append([*losses.values(), *grads, *buffers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*trained))
    # the statistics are those of the rows one by one, cut where they end
    one_by_one = make(**options).train()
    for row, length in enumerate(lengths):
        one_by_one(idx[row : row + 1, :length], idx[row : row + 1, :length])
    for (name, a), b in zip(model.named_buffers(), one_by_one.buffers()):
        if "seen" in name or ("pending" in name and "calls" not in name):
            assert (a - b).abs().max() < 1e-10, name
    longer = make(**options, block_size=24).eval()  # the same text with eight more pads
    shorter = make(**options, block_size=24).eval()
    pads = torch.zeros(4, 8, dtype=torch.int64)
    a = longer(torch.cat((idx, pads), 1), torch.cat((targets, pads - 1), 1))[1]
    b = shorter(idx, targets)[1]
    assert all(abs(a[name] - b[name]) < 1e-12 for name in b)
    assert S * codes.size(1) == 16


def test_gradient_reaches_the_encoder():
    """Guards the straight-through path: without it the trunk in front of the codes learns from the commitment loss alone."""
    model = initialized(backbone="somewhere", freeze_backbone_iters=3).train()
    model(tokens(4, 16), tokens(4, 16))[1]["token"].backward()
    assert model.backbone_rate(2) == 0.0 and model.backbone_rate(3) == 0.1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_truncated_depth():
    """Guards decode() of fewer levels, which sampling and the accuracy by depth rely on."""
    model = initialized()
    idx = tokens(8, 16)
    codes = model.encode(idx)
    for depth in (1, 2):
        cut = codes.clone()
        cut[..., depth:] = -1
        assert torch.equal(model.decode(codes[..., :depth]), model.decode(cut))
        assert not torch.equal(model.decode(codes[..., :depth]), model.decode(codes))
    with pytest.raises(ValueError, match="4 levels"):
        model.decode(torch.zeros(1, 1, 4, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------------------------------
# codebooks


def test_codes_start_when_they_are_told_to():
    """Guards the start: latents pass unquantized in training until k-means, never in evaluation, and no sooner than asked for."""
    model = make(quantize_after=30).train()
    idx = tokens(16, 16)
    for step in range(30):
        assert not model.quantizer.initialized, step
        losses = model(idx, idx)[1]
        assert losses["commitment"] == 0 and losses["total"] == losses["token"]
        model.after_step()
    assert model.quantizer.initialized  # 30 x 64 latents are more than 50 x 8
    hits = model.quantizer.codebook.ema_count[0].sum()
    assert abs(hits - 64) < 1e-6, "averages on the scale of all steps so far instead of one would take a thousand to move"
    losses = model(idx, idx)[1]
    assert losses["commitment"] > 0 and losses["total"] == losses["token"] + 0.25 * losses["commitment"]
    fresh = make(quantize_after=30)
    unquantized = make(quantize_after=30).train()
    assert fresh(idx, idx)[1]["token"] != unquantized(idx, idx)[1]["token"]


def test_evaluation_changes_no_buffer():
    """Guards evaluation: a validation pass that moves codebooks makes the run depend on how often it is evaluated."""
    model = initialized()
    before, idx = buffers(model), tokens(4, 16)
    model(idx, right_padded(idx, [16, 3, 4, 9]))
    model.summarize(model.measure(idx, idx))
    model.decode(model.encode(idx, mask=None))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_bfloat16_leaves_codebooks_alone():
    """Guards autocast: statistics summed in bfloat16 stop moving, and a codebook may take its dtype."""
    model = make(torch.float32).train()
    idx = tokens(64, 16)
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(idx, idx)[1]
        losses["total"].backward()
        model.after_step()
    assert model.quantizer.initialized
    assert all(b.dtype == torch.float32 for b in model.buffers() if b.is_floating_point())
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = model(idx, idx)[1]["token"]
        assert torch.equal(model.decode(model.encode(idx)), model(idx)[0])
    assert abs(a - model(idx, idx)[1]["token"]) < 0.1 * a


@pytest.mark.parametrize("options", OPTIONS[::2], ids=IDS[::2])
def test_compiles_without_graph_breaks(options):
    """Guards compile=on: one graph before and after k-means, with the losses, gradients and statistics of the plain model."""
    torch._dynamo.reset()
    model, idx = make(**options, n_encoder_layer=1, n_decoder_layer=1).train(), tokens(32, 16)
    other = copy.deepcopy(model)
    compiled, quantized = torch.compile(other, fullgraph=True, backend="aot_eager"), []
    for step in range(8):
        expected, found = model(idx, idx)[1], compiled(idx, idx)[1]
        assert found.keys() == expected.keys()
        assert all(abs(found[name] - expected[name]) < 1e-10 for name in found), step
        quantized.append(expected["commitment"] > 0)
        for one, losses in ((model, expected), (other, found)):
            one.zero_grad()
            losses["total"].backward()
            one.after_step()
    assert quantized[-1] and quantized[0] == (options.get("codebook_kind") == "simvq")
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-9, name
    for (name, a), b in zip(model.named_buffers(), other.buffers()):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-9), name


def test_frozen_codes_do_not_depend_on_the_precision(monkeypatch):
    """Guards bfloat16: the decoder is judged on, and of frozen codes learns, those that a model of codes gets, which float32 makes."""
    weights = {name: t.float() if t.is_floating_point() else t for name, t in initialized().state_dict().items()}
    idx, seen = tokens(64, 16), {}
    counts = lambda codes: torch.stack([torch.bincount(level, minlength=8) for level in codes.flatten(0, 1).unbind(-1)])  # noqa: E731
    for frozen in (True, False):
        model = make(torch.float32, freeze_codes=frozen)
        model.load_state_dict(weights)
        stored, expand = model.quantizer.decode(model.encode(idx)), model.expand
        for training in (True, False):
            monkeypatch.setattr(model, "expand", lambda z, key=(frozen, training), e=expand: seen.update({key: z}) or e(z))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model.train(training)(idx, idx)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(model.measure(idx, idx)["codes"], counts(model.float().encode(idx)).double())
    assert all(torch.equal(seen[key], stored) for key in ((True, True), (True, False), (False, False)))
    assert not torch.equal(seen[False, True], stored), "rounding changes no code: this test would see nothing"


# ----------------------------------------------------------------------------------------------------------------------
# measures


@pytest.mark.parametrize("options", [{}, {"codebook_kind": "simvq", "latent_factor": 8}], ids=["ema", "simvq"])
def test_measures_add_up_and_are_what_they_say(options):
    """Guards summary.json: sums that depend on how the text was cut into batches, pads that count, positions mixed up."""
    model, lengths = initialized(**options), [16, 5, 8, 1, 16, 13]
    S, idx = model.config.latent_factor, tokens(6, 16)
    targets = right_padded(idx, lengths)
    whole = model.measure(idx, targets)
    parts = [model.measure(idx[a:b], targets[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    empty = model.measure(torch.zeros(2, 16, dtype=torch.int64), torch.full((2, 16), -1))  # rows that fill up the last batch
    for name, value in whole.items():
        assert value.dtype == torch.float64 and not empty[name].any(), name
        assert torch.allclose(sum(part[name] for part in parts), value, rtol=1e-12, atol=0), name
    report = model.summarize(whole)

    mask, codes = targets >= 0, model.encode(idx, targets >= 0)
    logits = model.decode(codes)[:, :16]
    right = logits.argmax(-1) == idx
    assert abs(report["token_accuracy"] - right[mask].double().mean()) < 1e-12
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction="none").view(6, 16)
    blocks = [(row, start) for row in range(6) for start in range(0, lengths[row], S)]
    exact = [bool(right[row, start : min(start + S, lengths[row])].all()) for row, start in blocks]
    assert abs(report["exact_blocks"] - sum(exact) / len(blocks)) < 1e-12
    whole_rows = [bool(right[row, :length].all()) for row, length in enumerate(lengths)]
    assert abs(report["exact_sequences"] - sum(whole_rows) / len(lengths)) < 1e-12
    for position in range(S):
        here = mask & (torch.arange(16) % S == position)
        assert abs(report["loss_by_position"][position] - nats[here].mean()) < 1e-12
    assert abs(whole["nats"].sum() / whole["tokens"].sum() - model(idx, targets)[1]["token"]) < 1e-12
    for depth in (1, 2, 3):
        cut = model.decode(codes[..., :depth])[:, :16].argmax(-1) == idx
        assert abs(report["accuracy_by_depth"][depth - 1] - cut[mask].double().mean()) < 1e-12
        used = codes[..., depth - 1].flatten()
        assert report["code_usage"][depth - 1] == len(used[used >= 0].unique()) / 8
    shares = [codes[mask[:, ::S]][:, level].bincount() / mask[:, ::S].sum() for level in range(3)]
    bits = sum(-(p * p.clamp(min=1e-9).log2()).sum() for p in shares)
    assert report["code_bits_per_token"] == 3 * 3 / S and abs(report["code_entropy_per_token"] - bits / S) < 1e-5
    latents = torch.cat([model.compress(idx[row : row + 1, :length], None)[0][0] for row, length in enumerate(lengths)])
    lengths_by_depth = [r.pow(2).sum().sqrt() for r in model.quantizer.lookup(latents.detach(), model.quantizer.vectors())[1]]
    assert np.allclose(report["residual_by_depth"], [length / lengths_by_depth[0] for length in lengths_by_depth], rtol=1e-9)


def test_padding_spoils_no_block():
    """Guards exact_blocks of texts that end inside a block: right is a block whose real tokens are, and wrong one with one mistake."""
    model, idx = initialized(), tokens(3, 16)
    targets = right_padded(idx, [16, 9, 3])
    for mistakes in (0, 1):
        right = targets >= 0
        right[1, :mistakes] = False
        model.judge = lambda x, idx, right=right: (torch.zeros(idx.shape, dtype=torch.float64), right)
        sums = model.measure(idx, targets)
        assert (sums["latents"], sums["exact_blocks"]) == (8, 8 - mistakes)


def test_a_collapsed_codebook_is_reported():
    """Guards silent collapse: a run whose codes say nothing must say so."""
    model = initialized(codebook_size=64, quantize_after=0)
    model.quantizer.codebook.codes[0] = 1e3 * torch.arange(64)[:, None]  # all latents are nearest to code 0
    with pytest.warns(UserWarning, match="level 1 has collapsed"):
        model.summarize(model.measure(tokens(16, 16), tokens(16, 16)))


def test_flops_count_what_runs_for_a_token():
    """Guards equal-FLOP comparisons: what runs once for S tokens, counted for each of them, would make the model look slow."""
    config = make(latent_factor=4).config
    C, Z, block = 12, 6, 12 * 12**2 + 2 * 12
    latent = 2 * C * Z + 2 * (12 * Z**2 + Z)
    down, up = [3 * C**2 + C] * 2, [2 * C**2 + C] * 2
    active = 4 * block + 31 * C + C + latent / 4 + down[0] / 2 + down[1] / 4 + up[0] / 4 + up[1] / 2
    expected = 6 * active + 12 * C * 16 * 4 + 2 * 3 * 8 * Z / 4
    assert Autoencoder(config).flops_per_token() == round(expected)
    down = [2 * C**2 + C] * 2  # kernel 2, and 4 keys instead of 16 in two layers
    expected += 6 * (down[0] - 3 * C**2 - C) * (1 / 2 + 1 / 4) - 12 * C * (16 - 4) * 2
    assert make(latent_factor=4, encoder_context="block").flops_per_token() == round(expected)


# ----------------------------------------------------------------------------------------------------------------------
# through the scripts

SHORT = (
    "--model=autoencoder --block_size=32 --n_embd=16 --n_head=2 --n_encoder_layer=1 --n_decoder_layer=1 --latent_dim=8 "
    "--codebook_size=4 --codebook_levels=2 --quantize_after=2 --max_iters=9 --lr_decay_iters=9 --warmup_iters=2 --eval_interval=3 "
    "--eval_iters=2 --log_interval=1 --batch_size=4 --device=cpu --dtype=float32"
)  # 50 x 4 latents are there after 7 steps of 32


def run(data, out, *more: str) -> dict:
    return train.main([f"--dataset={data}", f"--out_dir={out}", *SHORT.split(), *more])


def state(out, which: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / which / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    """A run that has learned a text of period 23."""
    folder = tmp_path_factory.mktemp("autoencoder")
    text = np.resize(np.frombuffer(b"the quick brown foxes. ", dtype=np.uint8), 4000)
    data = write_tokens(folder / "data", text, text[:500])
    more = "--max_iters=300 --lr_decay_iters=300 --warmup_iters=30 --eval_interval=150 --log_interval=100 --learning_rate=1e-2"
    sizes = "--codebook_size=32 --latent_dim=16 --n_embd=32 --quantize_after=60 --batch_size=8"
    return folder / "run", run(data, folder / "run", *more.split(), *sizes.split())


def test_learns_a_text_by_heart(by_heart, capsys):
    """Guards the whole loop: the text comes back through its codes, and what is written about it says what it is."""
    out, summary = by_heart
    assert summary["token_accuracy"] > 0.99 and summary["val_loss"] < 0.1 and summary["reconstruction"] is True
    assert "val_bits_per_byte" not in summary and summary["exact_blocks"] > 0.99
    assert abs(np.mean(summary["loss_by_position"]) - summary["val_loss"]) < 1e-3
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in steps if record["kind"] == "eval"][-1]
    assert len(last["code_usage"]) == len(last["code_perplexity"]) == 2 and last["token_accuracy"] > 0.99
    assert "commitment_loss" in [record for record in steps if record["kind"] == "train"][-1]
    capsys.readouterr()
    prompt = "quick brown foxes. the quick brown foxes. "  # longer than the context of 32
    assert sample.main([str(out), f"--prompt={prompt}", "--device=cpu"]) == [prompt]
    shown = capsys.readouterr()
    assert shown.out == prompt + "\n" and "continues no text; it gave back 42 of 42 tokens" in shown.err
    with pytest.raises(ValueError, match="check, json, token_temperature: .* gives its prompt back and nothing else"):
        sample.main([str(out), "--device=cpu", "--check", "--json", "--token_temperature=0.3"])
    with pytest.raises(ValueError, match="run is an autoencoder"):
        compare.main([str(out), "--plot=none"])
    [again] = evaluate.main([str(out), "--device=cpu", f"--dtype={summary['dtype']}"])
    same = {key: summary[key] for key in again.keys() & summary.keys() if key not in ("run", "dataset")}
    assert {key: again[key] for key in same} == same and {"reconstruction", "val_loss", "accuracy_by_depth"} <= same.keys()
    loss, right = summary["val_loss"], summary["token_accuracy"]
    assert f"validation reconstruction loss {loss:.4f} nats per token, {right:.2%} right over 499 tokens" in capsys.readouterr().out


def test_codes_that_see_their_block_only_are_settled(tiny_data, tmp_path, capsys):
    """Guards encoder_context through the scripts, and dev/codes.py: whatever the codes, their blocks settle them, or do not."""
    for context in ("prefix", "block"):
        run(tiny_data, tmp_path / context, f"--encoder_context={context}", "--learning_rate=1e-2")
        found = codes.main([str(tmp_path / context)])[str(tmp_path / context)]
        assert (found["repeated"] == 1.0) == (context == "block")
        assert f"{found['repeated']:.2%} of repeated blocks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="model=decoder_only; codes are those of an autoencoder"):
        codes.main([str(ROOT / "results" / "models" / "baseline")])


def test_loaded_run_has_the_same_codes(by_heart):
    """Guards save and load: codes stored with one load must mean the same in the next one."""
    out, _ = by_heart
    idx = tokens(4, 32)
    first, second = (checkpoint.load_run(out, "last")[0] for _ in range(2))
    assert torch.equal(first.encode(idx), second.encode(idx)) and first.codebook_hash() == second.codebook_hash()
    assert first.quantizer.initialized and same(state(out), dict(second.state_dict()))


def test_resume_equals_an_unbroken_run(tiny_data, tmp_path):
    """Guards exact resumption: codebooks, averages, kept latents and the start of the codes, broken before and after k-means."""
    halves, full = tmp_path / "halves", tmp_path / "full"
    more = ("--dropout=0.1", "--quantize_dropout=0.5", "--gradient_accumulation_steps=2")
    run(tiny_data, halves, *more, "--max_iters=3")
    assert not state(halves)["quantizer.codebook.initialized"]
    run(tiny_data, halves, *more, "--max_iters=6", "--resume")
    assert state(halves)["quantizer.codebook.initialized"]
    run(tiny_data, halves, *more, "--resume")
    run(tiny_data, full, *more)
    assert same(state(halves), state(full)) and state(full)["quantizer.codebook.steps"] > 0
    summaries = [json.loads((out / "summary.json").read_text()) for out in (halves, full)]
    for key in ("val_loss", "token_accuracy", "code_perplexity", "accuracy_by_depth", "residual_by_depth"):
        assert summaries[0][key] == summaries[1][key]


def test_a_setting_that_an_older_run_has_not_had(tiny_data, tmp_path):
    """Guards resuming a run from before encoder_context with a config file that has since been given it: one line, not shapes."""
    run(tiny_data, tmp_path, "--max_iters=2")
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["model"]["encoder_context"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"encoder_context='block' \(was 'prefix'\). To go on"):
        run(tiny_data, tmp_path, "--max_iters=3", "--resume", "--encoder_context=block")
    assert run(tiny_data, tmp_path, "--max_iters=3", "--resume")["steps"] == 3


def test_a_run_without_k_means_says_so(tiny_data, tmp_path):
    """Guards against accuracies that are those of random codebooks: a run that ends before its codebooks are made of data."""
    with pytest.warns(UserWarning, match="the codebooks were never made of data"):
        assert run(tiny_data, tmp_path, "--max_iters=3")["codes_of_data"] is False
    assert run(tiny_data, tmp_path, "--resume")["codes_of_data"] is True


def test_two_processes_train_one_autoencoder(tiny_data, tmp_path):
    """
    Guards DDP: two gloo processes give one's losses, before k-means and after it. They share one codebook: each evaluates half of
    the windows with its own, and the sum is what one process finds with the checkpoint, which holds that of rank 0.
    """
    more = ("--gradient_accumulation_steps=2", "--learning_rate=1e-2", "--final_eval_tokens=1280", "--max_iters=12")
    one, two = tmp_path / "one", tmp_path / "two"
    words = [str(ROOT / "train.py"), f"--dataset={tiny_data}", f"--out_dir={two}", *SHORT.split(), *more]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run(tiny_data, one, *more)
    steps = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    trained = [(a, b) for a, b in zip(*steps) if a["kind"] == "train"]
    assert len({a["commitment_loss"] == 0 for a, _ in trained}) == 2, "steps before k-means, and steps after it"
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in trained), [(a["loss"], b["loss"]) for a, b in trained]
    together = json.loads((two / "summary.json").read_text())
    alone = run(tiny_data, two, *more, "--resume")  # nothing is left to do but the evaluation
    assert state(two)["quantizer.codebook.steps"] > 3 and (together["world_size"], alone["world_size"]) == (2, 1)
    assert abs(together["val_loss"] - alone["val_loss"]) < 1e-6 and together["code_usage"] == alone["code_usage"]


@pytest.mark.parametrize("kind", ["ema", "simvq"])
def test_frozen_codes_stay_while_the_decoder_learns(kind, tiny_data, tmp_path, capsys):
    """
    Guards a prior over codes whose autoencoder trains on: codebooks or an embedding that moved would change what its codes mean.
    Half precision must not change them either, and the backbone that was loaded first not be loaded again.
    """
    small = "--model=encoder_decoder --block_size=32 --n_embd=16 --n_head=2 --n_encoder_layer=1 --n_decoder_layer=1 --max_iters=1"
    train.main([f"--dataset={tiny_data}", f"--out_dir={tmp_path / 'backbone'}", *small.split(), "--device=cpu", "--position=rope",
                "--warmup_iters=0", "--eval_iters=1", "--final_eval_tokens=100"])  # fmt: skip
    words = [f"--codebook_kind={kind}", f"--backbone={tmp_path / 'backbone'}"]
    run(tiny_data, tmp_path / "a", *words)
    frozen = [*words, "--freeze_codes=true", f"--init_from={tmp_path / 'a'}", "--weight_decay=0.5", "--dtype=bfloat16"]
    with pytest.raises(ValueError, match="freeze_codes=true keeps the codes of another run"):
        run(tiny_data, tmp_path / "b", *words, "--freeze_codes=true")
    run(tiny_data, tmp_path / "b", *frozen, "--max_iters=5")
    run(tiny_data, tmp_path / "b", *frozen, "--resume")
    old, new = (checkpoint.load_run(tmp_path / name, "last")[0] for name in "ab")
    start = checkpoint.load_run(tmp_path / "a", "best")[0]
    idx = tokens(8, 32)
    assert new.codebook_hash() == start.codebook_hash() and torch.equal(new.encode(idx), start.encode(idx))
    changed = {name for name, p in start.named_parameters() if not torch.equal(p, new.get_parameter(name))}
    assert changed == {name for name, p in start.named_parameters() if name.startswith(("refine_dec", "from_", "up.", "deco", "ln_f"))}
    assert old.config != new.config and "commitment_loss" not in (tmp_path / "b" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="dropout=0.1 and quantize_dropout=0.0 would change codes"):
        AutoencoderConfig(freeze_codes=True, dropout=0.1)


def test_weights_of_another_encoder_context_are_refused(tiny_data, tmp_path):
    """Guards frozen codes: where a block is one token no shape shows what the encoder saw, and the same weights make other codes."""
    run(tiny_data, tmp_path / "a", "--latent_factor=1", "--encoder_context=prefix")
    for more in ([], ["--freeze_codes=true"]):
        with pytest.raises(ValueError, match=r"encoder_context=prefix \(here block\), so its weights would mean something else"):
            run(tiny_data, tmp_path / "b", "--latent_factor=1", "--encoder_context=block", f"--init_from={tmp_path / 'a'}", *more)
    with pytest.raises(ValueError, match=r"does not fit: it has codebook_levels=2 \(here 3\); set the same"):
        frozen = ["--freeze_codes=true", "--quantize_after=1", "--codebook_levels=3"]
        run(tiny_data, tmp_path / "b", "--latent_factor=1", "--encoder_context=prefix", f"--init_from={tmp_path / 'a'}", *frozen)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_backbone_of_a_run(tiny_data, tmp_path, position):
    """Guards the frozen backbone: bit for bit as it was until its time, then trained; nothing of it needed to go on or to load."""
    shape = f"--block_size=32 --n_embd=16 --n_head=2 --n_encoder_layer=1 --n_decoder_layer=1 --position={position}".split()
    trunk, out = tmp_path / "trunk", tmp_path / "out"
    length = ("--max_iters=2", "--warmup_iters=1", "--eval_interval=2", "--eval_iters=1", "--batch_size=4", "--device=cpu")
    train.main([f"--dataset={tiny_data}", f"--out_dir={trunk}", *shape, *length, "--n_cross_head=2", "--pos_sub=plain"])
    more = (f"--backbone={trunk}", "--freeze_backbone_iters=6", f"--position={position}", "--grad_clip=1.0")
    theirs = state(trunk, "best")
    run(tiny_data, out, *more, "--max_iters=3")
    trunk.rename(tmp_path / "gone")
    run(tiny_data, out, *more, "--max_iters=6", "--resume")
    frozen = state(out)
    names = [name for name in frozen if name.startswith(("wte.", "wpe.", "encoder."))]
    assert len(names) == (7 if position == "learned" else 6) + 1 and "wte.weight" in names
    for name in names:
        assert torch.equal(frozen[name], theirs[name][: len(frozen[name])]), name
    run(tiny_data, out, *more, "--resume")
    after = state(out)
    assert all(not torch.equal(after[name], frozen[name]) for name in names)
    model = checkpoint.load_run(out, "last")[0]
    assert torch.equal(model.wte.weight, after["wte.weight"])
    assert [model.backbone_rate(step) for step in (0, 5, 6, 99)] == [0.0, 0.0, 0.1, 0.1]


def test_a_run_too_short_for_codes_says_so_when_it_starts():
    """Guards hours of training of an autoencoder that nothing can be built on; a trial of a few steps is still possible."""
    for length in (29, 30):  # with 30 k-means comes with the last step
        with pytest.warns(UserWarning, match=f"quantize_after=30 is not below max_iters={length}: .* never trains on codes"):
            make(quantize_after=30).check(None, length)
    simvq, frozen = make(codebook_kind="simvq", quantize_after=300), initialized(quantize_after=30)
    with warnings.catch_warnings(action="error"):
        make(quantize_after=30).check(None, 31)
        make(quantize_after=30).check(None, 0)  # evaluate.py
        simvq.check(None, 1)
        frozen.check(None, 29)  # its codes are those of init_from


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 18}, "block_size=18 is not a multiple of latent_factor=4"),
        ({"latent_factor": 3}, "factor=3 tokens per latent"),
        ({"n_head": 5}, "n_embd=12 is not divisible by n_head=5"),
        ({"n_decoder_layer": 0}, "n_decoder_layer=0: at least 1"),
        ({"codebook_size": 1}, "codebook_size=1: at least 2"),
        ({"codebook_levels": 0}, "codebook_levels=0: at least 1"),
        ({"codebook_decay": 1.0}, "codebook_decay=1.0"),
        ({"quantize_dropout": 1.5}, "quantize_dropout=1.5"),
        ({"quantize_after": -1}, "quantize_after=-1 must not be negative"),
        ({"freeze_backbone_iters": 5}, "there is none; set backbone"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_cannot_work(options, message):
    """Guards clear lines: each names the key, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**(TINY | options))


def test_slow_averages_are_searched_less_often():
    """Guards codebook_decay: a code is not restarted before its averages have forgotten what they began with."""
    for decay, steps in ((0.5, 100), (0.99, 100), (0.999, 1000)):
        assert AutoencoderConfig(codebook_decay=decay).quantizer_config().restart_steps == steps


def test_backbones_that_do_not_fit(by_heart, tiny_data, tmp_path):
    """Guards bad input: a backbone that is missing, of another model or another width, before the run directory is made."""
    out, trunk = tmp_path / "out", tmp_path / "trunk"
    shape = "--block_size=16 --n_embd=8 --n_head=2 --n_encoder_layer=1 --n_decoder_layer=1 --n_cross_head=2 --position=learned"
    length = "--max_iters=1 --warmup_iters=0 --eval_iters=1 --batch_size=1 --device=cpu --dtype=float32"
    train.main([f"--dataset={tiny_data}", f"--out_dir={trunk}", "--window=5", *shape.split(), *length.split()])
    for more, message in (
        ([f"--backbone={tmp_path / 'nothing'}"], "backbone=.*nothing is not a directory"),
        ([f"--backbone={by_heart[0]}"], "is a run of autoencoder; one of encoder_decoder is needed"),
        ([f"--backbone={trunk}"], "does not fit: it has n_embd=8, position=learned, window=5.*; set the same here"),
        ([f"--backbone={trunk}", "--n_embd=8", "--position=learned"], "it has block_size=16, window=5"),
        ([f"--backbone={trunk}", "--n_embd=8", "--position=learned", "--n_head=4", "--block_size=16"], "it has n_head=2, window"),
        (["--eval_sample_tokens=5"], "autoencoder continues no text"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiny_data, out, *more)
        assert not out.exists()
    train.main([f"--dataset={tiny_data}", f"--out_dir={trunk}", "--overwrite", *shape.split(), *length.split()])
    other = shutil.copytree(tiny_data, tmp_path / "data")
    tokenizer.save(tokenizer.CharTokenizer("abc"), other)
    with pytest.raises(ValueError, match="has another tokenizer than"):  # its embeddings are those of other characters
        run(other, out, f"--backbone={trunk}", "--vocab_size=256", "--position=learned", *shape.split()[:3])
    assert not out.exists()
