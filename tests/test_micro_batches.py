"""Steps in pieces: the same gradients, and no more memory than there is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import dataloader
import recorder
import runtime
import train
from baseline_transformer.model import DecoderOnly, DecoderOnlyConfig
from conftest import make_model
from data.pairs import prepare as pairs
from model import Block, DecoderBlock
from tiny_runs import REFERENCE, arguments, complaint, records, run, same, weights
from trainer import TrainConfig, Trainer, make_optimizer


def make_trainer(data: Path, model: torch.nn.Module, world: int = 1, rank: int = 0, **settings) -> Trainer:
    machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, 1)
    trainer = Trainer(TrainConfig(**settings), model, dataloader.TokenData(data, model.config.block_size), machine)
    trainer.machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, world)
    return trainer


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [1, 3, 4, 12, 100])
def test_micro_batches_do_not_change_the_gradient(tiny_data, size):
    """Guards the weights of micro-batches: twelve sequences, also as 5 + 5 + 2, have one gradient and one loss by name."""
    found = []
    for micro in (None, size, 5):
        model = make_model("encoder_decoder", {"embedding_loss": "mse"}, vocab_size=256)
        trainer = make_trainer(tiny_data, model, batch_size=4, gradient_accumulation_steps=3, micro_batch_size=micro)
        sums = trainer.gradients(trainer.micro_batch_size)
        found.append([*gradients(model), *(sums[name] for name in sorted(sums))])
    for other in found[1:]:
        assert len(other) == len(found[0]) and all((a - b).abs().max() < 1e-12 for a, b in zip(found[0], other))


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_of_pairs_do_not_change_the_gradient(tmp_path, world):
    """Guards sets of pairs, whose answers differ in length: a token counts the same in whatever micro-batch and process it is."""
    lines = [f"{i}\t{'long answer ' * (i % 4)}{i}" for i in range(60)]
    (tmp_path / "qa.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs.main(["--input", str(tmp_path / "qa.tsv"), "--out_dir", str(tmp_path / "set"), "--val_fraction", "0.3"])
    data, found = dataloader.open_data(tmp_path / "set", 48), []
    for size, ranks in ((8, 1), (8 // world, world), (1, world), (3, world)):
        total, losses = [], 0.0
        for rank in range(ranks):
            model = make_model("decoder_only", {}, vocab_size=256, block_size=48)
            machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, 1)
            trainer = Trainer(TrainConfig(batch_size=8, micro_batch_size=size), model, data, machine)
            trainer.machine = runtime.Runtime(torch.device("cpu"), torch.float64, False, "", rank, ranks)
            losses += trainer.gradients(size)["token"]  # each process's share of the mean
            total.append(gradients(model))
        found.append([*(sum(grads) / ranks for grads in zip(*total)), losses])  # DDP's mean
    for other in found[1:]:
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found[0], other))


def test_processes_share_the_sequences(tiny_data):
    """Guards DDP with uneven micro-batches: all sequences once, equal shares, gradients that average to those of one process."""
    settings = dict(batch_size=7, gradient_accumulation_steps=2)
    one = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), **settings)
    sums = one.gradients(7)
    averaged, shares, numbers, sequences = None, [], [], []
    for rank in (0, 1):
        trainer = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), 2, rank, micro_batch_size=3, **settings)
        mine = trainer.micro_batches(3)
        numbers += [number for number, _, _ in mine]
        sequences += [i for _, first, count in mine for i in range(first, first + count)]
        assert [count for _, _, count in mine] == [3, 3, 1]
        shares.append(trainer.gradients(3)["total"])
        half = [grad / 2 for grad in gradients(trainer.raw_model)]
        averaged = half if averaged is None else [a + b for a, b in zip(averaged, half)]
    assert sorted(sequences) == list(range(14)) and len(set(numbers)) == 6
    assert abs(sum(shares) - sums["total"]) < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(averaged, gradients(one.raw_model)))
    whole = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), 2, 1, batch_size=3, gradient_accumulation_steps=4)
    assert whole.micro_batches(3) == [(1, 3, 3), (3, 9, 3)], "without the setting: every second micro-batch, as ever"


def test_batches_are_loaded_ahead(tiny_data):
    """Guards the one-step-ahead load: what is computed is what belongs to the step, and the next one lies ready."""
    trainer = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), batch_size=3, gradient_accumulation_steps=2)
    seen = []
    trainer.raw_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(3):
        trainer.update()
    expected = [trainer.data.gather("train", trainer.data.batch_starts(1337, step, 6))[0] for step in range(4)]
    assert torch.equal(torch.cat(seen), torch.cat(expected[:3]))
    assert trainer.ahead[0] == (3, 0, 3) and torch.equal(trainer.ahead[1][0], expected[3][:3])


def test_every_micro_batch_draws_its_own_random_numbers(tiny_data):
    """Guards dropout: one mask for all micro-batches, steps or processes of a run; which it is, only seed, step and number decide."""

    def seeds(world: int, seed: int = 1) -> list[int]:
        found = []
        for rank in range(world):
            settings = dict(batch_size=2, gradient_accumulation_steps=4, seed=seed)
            trainer = make_trainer(tiny_data, make_model("decoder_only", {}, vocab_size=256), world, rank, **settings)
            trainer.raw_model.register_forward_pre_hook(lambda *_: found.append(torch.initial_seed()))
            for trainer.step in (0, 1):
                trainer.gradients(2)
        return sorted(found)

    assert seeds(1) == seeds(2) and len(set(seeds(1) + seeds(1, seed=2))) == 16


def test_evaluations_do_not_slow_down_the_log(tiny_data, tmp_path, monkeypatch):
    """Guards tokens/s, also that by which processes settle how often they ask each other: the speed of training alone."""
    clock, update, estimates = [0.0], Trainer.update, Trainer.estimates

    def taking(seconds: float, work):
        def timed(trainer):
            clock[0] += seconds
            return work(trainer)

        return timed

    monkeypatch.setattr(Trainer, "update", taking(2.0, update))
    monkeypatch.setattr(Trainer, "estimates", taking(1000.0, estimates))
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    summary = run(tiny_data, tmp_path / "run")
    assert {record["tokens_per_second"] for record in records(tmp_path / "run", "train")} == {4 * 32 / 2.0}
    assert summary["tokens_per_second"] == 4 * 32 / 2.0 and summary["seconds"] == 6 * 2.0 + 3 * 1000.0


class Frozen(DecoderOnly):
    """Its token table has a learning rate of 0."""

    def named_backbone_parameters(self):
        return [("transformer.wte.weight", self.transformer.wte.weight)]

    def backbone_rate(self, step: int) -> float:
        return 0.0


def test_a_backbone_is_decayed_like_the_rest():
    """Guards the groups of a model with a backbone: each parameter in one of them, decayed if it would be without a backbone."""
    decay = []
    for cls in (DecoderOnly, Frozen):
        model = cls(DecoderOnlyConfig(n_layer=1, n_embd=16, block_size=12, bias=True))
        groups = make_optimizer(model, TrainConfig(), torch.device("cpu")).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        decay.append([of[id(p)] for p in model.parameters()])
    assert decay[0] == decay[1] and set(decay[0]) == {0.0, 0.1}


def test_gradients_are_clipped_at_their_own_scale(tiny_data):
    """Guards float16, whose loss is scaled up: the norm that is clipped, and logged, is that of the gradients without the scale."""
    norms = []
    for dtype in (torch.float32, torch.float16):
        model = make_model("decoder_only", {}, dtype=torch.float32, vocab_size=256)
        trainer = make_trainer(tiny_data, model, batch_size=4, grad_clip=0.1)
        trainer.machine = runtime.Runtime(torch.device("cpu"), dtype, False, "")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
        norms.append(trainer.update()["grad_norm"].item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02) and norms[0] > 0.1


def test_clipping_looks_at_what_moves(tiny_data):
    """Guards grad_clip beside a frozen backbone, whose gradients nobody follows: they may not shorten those of the rest."""
    found = []
    for cls in (DecoderOnly, Frozen):
        torch.manual_seed(0)
        model = cls(DecoderOnlyConfig(n_layer=1, n_embd=16, block_size=12)).double()
        make_trainer(tiny_data, model, batch_size=4).gradients(4)
        norms = {name: p.grad.norm() for name, p in model.named_parameters()}
        table = norms.pop("transformer.wte.weight") if cls is Frozen else torch.tensor(0.0)
        model.zero_grad()
        sums = make_trainer(tiny_data, model, batch_size=4, grad_clip=1e-3).update()
        assert abs(sums["grad_norm"] - torch.stack(list(norms.values())).norm()) < 1e-12
        found.append(torch.hypot(sums["grad_norm"], table))
    assert table > 0 and abs(found[0] - found[1]) < 1e-12


def test_the_gradient_norm_is_logged_and_changes_nothing(tiny_data, tmp_path):
    """Guards the log of a run without clipping: the norm that a clip beyond all norms finds, and weights that do not see it."""
    run(tiny_data, tmp_path / "a", "--log_interval=4")
    run(tiny_data, tmp_path / "b", "--grad_clip=1e9")
    norms = {record["step"]: record["grad_norm"] for record in records(tmp_path / "b", "train")}
    assert {record["step"]: record["grad_norm"] for record in records(tmp_path / "a", "train")} == {4: norms[4], 6: norms[6]}
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run(tiny_data, tmp_path / "c", "--lr_decay_iters=3", "--min_lr=0")
    assert all(record["grad_norm"] > 0 for record in records(tmp_path / "c", "train")), "of steps at a rate of 0 as well"


class SmallMemory(DecoderOnly):
    """Runs out of memory beyond `limit` sequences, halfway through: it has collected something by then."""

    def __init__(self, limit: int):
        super().__init__(DecoderOnlyConfig(n_layer=1, n_embd=16, block_size=12))
        self.limit, self.calls = limit, []
        self.register_buffer("collected", torch.zeros((), dtype=torch.int64))

    def forward(self, idx, targets=None):
        self.calls.append(len(idx))
        if self.training:
            self.collected += len(idx)
        # the last call of a step fails too, when gradients of others are there
        if len(idx) > self.limit and self.calls.count(len(idx)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(idx, targets)


def test_out_of_memory_repeats_the_step(tiny_data, capsys):
    """Guards `auto`: a step that fails in its second micro-batch is repeated at half the size and leaves no other trace."""
    torch.manual_seed(0)
    small = SmallMemory(limit=5).double()
    torch.manual_seed(0)
    plain = SmallMemory(limit=99).double()
    settings = dict(batch_size=8, gradient_accumulation_steps=3)
    careful = make_trainer(tiny_data, small, micro_batch_size="auto", **settings)
    reference = make_trainer(tiny_data, plain, micro_batch_size=4, **settings)
    for step in range(3):
        assert abs(careful.update()["total"] - reference.update()["total"]) < 1e-15
        assert careful.step == step + 1 and small.collected == plain.collected == 24 * (step + 1)
    assert small.calls == [8, 8] + plain.calls and plain.calls == [4] * 18
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), plain.parameters()))
    assert capsys.readouterr().out.count("out of memory in step 0: again with micro_batch_size=4") == 1
    with pytest.raises(torch.OutOfMemoryError):  # nobody asked for another size than this
        make_trainer(tiny_data, SmallMemory(limit=5).double(), micro_batch_size=8, **settings).update()
    with pytest.raises(torch.OutOfMemoryError):  # not one sequence: there is no end to halving
        make_trainer(tiny_data, SmallMemory(limit=0).double(), micro_batch_size="auto", **settings).update()


def test_out_of_memory_is_a_setting_to_change(tiny_data, tmp_path, monkeypatch, capsys):
    """Guards a traceback for a batch that is too large."""

    def gradients(self, size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB.")

    monkeypatch.setattr(Trainer, "gradients", gradients)
    for flags, advice in (
        ("--micro_batch_size=2", "; compute fewer sequences at a time, --micro_batch_size=N or auto (it is 2), or keep less of them"),
        ("--micro_batch_size=1", "; keep less of them, --activation_checkpointing, or take a smaller model"),
        ("--micro_batch_size=1 --activation_checkpointing", "; take a smaller model or block_size"),
    ):
        code, line = complaint(train, arguments(tiny_data, tmp_path / "run", "--overwrite", *flags.split()), capsys)
        assert code == 2 and "CUDA out of memory" + advice in line


def test_probe(tiny_data, monkeypatch):
    """
    Guards the search for a size: divisors from the whole step down, and afterwards model and gradients are as before. Of several
    processes all take what fits in the fullest.
    """
    torch.manual_seed(0)
    model = SmallMemory(limit=6).double()
    model.calls = [24, 12, 6, 3]  # so that the first call of a size fails already
    trainer = make_trainer(tiny_data, model, batch_size=8, gradient_accumulation_steps=3, micro_batch_size="auto")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.find_micro_batch_size()
    assert model.calls[4:] == [24, 12, 6] and trainer.micro_batch_size == 6
    assert same(before, model.state_dict()) and not gradients(model) and not trainer.optimizer.state
    trainer.sequences = 50
    assert [trainer.smaller(size) for size in (50, 25, 10, 5, 2)] == [25, 10, 5, 2, 1]
    for theirs, taken in ((3.0, 3), (12.0, 6)):
        both = lambda machine, mine, theirs=theirs: mine + torch.tensor([0.0, theirs])  # noqa: E731
        monkeypatch.setattr(runtime.Runtime, "sum_over_processes", both)
        shared = make_trainer(tiny_data, model, 2, 0, batch_size=8, gradient_accumulation_steps=3, micro_batch_size="auto")
        shared.find_micro_batch_size()
        assert shared.micro_batch_size == taken


def test_micro_batch_size_through_the_front_door(tiny_data, tmp_path, capsys, monkeypatch, reference):
    """Guards the setting: the default size gives the run without it bit for bit; `auto` says its size and is resumed with it."""
    run(tiny_data, tmp_path / "same", *REFERENCE, "--micro_batch_size=4")
    assert same(weights(tmp_path / "same"), weights(reference))
    out = tmp_path / "auto"
    run(tiny_data, out, *REFERENCE, "--micro_batch_size=auto", "--max_iters=3", "--lr_decay_iters=6")
    assert "micro_batch_size=auto: 4 of the 8 sequences" in capsys.readouterr().out
    state = checkpoint.read_json(out / "last" / "trainer.json")
    assert state["micro_batch_size"] == 4
    checkpoint.write_json(out / "last" / "trainer.json", state | {"micro_batch_size": 2})  # as if it had been halved
    checkpointed = []
    monkeypatch.setattr(runtime, "checkpoint_activations", lambda model, kinds: checkpointed.append(kinds))
    run(tiny_data, out, *REFERENCE, "--micro_batch_size=auto", "--lr_decay_iters=6", "--resume", "--activation_checkpointing")
    assert checkpointed == [(Block, DecoderBlock)]
    assert "micro_batch_size=auto: 2 of the 8 sequences" in capsys.readouterr().out
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        TrainConfig(micro_batch_size=0)
    machine = runtime.Runtime(torch.device("cpu"), torch.float32, False, "", rank=0, world_size=2)
    with pytest.raises(ValueError, match="the 15 sequences of a step cannot be shared by 2 processes"):
        config = TrainConfig(batch_size=5, gradient_accumulation_steps=3, micro_batch_size=1)
        Trainer(config, make_model("decoder_only", {}), None, machine)


def latent_model(name: str) -> torch.nn.Module:
    if name == "autoencoder":
        config = checkpoint.CONFIGS[name](block_size=16, n_embd=16, n_head=2, latent_dim=8, codebook_size=4, dropout=0.2)
    elif name == "latent_transformer":
        config = checkpoint.CONFIGS[name](
            block_size=16, target_size=8, n_embd=16, n_head=2, n_layer=1, n_decoder_layer=1, latent_factor=4, latent_dim=8,
            codebook_size=4, dropout=0.2,
        )  # fmt: skip
    else:
        config = checkpoint.CONFIGS[name](
            block_size=16, n_embd=16, n_head=2, n_cross_head=2, latent_factor=4, latent_dim=8, codebook_size=4, dropout=0.2,
            position="rope", window=5,
        )  # fmt: skip
    torch.manual_seed(0)
    return checkpoint.build(name, config).double().train()


@pytest.mark.parametrize("name", ["encoder_decoder", "autoencoder", "latent_transformer"])
def test_activation_checkpointing_changes_nothing(name):
    """Guards recomputation: the same gradients with dropout, and statistics of the quantizer that are collected once."""
    torch.manual_seed(1)
    idx, found, blocks = torch.randint(256, (3, 16)), [], []
    for recompute in (False, True):
        model = latent_model(name)
        if recompute:
            runtime.checkpoint_activations(model, (Block, DecoderBlock))
        calls = []
        for block in model.modules():
            if isinstance(block, (Block, DecoderBlock)):
                block.ln_1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(2)
        model(idx, idx)[1]["total"].backward()
        blocks.append(len(calls))
        found.append((gradients(model), dict(model.named_buffers())))
        model.eval()
        with torch.no_grad():
            found[-1] += (model(idx, idx)[1]["total"],)
    (grads, buffers, loss), (others, theirs, same_loss) = found
    assert blocks[1] == 2 * blocks[0] > 0, "nothing was computed again"
    assert len(grads) == len(others) and all((a - b).abs().max() < 1e-12 for a, b in zip(grads, others))
    assert same(buffers, theirs) and any(value.count_nonzero() for key, value in buffers.items() if "pending_count" in key)
    assert torch.equal(loss, same_loss)


@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only"])
def test_activation_checkpointing_compiles(name):
    """Guards torch.compile: one graph, and the eager gradients."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    idx, found = torch.randint(31, (2, 12)), []
    for compiled in (False, True):
        model = make_model(name, {}).train()
        if compiled:
            runtime.checkpoint_activations(model, (Block, DecoderBlock))
        call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
        call(idx, idx)[1]["total"].backward()
        found.append(gradients(model))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found))
