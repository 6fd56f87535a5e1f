"""Down and up: where latents end, what they see, padding, and what a leak looks like."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from latent.resample import CausalDownsample, ResidualConvBlock, Upsample

WIDTH = 16  # wide enough that no position has all its channels below zero, where relu would hide it


def make(module_class, *args, **more) -> nn.Module:
    """In float64, with biases and gains of order one: with the initial ones, zeros stay zeros whatever the padding does."""
    torch.manual_seed(0)
    module = module_class(WIDTH, *args, bias=True, **more).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# down


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_a_latent_ends_at_the_end_of_its_block(factor, kernel):
    """Guards the left padding of k - 2: latent j sees exactly 1 + (k-1)(S-1) tokens, the last of them (j+1)S - 1."""
    down = make(CausalDownsample, factor, kernel)
    x = randn(1, 37, WIDTH).requires_grad_()
    latents, _ = down(x)
    assert latents.shape == (1, 37 // factor, WIDTH)
    direction = randn(WIDTH)  # a plain sum would be constant behind LayerNorm
    for j in range(latents.size(1)):
        grad = torch.autograd.grad(latents[0, j] @ direction, x, retain_graph=True)[0]
        seen = grad[0].abs().sum(-1).nonzero().flatten().tolist()
        last = (j + 1) * factor - 1
        assert seen == list(range(max(0, last - (kernel - 1) * (factor - 1)), last + 1)), j


@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_one_layer_is_its_equation(kernel):
    """Guards the shortcut: output j averages inputs 2j and 2j+1, and its convolution ends at 2j+1; both written out per position."""
    down = make(CausalDownsample, 2, kernel)
    layer, x = down.layers[0], randn(1, 11, WIDTH)
    latents, _ = down(x)
    for j in range(5):
        y = layer.conv.bias.clone()
        for tap in range(kernel):
            position = 2 * j + 1 - (kernel - 1) + tap
            if position >= 0:
                y = y + layer.conv.weight[:, :, tap] @ F.relu(x[0, position])
        expected = (x[0, 2 * j] + x[0, 2 * j + 1]) / 2 + layer.norm(y)
        torch.testing.assert_close(latents[0, j], expected, rtol=0, atol=1e-12)


def leaks(down, factor: int, T: int) -> float:
    """Largest change of a latent, bit for bit, when all tokens behind its end are redrawn."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, T, WIDTH, dtype=torch.float64, generator=generator)
    worst, latents = 0.0, down(x)
    for t in range(T - 1):
        complete = (t + 1) // factor
        for _ in range(4):
            other = torch.cat((x[:, : t + 1], torch.randn(1, T - t - 1, WIDTH, dtype=torch.float64, generator=generator)), 1)
            again = down(other)
            worst = max([worst, *(latents - again)[:, :complete].abs().flatten().tolist()])
            if again.size(1) > complete:
                assert not torch.equal(again[:, complete:], latents[:, complete:])  # the test can see something at all
    return worst


class SymmetricPadding(nn.Module):
    """An ordinary strided convolution: padding 1 on both sides. For k = 3 that is our padding; for k = 4 it is a leak."""

    def __init__(self, down: CausalDownsample):
        super().__init__()
        self.down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.down.layers:
            y = F.conv1d(F.relu(x).transpose(1, 2), layer.conv.weight, layer.conv.bias, stride=2, padding=1)
            x = layer.norm(y.transpose(1, 2))
        return x


class NormOverTime(nn.Module):
    """The leak of GroupNorm in the place of LayerNorm: statistics over all positions."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_no_latent_sees_what_comes_after_it(factor, kernel):
    """Guards causality, bit for bit: nothing behind (j+1)S - 1 changes latent j. And the two leaks that users build in."""
    down = make(CausalDownsample, factor, kernel)
    for T in (1, factor - 1, factor, factor + 1, 3 * factor + 1):
        assert leaks(lambda x: down(x)[0], factor, T) == 0.0
    over_time = copy.deepcopy(down)
    for layer in over_time.layers:
        layer.norm = NormOverTime()
    assert leaks(lambda x: over_time(x)[0], factor, 3 * factor + 1) > 1e-3
    if kernel == 3:
        assert leaks(SymmetricPadding(down), factor, 3 * factor) == 0.0
    if kernel == 4:
        assert leaks(SymmetricPadding(down), factor, 3 * factor + 1) > 1e-3


@pytest.mark.parametrize("keep_partial", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_padding_on_the_right_changes_nothing(factor, keep_partial):
    """Guards against padded states that reach a convolution: each row alone equals the row in a padded batch, in every bit."""
    down = make(CausalDownsample, factor, keep_partial=keep_partial)
    lengths = torch.tensor([1, 5, 8, 13, 16])
    x = randn(5, 19, WIDTH) * 1e3
    mask = torch.arange(19) < lengths[:, None]
    x[~mask] = float("nan")
    latents, latent_mask = down(x, mask)
    for row, length in enumerate(lengths.tolist()):
        count = -(-length // factor) if keep_partial else length // factor
        assert latent_mask[row].sum() == count and latent_mask[row, :count].all()
        alone, _ = down(x[row : row + 1, :length])
        torch.testing.assert_close(latents[row, :count], alone[0], rtol=0, atol=1e-10)
        assert (latents[row, count:] == 0).all()


def test_partial_blocks_are_kept_or_dropped():
    """Guards the lengths, floor and ceil, and that keeping a partial block changes no complete one: prefixes keep their codes."""
    for factor in (1, 2, 4, 8):
        drop, keep = (make(CausalDownsample, factor, keep_partial=keep) for keep in (False, True))
        x = randn(1, 33, WIDTH)
        whole, _ = keep(x)
        for T in range(0, 34, 3):
            dropped, kept = drop(x[:, :T])[0], keep(x[:, :T])[0]
            assert dropped.size(1) == T // factor and kept.size(1) == -(-T // factor)
            torch.testing.assert_close(kept[:, : T // factor], dropped, rtol=0, atol=1e-12)
            torch.testing.assert_close(dropped, whole[:, : T // factor], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# residual blocks and up


def test_residual_block():
    """Guards the window of the block, one to each side, and its padding."""
    block = make(ResidualConvBlock)
    x = randn(1, 9, WIDTH).requires_grad_()
    y = block(x)
    direction = randn(WIDTH)
    for t in range(9):
        grad = torch.autograd.grad(y[0, t] @ direction, x, retain_graph=True)[0]
        assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [s for s in range(9) if t - 1 <= s <= t + 1]
    padded = torch.cat((x, torch.full((1, 3, WIDTH), float("nan"), dtype=torch.float64)), 1)
    masked = block(padded, torch.arange(12)[None] < 9)
    torch.testing.assert_close(masked[:, :9], y, rtol=0, atol=1e-12)
    assert (masked[:, 9:] == 0).all()


def test_dense_up_is_the_block_aligned_transposed_convolution():
    """Guards the reshape: position 2l + i must come from half i of the output for l; an independent kernel says so."""
    up = make(Upsample, 2)
    layer = up.layers[0]
    x = randn(2, 5, WIDTH)
    kernel = layer.dense.weight.unflatten(0, (2, WIDTH)).permute(2, 1, 0)  # (2 C, C) -> (C in, C out, 2)
    y = F.conv_transpose1d(F.relu(x).transpose(1, 2), kernel, stride=2).transpose(1, 2)
    y = y + layer.dense.bias.unflatten(0, (2, WIDTH)).repeat(5, 1)
    torch.testing.assert_close(up(x), x.repeat_interleave(2, 1) + layer.norm(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_up(factor):
    """Guards which latents a position sees: that of its own block."""
    up = make(Upsample, factor)
    x = randn(1, 5, WIDTH).requires_grad_()
    y = up(x)
    assert y.shape == (1, 5 * factor, WIDTH)
    grad = torch.autograd.grad((y[0, 2 * factor : 3 * factor] @ randn(WIDTH)).sum(), x)[0]
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [2]
    assert up(x[:, :0]).shape == (1, 0, WIDTH)


# ----------------------------------------------------------------------------------------------------------------------
# errors, compilation


def test_bad_settings_are_named():
    """Guards the messages: a factor of 3 must not silently become 2."""
    for factor in (0, 3, 6, -4):
        with pytest.raises(ValueError, match=f"factor={factor} .*power of two"):
            CausalDownsample(WIDTH, factor)
        with pytest.raises(ValueError, match=f"factor={factor} .*power of two"):
            Upsample(WIDTH, factor)
    with pytest.raises(ValueError, match="kernel=1: .*at least 2"):
        CausalDownsample(WIDTH, 2, kernel=1)


def test_compiles_without_graph_breaks_and_trains_every_parameter():
    """Guards torch.compile, and against a layer that is built but not used."""
    down, block, up = make(CausalDownsample, 4), make(ResidualConvBlock), make(Upsample, 4)

    def both(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        latents, latent_mask = down(x, mask)
        return up(block(latents, latent_mask))

    x, mask = randn(2, 11, WIDTH), torch.arange(11) < torch.tensor([[11], [6]])
    y = torch.compile(both, fullgraph=True, backend="aot_eager")(x, mask)
    torch.testing.assert_close(y, both(x, mask))
    (y * randn(*y.shape)).sum().backward()
    for module in (down, block, up):
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
