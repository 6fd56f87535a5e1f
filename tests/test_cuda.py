"""
What only an NVIDIA GPU can show; skipped elsewhere. TRITON_INTERPRET=1 tries the kernels alone on a CPU that has Triton (3.6: with
NumPy below 2.4).
"""

import os

import pytest
import torch
from torch.nn import functional as F

import kernels
import runtime
import trainer
from kernels import head_loss, losses_and_gradients
from model import EncoderDecoder, EncoderDecoderConfig

gpu_kernels = pytest.importorskip("gpu_kernels", reason="no Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no NVIDIA GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("T", "D"), [(1, 16), (17, 32), (64, 16), (100, 32), (200, 16), (256, 32)])
def test_attention(T, D):
    """Guards gpu_kernels.attend: the diagonal, the end of the text, strides of a packed projection, every gradient."""
    torch.manual_seed(0)
    packed = torch.randn(3, T, 3, 5, D, device=DEVICE, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32).requires_grad_()
    grad = torch.randn(3, 5, T, D, device=DEVICE, dtype=packed.dtype)

    def both(packed: torch.Tensor, attend) -> tuple[torch.Tensor, torch.Tensor]:
        y = attend(*(packed[:, :, i].transpose(1, 2) for i in range(3)))
        return y.double(), torch.autograd.grad(y, packed, grad.to(y.dtype))[0].double()

    mine = both(packed, lambda q, k, v: gpu_kernels.attend(q, k, v)[0].transpose(1, 2))
    exact = both(packed.detach().double().requires_grad_(), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    for a, b in zip(mine, exact):
        assert (a - b).norm() < (4e-3 if DEVICE == "cuda" else 1e-6) * b.norm()


@pytest.mark.parametrize(("V", "width"), [(31, 64), (5000, 5056), (50257, 50304)])
def test_softmax_gradient(V, width):
    """Guards gpu_kernels.losses_and_gradients: the columns behind the vocabulary, and the logits where no gradient is wanted."""
    torch.manual_seed(0)
    logits, column = 3 * torch.randn(7, width, device=DEVICE), torch.randint(V, (7, 1), device=DEVICE)
    expected, grad = losses_and_gradients(logits[:, :V].clone(), column, True)
    losses, mine = gpu_kernels.losses_and_gradients(logits.clone(), column, V, True)
    assert (losses - expected).abs().max() < 1e-5 and (mine[:, :V] - grad).abs().max() < 1e-6 and not mine[:, V:].any()
    losses, untouched = gpu_kernels.losses_and_gradients(logits.clone(), column, V, False)
    assert (losses - expected).abs().max() < 1e-5 and torch.equal(untouched, logits)


def build() -> EncoderDecoder:
    torch.manual_seed(0)
    config = EncoderDecoderConfig(
        vocab_size=50257, block_size=200, n_encoder_layer=1, n_decoder_layer=1, n_head=5, n_cross_head=10, n_embd=150,
        embedding_loss="mse", pos_sub="plain",
    )  # fmt: skip
    return EncoderDecoder(config).to(DEVICE).train()


@needs_gpu
@pytest.mark.parametrize("how", ["on", "graphs"])
def test_compiled_training_is_plain_training(how):
    """Guards padded widths, Triton's kernels and CUDA graphs together, with two micro-batches a step: losses and gradients."""
    tokens = torch.randint(50257, (2, 8, 201), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    tokens[1, 2, 100:] = 7
    plain, fast = build(), build()
    fast.load_state_dict(plain.state_dict())
    machine = runtime.start("cuda", "bfloat16", how)
    compiled = trainer.compiled(fast, machine)
    for model in (plain, fast):
        trainer.own_gradients(model.parameters())
    for step in range(3):
        found = []
        for model, call in ((plain, plain), (fast, compiled)):
            model.zero_grad(set_to_none=False)
            losses = []
            for batch in tokens:
                x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
                y[0, 5:9] = -1
                with machine.autocast():
                    loss = call(x, y)[1]["total"]
                loss.backward()
                losses.append(loss.item())
            found.append(losses)
        assert max(abs(a - b) for a, b in zip(*found)) < 2e-3, (step, found)
        for (name, a), b in zip(plain.named_parameters(), fast.parameters()):
            assert (a.grad - b.grad).norm() < 0.03 * a.grad.norm() + 1e-6, (step, name)
        with torch.no_grad():
            for a, b in zip(plain.parameters(), fast.parameters()):
                a -= 0.1 * a.grad
                b.copy_(a)


@needs_gpu
def test_chunks_of_the_output_layer_are_padded_on_a_gpu(monkeypatch):
    """Guards widths and a vocabulary that are padded there, in several chunks: compiled in bfloat16, loss and both gradients."""
    calls, one = [], gpu_kernels.losses_and_gradients
    monkeypatch.setattr(gpu_kernels, "losses_and_gradients", lambda *given: calls.append(given[0].shape) or one(*given))
    monkeypatch.setitem(kernels.CHUNK, "cuda", 50257 * 500)
    monkeypatch.setattr(kernels, "FEW", 0)
    torch.manual_seed(0)
    x = torch.randn(3, 400, 150, device="cuda").requires_grad_()
    weight = (0.02 * torch.randn(50257, 150, device="cuda")).requires_grad_()
    targets = torch.randint(50257, (3, 400), device="cuda")
    targets[0, :50] = -1
    with torch.autocast("cuda", torch.bfloat16):
        mine = torch.compile(head_loss)(x, weight, targets)
    part = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert abs(mine - part) < 1e-3 * part
    for a, b in zip(torch.autograd.grad(mine, (x, weight)), torch.autograd.grad(part, (x, weight))):
        assert (a - b).norm() < 0.02 * b.norm()
    assert calls == [(500, 50304), (500, 50304), (200, 50304)]


@needs_gpu
def test_the_loss_of_the_output_layer_on_a_gpu():
    """Guards chunks of it: loss and both gradients in float32, as nothing is compiled."""
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, device="cuda").requires_grad_() for shape in ((3, 4000, 150), (50257, 150)))
    targets = torch.randint(50257, (3, 4000), device="cuda")
    targets[0, :50] = -1
    torch.set_float32_matmul_precision("highest")
    mine = head_loss(x, weight, targets)
    part = F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert abs(mine - part) < 1e-4 * part
    for a, b in zip(torch.autograd.grad(mine, (x, weight)), torch.autograd.grad(part, (x, weight))):
        assert (a - b).norm() < 1e-4 * b.norm()
