"""The residual quantizer against its equations, another implementation, several processes, and the leaks it must not have."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from conftest import ROOT
from latent.quantize import QuantizerConfig, ResidualQuantizer, code_counts, code_usage, kmeans, nearest_code

TINY = dict(latent_dim=6, codebook_size=8, codebook_levels=3, vectors_per_code=4, codebook_decay=0.8, restart_interval=5)
OPTIONS = [
    {},
    {"shared_codebook": True},
    {"gradient": "rotation"},
    {"kind": "simvq"},
    {"kind": "simvq", "shared_codebook": True},
]
IDS = ["ema", "ema-shared", "ema-rotation", "simvq", "simvq-shared"]


def make(seed: int = 0, dtype: torch.dtype = torch.float64, initialize: bool = True, **options) -> ResidualQuantizer:
    torch.manual_seed(seed)
    quantizer = ResidualQuantizer(QuantizerConfig(**(TINY | options))).to(dtype)
    while initialize and not quantizer.initialized:
        quantizer(torch.randn(64, quantizer.config.latent_dim, dtype=dtype))
        quantizer.step()
    return quantizer


def clusters(number: int, means: torch.Tensor, generator: torch.Generator, noise: float = 0.2) -> torch.Tensor:
    """Stationary data: equally likely cluster means with some noise."""
    index = torch.randint(len(means), (number,), generator=generator)
    return means[index] + noise * torch.randn(number, means.size(1), generator=generator)


def state_of(quantizer: ResidualQuantizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in [*quantizer.named_buffers(), *quantizer.named_parameters()]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# lookup, value and gradient


def test_nearest_code(monkeypatch):
    """Guards the expanded square, the chunks, ties (the first) and the matmul precision, which is set and put back."""
    used, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: used.append(torch.get_float32_matmul_precision()) or addmm(*a, **k))
    torch.manual_seed(0)
    x, codebook = torch.randn(500, 6), torch.randn(64, 6)
    brute = (x.double()[:, None] - codebook.double()).pow(2).sum(-1).argmin(-1)
    assert torch.equal(nearest_code(x, codebook), brute)
    for word in ("medium", "highest"):
        torch.set_float32_matmul_precision(word)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", word == "medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nearest_code(x, codebook), brute)
        assert torch.get_float32_matmul_precision() == word and torch.backends.cudnn.allow_tf32 == (word == "medium")
    assert used == ["highest"] * 3  # on a CPU the words make no difference, on a GPU the second is TF32
    many = torch.randn(2**13, 2)
    assert torch.equal(nearest_code(many[:2100], many), torch.arange(2100))  # two chunks
    assert nearest_code(torch.zeros(3, 2), torch.ones(4, 2)).tolist() == [0, 0, 0]
    assert nearest_code(x[:0], codebook).shape == (0,)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("initialize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoded_codes_are_the_output(options, initialize, dtype):
    """Guards decode(codes) == z_q to the last bit, in training and evaluation, before and after k-means, masked, any shape."""
    trained = make(initialize=initialize, dtype=dtype, **options)
    for quantizer in (trained, copy.deepcopy(trained).eval()):
        for shape in ((2, 7), (5,), (2, 3, 4), (1, 0)):
            z = torch.randn(*shape, 6, dtype=dtype)
            mask = torch.rand(shape) > 0.3
            for m in (None, mask):
                out = quantizer(z, m)
                assert out.z_q.shape == z.shape and out.codes.shape == (*shape, 3) and out.z_q.dtype == dtype
                assert torch.equal(quantizer.decode(out.codes), out.z_q)
                assert torch.equal(quantizer.encode(z, m), out.codes)
                if m is not None:
                    assert (out.codes[~m] == -1).all() and (out.z_q[~m] == 0).all() and (out.codes[m] >= 0).all()
    codes = quantizer.encode(torch.randn(4, 6, dtype=dtype))
    by_hand = sum(quantizer.vectors()[level][codes[:, level]] for level in range(2))
    torch.testing.assert_close(quantizer.decode(codes[:, :2]), by_hand)  # the first levels alone
    with pytest.raises(ValueError, match="4 levels .* codebook_levels=3"):
        quantizer.decode(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["ema", "simvq"])
def test_gradient_goes_through_once(kind):
    """Guards against straight-through at every level, which multiplies the encoder's gradient by D; masked latents get none."""
    quantizer = make(kind=kind)
    z = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mask, upstream = torch.rand(2, 5) > 0.3, torch.randn(2, 5, 6, dtype=torch.float64)
    (quantizer(z, mask).z_q * upstream).sum().backward()
    assert torch.equal(z.grad, upstream * mask[..., None])
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())
    if kind == "ema":
        assert not list(quantizer.parameters())  # nothing for an optimizer or its weight decay


def test_rotation_against_the_matrix():
    """Guards the rotation trick: the gradient is that of scale * R z with R spelled out as a matrix, R z on the output."""
    quantizer = make(gradient="rotation")
    z = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, 6, dtype=torch.float64)
    z_q = quantizer(z).z_q
    (z_q * upstream).sum().backward()
    for i in range(9):
        a, b = (F.normalize(v, dim=0) for v in (z[i].detach(), z_q[i].detach()))
        w = F.normalize(a + b, dim=0)
        R = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(w, w) + 2 * torch.outer(b, a)
        torch.testing.assert_close(R @ R.T, torch.eye(6, dtype=torch.float64))
        scale = z_q[i].detach().norm() / z[i].detach().norm()
        torch.testing.assert_close(scale * R @ z[i].detach(), z_q[i].detach())
        torch.testing.assert_close(z.grad[i], scale * R.T @ upstream[i])


@pytest.mark.parametrize("kind", ["ema", "simvq"])
def test_losses_are_means_of_valid_latents(kind):
    """Guards the commitment as a mean over depth (a sum is D times stronger), the codebook loss, and whom each of them moves."""
    quantizer = make(kind=kind)
    z = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) > 0.3
    out = quantizer(z, mask)
    rows, codes = z[mask], out.codes[mask]
    zhat, commitment, codebook, distortion = 0.0, [], [], [rows.pow(2).mean()]
    for level, book in enumerate(quantizer.vectors()):
        vector = book[codes[:, level]]
        codebook.append((rows.detach() - zhat - vector).pow(2).mean())
        zhat = zhat + vector.detach()
        commitment.append((rows - zhat).pow(2).mean())
    torch.testing.assert_close(out.losses["commitment"], sum(commitment) / 3)
    torch.testing.assert_close(out.distortion, torch.stack(distortion + commitment).detach())
    assert out.losses.keys() == quantizer.config.loss_weights.keys()
    grad = torch.autograd.grad(out.losses["commitment"], z, retain_graph=True)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(sum(commitment) / 3, z, retain_graph=True)[0])
    if kind == "simvq":
        torch.testing.assert_close(out.losses["codebook"], sum(codebook) / 3)
        of_z, of_map = torch.autograd.grad(out.losses["codebook"], [z, quantizer.codebook.map], allow_unused=True)
        assert of_z is None and of_map.abs().sum() > 0
        assert torch.autograd.grad(quantizer(z).losses["commitment"], quantizer.codebook.map, allow_unused=True)[0] is None


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_padding_changes_nothing(options):
    """
    Guards statistics, losses and codes against padded latents, whatever stands in them, and against an empty batch; and statistics
    against latents that are not finite, which would stay in the averages although the optimizer skips such a step.
    """
    short, long = make(**options), make(**options)
    z = torch.randn(3, 4, 6, dtype=torch.float64)
    padded = torch.cat((z, torch.full((3, 5, 6), float("nan"), dtype=torch.float64)), 1)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 4:] = False
    a, b = short(z), long(padded, mask)
    assert torch.equal(a.codes, b.codes[:, :4]) and torch.equal(a.z_q, b.z_q[:, :4])
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name])
    torch.testing.assert_close(a.distortion, b.distortion)
    for x, y in zip(state_of(short).values(), state_of(long).values()):
        torch.testing.assert_close(x, y)
    padded[mask & (torch.arange(9) == 1)] = float("inf")  # a pass that overflowed: real latents, and the whole of a latent
    padded[0, 2, 3] = float("nan")
    long(padded, mask)
    finite = mask & padded.isfinite().all(-1)
    short(padded, finite)
    for x, y in zip(state_of(short).values(), state_of(long).values()):
        torch.testing.assert_close(x, y)
    empty = long(padded, torch.zeros_like(mask))
    assert all(loss == 0 for loss in empty.losses.values()) and (empty.codes == -1).all()


def test_quantize_dropout():
    """Guards the truncation: in training only, a prefix of levels, z_q of exactly these, statistics of all of them."""
    quantizer = make(quantize_dropout=0.5)
    depths = []
    for _ in range(60):
        out = quantizer(torch.randn(4, 6, dtype=torch.float64))
        used = (out.codes >= 0).sum(-1)
        assert (used == used[0]).all() and (out.codes[:, : used[0]] >= 0).all()
        assert torch.equal(quantizer.decode(out.codes), out.z_q)
        depths.append(int(used[0]))
    assert {1, 2, 3} == set(depths) and 15 < depths.count(3) < 45
    assert (quantizer.codebook.pending_count.sum(-1) == 240).all()
    quantizer.eval()
    assert all((quantizer(torch.randn(4, 6, dtype=torch.float64)).codes >= 0).all() for _ in range(10))
    always = make(quantize_dropout=1.0)  # a probability of 1 leaves out a level every time
    depths = {int((always(torch.randn(1, 6, dtype=torch.float64)).codes >= 0).sum()) for _ in range(40)}
    assert depths == {1, 2}


# ----------------------------------------------------------------------------------------------------------------------
# codebooks


@pytest.mark.parametrize("shared", [False, True])
def test_moving_averages(shared):
    """Guards the update against its equations in one-hot matrices, one step for two micro-batches, masked latents left out."""
    quantizer = make(shared_codebook=shared, dead_threshold=0.0)
    before = copy.deepcopy(quantizer.codebook)
    z = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    masks = [torch.rand(2, 5) > 0.3 for _ in range(2)]
    codes = torch.cat([quantizer(part, mask).codes[mask] for part, mask in zip(z, masks)])
    assert torch.equal(before.codes, quantizer.codebook.codes)  # forward never changes what it looks up
    quantizer.step()
    residual, books = torch.cat([part[mask] for part, mask in zip(z, masks)]), before.codes.size(0)
    n, s = torch.zeros_like(before.ema_count), torch.zeros_like(before.ema_sum)
    for level in range(3):
        one_hot = F.one_hot(codes[:, level], 8).double()
        n[level % books] += one_hot.sum(0)
        s[level % books] += one_hot.T @ residual
        residual = residual - before.codes[level % books][codes[:, level]]
    N, m = 0.8 * before.ema_count + 0.2 * n, 0.8 * before.ema_sum + 0.2 * s
    total = N.sum(-1, keepdim=True)
    e = m / (total * (N + 1e-5) / (total + 8 * 1e-5))[..., None]
    torch.testing.assert_close(quantizer.codebook.ema_count, N)
    torch.testing.assert_close(quantizer.codebook.codes, e)
    assert not quantizer.codebook.pending_count.any() and not quantizer.codebook.pending_sum.any()


def test_evaluation_changes_nothing():
    """Guards statistics that update in evaluation, initialization by the validation pass, and steps without data."""
    for initialize in (True, False):
        quantizer = make(initialize=initialize)
        quantizer.step()
        before = state_of(quantizer)
        quantizer.eval()
        for _ in range(20):
            quantizer(torch.randn(64, 6, dtype=torch.float64))
            quantizer.encode(torch.randn(64, 6, dtype=torch.float64))
            quantizer.step()
        quantizer.train()
        quantizer.encode(torch.randn(64, 6, dtype=torch.float64))
        assert same(before, state_of(quantizer)) and quantizer.initialized == initialize


@pytest.mark.parametrize("shared", [False, True])
def test_initialization_is_on_each_levels_own_residual(shared):
    """Guards the residual norm, which grows with depth when all levels start from the same vectors, and the counts' scale."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(200, 16, generator=generator)
    options = dict(latent_dim=16, codebook_size=32, codebook_levels=4, vectors_per_code=20, shared_codebook=shared)
    quantizer = make(initialize=False, dtype=torch.float32, **options)
    calls = 0
    while not quantizer.initialized:
        before = quantizer.codebook_hash()
        quantizer(clusters(96, means, generator))
        assert quantizer.codebook_hash() == before
        quantizer.step()
        calls += 1
    assert calls == math.ceil(20 * 32 / 96)
    torch.testing.assert_close(
        quantizer.codebook.ema_count.sum(-1), torch.full((4,), 96.0) if not shared else torch.tensor([384.0])
    )
    quantizer.eval()
    distortion = quantizer(clusters(500, means, generator)).distortion
    assert (distortion[1:] < (0.97 if shared else 0.9) * distortion[:-1]).all(), distortion


def test_random_codebooks_shorten_the_residual():
    """
    Guards the time before initialization, and SimVQ's start: codes of unit variance would lengthen a wide latent. Much longer or
    shorter ones shorten it less.
    """
    for kind in ("ema", "simvq"):
        for width in (8, 256):
            quantizer = make(initialize=False, dtype=torch.float32, kind=kind, latent_dim=width, codebook_size=256)
            z = torch.randn(1000, width)
            distortion = quantizer(z).distortion
            assert (distortion[1:] < distortion[:-1]).all(), distortion
            for factor in (0.5, 4) if kind == "ema" else ():
                quantizer.codebook.codes[0] *= factor
                assert quantizer.eval()(z).distortion[1] > distortion[1]


def test_a_centre_without_rows_stays_where_it_is():
    """Guards the averages behind k-means: those of a code that got no vector, if 0, would make it 0 at the first update."""
    torch.manual_seed(0)
    codebook, codes = ResidualQuantizer(QuantizerConfig(latent_dim=3, codebook_size=4, codebook_levels=1)).codebook, torch.randn(4, 3)
    codebook.set_codes(0, codes, torch.tensor([5, 3, 2, 0]))
    codebook.initialized.fill_(True)
    codebook.pending_count[0] = torch.tensor([6.0, 2.0, 2.0, 0.0])
    codebook.pending_sum[0] = codebook.pending_count[0][:, None] * codes
    codebook.step(True)
    assert (codebook.codes[0] - codes).abs().max() < 1e-2


def test_kmeans_finds_clusters_and_fills_every_centre():
    """Guards Lloyd's iterations and centres that got no row."""
    generator = torch.Generator().manual_seed(0)
    means = 10 * torch.randn(5, 3, generator=generator)
    x = clusters(400, means, generator, noise=0.01)
    centres, count = kmeans(x, 20, 20, generator)
    assert count.sum() == 400
    assert (x - centres[nearest_code(x, centres)]).norm(dim=-1).max() < 0.1
    assert torch.cdist(centres, means).min(-1).values.max() < 0.1


@pytest.mark.parametrize("shared", [False, True])
def test_restarts_go_to_zero_on_stationary_data(shared):
    """Guards both ends: dead codes come back and are used, and none is restarted for ever (a fixed threshold of 2 hits kills
    half of all codes at every search when a code gets 2 a step). The averages start as those of a collapsed codebook."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(16, 6, generator=generator)
    options = dict(codebook_decay=0.9, restart_interval=30, codebook_size=16, codebook_levels=2, kmeans_iterations=0)
    quantizer = make(dtype=torch.float32, shared_codebook=shared, **options)
    with torch.no_grad():  # all codes but two far away
        quantizer.codebook.codes[:, 2:] = 100.0
        quantizer.codebook.ema_sum[:, 2:] = 100.0 * quantizer.codebook.ema_count[:, 2:, None]
    history = []
    for _ in range(600):
        quantizer(clusters(32, means, generator, noise=0.3))  # 2 hits a code and step
        quantizer.step()
        history.append(sum(quantizer.restarts))
    assert history[0] == 0 and history[100] >= 14 * (1 if shared else 2)
    assert history[-1] == history[-200], "codes are still being restarted"
    codes = quantizer.eval().encode(clusters(2000, means, generator, noise=0.3))
    assert min(code_usage(code_counts(codes, quantizer.config.codebook_size), warn=False)["usage"]) > (0.3 if shared else 0.9)
    distortion = quantizer(clusters(500, means, generator, noise=0.3)).distortion
    assert (distortion[1:] < distortion[:-1]).all()


def test_a_restarted_code_survives_the_next_update():
    """Guards the EMA state of a restarted code: kept, it undoes the restart in the same step."""
    quantizer = make(dtype=torch.float32)
    book = quantizer.codebook
    book.codes[0, 3], book.ema_sum[0, 3], book.ema_count[0, 3] = 50.0, 50.0 * 1e-4, 1e-4
    book.restart_dead_codes()
    recent = book.recent[:-1]
    assert quantizer.restarts == [1, 0, 0] and (recent == book.codes[0, 3]).all(-1).any()
    chosen = book.codes[0, 3].clone()
    quantizer(torch.randn(64, 6))
    quantizer.step()
    assert (book.codes[0, 3] - chosen).norm() < 2 and book.ema_count[0, 3] > 0.5 * book.ema_count[0].mean()
    book.restart_dead_codes()
    assert quantizer.restarts == [1, 0, 0]


@pytest.mark.parametrize("shared", [False, True])
def test_a_dead_code_becomes_a_residual_of_its_level(shared):
    """Guards restarts of deep levels: a latent, which is longer than any residual there, would be nobody's nearest again."""
    quantizer = make(shared_codebook=shared)
    book, deep = quantizer.codebook, 0 if shared else 2
    residuals = quantizer.lookup(book.recent[:-1], quantizer.vectors())[1]
    book.ema_count[deep, :6] = 1e-4
    book.restart_dead_codes()
    assert sum(quantizer.restarts) == 6
    pool = torch.cat(residuals[:3]) if shared else residuals[2]
    found = [[bool((rows == code).all(-1).any()) for rows in (pool, residuals[0])] for code in book.codes[deep, :6]]
    assert all(in_pool for in_pool, _ in found) and not all(is_latent for _, is_latent in found)


def test_recent_latents_are_kept_in_a_ring():
    """Guards what k-means and restarts draw from: the last 4 x 8 valid latents, and of a batch beyond that the first ones."""
    quantizer = make(initialize=False)
    ring, seen = torch.zeros(32, 6, dtype=torch.float64), 0
    for rows in (12, 12, 12, 1, 80, 7):
        z, mask = torch.randn(rows, 6, dtype=torch.float64), torch.rand(rows) > 0.3
        quantizer(z, mask)
        for latent in z[mask][:32]:
            ring[seen % 32] = latent
            seen += 1
        assert torch.equal(quantizer.codebook.recent[:-1], ring) and quantizer.codebook.seen == seen


@pytest.mark.parametrize("initialize", [True, False])
def test_saved_and_loaded(tmp_path, initialize):
    """Guards checkpoints: codes, hash, and everything a run goes on with, k-means and restarts included, through safetensors."""
    for options in OPTIONS:
        quantizer = make(initialize=initialize, seed=3, **options)
        quantizer(torch.randn(20, 6, dtype=torch.float64))
        quantizer.step()
        safetensors.torch.save_file(quantizer.state_dict(), tmp_path / "quantizer.safetensors")
        loaded = make(initialize=False, seed=4, **options)
        assert loaded.codebook_hash() != quantizer.codebook_hash()
        loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "quantizer.safetensors"))
        z = torch.randn(50, 6, dtype=torch.float64)
        assert torch.equal(loaded.encode(z), quantizer.encode(z)) and loaded.codebook_hash() == quantizer.codebook_hash()
        for _ in range(8):
            z = torch.randn(20, 6, dtype=torch.float64)
            for q in (quantizer, loaded):
                q(z)
                q.step()
        assert quantizer.initialized and same(state_of(quantizer), state_of(loaded))


def test_hash_tells_codebooks_apart():
    """Guards the contract with a prior: one changed number is another codebook; statistics are none of its business."""
    for kind, name in (("ema", "codes"), ("simvq", "table"), ("simvq", "map")):
        quantizer = make(kind=kind, dtype=torch.float32)
        before = quantizer.codebook_hash()
        quantizer(torch.randn(30, 6))
        assert quantizer.codebook_hash() == before and len(before) == 64
        with torch.no_grad():
            getattr(quantizer.codebook, name)[0, 0, 0] += 1e-6
        assert quantizer.codebook_hash() != before


def test_simvq_learns_with_an_optimizer():
    """Guards the alternative: the codebook loss lowers the distortion and uses the codes, with no step()."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(100, 8, generator=generator) * torch.linspace(0.1, 2.0, 8)
    quantizer = make(kind="simvq", dtype=torch.float32, latent_dim=8, codebook_size=32)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2, weight_decay=0.0)
    first = quantizer(clusters(500, means, generator)).distortion
    for _ in range(150):
        quantizer(clusters(200, means, generator)).losses["codebook"].backward()
        optimizer.step()
        optimizer.zero_grad()
    last = quantizer(clusters(500, means, generator)).distortion
    assert last[-1] < 0.7 * first[-1] and (last[1:] < last[:-1]).all(), (first, last)
    codes = quantizer.encode(clusters(3000, means, generator))
    assert min(code_usage(code_counts(codes, 32), warn=False)["usage"]) > 0.9


# ----------------------------------------------------------------------------------------------------------------------
# precision, compilation, processes, another implementation


def test_autocast_leaves_codebooks_in_float32():
    """Guards statistics and codes against bfloat16: under autocast both are those of the rounded latents in float32."""
    for kind in ("ema", "simvq"):
        quantizer, plain = make(kind=kind, dtype=torch.float32), make(kind=kind, dtype=torch.float32)
        z = torch.randn(40, 6).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = quantizer(z)
            assert torch.equal(quantizer.encode(z), out.codes) and torch.equal(quantizer.decode(out.codes), out.z_q)
        expected = plain(z.float())
        assert out.z_q.dtype == torch.float32 and out.losses["commitment"].dtype == torch.float32
        assert torch.equal(out.codes, expected.codes) and torch.equal(out.z_q, expected.z_q)
        quantizer.step()
        plain.step()
        assert same(state_of(quantizer), state_of(plain))
        assert all(t.dtype == torch.float32 for t in state_of(quantizer).values() if t.is_floating_point())


@pytest.mark.parametrize("options", [{"quantize_dropout": 0.5}, {"kind": "simvq", "gradient": "rotation"}])
def test_compiles_without_graph_breaks(options):
    """Guards torch.compile: forward, statistics and backward in one graph, with the same results."""
    eager, compiled = (make(dtype=torch.float32, **options) for _ in range(2))
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for i in range(2):
        z, mask = torch.randn(2, 9, 6), torch.rand(2, 9) > 0.3
        grads = []
        for quantizer in (eager, run):
            torch.manual_seed(i)
            z = z.detach().requires_grad_()
            out = quantizer(z, mask)
            (out.z_q.pow(2).sum() + sum(out.losses.values())).backward()
            grads.append((out.codes, z.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        torch.testing.assert_close(grads[0][1], grads[1][1])
        for quantizer in (eager, compiled):
            quantizer.step()
    for name, tensor in state_of(eager).items():
        torch.testing.assert_close(tensor, state_of(compiled)[name])


PROCESSES = """
import os, sys
import torch, torch.distributed as dist
from latent.quantize import QuantizerConfig, ResidualQuantizer
dist.init_process_group("gloo")
rank = dist.get_rank()
for shared in (False, True):
    torch.manual_seed(0)  # DDP gives all processes one start; their data differ
    config = QuantizerConfig(latent_dim=6, codebook_size=8, codebook_levels=3, vectors_per_code=4, codebook_decay=0.8, restart_interval=5,
                             dead_threshold=0.3, shared_codebook=shared)
    quantizer = ResidualQuantizer(config)
    torch.manual_seed(1 + rank)
    data, history = [], []
    for step in range(40):
        if step == 20:  # some more codes that die
            quantizer.codebook.ema_count[:, :2] = 0.01
        for _ in range(2):
            data.append((torch.randn(1 + rank, 5, 6) * (1 + rank), torch.rand(1 + rank, 5) > 0.3 + 0.3 * rank))
            quantizer(*data[-1])
        quantizer.step()
        history.append(quantizer.codebook.codes.clone())
    torch.save({"state": quantizer.state_dict(), "data": data, "history": torch.stack(history)},
               f"{sys.argv[1]}/{shared}-{rank}.pt")
dist.barrier()
os._exit(0)  # all is saved; see runtime.end_process
"""


def test_two_processes_keep_one_codebook(tmp_path):
    """Guards statistics that are not summed, and k-means or restarts that each process draws for itself or from its own latents:
    all bits equal in both, and up to rounding those of one process that meets the data of both, pass by pass."""
    (tmp_path / "run.py").write_text(PROCESSES, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "run.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for shared in (False, True):
        a, b = (torch.load(tmp_path / f"{shared}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert a["state"]["codebook.initialized"] and torch.equal(a["history"], b["history"])  # after every step
        for name in ("codes", "ema_count", "ema_sum", "recent", "seen", "initialized", "steps", "restarts"):
            rows = slice(-1) if name == "recent" else ...  # the last one holds what is not to be kept
            assert torch.equal(a["state"][f"codebook.{name}"][rows], b["state"][f"codebook.{name}"][rows]), name
        assert a["state"]["codebook.restarts"].sum() > 0
        torch.manual_seed(0)
        alone = ResidualQuantizer(QuantizerConfig(
            latent_dim=6, codebook_size=8, codebook_levels=3, vectors_per_code=4, codebook_decay=0.8, restart_interval=5,
            dead_threshold=0.3, shared_codebook=shared,
        ))  # fmt: skip
        for step in range(40):
            if step == 20:
                alone.codebook.ema_count[:, :2] = 0.01
            for of_a, of_b in list(zip(a["data"], b["data"]))[2 * step : 2 * step + 2]:
                alone(*of_a)
                alone(*of_b)
            alone.step()
            torch.testing.assert_close(alone.codebook.codes, a["history"][step], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.codebook.restarts, a["state"]["codebook.restarts"])


@pytest.mark.parametrize("shared", [False, True])
def test_agrees_with_vector_quantize_pytorch(shared):
    """Guards assignment and moving averages against an independent implementation, over several steps. For a shared codebook only
    the assignment: there the package applies one moving average after the other, level by level, instead of one to their sum."""
    package = pytest.importorskip("vector_quantize_pytorch", reason="test-only dependency: pip install vector-quantize-pytorch")
    options = dict(latent_dim=6, codebook_size=16, codebook_decay=0.9, dead_threshold=0.0, shared_codebook=shared)
    ours = make(dtype=torch.float32, **options)
    theirs = package.ResidualVQ(
        dim=6, num_quantizers=3, codebook_size=16, decay=0.9, shared_codebook=shared, kmeans_init=False,
        threshold_ema_dead_code=0, rotation_trick=False,
    )  # fmt: skip
    for step in range(5):
        for level, layer in enumerate(theirs.layers):
            book = slice(0, 1) if shared else slice(level, level + 1)
            if step == 0 or shared:
                layer._codebook.embed.data.copy_(ours.codebook.codes[book])
                layer._codebook.embed_avg.data.copy_(ours.codebook.ema_sum[book])
                layer._codebook.cluster_size.data.copy_(ours.codebook.ema_count[book])
            else:
                torch.testing.assert_close(ours.codebook.codes[book], layer._codebook.embed, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours.codebook.ema_count[book], layer._codebook.cluster_size)
        z = torch.randn(4, 25, 6)
        out = ours(z)
        ours.step()
        quantized, indices, _ = theirs(z)
        assert torch.equal(out.codes, indices)
        torch.testing.assert_close(out.z_q, quantized, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# usage, settings


def test_usage_is_that_of_the_whole_pass():
    """Guards perplexity, which in single batches is capped by their size, and the warning for a collapsed level."""
    codes = torch.stack((torch.arange(640) % 64, torch.zeros(640, dtype=torch.int64)), -1)
    masked = torch.cat((codes, torch.full((60, 2), -1)))
    counts = sum(code_counts(part, 64) for part in masked.view(-1, 2, 10, 2))
    with pytest.warns(UserWarning, match="codebook level 2 has collapsed: perplexity 1.0 of 64"):
        report = code_usage(counts, warn=True)
    assert report == code_usage(code_counts(codes, 64), warn=False) and report["latents"] == 640
    assert report["usage"] == [1.0, 1 / 64] and report["perplexity"] == pytest.approx([64.0, 1.0])
    assert report["bits"] == pytest.approx(6.0)
    uneven = code_usage(code_counts(torch.tensor([[0], [0], [1], [2]]), 4), warn=False)
    assert uneven["perplexity"] == pytest.approx([2**1.5]) and uneven["usage"] == [0.75]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code_usage(code_counts(codes[:3, :1].expand(-1, 2), 64), warn=True)  # three latents cannot say more than these do
        empty = code_usage(code_counts(codes[:0], 64), warn=True)
    assert empty["latents"] == 0 and empty["usage"] == [0.0, 0.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent_dim": 0}, "latent_dim=0: at least 1"),
        ({"codebook_size": 1}, "codebook_size=1: at least 2"),
        ({"codebook_levels": 0}, "codebook_levels=0: at least 1"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0 must not be negative"),
        ({"quantize_dropout": 1.5}, "quantize_dropout=1.5: a probability"),
        ({"quantize_dropout": 0.5, "codebook_levels": 1}, "codebook_levels=1 leaves none to drop"),
        ({"codebook_decay": 1.0}, r"codebook_decay=1.0: a number in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(options, message):
    """Guards the messages, and that a setting which cannot work does not wait for the first latents to fail."""
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**options)


def test_defaults_and_the_meta_device():
    """Guards the published defaults, and that counting parameters needs no memory."""
    config = QuantizerConfig()
    assert (config.codebook_size, config.codebook_levels, config.commitment_weight) == (512, 4, 0.25)
    assert (config.codebook_decay, config.eps, config.dead_threshold) == (0.99, 1e-5, 0.05)
    with torch.device("meta"):
        for kind in ("ema", "simvq"):
            ResidualQuantizer(dataclasses.replace(config, kind=kind))
