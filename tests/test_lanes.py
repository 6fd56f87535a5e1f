"""Parts of a micro-batch computed side by side: the same step, the same bits every time, and never where it cannot be."""

import dataclasses
import threading

import pytest
import torch

import checkpoint
import dataloader
import runtime
import train
import trainer
from conftest import make_model
from data.pairs import prepare as pairs
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
    found = [
        step(make_model("decoder_only", {}, vocab_size=256, block_size=48), data, batch_size=8, lanes=lanes) for lanes in (1, 3)
    ]
    assert equal(found[0], found[1], 1e-12)


def test_lanes_run_at_once_each_on_its_share_of_the_threads(threads):
    """Guards the purpose: parts that wait for each other arrive together, with half of the threads, and all are back afterwards."""
    threads(2)
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
    assert len({thread for thread, _ in seen}) == 2 and {count for _, count in seen} == {1}
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), lanes.shared_threads():
        lanes.backward(lambda x: 1 / 0, [(parameter,), (parameter,)], [0.5, 0.5], [parameter])
    assert torch.get_num_threads() == 2, "lost after an error"


def test_as_many_lanes_as_pay(tiny_data, threads):
    """Guards the default: a lane a thread, but none below 512 tokens, none without a sequence, and none where there can be none."""
    threads(4)
    assert [trainer.lanes_that_pay(n, 256) for n in (1, 2, 4, 8, 64)] == [1, 1, 2, 4, 4]
    assert [trainer.lanes_that_pay(n, 2048) for n in (1, 3)] == [1, 3]

    def made(network: torch.nn.Module, machine: runtime.Runtime = FLOAT64, **settings) -> Trainer:
        return Trainer(TrainConfig(batch_size=64, **settings), network, dataloader.TokenData(tiny_data, 32), machine)

    def plain(**options) -> torch.nn.Module:
        return make_model("decoder_only", {}, vocab_size=256, block_size=32, **options)

    quantized = checkpoint.build("autoencoder", checkpoint.CONFIGS["autoencoder"](block_size=32, n_embd=16, n_head=2, latent_dim=8))
    compressed = make_model("encoder_decoder", {}, vocab_size=256, block_size=32, latent_factor=4, latent_dim=8, codebook_size=4)
    assert made(plain()).lanes.count == 4 and made(plain(), lanes=3).lanes.count == 3
    for network, machine, settings, why in (
        (plain(dropout=0.1), FLOAT64, {}, "dropout=0.1"),
        (quantized, FLOAT64, {"model": "autoencoder"}, "autoencoder draws random numbers or collects statistics"),
        (compressed, FLOAT64, {}, "encoder_decoder draws random numbers or collects statistics"),
        (plain(), dataclasses.replace(FLOAT64, dtype=torch.float16), {"dtype": "float16"}, "dtype=float16 scales the loss"),
        (plain(), dataclasses.replace(FLOAT64, compile=True), {}, "torch.compile is on"),
    ):
        assert made(network, machine, **settings).lanes.count == 1, why
        made(network, machine, lanes=1, **settings)
        with pytest.raises(ValueError, match=f"lanes=2 is not possible: .*{why}.*; leave it out"):
            made(network, machine, lanes=2, **settings)


def test_a_run_in_lanes_can_be_resumed(tiny_data, tmp_path, threads):
    """Guards the front door in float32: stopped and gone on with, a run in lanes ends with the same bits, near those of one lane."""
    threads(2)
    settings = ["--block_size=32", "--n_embd=16", "--n_head=2", "--n_layer=2", "--model=decoder_only", "--max_iters=6",
                "--warmup_iters=2", "--eval_interval=3", "--eval_iters=2", "--dtype=float32", f"--dataset={tiny_data}"]  # fmt: skip

    def run(name: str, *more: str) -> dict[str, torch.Tensor]:
        summary = train.main([*settings, f"--out_dir={tmp_path / name}", *more])
        assert summary["lanes"] == (1 if name == "one" else 2)
        return dict(checkpoint.load_run(tmp_path / name, "last")[0].named_parameters())

    whole, one = run("whole", "--batch_size=32"), run("one", "--batch_size=32", "--lanes=1")
    run("half", "--batch_size=32", "--max_iters=3", "--lr_decay_iters=6")
    half = run("half", "--batch_size=32", "--lr_decay_iters=6", "--resume")
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert all((whole[name] - one[name]).abs().max() < 1e-4 for name in whole)
