"""The architecture: sizes, names, causality, the equations against independent computations, compilation."""

import dataclasses
import math
import re
import typing

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import pretrained
from baseline_transformer.model import DecoderOnly, DecoderOnlyConfig
from conftest import (
    ALL_MODELS,
    ALL_MODELS_IDS,
    BASELINE_OPTIONS,
    ENCODER_DECODER_OPTIONS,
    TINY_BASELINE,
    TINY_ENCODER_DECODER,
    make_model,
)
from kernels import attend_in_products
from model import (
    Block,
    Context,
    DecoderBlock,
    EmbeddingLoss,
    EncoderDecoder,
    EncoderDecoderConfig,
    attend,
    rotary_angles,
    rotate,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# sizes and names


@pytest.mark.parametrize("config, options", [(EncoderDecoderConfig, ENCODER_DECODER_OPTIONS), (DecoderOnlyConfig, BASELINE_OPTIONS)])
def test_every_value_of_every_option_is_tested(config, options):
    """
    Guards a word that a setting takes and no branch knows, which computes what another one means, and a new setting that
    stepper.py or padding.py does not know, which then compute another model: all tests use these options.
    """
    elsewhere = {"dropout", "latent_factor", "latent_dim", "codebook_size", "codebook_levels", "commitment_weight"}
    for key, kind in typing.get_type_hints(config).items():
        if key in TINY_ENCODER_DECODER | TINY_BASELINE or key in elsewhere:
            continue
        tried = {option.get(key, getattr(config, key)) for option in options}
        kinds = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is typing.Literal]
        words = {word for one in kinds for word in typing.get_args(one)}
        missing = (words or ({True, False} if kind is bool else set())) - tried
        assert not missing and len(tried) > 1, f"{key}: add {missing or 'another value than the default'} to the options in conftest.py"


@pytest.mark.parametrize(
    "model_class, config, expected",
    [
        (
            EncoderDecoder,
            EncoderDecoderConfig(50257, 200, 13, 13, 5, 10, 150, embedding_loss="mse", pos_sub="plain"),
            15_763_500,
        ),
        (DecoderOnly, DecoderOnlyConfig(50257, 200, 26, 10, 160), 16_036_800),
        (DecoderOnly, DecoderOnlyConfig(50257, 200, 26, 12, 156), 15_441_192),
    ],
)
def test_published_sizes(model_class, config, expected):
    """Guards the comparison: an extra bias, an untied table or a missing LayerNorm would change a published size."""
    model = model_class(config)
    assert model.get_num_params() == expected
    everything = sum(p.numel() for p in model.parameters())
    rows = config.block_size + (config.pos_sub != "none")
    assert everything == expected + rows * config.n_embd
    rotary = model_class(dataclasses.replace(config, position="rope"))  # its table of next positions does not count either
    assert rotary.get_num_params() == expected


def test_flops_count_every_product():
    """Guards against a forgotten layer: the count must be close to what torch's own counter sees in a real step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("encoder_decoder", "decoder_only"):
        model = make_model(name, {"n_embd": 48, "block_size": 64, "vocab_size": 300})  # in float64, which is torch's in attention
        x = torch.randint(300, (2, 64))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the others are not counted on a CPU
            model(x, x)[1]["total"].backward()
        counted = counter.get_total_flops() / x.numel()
        assert 0.99 < counted / model.flops_per_token() < 1.01, name


def test_parameter_names():
    """Guards checkpoints: a renamed parameter makes every stored run unreadable."""
    model = EncoderDecoder(EncoderDecoderConfig(n_encoder_layer=1, n_decoder_layer=1, embedding_loss="mse", pos_sub="ln"))
    block = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}
    cross = {"ln_cross_q", "ln_cross_kv", "cross_attn.c_q", "cross_attn.c_kv", "cross_attn.c_proj"}
    expected = {"wte", "wpe", "bridge", "ln_f", "ln_pos_sub", "embedding_loss.ln_embedding", "embedding_loss.ln_encoder"}
    expected |= {f"encoder.0.{part}" for part in block} | {f"decoder.0.{part}" for part in block | cross}
    assert {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()} == expected


def test_baseline_loads_a_nanogpt_checkpoint(tmp_path):
    """Guards the promise that the decoder-only model has nanoGPT's parameter names (which are spelled out here)."""
    model = make_model("decoder_only", {"bias": True}, dtype=torch.float32)
    shapes = {"transformer.wte.weight": (31, 12), "transformer.wpe.weight": (12, 12), "lm_head.weight": (31, 12)}
    shapes |= {f"transformer.ln_f.{end}": (12,) for end in ("weight", "bias")}
    for i in range(3):
        for part, shape in (
            ("attn.c_attn", (36, 12)),
            ("attn.c_proj", (12, 12)),
            ("mlp.c_fc", (48, 12)),
            ("mlp.c_proj", (12, 48)),
        ):
            shapes |= {f"transformer.h.{i}.{part}.weight": shape, f"transformer.h.{i}.{part}.bias": shape[:1]}
        for part in ("ln_1", "ln_2"):
            shapes |= {f"transformer.h.{i}.{part}.{end}": (12,) for end in ("weight", "bias")}
    weights = {f"_orig_mod.{name}": torch.randn(shape) for name, shape in shapes.items()}
    weights["_orig_mod.transformer.wte.weight"] = weights["_orig_mod.lm_head.weight"]
    torch.save({"model": weights, "iter_num": 3, "model_args": {"n_head": 2}}, tmp_path / "ckpt.pt")
    pretrained.init_from(model, tmp_path / "ckpt.pt")
    assert dict(model.state_dict()).keys() == shapes.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"_orig_mod.{name}"]), name
    with pytest.raises(ValueError, match="does not fit"):
        pretrained.init_from(make_model("decoder_only", {"bias": False}), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"has n_head=2 \(here 3\).*set the same"):  # no shape tells
        pretrained.init_from(make_model("decoder_only", {"bias": True, "n_head": 3}), tmp_path / "ckpt.pt")


def test_initialisation_scales_each_stack_by_its_own_depth():
    """Guards against one n_layer for both stacks, which is what the original used."""
    torch.manual_seed(0)
    model = EncoderDecoder(EncoderDecoderConfig(n_encoder_layer=2, n_decoder_layer=8, n_embd=128))
    for stack, depth in ((model.encoder, 2), (model.decoder, 8)):
        for name, p in stack.named_parameters():
            if p.dim() == 2:
                expected = 0.02 / math.sqrt(2 * depth) if name.endswith("c_proj.weight") else 0.02
                assert abs(p.std().item() / expected - 1) < 0.05, name


@pytest.mark.parametrize("name", ["decoder_only", "autoencoder", "rq_transformer", "latent_transformer"])
def test_initialisation_of_all_stacks(name):
    """Guards the same for the other models, which have to name each of their stacks, and what is no layer."""
    torch.manual_seed(0)
    model = checkpoint.build(name, checkpoint.CONFIGS[name](bias=True))
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and isinstance(part[0], (Block, DecoderBlock))]
    assert len(stacks) == {"decoder_only": 1, "latent_transformer": 3}.get(name, 2)
    for stack in stacks:
        for key, p in stack.named_parameters():
            if p.dim() == 2:
                expected = 0.02 / math.sqrt(2 * len(stack)) if key.endswith("c_proj.weight") else 0.02
                assert abs(p.std().item() / expected - 1) < 0.05, key
    for key, p in model.named_parameters():
        if re.match(r"wte|wpe|project|start|code_embedding|to_latent.weight|from_latent.weight|from_sum.weight", key):
            assert abs(p.std().item() / 0.02 - 1) < 0.2, key  # some are small


def test_a_bridge_that_begins_as_the_identity():
    """Guards bridge_init: the decoder begins with the encoder's states themselves, and no other weight is drawn differently."""
    seeded = [make_initial(bridge_init=word) for word in (None, "identity")]
    plain, identity = (dict(model.named_parameters()) for model in seeded)
    assert [name for name in plain if not torch.equal(plain[name], identity[name])] == ["bridge.weight"]
    h = torch.randn(2, 3, 128)
    assert torch.equal(seeded[1].bridge(h), h) and seeded[0].bridge(h).norm() < 0.3 * h.norm()


def make_initial(**options) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(EncoderDecoderConfig(n_embd=128, **options))


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_initialisation_of_what_is_in_no_stack(position):
    """Guards tables and bridge, which torch would make 50 or 3 times as large: the first loss of a run would not be ln V."""
    torch.manual_seed(0)
    options = {"n_embd": 128, "position": position, "pos_sub": "plain", "bias": True}
    for model in (EncoderDecoder(EncoderDecoderConfig(**options)), DecoderOnly(DecoderOnlyConfig(**options))):
        outside = [(name, p) for name, p in model.named_parameters() if not re.match(r"(encoder|decoder|transformer\.h)\.", name)]
        matrices = [(name, p) for name, p in outside if p.dim() == 2]
        assert len(matrices) >= 2
        for name, p in matrices:
            assert abs(p.std().item() / 0.02 - 1) < 0.05 and abs(p.mean().item()) < 0.002, name
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        assert biases and not any(p.any() for p in biases)


# ----------------------------------------------------------------------------------------------------------------------
# causality


@pytest.mark.parametrize("name, options", ALL_MODELS, ids=ALL_MODELS_IDS)
@pytest.mark.parametrize("training", [False, True])
def test_causal_by_perturbation(name, options, training):
    """Guards against any leak from the future: through a mask, the bridge, position tables or a statistic over time."""
    model = make_model(name, options).train(training)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(31, (2, 12), generator=generator)
    logits, _ = model(x)
    for t in range(11):
        for _ in range(3):
            other = x.clone()
            other[:, t + 1 :] = (x[:, t + 1 :] + torch.randint(1, 31, (2, 11 - t), generator=generator)) % 31
            changed, _ = model(other)
            assert (changed[:, : t + 1] - logits[:, : t + 1]).abs().max() < 1e-10, f"position <= {t} sees a later token"
            # not vacuous: each later position is moved by the redrawn tokens
            assert (changed[:, t + 1 :] - logits[:, t + 1 :]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("name, options", ALL_MODELS, ids=ALL_MODELS_IDS)
def test_every_earlier_token_matters(name, options):
    """Guards against a mask that is too strict: the last position must depend on the very first token."""
    model = make_model(name, options)
    x = torch.randint(31, (1, 12), generator=torch.Generator().manual_seed(2))
    other = x.clone()
    other[0, 0] = (x[0, 0] + 1) % 31
    assert (model(x)[0] - model(other)[0])[0, -1].abs().max() > 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# the equations, against torch's own transformer layers and slow loops


def torch_layer(block, decoder: bool) -> nn.Module:
    """torch's pre-norm layer with the weights of one of our blocks."""
    C, heads = len(block.ln_1.weight), block.attn.n_head
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(C, heads, 4 * C, dropout=0.0, activation="gelu", norm_first=True, batch_first=True).double().eval()

    def copy(target, source):
        target.weight.data, target.bias.data = source.weight.data, source.bias.data

    layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = (
        block.attn.c_attn.weight.data,
        block.attn.c_attn.bias.data,
    )
    copy(layer.self_attn.out_proj, block.attn.c_proj)
    copy(layer.linear1, block.mlp.c_fc)
    copy(layer.linear2, block.mlp.c_proj)
    copy(layer.norm1, block.ln_1)
    if decoder:
        cross = block.cross_attn
        layer.multihead_attn = nn.MultiheadAttention(C, cross.n_head, batch_first=True).double()
        layer.multihead_attn.in_proj_weight.data = torch.cat((cross.c_q.weight.data, cross.c_kv.weight.data))
        layer.multihead_attn.in_proj_bias.data = torch.cat((cross.c_q.bias.data, cross.c_kv.bias.data))
        copy(layer.multihead_attn.out_proj, cross.c_proj)
        copy(layer.norm2, block.ln_cross_q)
        copy(layer.norm3, block.ln_2)
    else:
        copy(layer.norm2, block.ln_2)
    return layer


@pytest.mark.parametrize("pos_sub", ["none", "plain", "ln"])
def test_encoder_decoder_equals_torch_layers(pos_sub):
    """Guards the wiring: order of the sub-layers, which LayerNorm feeds what, the raw h for every layer, the bridge, wpe[t+1]."""
    options = {"bias": True, "pos_sub": pos_sub, "bridge_ln": True, "decoder_pos_emb": True}
    model = make_model("encoder_decoder", options)
    x = torch.randint(31, (2, 12))
    mask = torch.ones(12, 12).triu(1).bool()  # True = may NOT look, torch's convention here
    h = model.wte.weight[x] + model.wpe.weight[:12]
    for block in model.encoder:
        h = torch_layer(block, decoder=False)(h, src_mask=mask)
    d = model.bridge(F.layer_norm(h, (12,), model.ln_bridge.weight, model.ln_bridge.bias)) + model.wpe.weight[1:13]
    for block in model.decoder:
        memory = F.layer_norm(h, (12,), block.ln_cross_kv.weight, block.ln_cross_kv.bias)
        d = torch_layer(block, decoder=True)(d, memory, tgt_mask=mask, memory_mask=mask)
    d = F.layer_norm(d, (12,), model.ln_f.weight, model.ln_f.bias)
    if pos_sub != "none":
        d = d - model.wpe.weight[1:13]
    if pos_sub == "ln":
        d = F.layer_norm(d, (12,), model.ln_pos_sub.weight, model.ln_pos_sub.bias)
    assert (d @ model.wte.weight.T - model(x)[0]).abs().max() < 1e-10


def test_cross_first_swaps_the_two_attentions():
    """Guards the option decoder_order: same weights, computed by hand in the other order."""
    model = make_model("encoder_decoder", {"decoder_order": "cross_first", "n_decoder_layer": 1})
    x = torch.randint(31, (2, 7))
    positions, context = model.place(x)
    _, h = model.encode(x, positions, context)
    block, d = model.decoder[0], model.bridge(h)
    d = d + block.cross_attn(block.ln_cross_q(d), block.ln_cross_kv(h), context)
    d = d + block.attn(block.ln_1(d), context)
    d = d + block.mlp(block.ln_2(d))
    assert (model.ln_f(d) @ model.wte.weight.T - model(x)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("pos_sub", ["none", "plain", "ln"])
def test_baseline_equals_torch_layers(pos_sub):
    """Guards the baseline in the same way: a handicapped baseline would make every comparison worthless."""
    model = make_model("decoder_only", {"bias": True, "pos_sub": pos_sub})
    x, parts = torch.randint(31, (2, 12)), model.transformer
    h = parts.wte.weight[x] + parts.wpe.weight[:12]
    for block in parts.h:
        h = torch_layer(block, decoder=False)(h, src_mask=torch.ones(12, 12).triu(1).bool())
    h = F.layer_norm(h, (12,), parts.ln_f.weight, parts.ln_f.bias)
    if pos_sub != "none":
        h = h - parts.wpe.weight[1:13]
    if pos_sub == "ln":
        h = F.layer_norm(h, (12,), parts.ln_pos_sub.weight, parts.ln_pos_sub.bias)
    assert (h @ model.lm_head.weight.T - model(x)[0]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["mask", "all"])
def test_attention_in_products_equals_the_kernel(kind):
    """Guards the CPU's bfloat16 path: value and gradients of attention, against torch's kernel in float32."""
    torch.manual_seed(0)
    T, S = 5, 9
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (T, S, S))
    mask = torch.ones(T, S, dtype=torch.bool).tril(4) if kind == "mask" else None
    context = Context(mask, causal=False, rotary={}, start=S - T, dropout=0.0)
    assert attend(q, k, v, context, None).shape == (2, T, 24)
    fast, weight = attend_in_products(q, k, v, mask, 0.0), torch.randn(2, 3, T, 8)
    grads = torch.autograd.grad((fast * weight).sum(), (q, k, v))
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    slow = F.scaled_dot_product_attention(*exact, attn_mask=mask)
    assert (fast - slow).norm() / slow.norm() < 0.01
    for a, b in zip(grads, torch.autograd.grad((slow * weight).sum(), exact)):
        assert (a - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_token_loss_is_the_mean_over_counted_targets(name):
    """Guards the loss: targets of -1 must neither count in the sum nor in the mean."""
    model = make_model(name, {})
    x, y = torch.randint(31, (2, 12)), torch.randint(31, (2, 12))
    y[0, 3:7] = -1
    log_p = model(x)[0].log_softmax(-1)
    terms = [-log_p[b, t, y[b, t]] for b in range(2) for t in range(12) if y[b, t] >= 0]
    _, losses = model(x, y)
    assert abs(losses["token"] - sum(terms) / len(terms)) < 1e-12
    assert losses["total"] == losses["token"]


def test_rotary_depends_on_distance_only():
    """Guards RoPE: q.k must depend on the difference of positions, and angles must turn as position * base^(-2i/D)."""
    q, k = torch.randn(1, 1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 1, 6, dtype=torch.float64)

    def score(i, j):
        turn = lambda x, p: rotate(x, rotary_angles(torch.tensor([p]), 6))  # noqa: E731
        return (turn(q, i) * turn(k, j)).sum().item()

    assert abs(score(3, 1) - score(40, 38)) < 1e-5 and abs(score(3, 1) - score(3, 2)) > 1e-3
    # channel pair i is one complex number turned by p * 10000^(-2i/D)
    x = torch.randn(1, 1, 1, 7, dtype=torch.float64)
    y = rotate(x, rotary_angles(torch.tensor([5]), 7)).flatten()
    for i in range(3):
        z = complex(x.flatten()[i], x.flatten()[i + 3]) * complex(
            math.cos(5 * 10000 ** (-i / 3)), math.sin(5 * 10000 ** (-i / 3))
        )
        assert abs(z.real - y[i]) < 1e-6 and abs(z.imag - y[i + 3]) < 1e-6
    assert y[6] == x.flatten()[6], "the odd channel stays"


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_rotary_model_ignores_where_the_text_stands(name):
    """Guards position=rope: with no additive table a shifted text gives the same logits (with learned positions it must not)."""
    x, there = torch.randint(31, (2, 5)), torch.arange(7, 12)
    model = make_model(name, {"position": "rope"})
    assert (model(x)[0] - model(x, positions=there)[0]).abs().max() < 1e-4  # the angles are float32
    model = make_model(name, {"position": "learned"})
    assert (model(x)[0] - model(x, positions=there)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_rotary_subtraction_takes_the_row_of_its_position(name):
    """Guards `wpe_next`: row t, which belongs to position t + 1, leaves the state at t, and no other row does."""
    x = torch.randint(31, (2, 12))
    model, plain = (make_model(name, {"position": "rope", "pos_sub": pos_sub}) for pos_sub in ("plain", "none"))
    weights = dict(model.named_parameters())
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "wpe_next" not in key})
    (rows,) = (value for key, value in weights.items() if "wpe_next" in key)
    (tokens,) = (value for key, value in weights.items() if "wte" in key or "lm_head" in key)
    assert (plain(x)[0] - model(x)[0] - rows @ tokens.T).abs().max() < 1e-10


def test_dropout_acts_in_training_only():
    """Guards the published mistake: attention dropout that stays on in evaluation."""
    for name in ("encoder_decoder", "decoder_only"):
        x = torch.randint(31, (2, 12))
        wet, dry = make_model(name, {"dropout": 0.5}), make_model(name, {"dropout": 0.0})
        assert torch.equal(wet(x)[0], dry(x)[0])
        wet.train()
        assert (wet(x)[0] - wet(x)[0]).abs().max() > 1e-3
        # attention weights themselves: switch all nn.Dropout modules off, what is left is attention's
        for module in wet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert (wet(x)[0] - wet(x)[0]).abs().max() > 1e-3
        # and each module by itself: the embeddings, and every residual branch
        dry.train()
        modules = [module for module in dry.modules() if isinstance(module, nn.Dropout)]
        assert len(modules) == 1 + (2 * 2 + 2 * 3 if name == "encoder_decoder" else 3 * 2)
        for module in modules:
            assert torch.equal(dry(x)[0], dry(x)[0])
            module.p = 0.5
            assert (dry(x)[0] - dry(x)[0]).abs().max() > 1e-3
            module.p = 0.0


@pytest.mark.parametrize(
    "name, calls",
    [("autoencoder", 2 + 4 * 2), ("rq_transformer", 2 + 6 * 2), ("latent_transformer", 3 + 4 * 2 + 2 * 3 + 3)],
)
def test_dropout_of_latent_models(name, calls):
    """Guards the same by count: what each stack reads, and every residual branch, is dropped in training and in training only."""
    model, dropped = checkpoint.build(name, checkpoint.CONFIGS[name](dropout=0.5)), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, y: dropped.append(not torch.equal(args[0], y)))
    idx = torch.randint(256, (2, 64))
    if name == "rq_transformer":
        idx = torch.randint(512, (2, 64, 4))  # codes
        model.vectors.normal_()
    model.train()(idx, idx)
    assert dropped == [True] * calls
    dropped.clear()
    model.eval()(idx, idx)
    assert dropped and not any(dropped)


# ----------------------------------------------------------------------------------------------------------------------
# the embedding loss

LOSSES = [
    dict(embedding_loss=kind, embedding_loss_ln=ln, embedding_loss_ln_affine=affine)
    for kind in ("mse", "cosine", "log_cosine")
    for ln in ("input", "average", "none")
    for affine in (True, False)
]


def everywhere(x: torch.Tensor) -> torch.Tensor:
    """All positions of a batch (B, T, ...) count."""
    return torch.ones(x.shape[:2], dtype=torch.bool)


def slow_embedding_loss(module: EmbeddingLoss, config: EncoderDecoderConfig, e, h):
    """The formula of the design, one vector at a time."""

    def norm(layer, x):
        x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        return x if layer.weight is None else x * layer.weight + layer.bias

    total = 0.0
    for b in range(e.size(0)):
        for t in range(e.size(1)):
            a = [norm(module.ln_embedding, e[b, i]) if config.embedding_loss_ln == "input" else e[b, i] for i in range(t + 1)]
            m = sum(a) / (t + 1)
            if config.embedding_loss_ln == "average":
                m = norm(module.ln_embedding, m)
            u = norm(module.ln_encoder, h[b, t])
            cos = (m * u).sum() / (m.norm() * u.norm())
            total += {"mse": ((m - u) ** 2).mean(), "cosine": 1 - (cos + 1) / 2, "log_cosine": -torch.log((cos + 1) / 2)}[
                config.embedding_loss
            ]
    return total / (e.size(0) * e.size(1))


@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("detach", ["encoder", "embedding", "none"])
def test_embedding_loss_and_its_gradients(options, detach):
    """Guards the formula and where its gradients go: value and every gradient equal a slow loop with explicit detaches."""
    model = make_model("encoder_decoder", options | {"embedding_loss_detach": detach})
    x = torch.randint(31, (2, 6))
    positions, context = model.place(x)
    parameters = dict(model.named_parameters())

    def gradients(loss):
        return torch.autograd.grad(loss, parameters.values(), allow_unused=True)

    e, h = model.encode(x, positions, context)
    fast = model.embedding_loss(e, h, everywhere(x))
    e, h = model.encode(x, positions, context)
    slow = slow_embedding_loss(
        model.embedding_loss, model.config, e.detach() if detach == "embedding" else e, h.detach() if detach == "encoder" else h
    )
    assert abs(fast - slow) < 1e-10
    for name, a, b in zip(parameters, gradients(fast), gradients(slow)):
        assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-9), name
        if name.startswith("encoder."):
            assert (a is None) == (detach == "encoder"), f"{name}: gradient on the wrong side of detach={detach}"


def test_embedding_loss_in_training_only_and_weighted():
    """Guards the published quantity: evaluation must report the token loss alone, training must weight the embedding loss."""
    model = make_model("encoder_decoder", {"embedding_loss": "mse", "embedding_loss_weight": 8.0})
    x = torch.randint(31, (2, 12))
    _, losses = model(x, x)
    assert set(losses) == {"token", "total"} and losses["total"] == losses["token"]
    _, losses = model.train()(x, x)
    assert abs(losses["total"] - losses["token"] - 8 * losses["embedding"]) < 1e-12
    with torch.no_grad():
        model.embedding_loss.ln_embedding.bias.copy_(torch.tensor([3.0, 1.0] + [0.0] * 10))
        model.embedding_loss.ln_encoder.bias.copy_(torch.tensor([-1.0] + [0.0] * 11))
    _, losses = model(x, x)
    report = model.eval().embedding_loss_report(x, x)
    biases = [report[f"bias_{name}"] for name in ("embedding", "encoder", "distance")]
    assert biases == pytest.approx([10**0.5, 1.0, 17**0.5], rel=1e-6)
    assert abs(report["embedding_loss"] - losses["embedding"]) < 1e-12
    (8 * losses["embedding"]).backward()
    assert abs(report["embedding_grad_wte"] - model.wte.weight.grad.norm()) < 1e-9
    assert abs(report["embedding_grad_wpe"] - model.wpe.weight.grad.norm()) < 1e-9
    assert report["gain_encoder"] == model.embedding_loss.ln_encoder.weight.mean()
    wet, dry = (make_model("encoder_decoder", {"embedding_loss": "mse", "dropout": p}).eval() for p in (0.5, 0.0))
    assert wet.embedding_loss_report(x, x) == dry.embedding_loss_report(x, x), "dropout was on"


def test_log_cosine_of_opposite_vectors_is_finite():
    """Guards -log(0): where a state is exactly opposite to the mean embedding, neither loss nor gradient may leave the numbers."""
    model = make_model("encoder_decoder", {"embedding_loss": "log_cosine", "embedding_loss_ln_affine": False})
    e = torch.randn(2, 5, 12, dtype=torch.float64)[:, :1].requires_grad_()
    loss = model.embedding_loss(e, -e.detach(), everywhere(e))
    assert loss.item() == pytest.approx(-math.log(1e-8)) and torch.autograd.grad(loss, e)[0].isfinite().all()


def test_the_embedding_loss_has_a_trivial_solution():
    """Documents what we know: gains of zero and equal biases solve it; without the affine part that way out is closed."""
    model = make_model("encoder_decoder", {"embedding_loss": "mse"})
    e, h = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        for layer in (model.embedding_loss.ln_embedding, model.embedding_loss.ln_encoder):
            layer.weight.zero_()
            layer.bias.fill_(0.7)
    assert model.embedding_loss(e, h, everywhere(e)) < 1e-30
    closed = make_model("encoder_decoder", {"embedding_loss": "mse", "embedding_loss_ln_affine": False})
    assert closed.embedding_loss(e, h, everywhere(e)) > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# compilation, and settings that cannot work


@pytest.mark.parametrize("name, options", ALL_MODELS, ids=ALL_MODELS_IDS)
def test_compiles_without_graph_breaks(name, options):
    """Guards torch.compile: one graph for the training step, with the losses and gradients of the uncompiled one."""
    torch._dynamo.reset()
    model = make_model(name, options, n_encoder_layer=1, n_decoder_layer=1) if name == "encoder_decoder" else make_model(
        name, options, n_layer=1)  # fmt: skip
    model.train()
    x, y = torch.randint(31, (2, 12)), torch.randint(31, (2, 12))
    _, expected = model(x, y)
    expected["total"].backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _, losses = torch.compile(model, fullgraph=True, backend="aot_eager")(x, y)
    losses["total"].backward()
    assert losses.keys() == expected.keys()
    for key in losses:
        assert abs(losses[key] - expected[key]) < 1e-10
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in grads) and (p.grad is None or (p.grad - grads[n]).abs().max() < 1e-9), n


@pytest.mark.parametrize(
    "config_class, base, change, message",
    [
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"n_head": 5}, "n_embd=12 is not divisible by n_head=5"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"n_cross_head": 8}, "n_cross_head=8"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"n_encoder_layer": 0}, "n_encoder_layer=0"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"dropout": 1.0}, "dropout=1.0"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"embedding_loss_weight": -1.0}, "must not be negative"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"position": "rope", "decoder_pos_emb": True}, "position=learned"),
        (DecoderOnlyConfig, TINY_BASELINE, {"n_head": 7}, "n_embd=12 is not divisible by n_head=7"),
        (DecoderOnlyConfig, TINY_BASELINE, {"block_size": 0}, "block_size=0"),
        (DecoderOnlyConfig, TINY_BASELINE, {"window": -1}, "window=-1"),
        (DecoderOnlyConfig, TINY_BASELINE, {"pos_sub": "LN"}, "pos_sub=LN: choose one of none, plain, ln"),
        (DecoderOnlyConfig, TINY_BASELINE, {"pos_sub": None}, "pos_sub=None: choose one of none, plain, ln"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"bridge_init": "eye"}, "bridge_init=eye: choose one of identity"),
        (EncoderDecoderConfig, TINY_ENCODER_DECODER, {"embedding_loss": "MSE"}, "embedding_loss=MSE: choose one of none, mse"),
    ],
)
def test_impossible_settings(config_class, base, change, message):
    """Guards users from a traceback deep in torch: the message names the key, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        config_class(**(base | change))
    assert dataclasses.is_dataclass(config_class(**base))


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_too_long_for_the_context(name):
    """Guards against reading past the position table."""
    model = make_model(name, {})
    with pytest.raises(ValueError, match="13 tokens do not fit into the context of block_size=12"):
        model(torch.zeros(1, 13, dtype=torch.long))
