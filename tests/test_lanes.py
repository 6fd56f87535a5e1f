"""Parts of a micro-batch computed side by side: the same step, the same bits every time, and never where it cannot be."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import dataloader
import runtime
import train
import trainer
from conftest import make_model
from data.pairs import prepare as pairs
from latent.rq_transformer import RQTransformer, RQTransformerConfig
from model import Block, DecoderBlock
from trainer import TrainConfig, Trainer

FLOAT64 = runtime.Runtime(torch.device("cpu"), torch.float64, False, "")


@pytest.fixture
def threads():
    """Sets torch's number of threads, for this test only."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def step(model: torch.nn.Module, data: dataloader.TokenData, **settings) -> list[torch.Tensor]:
    """Gradients and losses of a first step."""
    made = Trainer(TrainConfig(**settings), model, data, FLOAT64)
    sums = made.gradients(made.micro_batch_size)
    return [*(p.grad for p in model.parameters() if p.grad is not None), *(sums[name] for name in sorted(sums))]


def equal(a: list[torch.Tensor], b: list[torch.Tensor], within: float) -> bool:
    return len(a) == len(b) and all((x - y).abs().max() <= within for x, y in zip(a, b))


@pytest.mark.parametrize("lanes, checkpointed", [(2, False), (3, False), (7, False), (9, False), (2, True)])
def test_lanes_do_not_change_the_gradient(tiny_data, lanes, checkpointed):
    """
    Guards the weights of parts: seven sequences, also as 3 + 2 + 2, twice a step, have one gradient and one loss by name, also
    where lanes compute their activations again.
    """
    options, settings = {"embedding_loss": "mse", "pos_sub": "plain"}, dict(batch_size=7, gradient_accumulation_steps=2)
    found = []
    for count in (1, lanes, lanes):
        model = make_model("encoder_decoder", options, vocab_size=256)
        if checkpointed and count > 1:
            runtime.checkpoint_activations(model, (Block, DecoderBlock))
        found.append(step(model, dataloader.TokenData(tiny_data, 12), lanes=count, **settings))
    assert equal(found[0], found[1], 1e-12) and equal(found[1], found[2], 0.0)


def test_lanes_of_pairs_do_not_change_the_gradient(tmp_path):
    """Guards answers that differ in length: a token counts the same in whatever part it is."""
    (tmp_path / "qa.tsv").write_text("".join(f"{i}\t{'long answer ' * (i % 4)}{i}\n" for i in range(60)), encoding="utf-8")
    pairs.main(["--input", str(tmp_path / "qa.tsv"), "--out_dir", str(tmp_path / "set"), "--val_fraction", "0.3"])
    data = dataloader.open_data(tmp_path / "set", 48)
    found = []
    for lanes in (1, 3):
        model = make_model("decoder_only", {}, vocab_size=256, block_size=48)
        found.append(step(model, data, batch_size=8, gradient_accumulation_steps=2, lanes=lanes))
    assert equal(found[0], found[1], 1e-12)


def test_gradients_are_laid_out_like_their_parameters():
    """
    Guards the optimizer: its fused kernel reads a gradient as it reads the parameter, so one with strides of its own, or one that
    belongs to two parameters, would train something else.
    """
    w, p, q = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (4,), (4,)))
    x = torch.randn(5, 3)
    runtime.Lanes(2).backward(lambda x: {"total": (w.t() * x).sum() + (p + q).sum()}, [(x,), (2 * x,)], [0.5, 0.5], [w, p, q])
    assert torch.allclose(w.grad, 1.5 * x.t()) and w.grad.stride() == w.stride() and p.grad is not q.grad


def test_an_update_in_lanes_is_that_of_one(tiny_data, threads):
    """Guards what is set for each thread: half precision in every lane, a lane's threads for the optimizer; frozen weights stay."""
    threads(4)
    bfloat16, found, seen = dataclasses.replace(FLOAT64, dtype=torch.bfloat16), [], []
    for lanes in (1, 2):
        model = make_model("decoder_only", {}, vocab_size=256, dtype=torch.float32)
        frozen = model.transformer.wpe.weight.requires_grad_(False)
        before = frozen.clone()
        made = Trainer(TrainConfig(batch_size=4, lanes=lanes), model, dataloader.TokenData(tiny_data, 12), bfloat16)
        moving = [p for p in model.parameters() if p.requires_grad]
        made.optimizer.register_step_pre_hook(lambda *_, moving=moving: found.append([p.grad.clone() for p in moving]))
        if lanes == 2:
            inside = lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_num_threads()))  # noqa: E731
            model.transformer.ln_f.register_forward_hook(inside)
            made.optimizer.register_step_pre_hook(lambda *_: seen.append((True, torch.get_num_threads())))
        made.update()
        assert torch.equal(frozen, before) and torch.get_num_threads() == 4
    assert seen == [(True, 2)] * 3
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*found))


def test_lanes_run_at_once_each_on_its_share_of_the_threads(threads):
    """Guards the purpose: parts that wait for each other arrive together, with half of the threads each, and all are back afterwards."""
    threads(4)
    together, parameter, seen = threading.Barrier(2, timeout=60), torch.nn.Parameter(torch.ones(3)), []

    def losses(x: torch.Tensor) -> dict[str, torch.Tensor]:
        together.wait()
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return {"total": (parameter * x).sum()}

    unused = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((3,), 5.0)
    lanes = runtime.Lanes(2)
    with lanes.shared_threads():
        lanes.backward(losses, [(torch.ones(3),), (torch.full((3,), 10.0),)], [0.25, 0.5], [parameter, unused])
    assert torch.equal(parameter.grad, torch.full((3,), 5 + 0.25 + 5)) and unused.grad is None  # added to what was there
    assert len({thread for thread, _ in seen}) == 2 and {count for _, count in seen} == {2}
    assert torch.get_num_threads() == 4
    with pytest.raises(ZeroDivisionError), lanes.shared_threads():
        lanes.backward(lambda x: 1 / 0, [(parameter,), (parameter,)], [0.5, 0.5], [parameter])
    assert torch.get_num_threads() == 4, "lost after an error"


def test_as_many_lanes_as_pay(tiny_data, threads):
    """Guards the default: a lane a thread, but none below 512 tokens, none without a sequence, and none where there can be none."""
    threads(4)
    for block_size, expected in ((256, {1: 1, 2: 1, 4: 2, 5: 1, 6: 2, 8: 4, 9: 1, 64: 4}), (2048, {1: 1, 2: 2, 3: 1, 4: 4})):
        small = make_model("decoder_only", {}, block_size=block_size)
        assert {n: trainer.lanes_that_pay(small, n) for n in expected} == expected
    with torch.device("meta"):  # 100 M parameters: 4 gradients of them would be too many
        large = checkpoint.build("decoder_only", checkpoint.CONFIGS["decoder_only"](vocab_size=10**6, n_embd=100, block_size=256))
    assert trainer.lanes_that_pay(large, 64) == 2

    def made(network: torch.nn.Module, machine: runtime.Runtime = FLOAT64, **settings) -> Trainer:
        return Trainer(TrainConfig(batch_size=64, **settings), network, dataloader.TokenData(tiny_data, 32), machine)

    def plain(**options) -> torch.nn.Module:
        return make_model("decoder_only", {}, vocab_size=256, block_size=32, **options)

    quantized = checkpoint.build("autoencoder", checkpoint.CONFIGS["autoencoder"](block_size=32, n_embd=16, n_head=2, latent_dim=8))
    compressed = make_model("encoder_decoder", {}, vocab_size=256, block_size=32, latent_factor=4, latent_dim=8, codebook_size=4)
    assert made(plain()).lanes.count == 4 and made(plain(), lanes=3).lanes.count == 3 and made(plain(), lanes=99).lanes.count == 64
    assert made(plain(), gradient_accumulation_steps=4, micro_batch_size=16).lanes.count == 1, "tokens at once count, not of a step"
    codes = checkpoint.CONFIGS["latent_transformer"](block_size=32, target_size=8, latent_dim=8, codebook_size=4, startup_steps=1)
    soft = SimpleNamespace(side_by_side=RQTransformer(RQTransformerConfig(soft_labels=0.5)).side_by_side, config=plain().config)
    assert not soft.side_by_side and RQTransformer(RQTransformerConfig()).side_by_side
    one = made(plain())
    for machine in (dataclasses.replace(FLOAT64, world_size=2), dataclasses.replace(FLOAT64, device=torch.device("cuda"))):
        one.machine = machine
        assert one.lane_count() == 1
    for network, machine, settings, why in (
        (plain(dropout=0.1), FLOAT64, {}, "dropout=0.1"),
        (quantized, FLOAT64, {"model": "autoencoder"}, "autoencoder draws random numbers or collects statistics"),
        (compressed, FLOAT64, {}, "encoder_decoder draws random numbers or collects statistics"),
        (checkpoint.build("latent_transformer", codes), FLOAT64, {"model": "latent_transformer"}, "latent_transformer draws"),
        (plain(), dataclasses.replace(FLOAT64, dtype=torch.float16), {"dtype": "float16"}, "dtype=float16 scales the loss"),
        (plain(), dataclasses.replace(FLOAT64, compile=True), {}, "torch.compile is on"),
    ):
        assert made(network, machine, **settings).lanes.count == 1, why
        made(network, machine, lanes=1, **settings)
        with pytest.raises(ValueError, match=f"lanes=2 is not possible: .*{why}.*; use lanes=none"):
            made(network, machine, lanes=2, **settings)


def test_a_run_in_lanes_can_be_resumed(tiny_data, tmp_path, threads):
    """Guards the front door in float32: stopped and gone on with, a run in lanes ends with the same bits, near those of one lane."""
    threads(2)
    settings = ["--block_size=32", "--n_embd=16", "--n_head=2", "--n_layer=2", "--model=decoder_only", "--max_iters=6",
                "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2", "--dtype=float32", f"--dataset={tiny_data}"]  # fmt: skip

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        summary = train.main([*settings, f"--out_dir={tmp_path / name}", *more])
        assert summary["lanes"] == (1 if name in ("one", "older") else 2)
        return dict(checkpoint.load_run(tmp_path / name, "last")[0].named_parameters())

    whole, one = run("whole", "--batch_size=32"), run("one", "--batch_size=32", "--lanes=1")
    run("half", "--batch_size=32", "--max_iters=3", "--lr_decay_iters=6")
    half = run("half", "--batch_size=32", "--lr_decay_iters=6", "--resume")
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    run("fewer", "--batch_size=32", "--max_iters=3", "--lr_decay_iters=6")
    threads(1)  # as if gone on with elsewhere: the run stays as it was cut
    fewer = run("fewer", "--batch_size=32", "--lr_decay_iters=6", "--resume")
    assert all(torch.equal(whole[name], fewer[name]) for name in whole)
    threads(2)
    run("older", "--batch_size=32", "--max_iters=3", "--lr_decay_iters=6", "--lanes=1")  # a run from before there were lanes
    state = checkpoint.read_json(tmp_path / "older" / "last" / "trainer.json")
    assert state.pop("lanes") == 1
    checkpoint.write_json(tmp_path / "older" / "last" / "trainer.json", state)
    older = run("older", "--batch_size=32", "--lr_decay_iters=6", "--resume")
    assert all(torch.equal(one[name], older[name]) for name in one)
    assert all((whole[name] - one[name]).abs().max() < 1e-4 for name in whole)
