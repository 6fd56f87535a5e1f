"""
The compression head of the encoder-decoder: S tokens become one latent of D codes, and the decoder's cross-attention sees the
latents in place of the encoder states.

    h (B, T, C) -> causal down -> linear, LayerNorm -> residual quantizer -> linear -> memory [start, latent 0, latent 1, ...]

1. Slot 0 of the memory is a learned vector, so that no position has nothing to look at; slot m > 0 is latent m - 1, which ends
   exactly at token m S - 1. Position t sees the slots with m S - 1 <= t, that is the start and floor((t + 1) / S) latents; what
   it predicts is token t + 1, so nothing leaks. For the same reason codebooks move only in `step()`, after the optimizer's: an
   update before the lookup would tell earlier latents of later tokens.
2. A slot stands at position m S - 1, the start therefore at -1: rotary keys are turned by it, and with learned positions a table
   of the head's own, one row a latent, says which block it was (codes should not have to).
3. Latents are made when their block is complete, and again from the encoder states when sampling goes on after a cache: those of
   the block and of the one before it are all that a convolution of kernel 3 sees. So the head has no state besides the states.
4. Without a `window` on self-attention the latents are redundant, and a model learns to do without them. `measure` asks how much
   they say: the loss with all latents zeroed, and with those of the text in the row before.
5. Commitment has no weight by default. In an autoencoder the reconstruction holds the latents apart; here the gradient through
   cross-attention begins at 0, and with a weight of 0.25 their variance was 0.02% of their square after 500 steps: the latents of
   another text served as well. Until k-means the head trains on random codes; on the latents themselves, as an autoencoder does, it
   came out 0.02 worse (two seeds). Both were tried before config/latent/head_stdlib.py clipped its gradients and began its bridge
   as the identity.
6. What a `window` would save in sampling is not saved: caches hold all states, and keys out of sight are masked. And training
   windows begin anywhere, so a latent may hold the end of one document and the beginning of the next.

Shapes: B batch, T tokens, C width, S tokens per latent, M latents, Z width of a latent, K codes, D levels, N slots of the memory.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn

from kernels import rotary_angles
from latent.quantize import QuantizerConfig, ResidualQuantizer, code_counts, code_usage
from latent.resample import CausalDownsample, doublings
from model import Context, require

Losses = dict[str, torch.Tensor]


class StateCache:
    """Encoder states (B, capacity, C) of the tokens in a cache. How many of them count is the cache's own length."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.h: torch.Tensor | None = None

    def append(self, h: torch.Tensor, start: int) -> torch.Tensor:
        """Write h (B, T, C) after the first `start` states; return all start + T of them."""
        if self.h is None:
            self.h = h.new_zeros(h.size(0), self.capacity, h.size(2))
        self.h[:, start : start + h.size(1)] = h
        return self.h[:, : start + h.size(1)]


def quantizer_config(config) -> QuantizerConfig:
    """The quantizer's part of an EncoderDecoderConfig. Raises ValueError for settings of the head that cannot work."""
    S = config.latent_factor
    doublings(S)
    require(config.block_size >= S, f"latent_factor={S} is more than block_size={config.block_size}; lower it, or 0 for no head")
    require(
        config.window == 0 or config.window >= S,
        f"window={config.window} is shorter than latent_factor={S}: tokens would be out of sight before their latent is in it",
    )
    sizes = config.latent_dim, config.codebook_size, config.codebook_levels
    return QuantizerConfig(*sizes, commitment_weight=config.commitment_weight)


class CompressionHead(nn.Module):
    """See the top of this file. config: an EncoderDecoderConfig with latent_factor > 0."""

    def __init__(self, config):
        super().__init__()
        self.factor = config.latent_factor
        self.down = CausalDownsample(config.n_embd, self.factor, kernel=3, bias=config.bias)
        self.to_latent = nn.Linear(config.n_embd, config.latent_dim, bias=config.bias)
        self.norm = nn.LayerNorm(config.latent_dim, bias=config.bias)  # the quantizer sees one scale from the first step on
        self.quantizer = ResidualQuantizer(quantizer_config(config))
        self.from_latent = nn.Linear(config.latent_dim, config.n_embd, bias=config.bias)
        self.start = nn.Parameter(0.02 * torch.randn(config.n_embd))
        learned = config.position == "learned"
        self.wpe = nn.Embedding(config.block_size // self.factor, config.n_embd) if learned else None
        self.ablation = "none"  # see `ablated`

    def extend(self, cache, n_encoder_layer: int):
        """An empty Cache, with what the head needs: encoder states, and in cross-attention's layers slots instead of tokens."""
        require(
            not isinstance(cache.length, torch.Tensor),
            "a compiled step needs shapes that never change, but a compression head adds a latent now and then; use compile=false",
        )
        for layer in cache.layers[n_encoder_layer + 1 :: 2]:
            layer.capacity = 1 + cache.capacity // self.factor
        cache.states = StateCache(cache.capacity)
        return cache

    def latents(self, h: torch.Tensor, first: int) -> torch.Tensor:
        """All complete latents (B, M - first, Z) of the states h (B, T, C) from number `first` on, not quantized."""
        last, before = h.size(1) // self.factor, max(first - 1, 0)  # kernel 3 sees S - 1 states in front of a block
        z, _ = self.down(h[:, before * self.factor : last * self.factor])
        return self.norm(self.to_latent(z[:, first - before :]))

    def ends(self, slots: int, device: torch.device) -> torch.Tensor:
        """Position (N,) of the last token that each slot of the memory knows; -1 for the start."""
        return torch.arange(slots, device=device) * self.factor - 1

    def real(self, targets: torch.Tensor) -> torch.Tensor:
        """Which latents (B, M) end before the padding behind the last target of their row, targets (B, T), -1 = none."""
        tokens = torch.arange(targets.size(1), device=targets.device)
        last = torch.where(targets >= 0, tokens, -1).amax(1)  # (B,)
        return self.ends(1 + targets.size(1) // self.factor, targets.device)[1:] <= last[:, None]

    def forward(
        self, h: torch.Tensor, positions: torch.Tensor, context: Context, cache, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Context, Losses]:
        """
        Encoder states h (B, T, C) at `positions` (T,) -> the slots (B, N, C) that this call adds to the memory, the context in
        which cross-attention sees it, and the quantizer's losses. `context` is that of self-attention in this call; with a
        cache, what came before is in its `states` and layers. In training, latents of padding, which `targets` (B, T) tell, are
        zeros that nothing with a target sees, and neither the codebooks nor the losses count them.
        """
        if cache is not None:
            h = cache.states.append(h, context.start)
        known = context.start // self.factor  # latents that are in the cache
        first = known + (context.start > 0)  # slots that are: the start is one of them
        slots = 1 + h.size(1) // self.factor
        memory, losses = h[:, :0], {}
        if slots > first:
            counts = self.training and targets is not None  # else nothing is made of the latents but the memory
            memory, losses = self.remember(h, known, self.real(targets) if counts else None)
        if first == 0:
            memory = torch.cat((self.start.expand(h.size(0), 1, -1), memory), dim=1)
        ends = self.ends(slots, h.device)
        rotary = {width: rotary_angles(ends[first:], width) for width in context.rotary}
        mask = ends <= positions[:, None]  # (T, N)
        return memory, Context(mask, False, context.rotary, start=first, dropout=context.dropout, key_rotary=rotary), losses

    def remember(self, h: torch.Tensor, first: int, real: torch.Tensor | None) -> tuple[torch.Tensor, Losses]:
        """Slots (B, M - first, C) of the latents from number `first` on of states h (B, T, C); the quantizer's losses over real ones."""
        latents = self.latents(h, first)
        z_q, _, losses, _ = self.quantizer(latents, real)
        memory = self.from_latent(z_q.type_as(latents))
        if self.ablation == "zeroed":
            memory = torch.zeros_like(memory)
        elif self.ablation == "swapped":
            assert len(memory) > 1, "one row has no other to swap with"
            memory = memory.roll(1, dims=0)
        if self.wpe is not None:
            memory = memory + self.wpe.weight[first : first + latents.size(1)]
        return memory, losses

    # ------------------------------------------------------------------------------------------------------------------
    # what it costs, and what it is good for

    def spared_flops(self, model: nn.Module) -> float:
        """How much CausalModel.flops_per_token, which runs every weight once a token, overcounts. Codes are looked up forward only."""
        config, S, T = model.config, self.factor, model.config.block_size
        once = [self.to_latent, self.norm, self.from_latent, *(block.cross_attn.c_kv for block in model.decoder)]  # for a latent
        shares = [(module, 1 / S) for module in once]  # module, how often it runs for a token
        shares += [(layer, 0.5 ** (1 + i)) for i, layer in enumerate(self.down.layers)]
        idle = sum((1 - share) * p.numel() for module, share in shares for p in module.parameters())
        quantizer = self.quantizer.config
        lookups = 2 * quantizer.codebook_levels * quantizer.codebook_size * quantizer.latent_dim / S
        unseen = config.n_decoder_layer * (T - 1 - T // S)  # keys
        return 6 * idle + 12 * config.n_embd * unseen - lookups

    @contextlib.contextmanager
    def ablated(self, how: str) -> Iterator[None]:
        """Inside, all latents are `zeroed`, or `swapped`: replaced by those of the row before. For evaluation without a cache."""
        self.ablation = how
        try:
            yield
        finally:
            self.ablation = "none"

    @torch.no_grad()
    def measure(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Sums over a batch of evaluation, x and y (B, T), y = -1 not counted: how often each code of each level occurs in front of
        padding (D, K), and the token losses, nats, of a model whose latents are zeroed or swapped.
        """
        assert not model.training, "measured in evaluation mode: training would collect statistics"
        _, h = model.encode(x, *model.place(x))
        codes = self.quantizer.encode(self.latents(h, 0))  # (B, M, D)
        counts = code_counts(codes[self.real(y)], self.quantizer.config.codebook_size)
        tokens = (y >= 0).sum().cpu().double()
        others = tokens if len(x) > 1 else torch.zeros_like(tokens)  # one row has no other to swap with
        sums = {"codes": counts.cpu().double(), "tokens": tokens, "swapped_tokens": others}
        for how, count in (("zeroed", tokens), ("swapped", others)):
            with self.ablated(how):  # a batch without a target has no mean
                sums[how] = model(x, y)[1]["token"].cpu().double() * count if count > 0 else torch.zeros_like(count)
        return sums

    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, int | float | list]:
        """Entries of summary.json from the added sums of `measure`. Warns of codebooks that have collapsed."""
        usage = code_usage(sums["codes"], warn=self.quantizer.initialized)
        report = {"codes_of_data": self.quantizer.initialized, "val_loss_latents_zeroed": (sums["zeroed"] / sums["tokens"]).item()}
        if sums["swapped_tokens"] > 0:
            report["val_loss_latents_swapped"] = (sums["swapped"] / sums["swapped_tokens"]).item()
        codes = {f"codebook_{name}": value for name, value in usage.items()}
        return report | codes | {"codebook_restarts": self.quantizer.restarts}
