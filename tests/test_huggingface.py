"""A Hugging Face model as both trunks of the text autoencoder: tiny random ones, written to a folder and read from there."""

import json
import shutil
import sys

import pytest
import safetensors.torch
import torch

import checkpoint
import pretrained
import train
from conftest import HOW_TO_INSTALL
from latent import huggingface
from latent.autoencoder import Autoencoder, AutoencoderConfig

transformers = pytest.importorskip("transformers", reason=HOW_TO_INSTALL)

SHAPE = dict(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
             bos_token_id=None, eos_token_id=None)  # fmt: skip
KINDS = {
    # heads wider than C / H, fewer of keys than of queries
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, intermediate_size=24, num_key_value_heads=1, head_dim=12),
    # LayerNorm, which unlike the RMSNorm of the others computes in float64 when asked to; positions from a table; dropout
    "gpt2": lambda: transformers.GPT2Config(**SHAPE),
}
OURS = dict(block_size=32, latent_factor=4, latent_dim=8, codebook_size=8, codebook_levels=3, quantize_after=0)


def write_model(folder, config, seed: int = 0):
    """A model with weights far from their initialisation, where attention is uniform and would hide a wrong mask."""
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_model(tmp_path_factory.mktemp("hf") / kind, config()) for kind, config in KINDS.items()}


def make(folder, dtype: torch.dtype = torch.float64, **options) -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(**(OURS | {"backbone": f"hf:{folder}"} | options))
    config = huggingface.fit(config, huggingface.describe(config.pretrained), options)
    model = Autoencoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    pretrained.load_backbone(model, config)
    return model.to(dtype).eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


both_kinds = pytest.mark.parametrize("kind", KINDS)

# ----------------------------------------------------------------------------------------------------------------------
# what depends on what


@both_kinds
def test_trunk_is_the_model(folders, kind):
    """Guards the wiring: tokens through our embedding and the trunk are what transformers computes from their ids; its weights too."""
    model, theirs = make(folders[kind], torch.float32), transformers.AutoModel.from_pretrained(folders[kind])
    idx = tokens(2, 32)
    assert torch.equal(model.trunk(model.wte(idx)), theirs(idx, use_cache=False).last_hidden_state)
    assert sum(p.numel() for _, p in model.named_backbone_parameters()) == theirs.num_parameters()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@both_kinds
def test_codes_of_a_prefix_are_those_of_the_text(folders, kind):
    """Guards continuation, as for our own trunk; pads and other rows included."""
    model, idx = make(folders[kind]), tokens(3, 32)
    codes = model.encode(idx)
    assert codes.shape == (3, 8, 3) and codes.unique().numel() > 3
    for length in (1, 3, 4, 7, 8, 17, 31):
        assert torch.equal(model.encode(idx[:, :length])[:, : length // 4], codes[:, : length // 4])
        mask = torch.arange(32) < torch.tensor([[length], [32], [length]])
        padded = model.encode(torch.where(mask, idx, 7), mask)
        assert torch.equal(padded[0, : (length + 3) // 4], model.encode(idx[:1, :length])[0]) and torch.equal(padded[1], codes[1])
        assert (padded[0, (length + 3) // 4 :] == -1).all()


@both_kinds
def test_logits_depend_on_blocks_up_to_their_own(folders, kind):
    """Guards streaming: bit for bit nothing of a later block, but at every position all of the own one and of the earlier ones."""
    model, idx = make(folders[kind]), tokens(2, 32)
    before, codes = model(idx)[0], model.encode(idx)
    for block in range(8):
        changed = idx.clone()
        changed[:, block * 4 : (block + 1) * 4] = (changed[:, block * 4 : (block + 1) * 4] + 7) % 256
        assert torch.equal(model(changed)[0][:, : block * 4], before[:, : block * 4])
        other = codes.clone()
        other[:, block] = (other[:, block] + 1) % 8
        moved = (model.decode(other) != before).any(-1)
        assert not moved[:, : block * 4].any() and moved[:, block * 4 :].all()


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("chunks", [(1,) * 8, (3, 1, 4)], ids=["one", "more"])
def test_decoding_in_chunks_is_decoding_at_once(folders, kind, dtype, chunks):
    """Guards the cache: positions and masks behind what is there, and the limit of block_size."""
    model = make(folders[kind], dtype)
    codes = torch.randint(0, 8, (2, 8, 3), generator=torch.Generator().manual_seed(3))
    whole, cache = model.decode(codes), model.make_decoder_cache()
    bound = (1e-10 if dtype == torch.float64 else 1e-5) * whole.abs().max()
    parts = [model.decode(chunk, cache) for chunk in codes.split(chunks, dim=1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < bound and cache.length == 32
    with pytest.raises(ValueError, match="36 tokens do not fit into the context of block_size=32"):
        model.decode(codes[:, :1], cache)


@both_kinds
def test_gradient_passes_the_frozen_trunk(folders, kind):
    """Guards the warm-up: under no_grad in the trunk, neither what leads to the codes nor the up-step would learn from the tokens."""
    model, idx = make(folders[kind], freeze_backbone_iters=3, dropout=0.0).train(), tokens(8, 32)
    while not model.quantizer.initialized:
        model(idx, idx)
        model.after_step()
    model(idx, idx)[1]["token"].backward()  # through the codes
    assert model.backbone_rate(2) == 0.0 and model.backbone_rate(3) == 0.1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_dropout_is_ours(folders):
    """Guards the config: GPT-2 brings dropout of 0.1, which would be on in a run that says dropout=0."""
    idx = tokens(4, 32)
    for dropout in (0.0, 0.5):
        model = make(folders["gpt2"], dropout=dropout).train()
        losses = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(model(idx, idx)[1]["token"])
        assert torch.equal(*losses) == (dropout == 0.0)


@both_kinds
def test_flops_count_the_trunk_twice(folders, kind):
    """Guards equal-FLOP comparisons: weights that are there once, but run for reading and for writing."""
    model = make(folders[kind])
    layers = sum(p.numel() for name, p in model.trunk.named_parameters() if "wpe" not in name)
    width = {"qwen3": 2 * 12, "gpt2": 16}[kind]
    latent = sum(p.numel() for part in (model.to_latent, model.refine_encoder, model.refine_decoder, model.from_latent)
                 for p in part.parameters())  # fmt: skip
    down, up = ([sum(p.numel() for p in layer.parameters()) for layer in part.layers] for part in (model.down, model.up))
    active = 2 * layers + 256 * 16 + latent / 4 + down[0] / 2 + down[1] / 4 + up[0] / 4 + up[1] / 2
    assert model.flops_per_token() == round(6 * active + 2 * 2 * 12 * width * 32 + 2 * 3 * 8 * 8 / 4)


# ----------------------------------------------------------------------------------------------------------------------
# through the scripts

SHORT = (
    "--model=autoencoder --block_size=32 --latent_dim=8 --codebook_size=4 --codebook_levels=2 --quantize_after=2 --max_iters=9 "
    "--lr_decay_iters=9 --warmup_iters=2 --eval_interval=3 --eval_iters=1 --log_interval=3 --batch_size=4 --device=cpu "
    "--dtype=float32 --final_eval_tokens=256 --grad_clip=1.0 --freeze_backbone_iters=6 --dropout=0.1"
)


def run(data, out, backbone, *more: str) -> dict:
    return train.main([f"--dataset={data}", f"--out_dir={out}", f"--backbone=hf:{backbone}", *SHORT.split(), *more])


def state(out) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "last" / "model.safetensors")


@both_kinds
def test_runs_freeze_go_on_and_load_without_the_folder(folders, tiny_data, tmp_path, kind, monkeypatch):
    """Guards the whole way: frozen bit for bit, then trained; broken and resumed as unbroken; the folder needed only at the start."""
    folder, halves, full = tmp_path / "model", tmp_path / "halves", tmp_path / "full"
    shutil.copytree(folders[kind], folder)
    theirs = transformers.AutoModel.from_pretrained(folder)
    summary = run(tiny_data, full, folder)
    assert 0 <= summary["token_accuracy"] < 1 and summary["parameters"] > 0
    run(tiny_data, halves, folder, "--max_iters=3")
    folder.rename(tmp_path / "gone")
    run(tiny_data, halves, folder, "--max_iters=6", "--resume")
    frozen = state(halves)
    embeddings = theirs.get_input_embeddings().weight
    assert torch.equal(frozen["wte.weight"], embeddings)
    expected = {f"trunk.model.{name}": p for name, p in theirs.named_parameters() if p is not embeddings}
    assert expected.keys() == {name for name in frozen if name.startswith("trunk.")}
    assert all(torch.equal(frozen[name], p) for name, p in expected.items())
    run(tiny_data, halves, folder, "--resume")
    after, unbroken = state(halves), state(full)
    assert all(not torch.equal(after[name], frozen[name]) for name in expected) and after.keys() == unbroken.keys()
    assert not torch.equal(after["wte.weight"], embeddings)
    assert all(torch.equal(after[name], unbroken[name]) for name in after)

    first, second = (checkpoint.load_run(halves, "last")[0] for _ in range(2))
    idx = tokens(3, 32)
    assert torch.equal(first.encode(idx), second.encode(idx)) and torch.equal(first(idx)[0], second(idx)[0])
    assert torch.equal(first.wte.weight, after["wte.weight"])
    stored = json.loads((halves / "config.json").read_text())["model"]
    assert (stored["n_embd"], stored["n_encoder_layer"], stored["n_decoder_layer"]) == (16, 2, 2)
    assert str(tmp_path) not in stored["backbone_config"]
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if not installed
    with pytest.raises(ValueError, match=r'needs transformers, which is not installed: pip install "transformers>=5"'):
        checkpoint.load_run(halves, "last")


def test_what_does_not_fit(folders, tiny_data, tmp_path):
    """Guards bad input: one line that says what to do, before the run directory is made."""
    out, qwen = tmp_path / "out", folders["qwen3"]
    small = write_model(tmp_path / "small", transformers.LlamaConfig(**(SHAPE | {"vocab_size": 300}), intermediate_size=8))
    bert = write_model(tmp_path / "bert", transformers.BertConfig(**(SHAPE | {"pad_token_id": 0}), intermediate_size=8))
    damaged = shutil.copytree(qwen, tmp_path / "damaged")
    weights = safetensors.torch.load_file(damaged / "model.safetensors")
    weights.pop("layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(qwen / "config.json", bare)
    t5 = tmp_path / "t5"
    transformers.T5Config(vocab_size=256).save_pretrained(t5)
    for folder, more, message in (
        (tmp_path / "nothing", [], "backbone=hf:.*nothing: .*A folder with config.json and model.safetensors is needed"),
        (bare, [], "backbone=hf:.*bare: .*A folder with config.json and model.safetensors is needed"),
        (damaged, [], r"is incomplete: 1 tensors are missing, layers.1.mlp.up_proj.weight"),
        (small, [], "has a vocabulary of 300 tokens, but the data set has 256: .*--vocab_size=300"),
        (qwen, ["--n_embd=32"], "n_embd=32, but backbone=hf:.* has 16; leave n_embd out"),
        (qwen, ["--n_decoder_layer=3"], "n_decoder_layer=3, but .* has 2; leave"),
        (qwen, ["--position=learned"], "position=learned: .*has positions of its own"),
        (qwen, ["--block_size=128"], "block_size=128, but .* has only 64 positions"),
        (bert, [], "looks ahead.*; a causal model is needed"),
        (t5, [], "is a t5; a causal language model of text is needed"),
        (qwen, ["--backbone=somewhere", "--backbone_config={}"], "backbone_config belongs to backbone=hf"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiny_data, out, folder, *more)
        assert not out.exists()
    run(tiny_data, out, small, "--vocab_size=300", "--max_iters=2")  # a table that is longer than the tokenizer's
    assert state(out)["wte.weight"].shape == (300, 16)
