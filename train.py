"""
Train any model of the project: one loop for all.

    python train.py config/quickstart.py                             # a config file
    python train.py config/stdlib/baseline.py --seed=2               # flags override it
    python train.py config/stdlib/baseline.py --resume               # go on where it stopped, with the same settings
    torchrun --standalone --nproc_per_node=4 train.py config/wikipedia/encdec_mse_possub.py

One *step* is one optimizer update on batch_size * gradient_accumulation_steps sequences of block_size tokens, however many
processes share them. Which sequences those are, and every dropout mask, is a function of (seed, step) alone; that is why
resuming, evaluating more often, or adding processes does not change a run. micro_batch_size, how many sequences are computed at
a time, changes rounding and, because each micro-batch draws its own, the dropout masks. On pairs, whose answers differ in length,
it also changes, a little, the losses that are not means over target tokens: the embedding loss and those of codes. lanes, the
number of parts of a micro-batch that a CPU computes side by side, changes the same things but for dropout, which lanes exclude; the
number is chosen when a run starts, from torch's number of threads at that time, and kept when it is resumed.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
import configurator
import dataloader
import generate
import runtime
import tokenizer
from model import Block, DecoderBlock
from trainer import TrainConfig, Trainer, exact_pairs, learning_rate, whole_file

# ----------------------------------------------------------------------------------------------------------------------
# reporting


def run_dir(config: TrainConfig, config_file: Path | None) -> Path:
    """out_dir, or out/ and the config file's path below config/: config/stdlib/baseline.py -> out/stdlib/baseline."""
    if config.out_dir:
        return Path(config.out_dir)
    if config_file is None:
        return Path("out", config.model)
    folders = config_file.parent.parts
    below = folders[len(folders) - folders[::-1].index("config") :] if "config" in folders else ()
    return Path("out", *below, config_file.stem)


COMMAND_ONLY = {"resume", "overwrite", "out_dir"}  # say what one command does; no settings of a run


def settings_of_run(config_file: Path | None, file_values: dict, flags: dict) -> dict[str, object]:
    """
    The settings that --resume takes from the run: those that were flags when it was started or resumed before, and those that the
    config file does not set. All others are read from the config file again, which may have changed. Empty for a new run. Raises
    ValueError or FileNotFoundError where there is no such run.
    """
    where = (*COMMAND_ONLY, "model")
    from_file, from_flags = ({key: values[key] for key in where if key in values} for values in (file_values, flags))
    config = configurator.resolve(TrainConfig, from_file, from_flags, config_file)
    if not config.resume:
        return {}
    out = run_dir(config, config_file)
    checkpoint.find(out, "last")
    settings, name, model_config = checkpoint.read_config(out)
    first = checkpoint.first_flags(out)
    asked = flags.get("model") or (name if "model" in first else file_values.get("model", name))
    if asked != name:
        raise ValueError(f"{out} is a run of model={name}, not {asked}: leave that out, or name another run")
    stored = configurator.to_dict(configurator.from_dict(TrainConfig, settings)) | configurator.to_dict(model_config)
    return {key: stored[key] for key in stored.keys() - COMMAND_ONLY if key in first or key not in file_values}


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


def git_commit() -> str:
    """Commit of the code, with + when it has uncommitted changes; "unknown" outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=10", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ----------------------------------------------------------------------------------------------------------------------
# what can be wrong with the settings has to show before the run directory is touched


def check_inputs(config: TrainConfig, model: torch.nn.Module, data: dataloader.TokenData, out: Path) -> None:
    """Raise ValueError for what does not go together: a model and its data, or the run directory and what the run reads."""
    if config.eval_sample_tokens and model.reconstructs:
        raise ValueError(f"eval_sample_tokens={config.eval_sample_tokens}: {config.model} continues no text; leave it 0")
    if isinstance(data, dataloader.PairData) and (model.reconstructs or hasattr(model.config, "autoencoder")):
        raise ValueError(
            f"{config.dataset} is a set of pairs, but {config.model} is made for whole texts; choose another model"
        )
    if getattr(model.config, "freeze_codes", False) and not (config.resume or (config.init_from and model.quantizer.initialized)):
        raise ValueError("freeze_codes=true keeps the codes of another run: name one that has learned them, --init_from=RUN")
    if hasattr(model, "check"):
        model.check(data, config.max_iters)
    inputs = {"dataset": data.folder} | {key: getattr(model.config, key, None) for key in ("autoencoder", "backbone")}
    for key, folder in inputs.items():
        if folder is not None and Path(folder).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"out_dir={out} is or holds what the run reads as its {key}, {folder}; write to another folder")


def make_sampler(config: TrainConfig, model: torch.nn.Module, data: dataloader.TokenData) -> Callable[[], str] | None:
    """What writes the sample of an evaluation, None without. Raises ValueError for a prompt or a seed that it cannot begin with."""
    if config.eval_sample_tokens == 0:
        return None
    text, sampling = tokenizer.load(data.folder), generate.Sampling(seed=config.seed)
    prompt = text.encode(config.eval_sample_prompt)
    if isinstance(data, dataloader.PairData):  # a question ends where its answer begins
        prompt.append(data.separator)
    generate.check_prompts(model, [prompt])
    return lambda: text.decode(
        generate.generate(model, [prompt], config.eval_sample_tokens, sampling, text.eos, tokenizer=text)[0]
    )


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def main(argv: list[str] | None = None) -> dict:
    """Train as the command line says; returns the summary that is also written to summary.json."""
    parsed = configurator.configure(
        argv,
        [TrainConfig],
        description=__doc__,
        positional="[CONFIG]",
        choose=("model", checkpoint.CONFIGS),
        stored=settings_of_run,
    )
    config, model_config = parsed.sections
    machine = runtime.start(config.device, config.dtype, config.compile)
    try:
        out = run_dir(config, parsed.config_file)
        with checkpoint.alone_in(out) if machine.is_main else contextlib.nullcontext():
            summary = train(config, model_config, machine, parsed, out)
        machine.barrier()  # gloo's threads abort a process that leaves while another is still connected to it
        return summary
    finally:
        runtime.stop()


def train(config: TrainConfig, model_config, machine: runtime.Runtime, parsed: configurator.Settings, out: Path) -> dict:
    say = print if machine.is_main else (lambda *args, **kwargs: None)
    say(machine.reasons)
    if 0 < config.max_iters < config.warmup_iters and not config.resume:
        if "warmup_iters" in parsed.flags or "max_iters" not in parsed.flags:
            raise ValueError(
                f"warmup_iters={config.warmup_iters} is beyond max_iters={config.max_iters}: the warm-up would never end; lower it"
            )
        # somebody tries a few steps of a long run: that is what they get
        say(f"note: max_iters={config.max_iters} ends the run inside its warm-up of {config.warmup_iters} steps")
    commit = git_commit()  # now: by the end of a long run the checkout may have moved on
    if machine.is_main:
        dataloader.prepare_if_missing(config.dataset)
    machine.barrier()
    autoencoder = None
    if hasattr(model_config, "autoencoder"):  # a model over the codes of a frozen one, which settles all sizes of text and codes
        encoder_run, copy = Path(model_config.autoencoder), out / "autoencoder"
        if config.resume and copy.is_dir() and not checkpoint.has_codebooks(encoder_run, model_config.codebook_hash):
            encoder_run = copy
            say(f"note: {model_config.autoencoder} is gone or has other codebooks by now: the run goes on with its own copy, {copy}")
        autoencoder = checkpoint.load_autoencoder(encoder_run)
        model_config = model_config.fitted_to(autoencoder, parsed.given)
    data = dataloader.open_data(dataloader.resolve(config.dataset), model_config.block_size)
    if autoencoder is not None:
        checkpoint.check_tokenizers(data.folder, encoder_run)
    elif "vocab_size" not in parsed.given:
        model_config = dataclasses.replace(model_config, vocab_size=data.vocab_size)
    if model_config.vocab_size < data.vocab_size:
        raise ValueError(f"vocab_size={model_config.vocab_size} is too small for {config.dataset}: it needs {data.vocab_size}")
    model_config = checkpoint.fit_backbone(model_config, parsed.given)
    config = dataclasses.replace(config, out_dir=str(out))
    if machine.is_main:
        configurator.print_differences(config, model_config)

    runtime.seed_everything(config.seed)
    model = checkpoint.build(config.model, model_config)
    if config.init_from and not config.resume:  # both bring all weights, those of a backbone among them
        checkpoint.init_from(model, Path(config.init_from))
        if Path(config.init_from).suffix != ".pt":
            checkpoint.check_tokenizers(data.folder, config.init_from)
    if getattr(model_config, "backbone", None) and not (config.init_from or config.resume):
        checkpoint.load_backbone(model, model_config)
    check_inputs(config, model, data, out)
    write_sample = make_sampler(config, model, data)
    model.to(device=machine.device, dtype=machine.weight_dtype)
    if autoencoder is not None:
        model.attach(autoencoder)
    if config.activation_checkpointing:
        runtime.checkpoint_activations(model, (Block, DecoderBlock))
    trainer = Trainer(config, model, data, machine)
    flags = (parsed.flags | (checkpoint.first_flags(out) if config.resume else set())) - COMMAND_ONLY
    settings = {"train": configurator.to_dict(config), "model": configurator.to_dict(model_config), "flags": sorted(flags)}
    if isinstance(data, dataloader.PairData):
        settings["separator"] = data.separator  # sample.py has no other way to know that a prompt is a question
    # `seconds` is everything since the start, `train_seconds` only the updates; both go on in a resumed run
    state = {"best_val_loss": None, "best_step": 0, "evaluated": None, "seconds": 0.0, "train_seconds": 0.0, "wandb_id": None}
    state |= {"data_hash": data.both_hash, "micro_batch_size": None, "lanes": 1, "decay_ends": []}
    resumed = checkpoint.read_run(settings, data.both_hash, out) if config.resume else None
    machine.barrier()  # everybody has read before anybody writes
    if machine.is_main and not resumed:
        checkpoint.check_free(out, config.overwrite)
    if hasattr(model, "training_data"):  # may take long, so that it comes before there is a run to resume
        trainer.train_data = model.training_data(data, encoder_run / "codes")
    wandb_run = None
    if machine.is_main and config.wandb != "off":  # before anything is deleted: it may fail
        wandb_run = open_wandb(config, settings, out, (resumed or {}).get("wandb_id"))
    if resumed:
        folder = checkpoint.find(out, "last")
        checkpoint.load_weights(model, folder)
        checkpoint.load_optimizer(model, trainer.optimizer, folder)
        trainer.scaler.load_state_dict(resumed["scaler"])
        if machine.is_main:  # only now: nothing was wrong with the checkpoint
            checkpoint.write_json(out / "config.json", settings)
            checkpoint.end_last_line(out / "metrics.jsonl")
            if not (out / tokenizer.FILE_NAME).exists():
                shutil.copyfile(data.folder / tokenizer.FILE_NAME, out / tokenizer.FILE_NAME)
        trainer.step = resumed["step"]
        state = {key: resumed.get(key, value) for key, value in state.items()}  # older runs have not all of them
        if config.lanes is None and not trainer.no_lanes_because():  # whatever the number of threads is now
            trainer.lanes = runtime.Lanes(state["lanes"])
        say(f"resuming {out} at step {trainer.step}")
    elif machine.is_main:
        checkpoint.start_run(settings, data.folder, out)
        if autoencoder is not None:
            checkpoint.copy_autoencoder(encoder_run, out)

    state["lanes"] = trainer.lanes.count
    if config.micro_batch_size == "auto":
        if state["micro_batch_size"] is not None:  # what the run found before it was stopped: then it goes on bit for bit
            trainer.micro_batch_size = state["micro_batch_size"]
        elif machine.device.type == "cuda":
            trainer.find_micro_batch_size()
        say(f"micro_batch_size=auto: {trainer.micro_batch_size} of the {trainer.sequences} sequences of a step at once")
    tokens_per_step = trainer.sequences * model_config.block_size  # of pairs padding counts: it is computed, too
    say(
        f"{config.model}: {model.get_num_params():,} parameters, {model.flops_per_token() / 1e6:.1f} MFLOP per token; "
        f"{config.dataset}: {len(data.train):,} training and {len(data.val):,} validation tokens; {tokens_per_step:,} tokens a step"
        f"{', padding included' if isinstance(data, dataloader.PairData) else ''}"
        f"{f', in {trainer.lanes.count} lanes' if trainer.lanes.count > 1 else ''}"
    )
    state["wandb_id"] = wandb_run.id if wandb_run else None

    def log(record: dict) -> None:
        if machine.is_main:
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({key: value if is_finite(value) else None for key, value in record.items()}) + "\n")
            if wandb_run:
                kind = record["kind"]
                wandb_run.log(
                    {f"{kind}/{key}": value for key, value in record.items() if key not in ("kind", "step")}, record["step"]
                )

    def save_last() -> None:
        if machine.is_main:
            if config.micro_batch_size == "auto":
                state["micro_batch_size"] = trainer.micro_batch_size
            trainer_state = {"step": trainer.step, "scaler": trainer.scaler.state_dict(), **state}
            checkpoint.save(out / "last", model, trainer.optimizer, trainer_state)

    what = "reconstruction loss" if model.reconstructs else "loss"

    def evaluate() -> dict:
        """Estimate both losses, log, keep the checkpoints. Returns the estimates."""
        record = {"step": trainer.step, "tokens": trainer.step * tokens_per_step, "kind": "eval", **trainer.estimates()}
        stop_if_not_finite(record["val_loss"], trainer.step, out)
        if trainer.step > 0:  # of an untrained model there is nothing to say
            record |= trainer.measure(trainer.eval_batches("val"))
        accuracy = f", accuracy {record['token_accuracy']:.2%}" if "token_accuracy" in record else ""
        say(f"step {trainer.step}: train {what} {record['train_loss']:.4f}, val {what} {record['val_loss']:.4f}{accuracy}")
        log(record)
        if write_sample and machine.is_main:
            say(f"sample: {write_sample()!r}")
        state["evaluated"] = trainer.step
        if state["best_val_loss"] is None or record["val_loss"] < state["best_val_loss"]:
            state.update(best_val_loss=record["val_loss"], best_step=trainer.step)
            if machine.is_main:
                checkpoint.save(out / "best", model, None, {"step": trainer.step, **state})
        save_last()
        return record

    clock = time.perf_counter()

    def lap(training: bool) -> None:
        """Add the time since the last lap to the seconds of the run and, after training, to those of that."""
        nonlocal clock
        before, clock = clock, time.perf_counter()
        state["seconds"] += clock - before
        state["train_seconds"] += (clock - before) * training

    estimates, rate_tokens, logged_at = None, 0, state["train_seconds"]  # the last two for tokens/s, the speed of training alone
    ask_every = 1  # steps: in how many one of several processes looks whether another has been interrupted
    with interruptible() as interrupted:
        while True:
            due = trainer.step % config.eval_interval == 0 or trainer.step >= config.max_iters
            if due and state["evaluated"] != trainer.step:
                machine.wait()
                lap(training=True)
                estimates = evaluate()
                lap(training=False)
            if trainer.step >= config.max_iters:
                break
            stalled = config.patience and trainer.step - state["best_step"] >= config.patience * config.eval_interval
            if stalled and state["evaluated"] == trainer.step:  # and saved
                say(f"patience={config.patience}: no val loss is lower than that of step {state['best_step']}")
                break
            # All processes have to stop at the same step. They ask each other only every few seconds, because all wait for the answer,
            # and that often, because torchrun kills them half a minute after a signal.
            asked = trainer.step % ask_every == 0
            if asked and machine.in_any_process(bool(interrupted)):
                if not all(p.isfinite().all() for p in model.parameters()):
                    stop_if_not_finite(math.nan, trainer.step, out)
                lap(training=True)
                save_last()
                machine.barrier()  # half a minute after one process has left torchrun ends the others, writing or not
                say(f"stopped at step {trainer.step}; {out}/last is saved: --resume --out_dir={shlex.quote(str(out))} goes on")
                raise KeyboardInterrupt
            if state["decay_ends"][-1:] != [config.decay_end]:
                if state["decay_ends"]:
                    say(
                        f"note: the learning rate decays until step {config.decay_end} from now on, until here it was "
                        f"{state['decay_ends'][-1]}: not the run that it would have been in one piece; give --lr_decay_iters from "
                        "the start to go on later"
                    )
                state["decay_ends"].append(config.decay_end)
            sums = trainer.update()
            rate_tokens += tokens_per_step
            if trainer.is_logged(trainer.step):
                values = {name: machine.sum_over_processes(value).item() for name, value in sums.items()}  # waits for the device
                stop_if_not_finite(values["total"], trainer.step, out)
                lap(training=True)
                speed = rate_tokens / (state["train_seconds"] - logged_at)
                logged_at, rate_tokens = state["train_seconds"], 0
                if machine.world_size > 1:
                    speeds = machine.sum_over_processes(torch.tensor(speed)).item() / machine.world_size  # the same for all of them
                    ask_every = max(1, min(config.log_interval, int(5 * speeds / tokens_per_step)))
                rate = learning_rate(config, trainer.step - 1)
                left = (config.max_iters - trainer.step) * tokens_per_step / speed
                named = {"loss": values.pop("total"), **{k if k == "grad_norm" else f"{k}_loss": v for k, v in values.items()}}
                shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in named.items() if key != "token_loss")
                say(
                    f"step {trainer.step}/{config.max_iters}: {shown}, lr {rate:.2e}, {speed:,.0f} tokens/s, "
                    f"{runtime.duration(state['seconds'])} gone, {runtime.duration(left)} to go",
                    flush=True,
                )
                log({"step": trainer.step, "tokens": trainer.step * tokens_per_step, "kind": "train", **named, "lr": rate,
                     "tokens_per_second": speed, "seconds": state["seconds"]})  # fmt: skip

    lap(training=False)
    say(f"evaluating on {'the whole validation file' if config.final_eval_tokens is None else 'part of the validation file'}")
    summary = {"run": out.name, "commit": commit, **summarize(trainer, state, estimates or trainer.estimates())}
    if machine.is_main:
        checkpoint.write_json(out / "summary.json", summary)
    if wandb_run:
        wandb_run.summary.update(summary)
        wandb_run.finish()
    if "exact_pairs" in summary:
        say(f"{summary['exact_pairs']:.2%} of {summary['pairs']:,} unseen pairs answered exactly")
    found = f"{summary['token_accuracy']:.2%} right" if model.reconstructs else f"{summary['val_bits_per_byte']:.4f} bits per byte"
    say(
        f"done: validation {what} {summary['val_loss']:.4f} nats per token, {found} over {summary['val_tokens']:,} tokens; "
        f"{runtime.duration(state['seconds'])}; {out}/summary.json"
    )
    return summary


def summarize(trainer: Trainer, state: dict, estimates: dict) -> dict:
    """What summary.json says of a trained model, the loss on the whole validation file first of all."""
    config, model, data, machine = trainer.config, trainer.raw_model, trainer.data, trainer.machine
    tokens = trainer.step * trainer.sequences * data.block_size
    val_loss, val_tokens = trainer.mean_loss(whole_file(data, machine, config.final_eval_tokens))
    summary = {
        "model": config.model, "dataset": config.dataset,
        "parameters": model.get_num_params(), "flops_per_token": model.flops_per_token(),
        "steps": trainer.step, "tokens": tokens,
        "train_loss": estimates["train_loss"], "val_loss": val_loss, "val_tokens": val_tokens,
        "best_val_loss": state["best_val_loss"], "best_step": state["best_step"], "ended_early": trainer.step < config.max_iters,
        "decay_ends": state["decay_ends"],  # step at which the learning rate is lowest; several: it was resumed with another
        "seconds": state["seconds"], "tokens_per_second": tokens / max(state["train_seconds"], 1e-9),
        "peak_memory_bytes": machine.peak_memory_bytes(), "seed": config.seed,
        "data_hash": data.val_hash, "train_hash": data.meta["train"]["sha256"],  # of the validation and of the training file
        "torch": torch.__version__, "device": device_name(machine), "dtype": str(machine.dtype).removeprefix("torch."),
        "compiled": machine.compile, "world_size": machine.world_size, "lanes": trainer.lanes.count,
    }  # fmt: skip
    if model.reconstructs:  # a loss that no language model's may be compared with
        summary["reconstruction"] = True
    else:
        summary["val_bits_per_byte"] = val_loss / math.log(2) / data.bytes_per_token
    measured = trainer.measure(whole_file(data, machine, config.final_eval_tokens))
    for name in [name for name in measured if name.endswith("bits_per_token")]:
        measured[name.removesuffix("token") + "byte"] = measured[name] / data.bytes_per_token
    summary |= measured
    if measured.get("codes_of_data") is False and machine.is_main:
        warnings.warn(
            "the codebooks were never made of data, so codes mean nothing: k-means waits for many latents a code, and for "
            "quantize_after steps if the model has them; train longer, or lower quantize_after or codebook_size",
            stacklevel=1,
        )
    if "embedding_loss" in estimates:
        summary["embedding_loss"] = estimates["embedding_loss"]
    if isinstance(data, dataloader.PairData) and machine.is_main:
        with machine.autocast():
            summary["exact_pairs"], summary["pairs"] = exact_pairs(model, data)
    return summary


@contextlib.contextmanager
def interruptible():
    """
    Inside, Ctrl-C and SIGTERM (a cluster's warning) do not stop the program between two halves of an update, but append to
    the yielded list, which is to be looked at between steps. A second Ctrl-C stops at once (lanes when they have computed their
    gradients); a second SIGTERM does not: a cluster and torchrun may both send one.
    """
    received: list[int] = []

    def remember(number: int, frame) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield received
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_finite(value: object) -> bool:
    """False for the numbers that JSON does not know: the norm of a float16 gradient that overflowed."""
    return not isinstance(value, float) or math.isfinite(value)


def stop_if_not_finite(loss: float, step: int, out: Path) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss} at step {step}; "
            + (f"{out}/last holds the last good checkpoint; " if (out / "last").is_dir() else "")
            + "try a lower learning_rate, grad_clip=1.0, or another dtype"
        )


def device_name(machine: runtime.Runtime) -> str:
    if machine.device.type == "cuda":
        return torch.cuda.get_device_name(machine.device)
    return f"{machine.device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    with configurator.exit_on_user_error():
        main()
