"""What is written for speed, against the plain computation that it equals."""

import math
import platform
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import kernels
from conftest import ROOT, make_model


def case(dtype: torch.dtype, tokens: int = 23, width: int = 12, vocab: int = 31):
    torch.manual_seed(0)
    x = torch.randn(2, tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (2, tokens))
    targets[0, 3:7] = targets[1, -1] = -1
    return x, weight, targets


def plain_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("tokens", [1, 5, 7, 8, 9, 20])
def test_causal_products_equal_the_kernel(tokens, monkeypatch):
    """Guards the blocks of queries: a key too many or too few at a border, gradients added to the wrong keys, a scale forgotten."""
    monkeypatch.setattr(kernels, "BLOCK", 7)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, tokens, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    fast, slow = kernels.attend_in_products(q, k, v, None, True, 0.0), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (fast - slow).abs().max() < 1e-12
    weight = torch.randn(2, 3, tokens, 5, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (fast, slow))):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_products_drop_the_same_weights_forward_and_backward(monkeypatch, causal):
    """Guards dropout, in blocks and under a mask: value and gradients are those of all weights times the factors that were drawn."""
    monkeypatch.setattr(kernels, "BLOCK", 7)
    torch.manual_seed(0)
    drawn, kept = [], kernels.kept
    monkeypatch.setattr(kernels, "kept", lambda *args: drawn.append(kept(*args)) or drawn[-1])
    q, k, v = (torch.randn(2, 3, 20, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = None if causal else torch.ones(20, 20, dtype=torch.bool).tril()
    fast = kernels.attend_in_products(q, k, v, seen, causal, 0.3)
    factors = torch.cat([F.pad(part, (0, 20 - part.size(2))) for part in drawn], dim=1).view(2, 3, 20, 20)
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)
    slow = ((q @ k.mT / 5**0.5).masked_fill(hidden, float("-inf")).softmax(-1) * factors) @ v
    assert 0 < (factors.tril() == 0).sum() - hidden.sum() * 6 < 6 * 210 and (fast - slow).abs().max() < 1e-12
    weight = torch.randn(2, 3, 20, 5, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (fast, slow))):
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_dropout_drops_what_it_says(p):
    """Guards the random numbers of dropout: share and scale, the four numbers of a draw alike and unrelated, seed and gradient."""
    torch.manual_seed(0)
    x = torch.ones(4096, 1021, requires_grad=True)
    y = kernels.drop(x, p)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)  # what was dropped gets no gradient, the rest is scaled alike
    assert (y.unique() - torch.tensor([0.0, 1 / (1 - p)])).abs().max() < 1e-4
    dropped, error = (y == 0).double().flatten(), (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * error / dropped.numel() ** 0.5
    for i in range(4):
        assert abs(dropped[i::4].mean() - p) < 4 * error / dropped[i::4].numel() ** 0.5
    for lag in (1, 2, 3, 4, 1021):  # between neighbours, and between rows
        both = (dropped[:-lag] * dropped[lag:]).mean()
        assert abs(both - p**2) < 5 * p * (1 - p**2) ** 0.5 / dropped.numel() ** 0.5
    torch.manual_seed(0)
    assert torch.equal(kernels.drop(x, p), y)
    assert not torch.equal(kernels.drop(x, p), y)
    assert torch.equal(kernels.drop(x, 0.0), x)
    assert kernels.drop(x, 1 - 1e-9).isfinite().all()  # 16 bits are not enough for it


@pytest.mark.parametrize("rows", [1, 7, 46, 1000])
def test_head_loss_equals_the_plain_one(rows, monkeypatch):
    """Guards value and gradients: a chunk left out, targets of -1 counted, or a mean over chunks instead of tokens."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x, weight, targets = case(dtype)
        exact = plain_loss(x, weight, targets)
        gradients = torch.autograd.grad(3 * exact, (x, weight))
        monkeypatch.setitem(kernels.CHUNK, "cpu", rows * len(weight))
        loss = kernels.head_loss(x, weight, targets)
        assert abs(loss - exact) < tolerance * exact
        for ours, theirs in zip(torch.autograd.grad(3 * loss, (x, weight)), gradients):
            assert (ours - theirs).norm() < tolerance * theirs.norm()
        with torch.no_grad():
            assert abs(kernels.head_loss(x, weight, targets) - exact) < tolerance * exact


def test_head_loss_under_autocast(monkeypatch):
    """Guards the half-precision path: no further from float64 than torch's own under autocast, gradients in the weights' dtype."""
    x, weight, targets = case(torch.float32, tokens=1000, width=64, vocab=500)
    exact = plain_loss(x.double(), weight.double(), targets)
    gradients = torch.autograd.grad(exact, (x, weight))
    found = []
    for chunk in (2**30, 20 * len(weight)):
        monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            loss = kernels.head_loss(x, weight, targets)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, (x, weight))
        assert [g.dtype for g in grads] == [torch.float32] * 2
        found.append([abs(loss - exact).item()] + [((a - b).norm() / b.norm()).item() for a, b in zip(grads, gradients)])
    for theirs, ours in zip(*found):
        assert ours < max(1.2 * theirs, 0.005), found


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_a_model_with_chunks_trains_as_without(name, monkeypatch):
    """Guards tied weights, whose gradient comes from both ends, and the compiler: same losses over ten AdamW steps."""
    tokens = torch.randint(31, (10, 4, 13), generator=torch.Generator().manual_seed(3))

    def losses(chunk: int, backend: str | None = None) -> torch.Tensor:
        monkeypatch.setitem(kernels.CHUNK, "cpu", chunk)
        model = make_model(name, {}).train()
        forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for batch in tokens:
            loss = forward(batch[:, :-1], batch[:, 1:])[1]["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    whole, chunked = losses(2**30), losses(31 * 20)
    assert (whole - chunked).abs().max() < 1e-10 and whole[0] - whole[-1] > 1e-3
    assert (whole - losses(31 * 20, "aot_eager")).abs().max() < 1e-10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory as it likes")
def test_freed_memory_is_kept():
    """
    Guards a tenth of every training step on a CPU: tensors that come and go, logits of a chunk among them, must not cost page
    faults each time.
    """
    count = """
import resource, torch, kernels, runtime
runtime.start("cpu", "float32", "off")
for step in range(25):
    if step == 5: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(n) for n in (2**18, 2**20, 2**22, kernels.CHUNK["cpu"])]  # 1, 4, 16 and 28 MiB
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.check_output([sys.executable, "-c", count], cwd=ROOT))
    assert faults < 10_000, faults  # pages; a tensor of 16 MiB has 4,096. Without, 330,000


def test_evaluation_in_chunks_computes_no_gradients(monkeypatch):
    """Guards the time of an evaluation: two more products a chunk, for the gradients of a parameter, although none are wanted."""
    monkeypatch.setitem(kernels.CHUNK, "cpu", 31 * 7)
    x, weight, targets = case(torch.float32)

    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        assert abs(kernels.head_loss(x, weight, targets) - plain_loss(x, weight, targets)) < 1e-6
    products = sum(event.count for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm_"))
    assert products == math.ceil(46 / 7) + 1, "one product for each chunk, and that of the plain loss"


def test_what_a_gpu_compiles(monkeypatch):
    """
    Guards what is for a GPU in kernels.py, its Triton kernels replaced by plain ones: widened sizes, the output layer's loss as one
    operation for the compiler, when attention is taken and how its result lies, the running sum; losses and gradients are the plain ones.
    """
    shapes, attended = [], []

    def losses_and_gradients(logits, column, V, needed):
        shapes.append(tuple(logits.shape))
        losses, grad = kernels.losses_and_gradients(logits[:, :V], column, needed)
        return losses, F.pad(grad, (0, logits.size(1) - V)) if needed else logits

    def attend(q, k, v):
        attended.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    fake = types.SimpleNamespace(losses_and_gradients=losses_and_gradients, suits=lambda q: True, attend=attend)
    x = torch.randint(31, (5, 13))
    for options, layers in (({"embedding_loss": "mse", "pos_sub": "plain"}, 6), ({"window": 4}, 2)):
        model = make_model("encoder_decoder", options).train()
        found, shapes[:], attended[:] = [], [], []
        for gpu in (False, True):
            with monkeypatch.context() as patch:
                patch.setitem(kernels.CHUNK, "cpu", 31 * 7)
                if gpu:
                    patch.setattr(kernels, "FEW", 31 * 7)
                    patch.setattr(kernels, "triton_runs", lambda x: True)
                    patch.setattr(kernels, "gpu_kernels", fake)
                    patch.setattr("model.running_sum", kernels.cumsum_op)
                loss = torch.compile(model, backend="aot_eager", dynamic=False)(x[:, :-1], x[:, 1:])[1]["total"]
                found.append((loss, *torch.autograd.grad(3 * loss, list(model.parameters()))))
        for mine, exact in zip(*found):
            assert (mine - exact).norm() < 1e-12
        assert shapes == [(7, 64)] * (60 // 7) + [(60 % 7, 64)], "60 tokens, 31 columns widened to 64"
        assert len(attended) == layers, "a window limits self-attention, of four layers, but not cross-attention"


def test_operations_for_the_compiler_are_what_they_say():
    """Guards what torch.compile is told of them: sizes, strides and types of their results."""
    x = torch.randn(2, 5, 4).mT
    torch.library.opcheck(kernels.cumsum_op, (x,), test_utils=("test_schema", "test_faketensor"))
    x, weight, targets = case(torch.float32)
    flat = x.detach().flatten(0, 1).T.contiguous().T
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.MonkeyPatch.context() as patch:
            fake = types.SimpleNamespace(losses_and_gradients=lambda logits, column, V, needed: (
                logits.new_zeros(len(logits), 1, dtype=torch.float32), logits))  # fmt: skip
            patch.setattr(kernels, "gpu_kernels", fake)
            for needed in (True, False):
                args = (flat.to(dtype), weight.detach().to(dtype), targets.flatten(), 7, needed)
                torch.library.opcheck(kernels.chunks_in_triton, args, test_utils=("test_schema", "test_faketensor"))


def test_running_sum_as_an_operation_of_its_own():
    """Guards the embedding loss where it is compiled for a GPU: the sum, and gradients that run backwards."""
    torch.manual_seed(0)
    x, grad = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 4, dtype=torch.float64)
    y, expected = kernels.cumsum_op(x.mT.contiguous().mT), x.cumsum(1)
    assert torch.equal(y, expected)
    assert torch.allclose(*(torch.autograd.grad(z, x, grad)[0] for z in (y, expected)), rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(kernels.cumsum_op, x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bfloat16_on_a_cpu_compiles_in_one_piece(dropout):
    """Guards compile=on from graphs for single functions, compiled again for every shape; without dropout the loss is the eager one."""
    model = make_model("encoder_decoder", {"position": "rope"}, dtype=torch.float32, dropout=dropout).train()
    x = torch.randint(31, (3, 12))
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises where there would be two pieces
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, loss = model(x[:, :-1], x[:, 1:])[1]["total"], compiled(x[:, :-1], x[:, 1:])[1]["total"]
    loss.backward()
    assert (eager == loss or dropout) and model.wte.weight.grad.isfinite().all()
