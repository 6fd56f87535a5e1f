"""
The decoder-only baseline: GPT-2 as nanoGPT writes it, wired from the blocks of the encoder-decoder so that a comparison
is about the wiring alone. Parameter names are nanoGPT's, so that its checkpoints load and ours load there.

Two options go beyond GPT-2, to ask whether they help without an encoder: position subtraction (`pos_sub`) and rotary
positions (`position=rope`). Both are defined at the top of model.py. Shape legend: there, too.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from kernels import Dropout, LayerNorm, head_logits, head_loss
from model import Block, Cache, CausalModel, check_fields


@dataclass(frozen=True)
class DecoderOnlyConfig:
    vocab_size: int = 256  # number of token ids; train.py takes it from the data set unless given
    block_size: int = 256  # longest context, tokens
    n_layer: int = 6  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width C
    bias: bool = False  # biases in linear layers and LayerNorms
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, in training only
    position: Literal["learned", "rope"] = "learned"  # a table added to the input, or rotary keys and queries
    pos_sub: Literal["none", "plain", "ln"] = "none"  # subtract the next position's embedding before the logits
    window: int = 0  # self-attention sees only so many positions, its own included; 0 = all

    def __post_init__(self):
        check_fields(self, "vocab_size", "block_size", "n_layer", "n_head", "n_embd")


class DecoderOnly(CausalModel):
    def __init__(self, config: DecoderOnlyConfig):
        super().__init__()
        self.config, self.window = config, config.window
        C, learned, subtract = config.n_embd, config.position == "learned", config.pos_sub != "none"
        self.n_layer_cache = config.n_layer
        self.head_widths = {C // config.n_head}
        parts = dict(
            wte=nn.Embedding(config.vocab_size, C),
            drop=Dropout(config.dropout),
            h=nn.ModuleList(Block(C, config.n_head, config.bias, config.dropout) for _ in range(config.n_layer)),
            ln_f=LayerNorm(C, bias=config.bias),
        )
        if learned:
            parts["wpe"] = nn.Embedding(config.block_size + subtract, C)
        elif subtract:
            parts["wpe_next"] = nn.Embedding(config.block_size, C)  # row t belongs to position t + 1
        if config.pos_sub == "ln":
            parts["ln_pos_sub"] = LayerNorm(C, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied
        self.initialize([self.transformer.h])

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: Cache | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The contract of EncoderDecoder.forward: logits (B, T, V), or with targets the losses `total` and `token`."""
        positions, context = self.place(idx, cache, positions, mask)
        parts, learned = self.transformer, self.config.position == "learned"
        x = parts.wte(idx)
        x = parts.drop(x + parts.wpe(positions) if learned else x)
        for i, block in enumerate(parts.h):
            x = block(x, context, cache.layers[i] if cache is not None else None)
        x = parts.ln_f(x)
        if self.config.pos_sub != "none":
            x = x - (parts.wpe(positions + 1) if learned else parts.wpe_next(positions))
        if self.config.pos_sub == "ln":
            x = parts.ln_pos_sub(x)
        if cache is not None:
            cache.length += idx.size(1)
        if targets is None:
            return head_logits(x, self.lm_head.weight), {}
        loss = head_loss(x, self.lm_head.weight, targets)
        return None, {"token": loss, "total": loss}
