"""
What a run leaves in its directory while it trains: a line of metrics.jsonl for each step that is logged and each evaluation, the
checkpoints last/ and best/, and its state, which trainer.json keeps for --resume.
"""

import json
import math
import shutil
import time
from pathlib import Path

import checkpoint
import runtime
import tokenizer
from trainer import TrainConfig, Trainer


class Recorder:
    """
    The record of one run, in `out`. In `state`, `seconds` is everything since the start and `train_seconds` only the updates; both go
    on in a resumed run.
    """

    def __init__(self, trainer: Trainer, out: Path):
        self.trainer, self.config, self.machine, self.out = trainer, trainer.config, trainer.machine, out
        self.tokens_per_step = trainer.sequences * trainer.data.block_size  # of pairs padding counts: it is computed, too
        self.wandb, self.dtype = None, str(trainer.machine.dtype).removeprefix("torch.")
        self.state = {
            "best_val_loss": None, "best_step": 0, "no_better": 0, "evaluated": None, "seconds": 0.0,
            "train_seconds": 0.0, "wandb_id": None, "data_hash": trainer.data.both_hash, "micro_batch_size": None, "lanes": 1,
            "decay_ends": [], "dtype": None, "best_has_codes": None,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------------------------
    # its first moment

    def begin(self, settings: dict, codes_run: Path | None) -> None:
        """
        Make the run directory, or go on with the one there, and settle what a run decides only once. `settings` become
        config.json. codes_run, for a model over learned codes, is the autoencoder's run directory, where the codes of the data are kept.
        Raises FileExistsError, FileNotFoundError or ValueError for what is wrong with the directory, ValueError for wandb; the
        directory is then as it was.
        """
        config, trainer, machine, model, out = self.config, self.trainer, self.machine, self.trainer.raw_model, self.out
        resumed = checkpoint.state_to_resume(settings, trainer.data.both_hash, out) if config.resume else None
        machine.barrier()  # everybody has read before anybody writes
        if machine.is_main and not resumed:
            checkpoint.check_free(out, config.overwrite)
        if codes_run is not None:  # may take long, so that it comes before there is a run to resume
            trainer.train_data = model.training_data(trainer.data, codes_run / "codes")
        if machine.is_main and config.wandb != "off":  # before anything is deleted: it may fail
            self.wandb = open_wandb(config, settings, out, (resumed or {}).get("wandb_id"))
        if resumed:
            self.resume(settings, resumed)
        elif machine.is_main:
            checkpoint.start_run(settings, trainer.data.folder, out)
            if codes_run is not None:
                checkpoint.copy_autoencoder(codes_run, out, model.autoencoder)
        if self.wandb:  # a run that goes on without wandb keeps the id for later
            self.state["wandb_id"] = self.wandb.id
        self.state["lanes"], self.state["dtype"] = trainer.lanes.count, self.dtype
        if config.micro_batch_size == "auto":
            if self.state["micro_batch_size"] is not None:  # what the run found before it was stopped: then it goes on bit for bit
                trainer.micro_batch_size = self.state["micro_batch_size"]
            elif machine.device.type == "cuda":
                trainer.find_micro_batch_size()
            machine.say(f"micro_batch_size=auto: {trainer.micro_batch_size} of the {trainer.sequences} sequences of a step at once")
        self.clock = time.perf_counter()

    def resume(self, settings: dict, resumed: dict) -> None:
        """Take weights, optimizer and state from the checkpoint last/, whose trainer.json is `resumed`."""
        trainer, out, folder = self.trainer, self.out, checkpoint.find(self.out, "last")
        checkpoint.load_weights(trainer.raw_model, folder)
        checkpoint.load_optimizer(trainer.raw_model, trainer.optimizer, folder)
        trainer.scaler.load_state_dict(resumed["scaler"])
        if self.machine.is_main:  # only now: nothing was wrong with the checkpoint
            checkpoint.write_json(out / "config.json", settings)
            checkpoint.end_last_line(out / "metrics.jsonl")
            if not (out / tokenizer.FILE_NAME).exists():
                shutil.copyfile(trainer.data.folder / tokenizer.FILE_NAME, out / tokenizer.FILE_NAME)
        trainer.step = resumed["step"]
        self.state = {key: resumed.get(key, value) for key, value in self.state.items()}  # older runs have not all of them
        if self.config.lanes is None and not trainer.no_lanes_because():  # whatever the number of threads is now
            trainer.lanes = runtime.Lanes(self.state["lanes"])
        self.machine.say(f"resuming {out} at step {trainer.step}")
        if (was := self.state["dtype"]) not in (None, self.dtype):
            self.machine.say(f"note: until here it was trained in {was}, from now on in {self.dtype}, which is this machine's choice")

    # ------------------------------------------------------------------------------------------------------------------
    # while it trains

    def lap(self, training: bool) -> None:
        """Add the time since the last lap to `seconds` and, if it was spent training, to `train_seconds`."""
        before, self.clock = self.clock, time.perf_counter()
        self.state["seconds"] += self.clock - before
        self.state["train_seconds"] += (self.clock - before) * training

    def log(self, kind: str, values: dict) -> None:
        """Write a line of metrics.jsonl, of kind `train` or `eval`, and send the same to Weights & Biases."""
        if not self.machine.is_main:
            return
        step, tokens = self.trainer.step, self.trainer.step * self.tokens_per_step
        line = {"step": step, "tokens": tokens, "kind": kind, **values}
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({key: value if is_finite(value) else None for key, value in line.items()}) + "\n")
        if self.wandb:
            self.wandb.log({f"{kind}/{key}": value for key, value in {"tokens": tokens, **values}.items()}, step)

    def save_last(self) -> None:
        """Write last/, from which the run goes on."""
        if self.machine.is_main:
            trainer = self.trainer
            if self.config.micro_batch_size == "auto":
                self.state["micro_batch_size"] = trainer.micro_batch_size
            trainer_state = {"step": trainer.step, "scaler": trainer.scaler.state_dict(), **self.state}
            checkpoint.save(self.out / "last", trainer.raw_model, trainer.optimizer, trainer_state)

    def save(self, val_loss: float, codes_of_data: bool) -> None:
        """After an evaluation: write best/, if the loss is the lowest so far, and last/. Patience counts it only with codes of data."""
        self.state["evaluated"] = self.trainer.step
        self.state["no_better"] += codes_of_data
        worth_nothing = codes_of_data and self.state["best_has_codes"] is False  # however low its loss
        if self.state["best_val_loss"] is None or val_loss < self.state["best_val_loss"] or worth_nothing:
            self.state.update(best_val_loss=val_loss, best_step=self.trainer.step, best_has_codes=codes_of_data, no_better=0)
            if self.machine.is_main:
                checkpoint.save(self.out / "best", self.trainer.raw_model, None, {"step": self.trainer.step, **self.state})
        self.save_last()

    def note_decay(self) -> None:
        """Remember the step at which the learning rate is lowest, and say so where a resumed run moves it."""
        ends, end = self.state["decay_ends"], self.config.decay_end
        if ends[-1:] == [end]:
            return
        if ends:
            self.machine.say(
                f"note: the learning rate decays until step {end} from now on, until here it was {ends[-1]}: not the run that it "
                "would have been in one piece; give --lr_decay_iters from the start to go on later"
            )
        ends.append(end)

    def finish(self, summary: dict) -> None:
        """Write summary.json."""
        if self.machine.is_main:
            checkpoint.write_json(self.out / "summary.json", summary)
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()


def open_wandb(config: TrainConfig, settings: dict, out: Path, run_id: str | None):
    """A Weights & Biases run. Raises ValueError where there can be none."""
    try:
        import wandb
    except ImportError:
        raise ValueError(f"wandb={config.wandb}, but wandb is not installed: pip install wandb, or leave --wandb=off") from None
    name, new = config.wandb_run_name or out.name, not (out / "wandb").exists()
    try:
        return wandb.init(
            project=config.wandb_project, name=name, config=settings, mode=config.wandb, dir=str(out), id=run_id, resume="allow"
        )
    except wandb.Error as error:  # not logged in, or no network
        if new:
            shutil.rmtree(out / "wandb", ignore_errors=True)
        raise ValueError(f"wandb={config.wandb}: {error}; run `wandb login`, or use --wandb=offline") from None


def is_finite(value: object) -> bool:
    """False for the numbers that JSON does not know: the norm of a float16 gradient that overflowed."""
    return not isinstance(value, float) or math.isfinite(value)
