"""The compression head and the window: what leaks (nothing) and what would, the cache, the mask, training, settings."""

import copy
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import bench
import generate
import lookahead
import sample
import train
from baseline_transformer.model import DecoderOnlyConfig
from conftest import TINY_BASELINE, TINY_ENCODER_DECODER, make_model
from latent.autoencoder import AutoencoderConfig
from latent.compression import CompressionHead
from latent.latent_transformer import LatentTransformerConfig
from latent.quantize import ResidualQuantizer
from latent.resample import CausalDownsample, DownLayer
from model import EncoderDecoder, EncoderDecoderConfig
from sample import SampleConfig
from trainer import TrainConfig

HEAD = {"block_size": 33, "latent_dim": 4, "codebook_size": 16, "codebook_levels": 2}
OPTIONS = [
    {},
    {"position": "rope", "n_cross_head": 4},  # head widths 6 and 3: one of them odd
    {"window": 8},
    {"window": 8, "position": "rope", "bias": True, "decoder_order": "cross_first", "pos_sub": "ln", "embedding_loss": "mse"},
]
IDS = ["learned", "rope", "learned-window", "rope-window"]
FACTORS = [1, 2, 4, 8]


def make_head(factor: int, options: dict | None = None, **more) -> EncoderDecoder:
    """A tiny model with a head, weights of order one, and codebooks from its latents, so that codes differ and step() moves them."""
    model = make_model("encoder_decoder", HEAD | {"latent_factor": factor} | (options or {}), **more)
    T = model.config.block_size
    with torch.no_grad():
        model.train()(tokens(1 + 50 * 16 // (T // factor), T, seed=9))
    model.after_step()
    assert model.compression.quantizer.initialized
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def lengths(factor: int) -> list[int]:
    """Texts shorter than a block, whole blocks, and one more or less."""
    return sorted({2, 5, factor, factor + 1, 2 * factor - 1, 2 * factor, 2 * factor + 1} - {1})


# ----------------------------------------------------------------------------------------------------------------------
# leaks


def leak(model: EncoderDecoder, T: int) -> float:
    """
    Largest change, bit for bit, of a logit up to t when all tokens after t are redrawn four times, for all t at once, each
    time from the same state of the quantizer; then one step of the codebooks, as after an optimizer step.
    """
    generator = torch.Generator().manual_seed(T)
    t = torch.arange(T - 1).repeat_interleave(4)[:, None]  # a row for each redraw
    later = torch.arange(T) > t
    x = torch.randint(31, (1, T), generator=generator).expand(len(t), T)
    other = torch.where(later, (x + torch.randint(1, 31, x.shape, generator=generator)) % 31, x)
    with torch.no_grad():
        before, after = (copy.deepcopy(model)(text)[0] for text in (x, other))
        change = (after - before).abs().amax(-1)  # (rows, T)
        assert change.masked_fill(~later, 1.0).min() > 1e-9, "vacuous: a redrawn token must change what follows it"
        model(x)
        model.after_step()
    return change.masked_fill(later, 0.0).max().item()


@pytest.mark.parametrize("options", OPTIONS[::3], ids=IDS[::3])
@pytest.mark.parametrize("factor", FACTORS)
def test_nothing_leaks_in_float32(factor, options):
    """Guards the precision that runs have: codebooks stay in float32, all else is as in float64."""
    model = make_head(factor, options).train().float()
    assert all(leak(model, T) == 0.0 for T in lengths(factor))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("factor", FACTORS)
def test_nothing_leaks(factor, options, training):
    """Guards the likelihood, bit for bit in float64: mask, padding, norms, codes, statistics, for texts around whole blocks."""
    model = make_head(factor, options).train(training)
    codes = model.compression.quantizer.codebook.codes
    for T in lengths(factor):
        moving = codes.clone()
        assert leak(model, T) == 0.0, f"{T=}"
        assert torch.equal(moving, codes) != (training and factor <= T), "codebooks move in training only, and then they do"


class UpdatesBeforeLookup(ResidualQuantizer):
    def forward(self, z, mask=None):
        super().forward(z, mask)
        self.step()
        return super().forward(z, mask)


class OwnBlockVisible(CompressionHead):
    def ends(self, slots, device):
        return super().ends(slots, device) + 1 - self.factor  # latent j counts as ending where its block begins


class SymmetricPadding(DownLayer):
    """An even kernel, padded as an ordinary convolution is (for k = 3 that would be ours)."""

    def forward(self, x):
        if x.size(1) < 2:
            return x[:, :0]
        y = F.conv1d(F.relu(x).transpose(1, 2), self.conv.weight, self.conv.bias, stride=2, padding=1)
        return self.norm(y.transpose(1, 2))


class NormOverTime(nn.LayerNorm):
    def forward(self, x):
        return F.group_norm(x.transpose(1, 2), 1).transpose(1, 2) if x.size(1) > 0 else x


def build_in(leak: type, model: EncoderDecoder) -> None:
    """Give the part of the head that `leak` derives from its class. It stays behind when the model is copied."""
    if leak is SymmetricPadding:
        model.compression.down = CausalDownsample(12, model.compression.factor, kernel=4).double()
    for module in list(model.compression.modules()):
        if type(module) is leak.__base__ and module is not model.compression.norm:
            module.__class__ = leak


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("kind", [UpdatesBeforeLookup, OwnBlockVisible, SymmetricPadding, NormOverTime])
def test_the_test_sees_leaks(kind, factor, training):
    """Guards test_nothing_leaks: the leaks that others have built in make it fail, wherever they can exist."""
    model = make_head(factor).train(training)
    build_in(kind, model)
    found = max(leak(model, T) for T in lengths(factor))
    possible = training if kind is UpdatesBeforeLookup else factor > 1  # statistics; anything to pad or norm, or a block to end
    assert found > 1e-5 if possible else found == 0.0


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_no_gradient_from_later_tokens(options):
    """Guards the same by gradients, which see everything but the choice of codes."""
    model = make_head(4, options)
    e = model.wte(tokens(1, 13)).detach().requires_grad_()
    model.wte.register_forward_hook(lambda *_: e)
    logits = model(tokens(1, 13))[0]
    for t in range(13):
        grad = torch.autograd.grad(logits[0, t].square().sum(), e, retain_graph=True)[0][0].abs().amax(-1)  # (T,)
        assert (grad[t + 1 :] == 0).all() and grad[t] > 0


# ----------------------------------------------------------------------------------------------------------------------
# what is seen


@pytest.mark.parametrize("factor", FACTORS)
def test_positions_see_the_start_and_all_whole_blocks(factor):
    """Guards the mask: floor((t+1)/S) latents and the start, so that no row is empty, for every text of 1 to 33 tokens."""
    model = make_head(factor)
    for T in range(1, 34):
        positions, context = model.place(tokens(1, T))
        memory, context, _ = model.compression(torch.zeros(1, T, 12).double(), positions, context, None)
        assert memory.size(1) == context.mask.size(1) == 1 + T // factor
        for t in range(T):
            assert context.mask[t].nonzero().flatten().tolist() == list(range(1 + (t + 1) // factor))


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_last_token_of_a_block_decides_its_latent(factor, options):
    """Guards against a memory that comes late: token (j+1)S-1 changes code j and logits there, but nothing before."""
    model, T = make_head(factor, options), 2 * factor + 1
    last, other = 2 * factor - 1, tokens(1, T).repeat(30, 1)
    other[:, last] = (other[:, last] + torch.arange(1, 31)) % 31

    def codes(x):
        positions, context = model.place(x)
        h = model.encode(x, positions, context)[1]
        return model.compression.quantizer.encode(model.compression.latents(h, 0))

    with torch.no_grad():
        x = tokens(1, T).expand(30, T)
        assert torch.equal(codes(x)[:, 0], codes(other)[:, 0])
        assert (codes(x)[:, 1] != codes(other)[:, 1]).any()
        before, after = model(x)[0], model(other)[0]
        assert torch.equal(before[:, :last], after[:, :last]) and (before - after)[:, last].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("options", OPTIONS[::3], ids=IDS[::3])
@pytest.mark.parametrize("factor", FACTORS)
def test_a_latent_reaches_the_logits_when_its_block_ends(factor, options):
    """Guards the use of the memory: latent j alone, moved behind the quantizer, changes logits from (j+1)S-1 on, and all of them."""
    model, T = make_head(factor, options), 3 * factor + 1
    x = tokens(1, T)
    plain = model(x)[0]
    for j in range(3):
        moved = torch.zeros(1, T // factor, 12).double()
        moved[:, j] = torch.randn(12).double()
        hook = model.compression.from_latent.register_forward_hook(lambda module, args, y, moved=moved: y + moved)
        change = (model(x)[0] - plain)[0].abs().amax(-1)
        hook.remove()
        assert (change[: (j + 1) * factor - 1] == 0).all() and (change[(j + 1) * factor - 1 :] > 1e-9).all()


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_other_rows_and_padding_change_nothing(options):
    """Guards batches: a row's logits depend neither on the other rows nor on what pads it on the right."""
    model = make_head(4, options)
    x, other, order = tokens(3, 14), tokens(3, 14, seed=1), [2, 0, 1]
    mixed = torch.cat((x[:1], other[1:]))
    with torch.no_grad():
        logits = model(x)[0]
        assert torch.equal(model(mixed)[0][0], logits[0])
        assert (model(x[order])[0] - logits[order]).abs().max() < 1e-12
        for more in range(1, 10):
            assert (model(F.pad(x, (0, more)))[0][:, :14] - logits).abs().max() < 1e-12


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_padding_is_no_data(options):
    """
    Guards training on pairs, which pads them: losses, gradients and codebooks do not depend on how much padding there is, and an
    embedding loss adds up over parts of a batch as the trainer weights them, by targets.
    """
    options = options | {"commitment_weight": 0.5, "embedding_loss": "mse", "embedding_loss_detach": "none"}
    x, y = tokens(3, 14), tokens(3, 14, seed=1)
    y[:, :3] = -1  # the question
    y[0, 9:], y[2, 6:] = -1, -1
    found = []
    for more in (0, 12):
        model = make_head(4, options).train()
        losses = model(F.pad(x, (0, more)), F.pad(y, (0, more), value=-1))[1]
        losses["total"].backward()
        model.after_step()
        book = model.compression.quantizer.codebook
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(losses | gradients | {"codes": book.codes, "counts": book.ema_count, "recent": book.recent[:-1]})
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() < 1e-12, name
    count = (y >= 0).sum(1)
    parts = torch.stack([model(x[i : i + 1], y[i : i + 1])[1]["embedding"] for i in range(3)])
    assert abs((parts * count).sum() / count.sum() - losses["embedding"]) < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_the_memory_is_made_of_codes(training):
    """Guards the bottleneck: what goes back to the width of the model is what the codes decode to, not the latents themselves."""
    model, seen, x = make_head(4), [], tokens(2, 33)
    model.compression.from_latent.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.train(training)(x)
        positions, context = model.eval().place(x)
        z = model.compression.latents(model.encode(x, positions, context)[1], 0)
    quantizer = model.compression.quantizer
    assert torch.equal(seen[0], quantizer.decode(quantizer.encode(z))) and not torch.allclose(seen[0], z)


def test_start_and_latents_have_positions():
    """Guards rotary keys and the table: two equal latents at different places must not look the same to a query."""
    for position in ("learned", "rope"):
        model = make_head(2, {"position": position, "n_cross_head": 2})
        block, x = model.decoder[0], tokens(1, 6)
        positions, context = model.place(x)
        model.compression.from_latent.weight.data.zero_()  # all latents equal
        memory, context, _ = model.compression(torch.randn(1, 6, 12).double(), positions, context, None)
        assert torch.equal(memory[0, 1], memory[0, 2]) == (position == "rope")
        assert torch.equal(model.compression.ends(4, torch.device("cpu")), torch.tensor([-1, 1, 3, 5]))
        if position == "rope":  # the score of a query with itself as key, 2 positions apart wherever they stand
            width = 6
            cos, sin = context.key_rotary[width]
            assert torch.equal(cos[1:], context.rotary[width][0][1::2]) and torch.equal(sin[1:], context.rotary[width][1][1::2])
        assert block.cross_attn(torch.randn(1, 6, 12).double(), memory, context).shape == (1, 6, 12)


# ----------------------------------------------------------------------------------------------------------------------
# the window


def banded(T: int, window: int) -> torch.Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("window", [1, 2, 5, 12, 40])
def test_window_equals_an_explicit_mask(window, position):
    """Guards the window: self-attention under a banded mask; cross-attention to the encoder states still sees all of them."""
    x, options = tokens(2, 12), {"position": position, "n_cross_head": 4}
    plain = make_model("decoder_only", {"position": position})
    near = make_model("decoder_only", {"position": position, "window": window})
    expected = plain(x, mask=banded(12, window))[0]
    assert (near(x)[0] - expected).abs().max() < 1e-12
    plain, near = make_model("encoder_decoder", options), make_model("encoder_decoder", options | {"window": window})
    positions, context = plain.place(x, mask=banded(12, window))
    _, whole = plain.place(x)
    _, h = plain.encode(x, positions, context)
    d = plain.bridge(h)
    for block in plain.decoder:
        d = block(d, h, context, whole)
    assert (near(x)[0] - F.linear(plain.ln_f(d), plain.wte.weight)).abs().max() < 1e-12


def test_far_tokens_come_through_the_latents_only():
    """Guards the purpose of window and head together: beyond the reach of windows, a token is known by its code or not at all."""
    options = {"n_encoder_layer": 1, "n_decoder_layer": 1, "window": 4, "n_cross_head": 4, "position": "rope"}
    model = make_head(4, options)
    x, other = tokens(1, 24), tokens(1, 24)
    other[0, 3] = (other[0, 3] + 1) % 31  # the reach is 2 * 3 positions, and a convolution's 6 more: token 3 is gone at 23
    with torch.no_grad():
        assert (model(x)[0] - model(other)[0])[0, 23].abs().max() > 1e-9
        with model.compression.ablated("zeroed"):
            assert torch.equal(model(x)[0][0, 10:], model(other)[0][0, 10:])


# ----------------------------------------------------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("options", OPTIONS[::3], ids=IDS[::3])
@pytest.mark.parametrize("factor", FACTORS)
def test_chunks_of_any_size_equal_the_whole(factor, options):
    """Guards sampling: latents appended when their block is complete, behind a cache of any length, give the full forward."""
    model = make_head(factor, options)
    x = tokens(2, 25)
    with torch.no_grad():
        whole = model(x)[0]
        for size in range(1, 26):
            cache = model.make_cache(25)
            parts = torch.cat([model(piece, cache=cache)[0] for piece in x.split(size, dim=1)], dim=1)
            assert (parts - whole).abs().max() < 1e-10 and cache.length == 25


@pytest.mark.parametrize("options", OPTIONS[::3], ids=IDS[::3])
@pytest.mark.parametrize("factor", FACTORS)
def test_a_truncated_cache_goes_on_like_a_fresh_one(factor, options):
    """Guards truncate() and keep(): latents and states behind the cut, in the middle of a block as well, must be forgotten."""
    model = make_head(factor, options)
    x, other = tokens(2, 20), tokens(2, 20, seed=1)
    with torch.no_grad():
        for length in range(20):
            cache = model.make_cache()
            model(x, cache=cache)
            if length % 2:
                cache.truncate(length)
            else:
                cache.keep(length // 2, length // 2, length - length // 2)
            y = torch.cat((x[:, :length], other[:, length:]), dim=1)
            tail = torch.cat([model(piece, cache=cache)[0] for piece in y[:, length:].split(3, dim=1)], dim=1)
            assert (tail - model(y)[0][:, length:]).abs().max() < 1e-10, length
    with pytest.raises(AssertionError, match="consecutive tokens"):
        cache.keep(3, 5, 2)


@pytest.mark.parametrize("factor", [1, 4])
def test_sampling_is_the_same_with_and_without_cache(factor):
    """Guards sample.py: cached and uncached texts are equal, in a batch, and beyond the context, where positions begin again."""
    model = make_head(factor, {"block_size": 12, "window": 5})
    prompts = [[1, 2, 3], [4, 5, 6]]
    cached = generate.generate(model, prompts, 40, generate.Sampling(seed=3))
    assert cached == generate.generate(model, prompts, 40, generate.Sampling(seed=3), use_cache=False)
    assert cached[:1] == generate.generate(model, prompts[:1], 40, generate.Sampling(seed=3)) and cached[0] != cached[1]


def test_what_the_head_cannot_do():
    """Guards users from wrong text: lookahead and static caches are refused in one line, positions and masks always."""
    model = make_head(4)
    with pytest.raises(ValueError, match="lookahead=none"):
        lookahead.Lookahead(model, generate.Continuation([1, 2], 5), generate.Sampling(), None)
    with pytest.raises(ValueError, match="compile=false"):
        model.make_cache(static=True)
    with pytest.raises(AssertionError, match="consecutive tokens"):
        model(tokens(1, 4), positions=torch.arange(4))


# ----------------------------------------------------------------------------------------------------------------------
# training


def test_training_begins_without_the_latents():
    """Guards the initialisation: cross-attention adds nothing at first, but learns, and so does all behind it from then on."""
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(**TINY_ENCODER_DECODER | HEAD, latent_factor=4)).double()
    x = tokens(2, 33)
    with model.compression.ablated("zeroed"):
        without = model(x)[0]
    assert torch.equal(model(x)[0], without)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        model(x, x)[1]["token"].backward()
        learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        head = {name for name, _ in model.named_parameters() if name.startswith("compression.")}
        assert {"decoder.0.cross_attn.c_proj.weight", "decoder.1.cross_attn.c_proj.weight"} <= learns
        assert head & learns == (head if step else set())  # straight through the quantizer
        optimizer.step()


def test_losses_by_name():
    """Guards the reported loss: commitment is weighted, in training only, and evaluation reports the token loss alone."""
    model = make_head(4, {"commitment_weight": 3.0, "embedding_loss": "mse"})
    x = tokens(2, 33)
    assert set(model(x, x)[1]) == {"token", "total"}
    losses = model.train()(x, x)[1]
    assert abs(losses["total"] - losses["token"] - losses["embedding"] - 3 * losses["commitment"]) < 1e-12
    positions, context = model.place(x)
    z = model.compression.latents(model.encode(x, positions, context)[1], 0)
    assert losses["commitment"] == model.compression.quantizer(z).losses["commitment"] > 0
    assert model(x[:, :3], x[:, :3])[1]["commitment"] == 0  # no whole block


@pytest.mark.parametrize("options", OPTIONS[::3], ids=IDS[::3])
def test_compiles_without_graph_breaks(options):
    """Guards torch.compile: one graph for the training step, with the losses, gradients and statistics of the plain one."""
    torch._dynamo.reset()
    model = make_head(4, options, n_encoder_layer=1, n_decoder_layer=1).train()
    other, x = copy.deepcopy(model), tokens(2, 33)
    expected, losses = model(x, x)[1], torch.compile(other, fullgraph=True, backend="aot_eager")(x, x)[1]
    assert losses.keys() == expected.keys() >= {"commitment"}
    assert all(abs(losses[key] - expected[key]) < 1e-10 for key in losses)
    for one, loss in ((model, expected["total"]), (other, losses["total"])):
        loss.backward()
        one.after_step()
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters()):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or (a.grad - b.grad).abs().max() < 1e-9), name
    before = make_head(4, options, n_encoder_layer=1, n_decoder_layer=1).compression.quantizer.codebook.codes
    after = [m.compression.quantizer.codebook.codes for m in (model, other)]
    assert (after[0] - after[1]).abs().max() < 1e-12 and not torch.equal(after[0], before)


RUN = (
    "--n_encoder_layer=1 --n_decoder_layer=1 --n_head=2 --n_cross_head=2 --n_embd=16 --block_size=32 --window=8 --latent_factor=4 "
    "--latent_dim=4 --codebook_size=4 --codebook_levels=2 --warmup_iters=2 --lr_decay_iters=20 --eval_interval=10 --eval_iters=2 "
    "--batch_size=4 --gradient_accumulation_steps=2 --device=cpu --dtype=float32 --final_eval_tokens=640"
)


def test_trains_resumes_and_samples(tiny_data, tmp_path, capsys):
    """Guards the scripts: 10 + 10 steps equal 20 bit for bit, codebooks and their averages too, and sample.py reads the run."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.main([*RUN.split(), f"--dataset={tiny_data}", f"--out_dir={whole}", "--max_iters=20"])
    train.main([*RUN.split(), f"--dataset={tiny_data}", f"--out_dir={halves}", "--max_iters=10"])
    train.main([*RUN.split(), f"--dataset={tiny_data}", f"--out_dir={halves}", "--max_iters=20", "--resume"])
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (safetensors.torch.load_file(out / "last" / file) for out in (whole, halves))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    codebook = "compression.quantizer.codebook."
    state = safetensors.torch.load_file(whole / "last" / "model.safetensors")
    assert state[codebook + "initialized"] and state[codebook + "steps"] > 10, "the trainer calls after_step once a step"
    capsys.readouterr()
    words = [str(whole), "--prompt=import ", "--max_new_tokens=60", "--device=cpu", "--dtype=float64", "--eos=false"]
    texts = sample.main([*words, "--num_samples=2"])
    assert len(texts) == 2 and sample.main([*words, "--num_samples=1", "--stream"]) == texts[:1]
    assert sample.main([*words, "--cache=false"]) == texts[:1]
    for more, message in (("--lookahead=4,3,4", "lookahead=none"), ("--compile", "compile=false")):
        with pytest.raises(ValueError, match=message):
            sample.main([*words, more])
    rows = bench.main(["sample", f"--run={whole}", "--tokens=3", "--repeats=1", "--batch=2", "--device=cpu"])
    assert [row["variant"] for row in rows] == ["plain cached", "plain uncached", "plain cached, batch 2"]


# ----------------------------------------------------------------------------------------------------------------------
# what it costs and says


def test_flops_count_every_product():
    """Guards the comparison of costs: the head's own count, against torch's counter in a real step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    options = {"n_embd": 48, "block_size": 64, "vocab_size": 300, "latent_factor": 4, "latent_dim": 32, "n_cross_head": 2}
    model = make_model("encoder_decoder", options | {"codebook_size": 64, "position": "rope"})  # in float64: torch's attention
    x = torch.randint(300, (2, 64))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x)[1]["total"].backward()
    assert 0.98 < counter.get_total_flops() / x.numel() / model.flops_per_token() < 1.02


def test_measure_counts_whole_blocks_and_ablates():
    """Guards summary.json: codes of padding are not counted, sums add up over batches, and ablations are what they are called."""
    model = make_head(4, {"window": 8})
    x, y = tokens(3, 33), tokens(3, 33, seed=1)
    y[1, 12:] = -1  # a block ends with the last target
    y[2, 30:] = -1
    head, parts = model.compression, [model.measure(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    sums = model.measure(x, y)
    for key in ("codes", "tokens", "zeroed"):
        assert torch.allclose(sum(part[key] for part in parts), sums[key]), key
    report = model.summarize(sums)
    assert report["codebook_latents"] == 8 + 3 + 7 and sums["tokens"] == 33 + 12 + 30
    positions, context = model.place(x)
    codes = head.quantizer.encode(head.latents(model.encode(x, positions, context)[1], 0))
    counted = torch.cat((codes[0], codes[1, :3], codes[2, :7]))
    assert torch.equal(sums["codes"][1], torch.bincount(counted[:, 1], minlength=16).double())
    assert report["codebook_usage"][0] == len(counted[:, 0].unique()) / 16 and len(report["codebook_perplexity"]) == 2
    # by hooks: the same with nothing behind the quantizer, and with the latents of the row before
    for how, change in (("zeroed", torch.zeros_like), ("swapped", lambda z: z.roll(1, 0))):
        hook = head.from_latent.register_forward_hook(lambda module, args, out, change=change: change(out))
        expected = model(x, y)[1]["token"]
        hook.remove()
        assert abs(report[f"val_loss_latents_{how}"] - expected) < 1e-12 and abs(expected - model(x, y)[1]["token"]) > 1e-4
    alone = model.summarize(parts[0])  # the row before would be the row itself, and say that latents are worth nothing
    assert "val_loss_latents_swapped" not in alone and "val_loss_latents_zeroed" in alone
    y[2, 3:] = -1
    short = model.measure(x[[0, 2]], y[[0, 2]])
    assert abs(short["swapped"] - short["zeroed"]) > 1e-4, "where the other text is over, its padding has latents, too"
    nothing = model.measure(x, torch.full_like(y, -1))
    assert all((value == 0).all() for value in nothing.values()), "a process without data must be able to add up"


def test_measuring_leaves_the_model_as_it_was():
    """Guards a run against its own evaluation: ablations end even when they fail, and statistics are not collected by them."""
    model, x = make_head(4), tokens(2, 33)
    before = model(x)[0]
    with pytest.raises(KeyboardInterrupt), model.compression.ablated("zeroed"):
        assert not torch.equal(model(x)[0], before)
        raise KeyboardInterrupt
    assert torch.equal(model(x)[0], before)
    with pytest.raises(AssertionError, match="evaluation mode"):
        model.train().measure(x, x)


def test_collapse_is_reported_of_codebooks_of_data():
    """Guards the warning: codebooks that use one code are named, but not the random ones of a run's first steps."""
    model = make_head(4)
    sums = model.measure(tokens(2, 33), tokens(2, 33))
    sums["codes"] = torch.zeros_like(sums["codes"]).index_fill_(1, torch.tensor([3]), 16.0)
    with pytest.warns(UserWarning, match="codebook level 1 has collapsed"):
        model.summarize(sums)
    model.compression.quantizer.codebook.initialized.fill_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.summarize(sums)


def test_without_a_head_nothing_changes():
    """Guards published sizes and stored runs: no parameter, buffer, hook or random number more than before."""
    plain = EncoderDecoder(EncoderDecoderConfig(50257, 200, 13, 13, 5, 10, 150, embedding_loss="mse", pos_sub="plain"))
    assert plain.get_num_params() == 15_763_500 and not list(plain.buffers())
    assert not any(hasattr(plain, hook) for hook in ("after_step", "measure", "summarize"))
    model = make_model("encoder_decoder", {"window": 5})
    assert model.state_dict().keys() == make_model("encoder_decoder", {}).state_dict().keys()
    head = make_model("encoder_decoder", {"latent_factor": 4}).state_dict().keys()
    assert all(name.startswith("compression.") for name in head - model.state_dict().keys())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent_factor": 3}, "latent_factor=3 tokens per latent: .* use 1, 2, 4, 8 or another power of two"),
        ({"latent_factor": 16}, "latent_factor=16 is more than block_size=12; lower it"),
        ({"latent_factor": -2}, "latent_factor=-2"),
        ({"latent_factor": 8, "window": 4}, "window=4 is shorter than latent_factor=8"),
        ({"window": -1}, "window=-1: a number of positions"),
        ({"latent_factor": 4, "latent_dim": 0}, "latent_dim=0: at least 1"),
        ({"latent_factor": 4, "codebook_size": 1}, "codebook_size=1: at least 2"),
        ({"latent_factor": 4, "codebook_levels": 0}, "codebook_levels=0: at least 1"),
        ({"latent_factor": 4, "commitment_weight": -1.0}, "commitment_weight=-1.0 must not be negative"),
    ],
)
def test_impossible_settings(change, message):
    """Guards users from a traceback deep in torch: the message names the key, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**TINY_ENCODER_DECODER | change)
    if "latent_factor" not in change:
        with pytest.raises(ValueError, match=message):
            DecoderOnlyConfig(**TINY_BASELINE | change)


def test_ignored_settings_are_named():
    """Guards against a run that is not what its settings say."""
    with pytest.warns(UserWarning, match="latent_dim, codebook_levels without effect.*latent_factor=0"):
        EncoderDecoderConfig(**TINY_ENCODER_DECODER, latent_dim=8, codebook_levels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EncoderDecoderConfig(**TINY_ENCODER_DECODER, latent_factor=4, latent_dim=8)
        EncoderDecoderConfig(**TINY_ENCODER_DECODER, window=3)
        EncoderDecoderConfig(**TINY_ENCODER_DECODER | {"block_size": 8}, latent_factor=8, window=8)  # as small as it may be
        EncoderDecoderConfig(**TINY_ENCODER_DECODER, embedding_loss="mse", embedding_loss_weight=8.0)
        LatentTransformerConfig(bottleneck="rq", codebook_levels=2, commitment_weight=1.0)
        LatentTransformerConfig(bottleneck="gumbel", gumbel_hard=True)
        AutoencoderConfig(codebook_decay=0.9)
        TrainConfig(min_lr=1e-5)
        SampleConfig(temperature=(0.0, 1.0), top_k=3)
    for build, message in (
        (lambda: EncoderDecoderConfig(embedding_loss_weight=8.0), "embedding_loss_weight without effect: embedding_loss=none"),
        (lambda: LatentTransformerConfig(gumbel_hard=True), "gumbel_hard without effect: bottleneck=vq"),
        (lambda: LatentTransformerConfig(bottleneck="semhash", codebook_decay=0.9), "codebook_decay without effect: bottleneck=sem"),
        (lambda: AutoencoderConfig(codebook_kind="simvq", codebook_decay=0.9), "codebook_decay without effect: codebook_kind=simvq"),
        (lambda: TrainConfig(decay_lr=False, min_lr=1e-5), "min_lr without effect: decay_lr=false"),
        (lambda: SampleConfig(temperature=0.0, top_k=3), "top_k without effect: at temperature 0"),
    ):
        with pytest.warns(UserWarning, match=message):
            build()
