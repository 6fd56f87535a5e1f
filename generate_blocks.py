"""
generate.py's loop for models over codes, which write several tokens at a time: S tokens from the codes of a block
(latent/rq_transformer.py), or a whole target from all its codes (latent/latent_transformer.py). Every code and every token is
chosen with `pick` and the noise of its own position, as there.

Shapes: B samples, T tokens, V vocabulary, C width; S tokens of a block, M blocks of a context, D levels of codes, K codes of a level.
"""

from collections.abc import Iterator

import torch

from code_stepper import CodeStepper
from generate import BlockSampling, Continuation, Sampling, context_start, gumbel_noise, pick
from stepper import can_step


def filler(sample: Continuation) -> int:
    """The token that fills the block in which a prompt begins: a line break where it is one token, or the first token again."""
    try:
        newline = sample.tokenizer.encode("\n") if sample.tokenizer is not None else []
    except ValueError:  # characters of a text without line breaks
        newline = []
    return newline[0] if len(newline) == 1 else sample.tokens[0]


def block_noise(seed: int, samples: range, position: int, count: int, size: int) -> torch.Tensor:
    """(B, count, size) Gumbel noise of one position in all samples, for `count` choices among `size`."""
    return torch.stack([gumbel_noise(seed, sample, position, count * size) for sample in samples]).unflatten(1, (count, size))


def code_noise(levels: tuple[Sampling, ...], samples: range, n: int, count: int, size: int) -> list[torch.Tensor | None]:
    """(B, size) noise for each of the `count` codes that follow n blocks or tokens; None where all levels are greedy."""
    if all(level.temperature == 0 for level in levels):
        return [None] * count
    return list(block_noise(levels[0].seed, samples, n, count, size).unbind(1))


def token_noise(sampling: BlockSampling, samples: range, n: int, count: int, size: int) -> torch.Tensor | None:
    """(B count, size) noise for the tokens of those codes, at positions from 2^31 on, out of the way of the codes'; None: greedy."""
    if sampling.tokens.temperature == 0:
        return None
    return block_noise(sampling.tokens.seed, samples, 2**31 + n, count, size).flatten(0, 1)


class BlockSteps:
    """
    What an RQ-transformer computes for a block: with caches only what they do not hold yet, without them all of the context again.
    One text on a CPU goes through a CodeStepper.
    """

    def __init__(self, model: torch.nn.Module, samples: int, use_cache: bool):
        self.model, self.table, self.use_cache = model, model.table(), use_cache
        self.stepper = CodeStepper(model, self.table) if use_cache and samples == 1 and can_step(model) else None

    def begin(self) -> None:
        """Empty caches, for another context."""
        autoencoder = self.model.autoencoder
        self.spatial, self.depth = self.model.spatial.make_cache(), self.model.depth.make_cache()
        self.decoder = None if autoencoder is None else autoencoder.make_decoder_cache()

    def state(self, codes: torch.Tensor) -> torch.Tensor:
        """Spatial state (B, C) that predicts the block after those of codes (B, m, D)."""
        self.depth.truncate(0)
        if self.stepper is not None and self.spatial.length == codes.size(1) > 0:
            return self.stepper.state(codes[0, -1].tolist(), self.spatial)
        return self.model.states(codes, self.table, self.spatial if self.use_cache else None)[:, -1]

    def code_logits(self, h: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of the code after those of a stack (B, d), whose spatial state is h (B, C)."""
        if self.stepper is not None and self.depth.length == stack.size(1):
            return self.stepper.logits(h, stack[0].tolist(), self.depth)
        return self.model.code_logits(h, stack, self.table, self.depth if self.use_cache else None)[:, -1]

    def token_logits(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits (B S, V) of the tokens of the last block of codes (B, m, D)."""
        S = self.model.config.latent_factor
        known = self.decoder.length // S  # blocks in the cache
        if self.stepper is not None and self.stepper.write is not None and known + 1 == codes.size(1):
            return self.stepper.write(codes[0, -1].tolist(), self.decoder)
        logits = self.model.autoencoder.decode(codes[:, known:], self.decoder if self.use_cache else None)  # (B, m' S, V)
        return logits[:, -S:].flatten(0, 1)


def sample_in_blocks(
    model: torch.nn.Module, samples: list[Continuation], sampling: BlockSampling, use_cache: bool, first_sample: int
) -> Iterator[None]:
    """
    sample_together for a model over codes: at every step one spatial step, D depth steps that choose the codes of one block,
    and its S tokens at once from the autoencoder's decoder. Where codes are the tokens there is none: they are chosen already.

    A prompt is filled up to whole blocks in front (see filler), because new text begins with a new block; where codes are the
    tokens it may end inside a block, of which only the rest is chosen. When the context is full, the text of its last M // 2 blocks
    is encoded anew as the beginning of the next one; between that, codes are kept as they were chosen. Without the cache the
    spatial states are computed again for every block, the depth steps for every code.
    """
    config, learned, device = model.config, model.autoencoder is not None, model.start.device
    S, M, D = config.latent_factor, config.blocks, config.codebook_levels
    levels, numbers = sampling.for_levels(D), range(first_sample, first_sample + len(samples))
    fill = -len(samples[0].tokens) % S if learned else 0
    idx = torch.tensor([[filler(sample)] * fill + sample.tokens for sample in samples], device=device)
    steps, codes = BlockSteps(model, len(samples), use_cache), None
    while not all(sample.finished for sample in samples):
        n = idx.size(1) // S  # blocks of text, hence the number of the next one; a part of that may be there
        if codes is None or codes.size(1) == M:
            kept = n if n < M else M // 2
            codes = torch.empty(len(samples), 0, D, dtype=torch.int64, device=device)
            if kept > 0:
                codes = model.encode(idx[:, (n - kept) * S : n * S].contiguous(), None)[0]
            steps.begin()
        h, drawn = steps.state(codes), code_noise(levels, numbers, n, D, config.codebook_size)
        stack = idx[:, n * S :]  # (B, d), the codes of this block so far
        given = stack.size(1)
        for d in range(given, D):
            stack = torch.cat((stack, pick(steps.code_logits(h, stack), drawn[d], levels[d])[:, None]), dim=1)
        codes = torch.cat((codes, stack[:, None]), dim=1)  # (B, blocks in the context, D)
        if learned:
            drawn = token_noise(sampling, numbers, n, S, config.vocab_size)
            chosen = pick(steps.token_logits(codes), drawn, sampling.tokens).unflatten(0, (-1, S))  # (B S,) -> (B, S)
        else:
            chosen = stack[:, given:]
        for sample, tokens in zip(samples, chosen.tolist()):
            if not sample.finished:
                sample.accept(tokens)
        idx = torch.cat((idx, chosen), dim=1)
        yield


def sample_targets(
    model: torch.nn.Module, samples: list[Continuation], sampling: BlockSampling, use_cache: bool, first_sample: int
) -> Iterator[None]:
    """
    sample_together for a latent transformer: at every step the codes of one target, one by one, and all its tokens at once. Of a
    text the tokens are then read as those of the prompt were, in front of the next target; a pair has one target.

    Without the cache prefix and codes are read again for every code but the first.
    """
    config, device = model.config, next(model.parameters()).device
    S, D, K, pairs = config.latent_factor, config.codebook_levels, config.codebook_size, config.task == "pairs"
    levels, most, numbers = sampling.for_levels(D), config.latents * D, range(first_sample, first_sample + len(samples))
    idx = torch.tensor([sample.tokens for sample in samples], device=device)  # (B, n)

    cache, begin, h = None, 0, None
    while not all(sample.finished for sample in samples):
        n = idx.size(1)
        if cache is None or begin != context_start(n, config.block_size):
            begin, cache = context_start(n, config.block_size), model.make_cache()
            h = model.wte.weight.new_empty(len(samples), 0, config.n_embd)
        new = model.read(model.wte(idx[:, begin + h.size(1) :]), cache)
        h = torch.cat((h.to(new.dtype), new), dim=1)  # (B, n - begin, C)
        state, codes = h[:, -1], idx.new_empty(len(samples), 0)  # (B, codes so far)
        going = torch.ones(len(samples), dtype=torch.bool, device=device)  # no "end" yet
        drawn = code_noise(levels, numbers, n, most, K + 1)
        for i in range(most):
            logits = model.code_logits(state, i % D)
            if i == 0:
                logits = logits[:, :K]  # not even an empty target ends before its first latent
            rows = None if drawn[i] is None else drawn[i][:, : logits.size(1)]
            chosen = pick(logits, rows, levels[i % D])
            if i % D == 0:
                going = going & (chosen < K)
                if not going.any():
                    break
            codes = torch.cat((codes, torch.where(going, chosen, -1)[:, None]), dim=1)
            if i + 1 == most:
                break
            if use_cache:
                state = model.read(model.embed_codes(codes[:, i:], i), cache)[:, -1]
            else:
                vectors = torch.cat((model.wte(idx[:, begin:]), model.embed_codes(codes)), dim=1)
                state = model.read(vectors, model.make_cache())[:, -1]
        cache.truncate(n - begin)
        logits = model.write(codes.unflatten(1, (-1, D)), h)  # (B, m S, V)
        drawn = token_noise(sampling, numbers, n, *logits.shape[1:])
        chosen = pick(logits.flatten(0, 1), drawn, sampling.tokens).unflatten(0, (len(samples), -1))
        lengths = (codes[:, ::D] >= 0).sum(1) * S
        for sample, tokens, length in zip(samples, chosen.tolist(), lengths.tolist()):
            if not sample.finished:
                sample.accept(tokens[:length])
            if pairs and not sample.finished:
                sample.end("length")
        idx = torch.cat((idx, chosen), dim=1)
        yield
