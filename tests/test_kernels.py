"""What is written for speed, against the plain computation that it equals."""

import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import cpu_kernels
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


# ----------------------------------------------------------------------------------------------------------------------
# attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # relative; torch's own kernel has up to 8e-7 and 4.4e-3
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not cpu_kernels.BFLOAT16, reason="no AVX512-BF16"))]


def plain_attention(q, k, v, factors=1.0):
    """Causal attention, its weights times `factors`."""
    hidden = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
    return ((q @ k.mT / q.size(3) ** 0.5).masked_fill(hidden, -math.inf).softmax(-1) * factors) @ v


def exact_attention(inputs, grad, factors=1.0):
    """The same in float64, and its gradients."""
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    y = plain_attention(*inputs, factors)
    return y.detach(), *torch.autograd.grad(y, inputs, grad.double())


def distance(ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.0) -> float:
    """Relative; `least` stands for the size of a tensor that may be 0."""
    return ((ours.double() - theirs.double()).norm() / (theirs.double().norm() + least)).item()


def queries(B: int, H: int, T: int, D: int, dtype: torch.dtype, layout: str = "packed") -> list[torch.Tensor]:
    """q, k, v: views of one projection as a model makes them, or with a last stride that is not 1."""
    torch.manual_seed(0)
    packed = 1.5 * torch.randn(B, T, 3, H, D).to(dtype)
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    if layout == "permuted":
        views = [x.mT.contiguous().mT for x in views]
    if not cpu_kernels.available(D, dtype == torch.bfloat16):
        pytest.skip("no C++ compiler")
    return [x.detach().requires_grad_() for x in views]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 3, 15, 5), (3, 1, 16, 34), (1, 2, 17, 34), (2, 2, 150, 5), (1, 1, 64, 34)], ids=str)
@pytest.mark.parametrize("layout", ["packed", "permuted"])
def test_attention_on_a_cpu_is_the_plain_one(shape, dtype, layout):
    """Guards cpu_kernels.cpp: the diagonal, texts that fill no block, odd and wide heads, strides, scales, each gradient; threads."""
    q, k, v = queries(*shape, dtype, layout)
    B, H, T, D = shape
    grad = torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    if layout == "permuted":
        grad = torch.ones((), dtype=dtype).expand(B, H, T, D)  # that of a sum: one number
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        y = cpu_kernels.attend(q, k, v)
        found.append((y, *torch.autograd.grad(y, (q, k, v), grad)))
    torch.set_num_threads(threads)
    assert y.dtype == dtype and y.transpose(1, 2).is_contiguous(), "what a model reads next"
    for ours, again, theirs in zip(*found, exact_attention((q, k, v), grad)):
        assert torch.equal(ours, again)
        assert distance(ours, theirs, least=T == 1) < TOLERANCE[dtype]  # then those of q and k are 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 45, 5), (1, 2, 64, 34), (2, 4, 40, 17)], ids=str)
def test_attention_on_a_cpu_rotates_as_rotary_positions_do(shape, dtype):
    """Guards rotation inside the kernel: pairs, the last channel of odd heads, every position, the way back of both gradients."""
    q, k, v = queries(*shape, dtype)
    B, H, T, D = shape
    rotary, grad = kernels.rotary_angles(torch.arange(T), D), torch.randn(B, T, H, D).to(dtype).transpose(1, 2)
    y = kernels.attention(q, k, v, None, True, 0.0, rotary)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plain = plain_attention(kernels.rotate(exact[0], rotary), kernels.rotate(exact[1], rotary), exact[2])
    grads = torch.autograd.grad(y, (q, k, v), grad), torch.autograd.grad(plain, exact, grad.double())
    for ours, theirs in zip((y, *grads[0]), (plain, *grads[1])):
        assert distance(ours, theirs) < 1.5 * TOLERANCE[dtype]  # rotated channels are rounded once more


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_a_cpu_sees_no_later_token(dtype):
    """Guards causality to the last bit: outputs and gradients before a token do not change with it."""
    q, k, v = queries(1, 2, 40, 5, dtype)
    before = cpu_kernels.attend(q, k, v)
    for t in (2, 16, 23, 39):
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] = 1e4
        after = cpu_kernels.attend(*changed)
        assert torch.equal(after[:, :, :t], before[:, :, :t]) and not torch.equal(after[:, :, t], before[:, :, t])
        for grad in torch.autograd.grad(before[:, :, :t].sum(), (k, v), retain_graph=True):
            assert grad[:, :, t:].count_nonzero() == 0 and grad[:, :, :t].count_nonzero() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_a_cpu_with_numbers_out_of_range(dtype):
    """Guards the softmax: scores of thousands overflow nowhere, and what is not a number stays visible."""
    q, k, v = (x.detach() for x in queries(1, 1, 40, 5, dtype))
    large = 100 * q, 100 * k, v
    y, exact = cpu_kernels.attend(*large), plain_attention(*(x.double() for x in large))
    assert distance(y, exact) < 10 * TOLERANCE[dtype]  # scores of 10,000 have three digits behind the point
    for broken in range(3):
        inputs = [x.clone() for x in (q, k, v)]
        inputs[broken][:, :, 20, 3] = math.nan
        y = cpu_kernels.attend(*inputs)
        assert y[:, :, 20].isnan().any() and (broken == 0 or y[:, :, 39].isnan().any()) and y[:, :, :16].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_a_cpu_drops_the_same_weights_forward_and_backward(dtype):
    """
    Guards dropout in cpu_kernels.cpp: values that pick single weights tell which were kept; share and scale, no relation between
    neighbours, heads or texts; the gradients are those of all weights times these factors; the seed decides.
    """
    p, (B, H, T, D) = 0.3, (4, 3, 34, 34)
    q, k, v = queries(B, H, T, D, dtype)

    def attend(values, seed):
        torch.manual_seed(seed)
        return cpu_kernels.attend(q, k, values, p)

    ones = torch.eye(T, dtype=dtype).expand(B, H, T, T)
    weights = plain_attention(q.detach().double(), k.detach().double(), ones.double())
    y, seen = attend(ones, 1), torch.ones(T, T, dtype=torch.bool).tril() & (weights > 1e-30)
    kept = (y > 0) & seen
    assert torch.equal(y, attend(ones, 1)) and not torch.equal(y, attend(ones, 2))
    assert distance(y, weights * kept / (1 - p)) < TOLERANCE[dtype] + 2**-16
    n, share, error = seen.sum(), (~kept & seen).sum() / seen.sum(), (p * (1 - p)) ** 0.5
    assert abs(share - p) < 4 * error / n**0.5
    dropped = (~kept).double() - p
    for one, other, both in (
        (dropped[..., ::2], dropped[..., 1::2], seen[..., 1::2]),  # keys that share a hash
        (dropped[..., 1:-1:2], dropped[..., 2::2], seen[..., 2::2]),
        (dropped[..., :-1, :], dropped[..., 1:, :], seen[..., :-1, :]),
        (dropped[:, :-1], dropped[:, 1:], seen[:, :-1] & seen[:, 1:]), (dropped[:-1], dropped[1:], seen[:-1] & seen[1:]),
    ):  # fmt: skip
        assert abs((one * other)[both].mean()) < 4 * p * (1 - p) / both.sum() ** 0.5

    factors, grad = kept / (1 - p), torch.randn(B, H, T, D).to(dtype)
    y = attend(v, 1)
    for ours, theirs in zip((y, *torch.autograd.grad(y, (q, k, v), grad)), exact_attention((q, k, v), grad, factors)):
        assert distance(ours, theirs) < TOLERANCE[dtype] + 2**-16
    assert cpu_kernels.attend(q, k, v, 1 - 1e-9).isfinite().all()  # 16 bits are not enough for it


@pytest.mark.parametrize("tuned", [["-march=native", "-mno-avx512f"], []], ids=["avx2", "any"])
def test_attention_on_another_cpu(tuned, monkeypatch):
    """Guards vectors of 8 and 4 lanes, where this CPU has 16: blocks, squares that are turned around, two keys of a hash."""
    monkeypatch.setattr(cpu_kernels, "TUNED", [tuned, []])
    monkeypatch.setattr(cpu_kernels, "libraries", {})
    q, k, v = queries(2, 2, 45, 5, torch.float32)
    for p in (0.0, 0.3):
        torch.manual_seed(1)
        y, factors = cpu_kernels.attend(q, k, v, p), torch.ones(2, 2, 45, 45)
        for i in range(0, 45 if p else 0, 5):  # the same weights, five keys at a time
            torch.manual_seed(1)
            part = torch.zeros(2, 2, 45, 5)
            part[:, :, i : i + 5] = torch.eye(5)
            factors[..., i : i + 5] = (cpu_kernels.attend(q, k, part, p) > 0) / (1 - p)
        grad = torch.randn(2, 2, 45, 5)
        for ours, theirs in zip((y, *torch.autograd.grad(y, (q, k, v), grad)), exact_attention((q, k, v), grad, factors)):
            assert distance(ours, theirs) < TOLERANCE[torch.float32] + (p > 0) * 2**-16


def test_attention_on_a_cpu_compiles_in_one_piece():
    """Guards torch.compile on a CPU: one operation, told right sizes and strides, with the eager value and gradients."""
    q, k, v = queries(2, 3, 20, 5, torch.float32)
    torch.library.opcheck(cpu_kernels.attend_op, (q, k, v), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    y, lse = cpu_kernels.attend_op(q, k, v)
    detached = [x.detach() for x in (y.transpose(1, 2), q, k, v, y, lse)]
    torch.library.opcheck(cpu_kernels.attend_gradients, detached, test_utils=("test_schema", "test_faketensor"))

    def twice(q, k, v):
        return 2 * kernels.attention(q, k, v, None, True, 0.0)

    found = []
    for function in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        y = function(q, k, v)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found))


def test_a_kernel_is_compiled_by_many_at_once(tmp_path, monkeypatch):
    """Guards lanes and processes that start together: nobody loads half a file, and one file is left, which is then taken as it is."""
    queries(1, 1, 1, 5, torch.float32)  # skips without a compiler
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "libraries", {})
    found = []
    lanes = [threading.Thread(target=lambda: found.append(cpu_kernels.available(1, False))) for _ in range(2)]
    processes = [threading.Thread(target=lambda: found.append(cpu_kernels.compiled(1, False) is not None)) for _ in range(2)]
    for thread in lanes + processes:
        thread.start()
    for thread in lanes + processes:
        thread.join()
    assert found == [True] * 4
    (file,) = (tmp_path / "encdec").iterdir()
    written = file.stat().st_mtime_ns
    assert cpu_kernels.compiled(1, False) and file.stat().st_mtime_ns == written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))  # a disk that was full has half a file
    half = cpu_kernels.cached(file.name)
    half.write_bytes(b"half")
    assert cpu_kernels.compiled(1, False) and half.stat().st_size == file.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sessions are read from /proc")
def test_an_interrupted_run_does_not_interrupt_the_compiler(tmp_path, monkeypatch):
    """Guards the cache: Ctrl-C goes to all of a session, and a compiler it ends looked like one that knows no -fopenmp, for good."""
    queries(1, 1, 1, 5, torch.float32)
    script = tmp_path / "cxx"
    script.write_text(
        f'#!/bin/sh\nread -r _ _ _ _ _ session _ < /proc/$$/stat\necho $session >> {tmp_path}/sessions\n'
        f'exec {shlex.join(cpu_kernels.compiler())} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(script))
    assert cpu_kernels.compiled(1, False)
    sessions = (tmp_path / "sessions").read_text().split()
    assert str(os.getsid(0)) not in sessions[1:] and len(sessions) >= 2, "the first only says its version"


def test_which_attention_a_cpu_takes(monkeypatch):
    """Guards the choice: causal attention of a model's types goes to the kernel, with dropout unless compiled; nothing else does."""
    q, k, v = queries(2, 3, 20, 5, torch.float32)
    taken = []
    monkeypatch.setattr(cpu_kernels, "attend", lambda q, k, v, dropout, rotary: taken.append(dropout) or v)
    for p in (0.0, 0.3):
        kernels.attention(q, k, v, None, True, p)
        kernels.attention(q, k, v, None, False, p)
        kernels.attention(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril(), False, p)
        kernels.attention(*(x.double() for x in (q, k, v)), None, True, p)
        kernels.attention(*(x[:, :, :1] for x in (q, k, v)), None, True, p)
    assert taken == [0.0, 0.3]


def test_attention_without_a_compiler(monkeypatch, capsys, tmp_path):
    """Guards a machine without one, and a home where nothing can be written: a note, once, and torch's numbers."""
    monkeypatch.setattr(cpu_kernels, "libraries", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", 'g++ "')
    assert not cpu_kernels.available(4, False) and "CXX=g++ \": No closing quotation" in capsys.readouterr().err
    monkeypatch.setenv("CXX", " ")
    assert " " not in cpu_kernels.compiler(), "not set"
    monkeypatch.setattr(cpu_kernels, "libraries", {})
    monkeypatch.setenv("CXX", "/nonexistent")
    for width in (5, 6):
        q = torch.randn(2, 3, 20, width)
        assert not cpu_kernels.suits(q)
        y = kernels.attention(q, q, q, None, True, 0.0)
        assert torch.equal(y, F.scaled_dot_product_attention(q, q, q, is_causal=True))
    notes = capsys.readouterr().err
    assert notes.count("Attention on the CPU") == 1 and "/nonexistent" in notes
    q, k, v = (torch.randn(2, 3, 20, 5).bfloat16() for _ in range(3))
    assert distance(kernels.attention(q, k, v, None, True, 0.0), plain_attention(q.double(), k.double(), v.double())) < 0.01
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu_kernels.cached("x.so").parent.is_dir()


def test_products_drop_the_same_weights_forward_and_backward(monkeypatch):
    """Guards dropout under a mask: value and gradients are those of all weights times the factors that were drawn."""
    torch.manual_seed(0)
    drawn, draw = [], kernels.dropout_factors
    monkeypatch.setattr(kernels, "dropout_factors", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    q, k, v = (torch.randn(2, 3, 20, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    fast = kernels.attend_in_products(q, k, v, torch.ones(20, 20, dtype=torch.bool).tril(), 0.3)
    factors = drawn[0].view(2, 3, 20, 20)
    slow = plain_attention(q, k, v, factors)
    assert 0 < (factors == 0).sum() < 6 * 400 and (fast - slow).abs().max() < 1e-12
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


@pytest.mark.parametrize("rows", [1000, 60_000], ids=["all", "a chunk"])  # whose tokens add up to too much
def test_head_loss_of_many_tokens_in_float16(rows, monkeypatch):
    """Guards training that stands still: a sum over tokens beyond 65,504 is infinite before it is divided, at any scale of the loss."""
    x = torch.full((1, 70_000, 4), 2.0, requires_grad=True)
    weight, targets = torch.zeros(8, 4, requires_grad=True), torch.zeros(1, 70_000, dtype=torch.int64)
    monkeypatch.setitem(kernels.CHUNK, "cpu", rows * len(weight))
    with torch.autocast("cpu", torch.float16):
        loss = kernels.head_loss(x, weight, targets)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(gradient, torch.tensor([-7 / 8] + 7 * [1 / 8])[:, None].expand(8, 4) * 2, rtol=1e-3)


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
