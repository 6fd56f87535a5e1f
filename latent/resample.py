"""
Shorter and longer sequences: S tokens into one latent and back, for the compression head and the text autoencoder.

Down: log2(S) convolutions of stride 2. A layer pads k - 2 zeros on the LEFT and nothing on the right, so its output j ends
exactly at its input 2j+1, and latent j of the stack ends exactly at token (j+1)S - 1: it may be used from that token on.
(k - 1 zeros, the habit from stride 1, would be causal as well, but every latent would end S - 1 tokens too early.) It sees the
1 + (k-1)(S-1) tokens that end there; with k = 2 (Kaiser et al. 2018, arXiv:1803.03382) just its own block.
Up: each layer doubles the length by Kaiser's linear map to twice the width, reshaped to twice the length, which is a transposed
convolution of kernel 2 and stride 2 and therefore stays inside a block.

Every layer is x + LayerNorm(convolution(relu(x))), the shortcut averaging or repeating positions where the length changes. The
order matters: relu keeps zeros, and normalization comes last, so masked states, zeroed once in front of a layer, stand for
exactly the zero padding after the end, and padding on the right changes nothing. Normalization is per position only: any norm
over time (GroupNorm, BatchNorm) would tell a position about later ones.

Shapes: B batch, L positions, C width, S tokens per latent, k kernel size, M latents.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F


def doublings(factor: int) -> int:
    """log2 of the compression factor S. Raises ValueError unless S is a power of two."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(
            f"latent_factor={factor} tokens per latent: layers halve the length, so use 1, 2, 4, 8 or another power of two"
        )
    return factor.bit_length() - 1


def zero_masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x (B, L, C) with zeros where mask (B, L) is False."""
    return x if mask is None else torch.where(mask[..., None], x, 0.0)


def convolve(convolution: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A convolution over time for x (B, L, C), with the activation in front of it."""
    return convolution(F.relu(x).transpose(1, 2)).transpose(1, 2)


class DownLayer(nn.Module):
    """Two positions into one; see the top of this file."""

    def __init__(self, width: int, kernel: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, stride=2, bias=bias)
        self.norm = nn.LayerNorm(width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, L, C) -> (B, floor(L / 2), C)."""
        n = x.size(1) // 2
        if n == 0:
            return x[:, :0]
        x = x[:, : 2 * n]
        shortcut = x.unflatten(1, (n, 2)).mean(dim=2)  # (B, 2n, C) -> (B, n, 2, C) -> (B, n, C)
        return shortcut + self.norm(convolve(self.conv, F.pad(x, (0, 0, self.conv.kernel_size[0] - 2, 0))))


class CausalDownsample(nn.Module):
    """
    x (B, T, C) -> latents (B, M, C), latent j ending exactly at position (j+1)S - 1.

    width C; factor S, a power of two; kernel k >= 2 (2: no latent sees beyond its own block).
    keep_partial=False, for a causal model: M = floor(T/S), a latent is valid if all its S positions are.
    keep_partial=True, for an autoencoder, whose last block may be partly text: M = ceil(T/S), valid if any of them is.
    Raises ValueError for a factor or kernel that cannot work.
    """

    def __init__(self, width: int, factor: int, kernel: int = 3, keep_partial: bool = False, bias: bool = False):
        super().__init__()
        if kernel < 2:
            raise ValueError(f"kernel={kernel}: a layer that joins two positions needs a kernel of at least 2")
        self.keep_partial = keep_partial
        self.layers = nn.ModuleList(DownLayer(width, kernel, bias) for _ in range(doublings(factor)))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, T, C) of any length, mask (B, T) True = real -> latents (B, M, C), zero where masked, and their mask (B, M)."""
        x = zero_masked(x, mask)
        for layer in self.layers:
            if self.keep_partial and x.size(1) % 2:  # ceil(ceil(T/2)/2) = ceil(T/4), and so on: pad layer by layer
                if mask is None:
                    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
                x, mask = F.pad(x, (0, 0, 0, 1)), F.pad(mask, (0, 1))
            x = layer(x)
            if mask is not None:
                first, second = mask[:, 0 : 2 * x.size(1) : 2], mask[:, 1::2]
                mask = first | second if self.keep_partial else first & second
                x = zero_masked(x, mask)
        return x, mask


class ResidualConvBlock(nn.Module):
    """x + LayerNorm(conv3(relu(x))), seeing one position to each side."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, bias=bias)
        self.norm = nn.LayerNorm(width, bias=bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, L, C), mask (B, L) True = real -> (B, L, C), zero where masked."""
        x = zero_masked(x, mask)
        return zero_masked(x + self.norm(convolve(self.conv, F.pad(x, (0, 0, 1, 1)))), mask)


class UpLayer(nn.Module):
    """One position into two; see the top of this file."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.dense = nn.Linear(width, 2 * width, bias=bias)
        self.norm = nn.LayerNorm(width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, L, C) -> (B, 2 L, C)."""
        shortcut = x.repeat_interleave(2, dim=1)
        return shortcut + self.norm(self.dense(F.relu(x)).reshape(shortcut.shape))  # (B, L, 2C) -> (B, 2L, C)


class Upsample(nn.Module):
    """Latents (B, M, C) -> positions (B, M S, C). Raises ValueError for a factor that is no power of two."""

    def __init__(self, width: int, factor: int, bias: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(UpLayer(width, bias) for _ in range(doublings(factor)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
