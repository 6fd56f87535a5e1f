"""
An auto-regressive prior over the codes of a frozen text autoencoder: the RQ-transformer (arXiv:2203.01941, section 3.2).

Every S tokens are one stack of D codes k_1..k_D. A spatial transformer goes over the stacks, a depth transformer over the codes
of one stack, so nothing attends over all M D codes:

    e_{m,d} = P_d E_d[k_{m,d}]                        frozen codebook vectors, one learned projection a level
    u_m = sum_d e_{m,d}                               (start, u_1 .. u_{M-1}) -> spatial -> h_1 .. h_M
    v_{m,1} = h_m + p_1;  v_{m,d} = W sum_{i<d} e_{m,i} + p_d   -> depth -> logits_{m,d} = head_d(.), over K codes

1. h_m knows the stacks before m and reaches depth d > 1 only through attention, so the depth transformer always sees
   the whole prefix of its stack: in training, and through its cache in every step of sampling.
2. Both transformers are blocks of model.py, the spatial one with rotary positions; the levels have theirs in p. `states` and
   `code_logits` take all codes so far and compute what their cache does not hold yet: training, prefill and steps are one path.
3. One projection a level: with a table shared by all depths (1, 2, 3) and (3, 2, 1) would be the same context. E_d is divided by
   its root mean square, because residuals, and so the codes of deep levels, become small. With `code_vectors` = learned E_d is the
   identity, so that P_d is a table of embeddings: more parameters, no more arithmetic, and where there is a code for each token a lower
   loss, where there are fewer no lower one (results/REPORT.md, section 7).
4. In evaluation `token` is an upper bound of the negative log-likelihood of the text: the codes z(x) are a function of the text,
   so p(x) >= p(z(x)) p(x | z(x)), and both factors are paid for: nats of the codes, and of the tokens given the codes. It is that of
   whole windows x_0 .. x_{T-1}; other models predict x_1 .. x_T and are given x_0.
5. In front of the first stack stands one learned vector, where the paper has a condition: a text is continued from a prompt.
6. The autoencoder is attached, not a part: it is neither trained nor counted nor in this model's checkpoints.
7. Without one the codes of a block are its tokens: D = S, K = V, learned vectors, and `token` is no bound but the nats of the text
   themselves. That is much like MegaByte (arXiv:2305.07185), whose local model is the depth transformer here, and what learned codes
   have to be compared with.

Shapes: B batch, T tokens, S tokens of a block, M = ceil(T / S) blocks, D levels, K codes of a level, Z latent width, C width,
N stacks of any texts, V vocabulary.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from dataloader import TokenData
from kernels import Dropout, head_logits, uncompiled
from latent.autoencoder import Autoencoder
from latent.codes import CodeData
from latent.quantize import full_float32
from model import Block, Cache, CausalModel, check_fields, require, warn_ignored

FROM_AUTOENCODER = ("vocab_size", "block_size", "latent_factor", "latent_dim", "codebook_size", "codebook_levels")


@dataclass(frozen=True)
class RQTransformerConfig:
    autoencoder: str | None = "out/latent/rqvae_stdlib"  # run of the frozen autoencoder of the codes; none: codes are the tokens
    codebook_hash: str = ""  # sha256 of its codebooks; filled in when a run starts, and refused when it differs later
    n_spatial_layer: int = 5  # blocks over the stacks of codes, one step for S tokens
    n_depth_layer: int = 1  # blocks over the codes of a stack, D steps for S tokens
    n_head: int = 4  # attention heads of both
    n_embd: int = 108  # width C of both
    bias: bool = False  # biases in linear layers and LayerNorms
    dropout: float = 0.0  # on embeddings, attention weights and residual branches, in training only
    code_vectors: Literal["codebook", "learned"] = "codebook"  # what is read of a code: its frozen vector, projected, or one of its own
    soft_labels: float = 0.0  # temperature of stochastic soft targets, see soft_codes; 0 = the codes themselves, stored once
    code_offsets: int = 1  # stored copies of the training text, each cut into windows at other places
    # the autoencoder's: taken from it when a run starts; without one K = V and D = S, and there is no Z
    vocab_size: int = 256  # number of token ids
    block_size: int = 256  # longest context, tokens
    latent_factor: int = 4  # tokens S of a block
    latent_dim: int = 64  # width Z of a latent
    codebook_size: int = 512  # codes K of a level
    codebook_levels: int = 4  # levels D

    def __post_init__(self):
        if self.autoencoder is None:
            warn_ignored(self, ("soft_labels", "code_offsets", "latent_dim"), "autoencoder=none, so codes are the tokens")
            own = {"codebook_size": self.vocab_size, "codebook_levels": self.latent_factor, "code_vectors": "learned", "soft_labels": 0.0}
            for key, value in own.items():
                if key != "soft_labels" and getattr(self, key) != value:
                    warn_ignored(self, [key], f"autoencoder=none, so it is {value}")
                object.__setattr__(self, key, value)  # frozen for all others
        check_fields(self, "n_spatial_layer", "n_depth_layer", "n_head", "n_embd", "code_offsets", *FROM_AUTOENCODER)
        require(self.soft_labels >= 0.0, f"soft_labels={self.soft_labels}: a temperature is needed, or 0 for hard labels")
        require(
            self.soft_labels == 0.0 or self.code_offsets == 1,
            f"soft_labels={self.soft_labels} encodes its text in every step, so code_offsets={self.code_offsets} windows would not "
            "be stored; leave code_offsets at 1",
        )
        require(
            self.block_size % self.latent_factor == 0,
            f"block_size={self.block_size} is not a multiple of latent_factor={self.latent_factor}",
        )

    @property
    def blocks(self) -> int:
        """Blocks M of the longest context."""
        return self.block_size // self.latent_factor

    def fitted_to(self, autoencoder: Autoencoder, given: dict[str, object] | None = None) -> "RQTransformerConfig":
        """This config with the sizes and the hash of an autoencoder. Raises ValueError for `given` values that differ."""
        theirs, given = {key: getattr(autoencoder.config, key) for key in FROM_AUTOENCODER}, given or {}
        for key, value in theirs.items():
            require(
                given.get(key, value) == value,
                f"{key}={given.get(key)}, but the autoencoder {self.autoencoder} has {value}: set --{key}={value}",
            )
        if "codebook_hash" in given:
            check_hash(self.codebook_hash, autoencoder)
        return dataclasses.replace(self, **theirs, codebook_hash=autoencoder.codebook_hash())


def check_hash(expected: str, autoencoder: Autoencoder) -> None:
    """Raise ValueError unless the autoencoder has the codebooks that a prior was made for."""
    found = autoencoder.codebook_hash()
    require(
        found == expected,
        f"the autoencoder has other codebooks (hash {found[:12]}...) than this model was trained on ({expected[:12] or 'none'}...), "
        "so its codes mean nothing here; use the autoencoder of that time, or train this model again",
    )


def soft_codes(z: torch.Tensor, books: list[torch.Tensor], tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Latents z (N, Z) -> codes (N, D), drawn level by level from Q(k | r) = softmax(-|r - e_k|^2 / tau), each residual being what
    the drawn code leaves, and Q (N, D, K) itself: the targets of arXiv:2203.01941, section 3.2.3.
    """
    residual, codes, targets = z.to(books[0].dtype), [], []
    for book in books:
        logits = (2 * residual @ book.T - book.pow(2).sum(-1)) / tau  # |r|^2 is the same for all k
        targets.append(logits.softmax(-1))
        codes.append(torch.multinomial(targets[-1], 1).squeeze(-1))
        residual = residual - book[codes[-1]]
    return torch.stack(codes, -1), torch.stack(targets, 1)


class Stack(CausalModel):
    """Causal blocks of model.py over vectors instead of tokens. Learned positions are for the caller to add."""

    def __init__(self, config: RQTransformerConfig, n_layer: int, length: int, position: Literal["learned", "rope"]):
        super().__init__()
        self.config = SimpleNamespace(block_size=length, dropout=config.dropout, position=position)  # what CausalModel reads
        self.n_layer_cache, self.head_widths = n_layer, {config.n_embd // config.n_head}
        self.blocks = nn.ModuleList(Block(config.n_embd, config.n_head, config.bias, config.dropout) for _ in range(n_layer))

    def forward(self, x: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """x (B, n, C), after what is in the cache -> (B, n, C)."""
        _, context = self.place(x, cache)
        for i, block in enumerate(self.blocks):
            x = block(x, context, cache.layers[i] if cache is not None else None)
        if cache is not None:
            cache.length += x.size(1)
        return x


class RQTransformer(CausalModel):
    """See the top of this file. Parameter names are part of the checkpoint format."""

    writes_blocks = True

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.config, self.side_by_side = config, config.soft_labels == 0.0
        C, D, K, learned = config.n_embd, config.codebook_levels, config.codebook_size, config.code_vectors == "learned"
        self.project = nn.Parameter(torch.empty(D, K if learned else config.latent_dim, C))  # P
        self.start = nn.Parameter(torch.empty(C))  # in front of the first stack
        self.spatial = Stack(config, config.n_spatial_layer, config.blocks, "rope")
        self.from_sum = nn.Linear(C, C, bias=config.bias) if D > 1 else None  # W
        self.wpe_depth = nn.Parameter(torch.empty(D, C))  # p
        self.depth = Stack(config, config.n_depth_layer, D, "learned")
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(C, bias=config.bias), nn.Linear(C, K, bias=config.bias)) for _ in range(D)
        )
        self.dropout = Dropout(config.dropout)
        vectors = None if learned else torch.zeros(D, K, config.latent_dim)  # E of the autoencoder that is attached
        self.register_buffer("vectors", vectors, persistent=False)
        self.autoencoder: Autoencoder | None = None
        self.initialize([self.spatial.blocks, self.depth.blocks])
        for parameter in (self.project, self.start, self.wpe_depth):
            nn.init.normal_(parameter, mean=0.0, std=0.02)

    # ------------------------------------------------------------------------------------------------------------------
    # the frozen autoencoder

    @torch.no_grad()
    def attach(self, autoencoder: Autoencoder) -> None:
        """Make this the autoencoder whose codes are predicted, frozen. Raises ValueError if it has other codebooks."""
        check_hash(self.config.codebook_hash, autoencoder)
        autoencoder.to(self.start).eval().requires_grad_(False)  # before E is made: a resumed run has only its copy, in this precision
        if self.vectors is not None:
            books = torch.stack(autoencoder.quantizer.vectors())
            self.vectors.copy_(books / books.pow(2).mean((1, 2), keepdim=True).sqrt())
        object.__setattr__(self, "autoencoder", autoencoder)  # nn.Module would make it a submodule

    def _apply(self, fn, recurse: bool = True):
        if self.autoencoder is not None:  # it goes where the model goes
            self.autoencoder._apply(fn)
        return super()._apply(fn, recurse)

    def encode(self, idx: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Text (B, T), mask True = real -> codes (B, M, D), -1 where there is no text, and in training their soft targets
        (B, M, D, K), if there are any.
        """
        if self.autoencoder is not None:
            return self.learned_codes(idx, mask)
        assert self.config.autoencoder is None, "no autoencoder has been attached"
        tokens, S = idx if mask is None else torch.where(mask, idx, -1), self.config.latent_factor
        return F.pad(tokens, (0, -tokens.size(1) % S), value=-1).unflatten(1, (-1, S)), None  # (B, T) -> (B, M S) -> (B, M, S)

    @uncompiled
    def learned_codes(self, idx: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`encode` where an autoencoder does it."""
        if not self.training or self.config.soft_labels == 0.0:
            return self.autoencoder.encode(idx, mask), None
        with torch.no_grad(), full_float32(idx.device):
            z, real = self.autoencoder.compress(idx, mask)
            codes, soft = soft_codes(z.flatten(0, 1), self.autoencoder.quantizer.vectors(), self.config.soft_labels)
            codes, soft = codes.unflatten(0, z.shape[:2]), soft.unflatten(0, z.shape[:2])
            return codes if real is None else torch.where(real[..., None], codes, -1), soft

    @uncompiled
    def token_nats(self, codes: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """Nats (B, T) of the tokens idx (B, T), given their codes (B, M, D)."""
        states = self.autoencoder.expand(self.autoencoder.quantizer.decode(codes))  # (B, M S, C)
        return self.autoencoder.judge(states[:, : idx.size(1)], idx)[0]

    # ------------------------------------------------------------------------------------------------------------------
    # codes to logits

    def table(self) -> torch.Tensor:
        """What a code adds to the context, (D, K, C): its projected codebook vector, or its own. Once per forward pass, or per text."""
        return self.project if self.vectors is None else torch.bmm(self.vectors, self.project)

    def embed(self, codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """
        Vectors e (..., d, C) of the codes (..., d) of the first d levels. Those of -1 mean nothing: a block without text stands
        after all text, where nothing that counts looks at it.
        """
        K = table.size(1)
        return F.embedding(
            codes.clamp(min=0) + torch.arange(0, K * codes.size(-1), K, device=codes.device), table.flatten(0, 1)
        )

    def states(self, codes: torch.Tensor, table: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """
        All n stacks of codes (B, n, D) so far -> h_1 .. h_{n+1} (B, n + 1, C), where h_m predicts stack m from those before it.
        With a cache only the h that it does not hold yet.
        """
        known = cache.length if cache is not None else 0  # h_1 .. h_known
        u = self.embed(codes[:, max(known - 1, 0) :], table).sum(-2)
        if known == 0:
            u = torch.cat((self.start.to(u.dtype).expand(codes.size(0), 1, -1), u), dim=1)
        return self.spatial(self.dropout(u), cache)

    def code_logits(
        self, h: torch.Tensor, codes: torch.Tensor, table: torch.Tensor, cache: Cache | None = None
    ) -> torch.Tensor:
        """
        Logits (N, d, K) of the first d codes of a stack, from its spatial state h (N, C) and all d - 1 codes (N, d - 1) before
        the last one predicted; with a cache only those that it does not hold yet.
        """
        known, parts = cache.length if cache is not None else 0, []
        if known == 0:
            parts.append(h[:, None])
        if codes.size(1) > 0:
            parts.append(self.from_sum(self.embed(codes, table).cumsum(1)[:, max(known - 1, 0) :]))
        x = torch.cat(parts, dim=1)
        x = self.depth(self.dropout(x + self.wpe_depth[known : known + x.size(1)]), cache)
        heads = self.heads[known : known + x.size(1)]
        return torch.stack([head_logits(norm(x[:, i]), of.weight, of.bias) for i, (norm, of) in enumerate(heads)], dim=1)

    def logits(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits (B, M, D, K) of all codes (B, M, D), each from those before it."""
        table = self.table()
        h = self.states(codes[:, :-1], table)
        return self.code_logits(h.flatten(0, 1), codes.flatten(0, 1)[:, :-1], table).unflatten(0, codes.shape[:2])

    # ------------------------------------------------------------------------------------------------------------------
    # losses

    def sums(self, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Of codes idx (B, M, D), or of text idx (B, T) where targets (B, T) >= 0: `code_nats` and `codes` (D,), `tokens` and, in
        evaluation of text with an autoencoder, `token_nats`. A block that is partly text counts with all codes that it has.
        """
        text, counted = idx.dim() == 2, targets >= 0
        codes, soft = self.encode(idx, counted) if text else (idx, None)
        logits, count = self.logits(codes), (codes >= 0).sum((0, 1))
        if soft is None:
            nats = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), ignore_index=-1, reduction="none").view(codes.shape)
        else:
            nats = torch.where(codes >= 0, -(soft * logits.log_softmax(-1)).sum(-1), 0.0)
        sums = {"code_nats": nats.sum((0, 1)), "codes": count}
        sums["tokens"] = counted.sum() if text else count[0] * self.config.latent_factor
        if text and not self.training and self.autoencoder is not None:
            sums["token_nats"] = torch.where(counted, self.token_nats(codes, idx), 0.0).sum()
        return sums

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Codes idx (B, M, D), -1 where a block has no text, or text idx (B, T) -> logits (B, M, D, K) and no losses. With targets
        of idx's shape, which only say what counts (>= 0, all of it in front), no logits but the losses by name: `code` and `total`
        (to minimise), nats per code, and `token`, nats per token: of the codes alone for codes and in training, or where they are
        the tokens, else of codes and tokens together.
        """
        if targets is None:
            return self.logits(self.encode(idx, None)[0] if idx.dim() == 2 else idx), {}
        sums = self.sums(idx, targets)
        nats = sums["code_nats"].sum()
        code = nats / sums["codes"].sum()
        return None, {"token": (nats + sums.get("token_nats", 0.0)) / sums["tokens"], "code": code, "total": code}

    # ------------------------------------------------------------------------------------------------------------------
    # hooks of training: see checkpoint.py

    def training_data(self, data: TokenData, store: Path) -> TokenData | CodeData:
        """What to train on: the codes of the training text, stored in a folder, or with soft labels the text itself."""
        if self.config.soft_labels > 0.0:
            return data
        copies = self.config.code_offsets
        return CodeData(store / str(copies), data, self.autoencoder, copies)  # runs with other numbers of copies keep theirs

    @torch.no_grad()
    def measure(self, idx: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """What summarize() needs of a batch of text, in evaluation mode: float64 sums on the CPU, to be added up."""
        return {name: value.cpu().double() for name, value in self.sums(idx, targets).items()}

    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float | list[float]]:
        """
        `code_loss`, nats per code of each level, and with an autoencoder `code_bits_per_token` and `token_bits_per_token`, which add
        up to the bound.
        """
        found = {"code_loss": (sums["code_nats"] / sums["codes"].clamp(min=1)).tolist()}
        if "token_nats" in sums:
            nats = {"code": sums["code_nats"].sum(), "token": sums["token_nats"]}
            found |= {f"{name}_bits_per_token": (of / (math.log(2) * sums["tokens"])).item() for name, of in nats.items()}
        return found

    def flops_per_token(self) -> int:
        """
        As CausalModel counts, for a token of text: a block costs one spatial step, D depth steps, and each head once. The table of
        the codes is not counted: it is made once for a whole batch.
        """
        config = self.config
        C, D, M = config.n_embd, config.codebook_levels, config.blocks
        depth, from_sum = (sum(p.numel() for n, p in self.named_parameters() if n.startswith(part)) for part in ("depth.", "from_sum."))
        once = self.get_num_params() - self.project.numel()
        products = 6 * (once + (D - 1) * depth + (D - 2) * from_sum)  # W is not there if D = 1
        attention = 12 * C * (config.n_spatial_layer * M + config.n_depth_layer * D * D)
        return (products + attention) // config.latent_factor
