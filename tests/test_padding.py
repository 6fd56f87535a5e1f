"""Models at padded widths against the models themselves: the same losses, the same gradients."""

import dataclasses

import pytest
import torch

import checkpoint
from baseline_transformer.model import DecoderOnly, DecoderOnlyConfig
from conftest import ALL_MODELS
from model import EncoderDecoder, EncoderDecoderConfig
from padding import Padded, suits
from runtime import Runtime
from trainer import compiled

ODD = dict(n_head=2, n_embd=30)  # heads of 15 channels, and of 5
STACKS = dict(n_encoder_layer=2, n_decoder_layer=2, n_cross_head=6)
EVEN = dict(n_head=2, n_embd=32)  # heads of 16
MODELS = {
    "plain": (EncoderDecoder, ODD | STACKS),
    "biases": (EncoderDecoder, ODD | STACKS | dict(bias=True, bridge_ln=True, decoder_pos_emb=True)),
    "mse": (EncoderDecoder, ODD | STACKS | dict(embedding_loss="mse", embedding_loss_weight=8.0, pos_sub="ln")),
    "mse of the average": (EncoderDecoder, ODD | STACKS | dict(embedding_loss="mse", embedding_loss_ln="average")),
    "cross first": (EncoderDecoder, ODD | STACKS | dict(decoder_order="cross_first")),
    "cosine without gains": (EncoderDecoder, ODD | STACKS | dict(embedding_loss="cosine", embedding_loss_ln_affine=False)),
    "baseline": (DecoderOnly, ODD | dict(n_layer=2, bias=True, pos_sub="plain")),
    "baseline, odd heads alone": (DecoderOnly, dict(n_layer=2, n_head=8, n_embd=32)),
}  # fmt: skip
CONFIGS = {EncoderDecoder: EncoderDecoderConfig, DecoderOnly: DecoderOnlyConfig}
# every option with learned positions, at a width whose parts of a packed layer are not multiples of what is padded to
SIZES = {EncoderDecoder: STACKS | dict(n_cross_head=2), DecoderOnly: dict(n_layer=2)}
for name, options in ALL_MODELS:
    kind = checkpoint.MODELS[name][1]
    if options.get("position", "learned") == "learned":
        MODELS[f"{name}, {options}"] = kind, SIZES[kind] | options | dict(n_head=2, n_embd=34)


def build(kind: type, settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(CONFIGS[kind](vocab_size=31, block_size=12, **settings)).double().train()
    for parameter in model.parameters():  # gains of one and biases of zero would hide a wrong one
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_model(name):
    """Guards every tensor that is padded: a zero in the wrong place, a mean over zeros, the scale of attention."""
    model = build(*MODELS[name])
    x, y = torch.randint(31, (2, 3, 12), generator=torch.Generator().manual_seed(1))
    y[0, 3] = -1
    assert suits(model)
    found = []
    for forward in (model, Padded(model)):
        losses = forward(x, y)[1]
        found.append((losses, torch.autograd.grad(losses["total"], list(model.parameters()))))
    (losses, grads), (padded_losses, padded_grads) = found
    assert losses.keys() == padded_losses.keys()
    for key, loss in losses.items():
        assert abs(loss - padded_losses[key]) < 1e-12, key
    for (parameter, _), grad, padded in zip(model.named_parameters(), grads, padded_grads):
        assert (grad - padded).norm() <= 1e-12 * max(1.0, grad.norm()), parameter


def test_all_products_have_padded_widths():
    """Guards the purpose: a single tensor that is forgotten would take the slow kernel, and nobody would see it."""
    model, widths = build(*MODELS["biases"]), []

    class Widths(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                widths.extend(size for x in args[-2:] for size in x.shape)
            return function(*args, **(kwargs or {}))

    x = torch.randint(31, (2, 12))
    with Widths():
        Padded(model)(x, x)[1]["total"].backward()
    odd = {size for size in widths if size % 16}  # of 31 words, which head_loss pads on a GPU, and of 24 tokens
    assert len(widths) > 100 and odd <= {31, 24}


def test_what_is_padded():
    """Guards rotary heads, whose channels would pair wrongly, models over codes, and models that have nothing to gain."""
    assert not suits(build(EncoderDecoder, ODD | STACKS | dict(position="rope")))
    assert not suits(build(DecoderOnly, EVEN | dict(n_layer=1)))
    assert suits(build(DecoderOnly, dict(n_head=8, n_embd=96, n_layer=1)))
    head = dict(latent_factor=4, latent_dim=8, codebook_size=4, codebook_levels=1)
    assert not suits(build(EncoderDecoder, ODD | STACKS | head))


def test_what_is_compiled(monkeypatch):
    """Guards the choice of widths and CUDA graphs: a GPU in bfloat16, and no activations that are computed again."""
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: (type(model).__name__, mode))
    odd, even = build(*MODELS["plain"]), build(DecoderOnly, EVEN | dict(n_layer=1))
    gpu = Runtime(torch.device("cuda", 0), torch.bfloat16, True, "")
    assert compiled(odd, gpu) == ("Padded", None) and compiled(even, gpu) == ("DecoderOnly", None)
    assert compiled(odd, gpu, recomputes=True) == ("EncoderDecoder", None)
    assert compiled(odd, dataclasses.replace(gpu, dtype=torch.float32, graphs=True)) == ("EncoderDecoder", "reduce-overhead")
    assert compiled(odd, dataclasses.replace(gpu, device=torch.device("cpu"))) == ("EncoderDecoder", None)
