"""
The parts of training: its settings, what a step does, how large a micro-batch fits, and what is evaluated on the way. train.py puts
them into a loop.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
import dataloader
import padding
import runtime
from model import require, warn_ignored
from validation import mean_loss


@dataclass(frozen=True)
class TrainConfig:
    # what to train on what
    model: str = "encoder_decoder"  # a name in the registry of checkpoint.py
    dataset: str = "stdlib"  # data/<dataset>/, or a path to a folder with train.bin, val.bin and meta.json
    out_dir: str | None = None  # run directory; none: out/ and the config file's path below config/, or without one the model's name
    resume: bool = False  # go on from out_dir/last, with the settings that the run has
    overwrite: bool = False  # start again although out_dir holds a run
    init_from: str | None = None  # start from the weights of another run directory, or of a nanoGPT ckpt.pt
    seed: int = 1337  # of the weights, the order of the data, and dropout
    # length and batch
    max_iters: int = 2000  # optimizer steps
    batch_size: int = 16  # sequences; this many times gradient_accumulation_steps are a step, over all processes together
    gradient_accumulation_steps: int = 1  # see batch_size
    # AdamW and its schedule
    learning_rate: float = 2e-3  # after warm-up
    min_lr: float | None = None  # at lr_decay_iters and after; none: learning_rate / 10
    warmup_iters: int = 100  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the cosine ends; none: max_iters
    decay_lr: bool = True  # false: constant after warm-up
    weight_decay: float = 0.1  # on tensors with two or more dimensions
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.95  # decay of AdamW's second moment
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    # evaluation and logging
    eval_interval: int = 250  # steps between evaluations; each writes last/, and best/ where the loss is lowest, the first at step 0
    eval_iters: int = 20  # batches of an evaluation: the same windows every time, and in every run that evaluates as many sequences
    patience: int | None = None  # end the run after this many evaluations in a row without a lower val_loss; best/ has the lowest
    final_eval_tokens: int | None = None  # tokens judged at the end; none: all
    log_interval: int = 10  # steps between progress lines
    eval_sample_tokens: int = 0  # length of a sample printed at evaluations; 0: none
    eval_sample_prompt: str | None = None  # what that sample begins with; none: a line end, or of pairs the first question
    wandb: Literal["off", "online", "offline"] = "off"  # log to Weights & Biases as well
    wandb_project: str = "encoder-decoder-lm"  # project there
    wandb_run_name: str | None = None  # name there; none: the name of out_dir
    # machine
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of products; auto: bfloat16 if the device has it
    compile: Literal["auto", "on", "off", "graphs"] = "auto"  # torch.compile; auto: on a GPU; graphs: to CUDA graphs, for small models
    micro_batch_size: int | Literal["auto"] | None = None  # sequences at a time; none: batch_size; auto: what a GPU holds
    lanes: int | None = None  # parts of a micro-batch at once on a CPU, each on its share of threads; none: as many as pay
    activation_checkpointing: bool = False  # compute blocks again for their gradients: slower, with far less memory

    def __post_init__(self):
        configurator.check_given(self, "model", "dataset", "out_dir", "init_from", "wandb_project", "wandb_run_name")
        counts = ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval", "final_eval_tokens")
        configurator.at_least_one(self, *counts, "lanes", "patience")
        require(
            self.micro_batch_size in (None, "auto") or self.micro_batch_size >= 1,
            f"micro_batch_size={self.micro_batch_size}: at least 1 is needed, or none, or auto",
        )
        for key in ("max_iters", "warmup_iters", "weight_decay", "grad_clip", "eval_sample_tokens", "seed"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must not be negative")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")
        require(
            0 <= self.lowest_lr <= self.learning_rate,
            f"min_lr={self.min_lr} must lie between 0 and learning_rate={self.learning_rate}",
        )
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"{key}={getattr(self, key)} must lie in [0, 1)")
        require(
            self.lr_decay_iters is None or self.lr_decay_iters > self.warmup_iters,
            f"lr_decay_iters={self.lr_decay_iters} must be beyond warmup_iters={self.warmup_iters}",
        )
        require(not (self.resume and self.overwrite), "resume and overwrite exclude each other: choose one")
        if not self.decay_lr:
            warn_ignored(self, ("min_lr", "lr_decay_iters"), "decay_lr=false")

    @property
    def lowest_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def decay_end(self) -> int | None:
        """Step at which the cosine ends; None where the rate stays as it is after warm-up."""
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        return end if self.decay_lr else None


LANE_TOKENS = 512  # of a lane, at least: with fewer, Python, which serves one lane at a time, would hold them up
LANE_GRADIENTS = 2**28  # that all lanes hold together, at most: 1 GiB in float32


# ----------------------------------------------------------------------------------------------------------------------
# the parts of a step


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then a cosine from learning_rate to lowest_lr, then constant."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if (end := config.decay_end) is None:
        return config.learning_rate
    if step > end:
        return config.lowest_lr
    progress = (step - config.warmup_iters) / max(1, end - config.warmup_iters)
    return config.lowest_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.lowest_lr)


def make_optimizer(model: torch.nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """
    AdamW that decays matrices and embeddings but no gains and biases; fused where torch has such a kernel. What a model names
    as its backbone, which has a learning rate of its own, is in groups of its own.
    """
    backbone = {p for _, p in model.named_backbone_parameters()} if hasattr(model, "named_backbone_parameters") else set()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.dim() >= 2) == decayed and (p in backbone) == own_rate],
         "weight_decay": config.weight_decay if decayed else 0.0, "backbone": own_rate}
        for own_rate in ((False, True) if backbone else (False,))
        for decayed in (True, False)
    ]  # fmt: skip
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=device.type in ("cuda", "cpu"))


def compiled(model: torch.nn.Module, machine: runtime.Runtime, recomputes: bool = False) -> torch.nn.Module:
    """
    model(idx, targets) for training and evaluation, compiled for this machine; on a GPU in half precision at padded widths
    (padding.py). Not padded if it recomputes activations: where torch.compile falls back, that happens in the backward pass, when the
    unpadded parameters are back in their places.
    """
    half = machine.dtype in (torch.bfloat16, torch.float16)
    if machine.device.type == "cuda" and half and not recomputes and padding.suits(model):
        model = padding.Padded(model)
    # dynamic=False: another number of sequences compiles once more instead of to slower code
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if machine.graphs else None)


def exchanging(model: torch.nn.Module, machine: runtime.Runtime) -> DistributedDataParallel:
    """The model with its gradients averaged over all processes. Buffers stay as they are: those of codebooks are summed by step()."""
    if machine.compile:
        # one graph instead of one for each bucket of gradients: they are exchanged once a step, so there is little to hide in backward
        torch._dynamo.config.optimize_ddp = False
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # where the other warns
    sync = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[machine.device.index] if machine.device.type == "cuda" else None, **sync)


def own_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """
    Zeros for parameters without a gradient. CUDA graphs write the gradients of every micro-batch to the same memory; a sum that
    began there would be overwritten.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def lanes_that_pay(model: torch.nn.Module, sequences: int) -> int:
    """Lanes for a micro-batch of so many sequences on this CPU: all with equally many of them and of torch's threads."""
    threads, tokens, size = torch.get_num_threads(), sequences * model.config.block_size, sum(p.numel() for p in model.parameters())
    most = min(threads, sequences, tokens // LANE_TOKENS, LANE_GRADIENTS // size)
    return max([n for n in range(2, most + 1) if threads % n == 0 and sequences % n == 0], default=1)


class Trainer:
    """
    A model, its optimizer and the data they see. `step` counts finished updates. raw_model is the model as it was built, model the
    same compiled, train_model that with gradients exchanged between processes. train_data is what update() draws from: `data`, unless
    a model puts something else made of it there.
    """

    def __init__(self, config: TrainConfig, raw_model: torch.nn.Module, data: dataloader.TokenData, machine: runtime.Runtime):
        self.sequences = config.batch_size * config.gradient_accumulation_steps  # of a step
        if config.micro_batch_size is None and config.gradient_accumulation_steps % machine.world_size:
            raise ValueError(
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared by {machine.world_size} "
                f"processes; choose a multiple of {machine.world_size} (and a smaller batch_size to keep the tokens per step)"
            )
        if self.sequences % machine.world_size:
            raise ValueError(
                f"the {self.sequences} sequences of a step cannot be shared by {machine.world_size} processes; choose a "
                f"batch_size or gradient_accumulation_steps that is a multiple of {machine.world_size}"
            )
        require(
            not machine.graphs or (raw_model.side_by_side and config.micro_batch_size != "auto"),
            f"compile=graphs is not possible with model={config.model} and micro_batch_size={config.micro_batch_size}: it needs a model "
            f"without codes, and keeps the memory of every size it tries; use compile=on, or a number as micro_batch_size",
        )
        self.micro_batch_size = config.batch_size if config.micro_batch_size in (None, "auto") else config.micro_batch_size
        self.config, self.raw_model, self.data, self.machine = config, raw_model, data, machine
        self.train_data = data
        self.optimizer = make_optimizer(raw_model, config, machine.device)
        # float16 gradients underflow unless the loss is scaled up; for all other types this does nothing
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.model = compiled(raw_model, machine, config.activation_checkpointing) if machine.compile else raw_model
        self.train_model = exchanging(self.model, machine) if machine.world_size > 1 else self.model
        self.parameters = [p for p in raw_model.parameters() if p.requires_grad]
        self.lanes = runtime.Lanes(self.lane_count())
        self.drop_gradients()
        self.step = 0
        self.ahead = (None, None)  # a micro-batch loaded before it is needed: which one, and its tokens

    def no_lanes_because(self) -> list[str]:
        """What forbids lanes, in words; empty where they are possible."""
        config, machine, model = self.config, self.machine, self.raw_model
        reasons = {
            f"the device is {machine.device.type}": machine.device.type != "cpu",
            "several processes share the work": machine.world_size > 1,
            f"dtype={config.dtype} scales the loss": self.scaler.is_enabled(),
            "torch.compile is on, which is not safe in several threads": machine.compile,
            f"dropout={model.config.dropout}, and its masks are drawn one after the other": model.config.dropout > 0.0,
            f"{config.model} draws random numbers or collects statistics in training": not model.side_by_side,
        }
        return [reason for reason, true in reasons.items() if true]

    def lane_count(self) -> int:
        """config.lanes, or as many as pay. Raises ValueError for lanes where there can be none."""
        lanes, why_not = self.config.lanes, self.no_lanes_because()
        if lanes is None:
            return 1 if why_not else lanes_that_pay(self.raw_model, self.micro_batch_size)
        require(lanes == 1 or not why_not, f"lanes={lanes} is not possible: {'; '.join(why_not)}; use lanes=none")
        return min(lanes, self.micro_batch_size)

    def to_device(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.machine.device.type == "cuda":  # from pinned memory the copy overlaps with what the GPU is doing
            return tuple(t.pin_memory().to(self.machine.device, non_blocking=True) for t in (x, y))
        return x.to(self.machine.device), y.to(self.machine.device)

    def micro_batches(self, size: int) -> list[tuple[int, int, int]]:
        """
        (number in the step, first sequence, sequences) of each micro-batch of this process: rounds in which every process takes
        `size` sequences, the last one shared evenly where it is smaller.
        """
        world, found, first = self.machine.world_size, [], 0
        while first < self.sequences:
            count = min(size, (self.sequences - first) // world)
            found.append((len(found) * world + self.machine.rank, first + self.machine.rank * count, count))
            first += world * count
        return found

    def load_micro_batch(self, step: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.ahead[0] == (step, first, count):
            return self.ahead[1]
        starts = self.train_data.batch_starts(self.config.seed, step, self.sequences)
        return self.to_device(*self.train_data.gather("train", starts[first : first + count]))

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.machine.autocast():
            return self.train_model(x, y)[1]

    def gradients(self, size: int) -> dict[str, torch.Tensor]:
        """Gradients of the next step, in micro-batches of `size` sequences. Returns the losses as update() does."""
        config, machine = self.config, self.machine
        mine = self.micro_batches(size)
        targets = self.train_data.target_counts(self.train_data.batch_starts(config.seed, self.step, self.sequences))
        every = targets.sum()
        sums: dict[str, torch.Tensor] = {}
        self.train_model.train()
        for i, (number, first, count) in enumerate(mine):
            x, y = self.load_micro_batch(self.step, first, count)
            runtime.seed_everything(config.seed, self.step, number)
            if machine.world_size > 1:  # exchange gradients once a step, not once a micro-batch
                self.train_model.require_backward_grad_sync = i == len(mine) - 1
            # weighted by its share of the step's targets, a micro-batch's mean loss makes every target of the step count the same; times
            # world_size, because DDP averages gradients over processes. Losses that are not means over targets get the same weights:
            # exact where all sequences have equally many targets; on pairs they depend a little on the micro-batches.
            lanes, here = min(self.lanes.count, count), targets[first : first + count]
            shares = [float(part.sum() / every) for part in np.array_split(here, lanes)]
            if lanes == 1:
                found = [self.losses(x, y)]
                self.scaler.scale(found[0]["total"] * (shares[0] * machine.world_size)).backward()
            else:
                parts = list(zip(x.tensor_split(lanes), y.tensor_split(lanes)))
                found = self.lanes.backward(self.losses, parts, shares, self.parameters)
            for losses, share in zip(found, shares):
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss.detach() * share
            # the device still works on all that; meanwhile the host loads what comes next
            upcoming = (self.step, *mine[i + 1][1:]) if i + 1 < len(mine) else (self.step + 1, *mine[0][1:])
            self.ahead = (upcoming, self.load_micro_batch(*upcoming))
        return sums

    def drop_gradients(self) -> None:
        """Begin the sum of a new step."""
        self.optimizer.zero_grad(set_to_none=not self.machine.graphs)
        if self.machine.graphs:
            own_gradients(self.parameters)

    def is_logged(self, step: int) -> bool:
        return step % self.config.log_interval == 0 or step == self.config.max_iters

    def update(self) -> dict[str, torch.Tensor]:
        """
        One optimizer step. Returns the losses by name, each this process's share of the mean over the step; and, where it is known
        or will be logged, the norm of the gradient before it was clipped.
        """
        config, machine = self.config, self.machine
        rate = learning_rate(config, self.step)
        moving = []  # all parameters but those of a frozen backbone
        for group in self.optimizer.param_groups:
            share = self.raw_model.backbone_rate(self.step) if group["backbone"] else 1.0
            group["lr"] = rate * share
            moving += group["params"] if share > 0 else []
        with self.lanes.shared_threads():
            if config.micro_batch_size == "auto" and machine.world_size == 1:  # several would have to repeat it together
                while (sums := self.if_it_fits(self.gradients, self.micro_batch_size)) is None:
                    self.micro_batch_size = self.smaller(self.micro_batch_size)
                    machine.say(f"note: out of memory in step {self.step}: again with micro_batch_size={self.micro_batch_size}")
            else:
                sums = self.gradients(self.micro_batch_size)
            if config.grad_clip > 0 or self.is_logged(self.step + 1):
                self.scaler.unscale_(self.optimizer)
                sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(moving, config.grad_clip or math.inf) / machine.world_size
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.drop_gradients()
        if hasattr(self.raw_model, "after_step"):
            self.raw_model.after_step()
        self.step += 1
        return sums

    # ------------------------------------------------------------------------------------------------------------------
    # micro-batches as large as memory allows

    def if_it_fits(self, work: Callable[[int], dict], size: int) -> dict | None:
        """work(size), or None if it ran out of memory: then nothing has changed, neither gradients nor collected statistics."""
        before = [buffer.clone() for buffer in self.raw_model.buffers()]
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # behind the except clause, because the exception holds all that the failed pass had allocated
        self.ahead = (None, None)
        self.forget(before)
        return None

    @torch.no_grad()
    def forget(self, buffers: list[torch.Tensor]) -> None:
        """Drop the gradients and give the model back its buffers as they were."""
        self.drop_gradients()
        for buffer, value in zip(self.raw_model.buffers(), buffers):
            buffer.copy_(value)
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # what did not fit, or was only tried, is no peak of the run

    def smaller(self, size: int) -> int:
        """The largest divisor of this process's share of a step that is at most half of `size`: equal shapes compile once."""
        share = self.sequences // self.machine.world_size
        return max(n for n in range(1, max(size // 2, 1) + 1) if share % n == 0)

    def probe(self, size: int) -> dict[str, torch.Tensor]:
        """
        Forward and backward of the first `size` sequences that will be trained on, with memory set aside for what a real step also
        holds: summed gradients, the optimizer's moments, buffers of the exchange. Not compiled, as every size would be once more.
        """
        copies = 1 + (0 if self.optimizer.state else 2) + (self.machine.world_size > 1)
        reserved = [torch.empty_like(p) for p in self.parameters for _ in range(copies)]
        runtime.seed_everything(self.config.seed)
        x, y = self.load_micro_batch(self.step, 0, size)
        self.raw_model.train()
        with self.machine.autocast():
            _, losses = self.raw_model(x, y)
        self.scaler.scale(losses["total"]).backward()
        del reserved
        return losses

    def find_micro_batch_size(self) -> None:
        """Set micro_batch_size to the first that fits, halved from the whole step down; all processes take the smallest found."""
        size = self.sequences // self.machine.world_size
        before = [buffer.clone() for buffer in self.raw_model.buffers()]
        while self.if_it_fits(self.probe, size) is None:
            size = self.smaller(size)
        self.forget(before)
        sizes = torch.zeros(self.machine.world_size)
        sizes[self.machine.rank] = size
        self.micro_batch_size = int(self.machine.sum_over_processes(sizes).min())

    # ------------------------------------------------------------------------------------------------------------------
    # evaluation: its own windows, no dropout, no random numbers, so that it leaves no trace in the run

    @property
    def rows_that_fit(self) -> int:
        """Sequences at a time for what may need more memory than training: batch_size, or micro_batch_size if that is less."""
        return min(self.config.batch_size, self.micro_batch_size)

    def eval_batches(self, split: str, most: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's share of the fixed evaluation windows of a split, at most `most` at a time; none: as many as in training."""
        config, machine = self.config, self.machine
        starts = self.data.eval_starts(split, config.batch_size * config.eval_iters)
        # a micro-batch of a model over codes is one of codes, not of the text that it is evaluated on
        most = most or (self.micro_batch_size if self.train_data is self.data else self.rows_that_fit)
        most = min(most, -(-len(starts) // machine.world_size))
        rows = max(n for n in range(1, most + 1) if len(starts) % n == 0)
        rows = rows if 2 * rows > most else most  # batches of one shape compile once, but not where they would be small
        for first in range(machine.rank * rows, len(starts), machine.world_size * rows):
            yield self.to_device(*self.data.gather(split, starts[first : first + rows]))

    def estimates(self) -> dict[str, float]:
        """train_loss and val_loss over the evaluation windows, and what there is to say of an embedding loss."""
        found = {f"{split}_loss": mean_loss(self.model, self.eval_batches(split), self.machine)[0] for split in ("train", "val")}
        if getattr(self.raw_model, "embedding_loss", None) is not None:
            x, y = self.to_device(*self.data.gather("train", self.data.eval_starts("train", self.rows_that_fit)))
            with self.machine.autocast():
                found |= self.raw_model.embedding_loss_report(x, y)
        return found
