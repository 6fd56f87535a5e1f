"""
Widths that suit a GPU. Its matrix units want every dimension of a product to be a multiple of 8 elements: at width 150 products
take about twice as long as at 152, and flash attention with heads of 30 and 15 channels 1.7 and 1.3 times what it takes with 32 and
16 (dev/LOG.md). `Padded` computes the same losses with zeros behind the channels of every tensor, up to multiples of 16, with which a
step takes 3% less than with those of 8; parameters, gradients and checkpoints keep their sizes.

What is zero stays zero: rows of zeros give zeros, LayerNorm counts the real channels only and has gains of zero behind them, values
of zero add nothing. Attention divides by the square root of the padded head width, so queries are made larger by as much. Dropout
draws masks of the padded sizes, so the same seed gives another run than without padding.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from baseline_transformer.model import DecoderOnly
from model import CausalModel, CrossAttention, EncoderDecoder, SelfAttention

MULTIPLE = 16  # elements; a model whose widths are multiples of 8 is left as it is


def suits(model: nn.Module) -> bool:
    """Whether `Padded` can and would change this model. Rotary positions pair channels i and i + D / 2, which zeros would part."""
    if type(model) not in (EncoderDecoder, DecoderOnly) or model.config.position != "learned":
        return False
    if getattr(model, "compression", None) is not None:
        return False
    return any(width % 8 for width in (model.config.n_embd, *model.head_widths))


def pad(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """x with zeros behind these of its dimensions, so that they are multiples."""
    for dim in dims:
        missing = -x.size(dim) % MULTIPLE
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
    return x


def pad_heads(x: torch.Tensor, n_head: int, parts: int) -> torch.Tensor:
    """x (parts H D, ...) with zeros behind the D channels of every head."""
    return pad(x.unflatten(0, (parts, n_head, -1)), 2).flatten(0, 2)


class Padded(nn.Module):
    """model(idx, targets) of a padded `model`. Shares its parameters; has no cache."""

    def __init__(self, model: CausalModel):
        super().__init__()
        self.model = model
        self.to_heads, self.from_heads, self.tables = {}, {}, set()  # names of linear layers -> heads and parts
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                self.tables.add(name)
            elif isinstance(module, SelfAttention):
                self.to_heads[f"{name}.c_attn"], self.from_heads[f"{name}.c_proj"] = (module.n_head, 3), (module.n_head, 1)
            elif isinstance(module, CrossAttention):
                self.to_heads[f"{name}.c_q"], self.to_heads[f"{name}.c_kv"] = (module.n_head, 1), (module.n_head, 2)
                self.from_heads[f"{name}.c_proj"] = (module.n_head, 1)

    def padded(self, name: str, p: torch.Tensor) -> torch.Tensor:
        """The parameter of this name, padded."""
        layer, is_weight = name.rpartition(".")[0], p.dim() == 2
        if layer in self.tables:
            return pad(p, 1)  # tokens and positions stay as many
        if layer in self.from_heads and is_weight:
            return pad(pad_heads(p.T, *self.from_heads[layer]).T, 0)
        if layer not in self.to_heads:
            return pad(p, *range(p.dim()))
        n_head, parts = self.to_heads[layer]
        if not layer.endswith(".c_kv"):  # the first part, or all of it, are queries
            D = len(p) // (parts * n_head)
            factor = torch.ones(parts, *(1,) * p.dim(), dtype=p.dtype, device=p.device)
            factor[0] = math.sqrt((D + -D % MULTIPLE) / D)
            p = (p.unflatten(0, (parts, -1)) * factor).flatten(0, 1)
        p = pad_heads(p, n_head, parts)
        return pad(p, 1) if is_weight else p

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[None, dict[str, torch.Tensor]]:
        parameters = {name: self.padded(name, p) for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, parameters, (idx, targets))
