"""
Sampling from any model of the project: plain, cached, batched, streamed, and in lookahead.py several tokens a step; all of
them choose tokens with the one function `pick`, so they give the same text.

Randomness. The token at position p of sample i is  argmax_v (filtered logits_v + temperature * g_v)  with Gumbel noise
g = -log(-log(u)) (Gumbel-max: that is a draw from softmax(logits / temperature)), where u is a function of (seed, i, p, v)
alone. So a text does not depend on the batch it was sampled in, on the cache, or on the order of computation.

Context. Models have block_size positions. While prompt and output fit, all of it is the context. When it is full, only its
last block_size // 2 tokens are kept, at positions from 0 again, and the context grows from there: see context_start.

Blocks. Models over codes write several tokens at a time: see generate_blocks.py.

Shapes: B samples, T tokens, V vocabulary, D levels of codes.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

import tokenizer as tokenizers
from stepper import Stepper, can_step


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # only the k most likely tokens; none: all
    top_p: float = 1.0  # then only the most likely ones that together have this probability
    seed: int = 1337

    def __post_init__(self):
        if not 0 <= self.temperature <= 1e6:  # beyond, scores would lose the logits, and at last be infinite
            raise ValueError(f"temperature={self.temperature}: 0 (greedy) or a positive number up to 1e6 is needed")
        if self.top_k is not None and not (isinstance(self.top_k, Integral) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k}: a whole number of at least 1 is needed, or none for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability in (0, 1] is needed; 1 keeps all tokens")
        if not (isinstance(self.seed, Integral) and 0 <= self.seed < 2**64):
            raise ValueError(f"seed={self.seed}: a whole number from 0 to 2^64 - 1 is needed")


@dataclass(frozen=True)
class BlockSampling:
    """How a model that writes blocks chooses: the codes of each level, and the tokens from the codes."""

    levels: tuple[Sampling, ...]  # one for each level, or one for all; the seed is the first one's
    tokens: Sampling = Sampling(temperature=0.0)  # greedy: the codes have left next to nothing open

    def for_levels(self, D: int) -> tuple[Sampling, ...]:
        if len(self.levels) not in (1, D):
            raise ValueError(
                f"{len(self.levels)} values of temperature, top_k or top_p for a model of {D} code level{'s' * (D > 1)}: give one"
                + f", or {D}" * (D > 1)
            )
        return self.levels * (D // len(self.levels))


def gumbel_noise(seed: int, sample: int, position: int, size: int) -> torch.Tensor:
    """
    (V,) float64 standard Gumbel noise, a pure function of its arguments: Philox is a counter-based generator, so a key *is*
    a stream. float64 because noise made of float32 uniforms ends at 16.6 and would never pick a token rarer than 1e-7.
    """
    key = np.array([seed, (sample << 32) | position], dtype=np.uint64)
    u = np.random.Generator(np.random.Philox(key=key)).random(size)  # [0, 1) in steps of 2^-53
    return torch.from_numpy(-np.log(-np.log1p(-np.maximum(u, 2.0**-53))))


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """
    logits (B, V) with -inf where top-k, and after it top-p, exclude a token. Equal logits are ranked by their index. The most
    likely token always stays. top-p looks at softmax(logits / temperature) over what top-k left.
    """
    V = logits.size(-1)
    k = min(sampling.top_k or V, V)
    if k < V:
        threshold = torch.topk(logits, k).values[:, -1:]
        above, equal = logits > threshold, logits == threshold
        kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        logits = logits.masked_fill(~kept, float("-inf"))
    if sampling.top_p < 1:
        # the k candidates in order of their index, then stably by value: equal ones stay in order of their index
        index = (
            torch.topk(logits, k).indices.sort(-1).values if k < V else torch.arange(V, device=logits.device).expand_as(logits)
        )
        values, order = logits.gather(-1, index).sort(dim=-1, descending=True, stable=True)
        index = index.gather(-1, order)
        probability = torch.softmax((values - values[:, :1]) / sampling.temperature, dim=-1)
        before = probability.cumsum(-1) - probability  # mass of the more likely ones; 0 for the first
        dropped = before >= sampling.top_p
        logits = logits.scatter(-1, index, values.masked_fill(dropped, float("-inf")))
    return logits


def pick(logits: torch.Tensor, noise: torch.Tensor | None, sampling: Sampling) -> torch.Tensor:
    """
    The chosen token (B,) for logits (B, V) and Gumbel noise (B, V): argmax(filtered logits + temperature * noise), the lowest
    id among equals. Temperature 0 is greedy and needs no noise. A pure function, in float64.
    """
    device = logits.device
    logits = logits.cpu() if device.type == "mps" else logits  # Apple GPUs have no float64
    score = logits
    if sampling.temperature > 0:
        score = filter_logits(logits.double(), sampling) + sampling.temperature * noise.to(logits.device)
    return score.argmax(dim=-1).to(device)  # of equal ones the first, as torch promises


def context_start(length: int, block_size: int) -> int:
    """Index of the first token of the context that predicts token `length`, i.e. of a text of `length` tokens so far."""
    keep = max(1, block_size // 2)
    step = block_size + 1 - keep
    return 0 if length <= block_size else -(-(length - block_size) // step) * step


# ----------------------------------------------------------------------------------------------------------------------
# one sample


class Continuation:
    """
    The tokens of one sample, prompt first. `accept` is the one place that decides what is emitted and where a text ends: at
    the end-of-document token, at a stop string, or at max_new_tokens. It also streams text that can no longer change.
    """

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        tokenizer: tokenizers.Tokenizer | None = None,  # needed for stop strings and for streaming
        eos: int | None = None,
        stop: tuple[str, ...] = (),
        write: Callable[[str], None] | None = None,
    ):
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} must not be negative")
        if tokenizer is None and (stop or write):
            raise ValueError("stop and write are about text: they need the tokenizer")
        self.tokens, self.n_prompt = list(prompt), len(prompt)
        self.limit, self.eos, self.tokenizer = len(prompt) + max_new_tokens, eos, tokenizer
        self.stop = tuple(s.encode() for s in stop)
        self.write, self._written = write, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end inside a character
        self.bytes = b""  # of the output, up to the stop string
        self.reason = "length" if max_new_tokens == 0 else ""  # why it ended: "length", "eos", "stop"

    @property
    def finished(self) -> bool:
        return self.reason != ""

    @property
    def output(self) -> list[int]:
        """The new tokens; an end-of-document token is not one of them, a token that completed a stop string is the last."""
        return self.tokens[self.n_prompt :]

    @property
    def text(self) -> str:
        """The new text, up to the stop string."""
        return self.bytes.decode("utf-8", errors="replace")

    def accept(self, tokens: list[int]) -> int:
        """Take tokens until the text ends; returns how many of them were consumed (an end-of-document token counts)."""
        for count, token in enumerate(tokens, start=1):
            assert not self.finished, "tokens offered to a finished text"
            if token == self.eos:
                self.reason = "eos"
            else:
                self.tokens.append(token)
                if self.tokenizer is not None:
                    self._extend(self.tokenizer.decode_bytes([token]))
                if not self.finished and len(self.tokens) == self.limit:
                    self.reason = "length"
            if self.finished:
                self._flush(len(self.bytes))
                return count
        return len(tokens)

    def end(self, reason: str) -> None:
        """Nothing more will come."""
        self.reason = reason
        self._flush(len(self.bytes))

    def _extend(self, new: bytes) -> None:
        searched = len(self.bytes)
        self.bytes += new
        # a stop string may have begun in earlier tokens
        found = [self.bytes.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop]
        if any(at >= 0 for at in found):
            self.bytes, self.reason = self.bytes[: min(at for at in found if at >= 0)], "stop"
        if not self.finished:
            # what could be the beginning of a stop string is held back
            held = max((n for s in self.stop for n in range(1, len(s)) if self.bytes.endswith(s[:n])), default=0)
            self._flush(len(self.bytes) - held)

    def _flush(self, end: int) -> None:
        if self.write is not None:
            text = self._decoder.decode(self.bytes[self._written : end], final=self.finished)
            self._written = max(self._written, end)
            if text:
                self.write(text)


# ----------------------------------------------------------------------------------------------------------------------
# loops


class Noise:
    """Rows of Gumbel noise; none of them depends on what was drawn before."""

    def __init__(self, sampling: Sampling, vocab_size: int):
        self.sampling, self.vocab_size = sampling, vocab_size
        self._drawn: dict[int, torch.Tensor] = {}  # position -> row, for rows_at

    def rows(self, samples: list[int], position: int) -> torch.Tensor | None:
        """(B, V) noise of the given samples at one position; None when sampling is greedy."""
        if self.sampling.temperature == 0:
            return None
        return torch.stack([gumbel_noise(self.sampling.seed, sample, position, self.vocab_size) for sample in samples])

    def rows_at(self, sample: int, positions: list[int]) -> torch.Tensor | None:
        """(T, V) noise of one sample at several positions; None when sampling is greedy. What lies ahead is drawn only once."""
        if self.sampling.temperature == 0:
            return None
        self._drawn = {position: row for position, row in self._drawn.items() if position >= min(positions)}
        for position in set(positions) - self._drawn.keys():
            self._drawn[position] = gumbel_noise(self.sampling.seed, sample, position, self.vocab_size)
        return torch.stack([self._drawn[position] for position in positions])


def check_prompts(model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """Raise ValueError for prompts that the model cannot start from, or a model that starts from none, or would with dropout."""
    if model.reconstructs:
        raise ValueError("an autoencoder continues no text; give a language model")
    if model.training:
        raise ValueError("the model is in training mode, in which every pass may be another one: call model.eval() first")
    V = model.config.vocab_size
    longest = getattr(model.config, "prefix_size", model.config.block_size)  # of a pair, without its answer
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty: at least one token is needed to predict the next")
        if len(prompt) > longest:
            raise ValueError(f"the prompt has {len(prompt)} tokens, but the model has room for {longest}; shorten the prompt")
        if len(prompt) != len(prompts[0]):
            raise ValueError("prompts that are sampled together must have the same number of tokens")
        if not all(isinstance(token, Integral) and 0 <= token < V for token in prompt):
            raise ValueError(f"the prompt has token ids outside the model's vocabulary of {V}, whole numbers from 0 on")


def prepare_for_decoding(model: torch.nn.Module) -> None:
    """
    Switch TF32 off in this process, so that a text is the same however many tokens are computed together. On a CPU also store all
    matrices column by column (in place; shapes and values stay): with the few rows of a small batch, or of a context without a cache,
    MKL is then faster, but not for an RQ-transformer.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions, which that does not reach
    for parameter in model.parameters() if not hasattr(model, "attach") else ():
        if parameter.dim() == 2 and parameter.device.type == "cpu":
            parameter.data = parameter.data.t().contiguous().t()


def cached_step(model: torch.nn.Module, int8: bool = False) -> Callable:
    """
    step(idx, cache) appends the tokens idx (B, T) to the cache and returns the logits (B, V) of the next token. With positions (T,),
    mask (T, S) and slots `read` (R,), for one text, as in lookahead.py, it returns the logits (R, V) after each of those slots.
    On a CPU single tokens of one text, and passes with a mask, go through a Stepper (int8: see there), all else through the model.
    """
    stepper, steps = None, can_step(model)

    def step(idx: torch.Tensor, cache, positions=None, mask=None, read=None) -> torch.Tensor:
        nonlocal stepper
        if not steps or len(idx) > 1 or (idx.size(1) > 1 and mask is None):
            logits = model(idx, cache=cache, positions=positions, mask=mask)[0]
            return logits[:, -1] if read is None else logits[0, read]
        stepper = stepper or Stepper(model, int8)  # packed when it is needed: then precision and weights are final
        return stepper(idx[0].tolist(), cache, positions, mask, read)

    return step


def decode_logits(model: torch.nn.Module, use_cache: bool, compile: str | None, int8: bool) -> Callable:
    """
    A function from the tokens so far (B, n) to the next token's logits (B, V). With a cache it computes only what is new since
    its last call, and starts again with an empty cache where the context moves. `compile` names a backend of torch.compile
    for the steps of one token, whose shapes are then always the same. `int8`: see cached_step.
    """
    block_size, cache, start, cached = model.config.block_size, None, 0, 0
    step = cached_step(model, int8)
    if compile is not None:
        compiled = torch.compile(model, backend=compile, fullgraph=True, dynamic=False)

    def logits(idx: torch.Tensor) -> torch.Tensor:
        nonlocal cache, start, cached
        n = idx.size(1)
        if not use_cache:
            return model(idx[:, context_start(n, block_size) :])[0][:, -1]
        if cache is None or start != context_start(n, block_size):
            start, cached, cache = context_start(n, block_size), 0, model.make_cache(static=compile is not None)
        # a copy, because torch.compile compiles again for other strides
        new, cached = idx[:, start + cached :].clone(memory_format=torch.contiguous_format), n - start
        if compile is None:
            return step(new, cache)
        return (compiled if new.size(1) == 1 else model)(new, cache=cache)[0][:, -1]

    return logits


@torch.inference_mode()
def sample_together(
    model: torch.nn.Module,
    samples: list[Continuation],
    sampling: Sampling | BlockSampling,
    use_cache: bool = True,
    first_sample: int = 0,
    compile: str | None = None,
    int8: bool = False,
) -> Iterator[None]:
    """
    Continue all samples (prompts of one length) by one token each at every step, until all have ended; by one block, where the
    model writes blocks. Sample number i of the batch draws the noise of sample first_sample + i. Yields after every step.
    `compile`, `int8`: see decode_logits.
    """
    check_prompts(model, [sample.tokens for sample in samples])
    if model.writes_blocks:
        if compile is not None or int8:
            raise ValueError("compile and int8 are for models that write one token a step, not blocks; leave them out")
        from generate_blocks import sample_in_blocks, sample_targets  # which need this file

        how = sampling if isinstance(sampling, BlockSampling) else BlockSampling((sampling,))
        loop = sample_targets if hasattr(model, "bottleneck") else sample_in_blocks  # a latent transformer has one
        yield from loop(model, samples, how, use_cache, first_sample)
        return
    if isinstance(sampling, BlockSampling):
        raise ValueError("BlockSampling is for models that write blocks; this one chooses single tokens: give a Sampling")
    device = next(model.parameters()).device
    noise = Noise(sampling, model.config.vocab_size)
    next_logits = decode_logits(model, use_cache, compile, int8)
    idx = torch.tensor([sample.tokens for sample in samples], device=device)  # (B, n)
    numbers = [first_sample + i for i in range(len(samples))]
    while not all(sample.finished for sample in samples):
        chosen = pick(next_logits(idx), noise.rows(numbers, idx.size(1)), sampling)  # (B,)
        for sample, token in zip(samples, chosen.tolist()):
            if not sample.finished:
                sample.accept([token])
        idx = torch.cat((idx, chosen[:, None]), dim=1)  # a finished row goes on unread, to keep the batch rectangular
        yield


def generate(
    model: torch.nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | BlockSampling | None = None,
    eos: int | None = None,
    use_cache: bool = True,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> list[list[int]]:
    """
    New token ids for each prompt (all of one length), computed in evaluation mode. Models that write blocks need the tokenizer to
    give the text of sample.py: see generate_blocks.filler. Raises ValueError for prompts that check_prompts refuses.
    """
    if not all(isinstance(prompt, list) for prompt in prompts):
        raise ValueError("prompts are a list of lists of token ids, such as [tokenizer.encode(text)]")
    samples, was_training = [Continuation(prompt, max_new_tokens, tokenizer, eos) for prompt in prompts], model.training
    model.eval()
    try:
        for _ in sample_together(model, samples, sampling or Sampling(), use_cache):
            pass
    finally:
        model.train(was_training)
    return [sample.output for sample in samples]
