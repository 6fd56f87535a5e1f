"""
Train any model of the project: one loop for all.

    python train.py config/quickstart.py                             # a config file
    python train.py config/stdlib/baseline.py --seed=2               # flags override it
    python train.py config/stdlib/baseline.py --resume               # go on where it stopped, with the same settings
    torchrun --standalone --nproc_per_node=4 train.py config/wikipedia/encdec_mse_possub.py

One *step* is one optimizer update on batch_size * gradient_accumulation_steps sequences of block_size tokens, however many
processes share them. Which sequences those are is a function of (seed, step), dropout masks of (seed, step, micro-batch); so
resuming, evaluating more often, or adding processes changes a run by rounding at most. micro_batch_size, how many sequences are
computed at a time, changes rounding and, because each micro-batch draws its own, the dropout masks, as do processes that have to
cut the last micro-batch. On pairs, whose answers differ in length, it also changes, a little, the losses of codes, which are not
means over target tokens. The number of lanes, parts of a micro-batch that a CPU computes side by side, changes rounding and those
losses too; masks it does not, as with dropout there is one lane. It is chosen from torch's number of threads when a run starts, and
kept when the run is resumed.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
import configurator
import dataloader
import generate
import pretrained
import runtime
import tokenizer
from errors import exit_on_user_error
from model import Block, DecoderBlock
from recorder import Recorder
from trainer import TrainConfig, Trainer, learning_rate
from validation import bytes_per_target, exact_pairs, in_words, judge, measured

# ----------------------------------------------------------------------------------------------------------------------
# where a run is, and what it was given


def run_dir(config: TrainConfig, config_file: Path | None) -> Path:
    """out_dir, or out/ and the config file's path below config/: config/stdlib/baseline.py -> out/stdlib/baseline; or out/MODEL."""
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
    The settings that --resume takes from the run; empty for a new run. What counts, the first of these that has the setting:
        a flag of this command
        the run, if it was a flag when the run was started or resumed before
        the config file as it is now, which may have changed
        the run
    Raises ValueError or FileNotFoundError where there is no such run.
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
# from settings to a model with its data


def check_warmup(config: TrainConfig, flags: set[str], machine: runtime.Runtime) -> None:
    """Raise ValueError for a warm-up that would never end, unless somebody tries a few steps of a long run: they get those."""
    if config.resume or not 0 < config.max_iters < config.warmup_iters:
        return
    if "warmup_iters" in flags or "max_iters" not in flags:
        raise ValueError(
            f"warmup_iters={config.warmup_iters} is beyond max_iters={config.max_iters}: the warm-up would never end; lower it (to "
            "try a few steps of a long run, give max_iters as a flag)"
        )
    machine.say(f"note: max_iters={config.max_iters} ends the run inside its warm-up of {config.warmup_iters} steps")


def find_autoencoder(config: TrainConfig, model_config, out: Path, machine: runtime.Runtime) -> tuple[Path | None, Path | None]:
    """
    For a model over the codes of a frozen autoencoder two run directories: the one to load the autoencoder from, and the one that
    holds the stored codes of the data. Else (None, None). A resumed run loads its own copy, because the decoder of the original may
    have been trained further; the stored codes stay with the original as long as its codebooks are the same.
    """
    if getattr(model_config, "autoencoder", None) is None:
        return None, None
    original, copy = Path(model_config.autoencoder), out / "autoencoder"
    if not (config.resume and copy.is_dir()):
        return original, original
    if checkpoint.has_codebooks(original, model_config.codebook_hash):
        return copy, original
    machine.say(f"note: {original} is gone or has other codebooks by now: the run goes on with its own copy, {copy}")
    return copy, copy


def open_data(config: TrainConfig, model_config, encoder_run: Path | None, given: dict) -> tuple[dataloader.TokenData, object]:
    """The data set of a run, and its model's config with the sizes that the data and a backbone settle."""
    data = dataloader.open_data(dataloader.resolve(config.dataset), model_config.block_size)
    if encoder_run is not None:
        checkpoint.check_tokenizers(data.folder, encoder_run)
    elif "vocab_size" not in given:
        with warnings.catch_warnings(action="ignore"):  # configure() has warned of what was given
            model_config = dataclasses.replace(model_config, vocab_size=data.vocab_size)
    if model_config.vocab_size < data.vocab_size:
        raise ValueError(f"vocab_size={model_config.vocab_size} is too small for {config.dataset}: it needs {data.vocab_size}")
    return data, pretrained.fit_backbone(model_config, given)


def build_model(config: TrainConfig, model_config, data: dataloader.TokenData) -> torch.nn.Module:
    """The model as training begins with it, on the CPU: random weights, or those of init_from or of a backbone."""
    runtime.seed_everything(config.seed)
    model = checkpoint.build(config.model, model_config)
    if config.resume:
        return model  # its checkpoint brings all weights, those of a backbone among them
    if config.init_from:
        pretrained.init_from(model, Path(config.init_from))
        if hasattr(model, "steps"):
            model.steps.zero_()  # its schedules are of this run
        if Path(config.init_from).suffix != ".pt":
            checkpoint.check_tokenizers(data.folder, config.init_from)
    elif getattr(model_config, "backbone", None):
        pretrained.load_backbone(model, model_config)
        if model_config.pretrained is None:
            checkpoint.check_tokenizers(data.folder, model_config.backbone)
    return model


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
    if getattr(model.config, "freeze_codes", False) and not config.resume:
        if not config.init_from:
            raise ValueError("freeze_codes=true keeps the codes of another run: name one that has learned them, --init_from=RUN")
        if not model.quantizer.initialized:
            raise ValueError(f"init_from={config.init_from} was stopped before its codebooks were made of data; train it longer")
    if hasattr(model, "check"):
        model.check(data, config.max_iters)
    bytes_per_target(data, config.final_eval_tokens)  # asked again after training: tiktoken, should it be missing, is missed now
    inputs = {"dataset": data.folder, "init_from": None if config.resume else config.init_from}
    inputs |= {key: getattr(model.config, key, None) for key in ("autoencoder", "backbone")}
    for key, folder in inputs.items():
        if folder is not None and Path(folder).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"out_dir={out} is or holds what the run reads as its {key}, {folder}; write to another folder")


def make_sampler(config: TrainConfig, model: torch.nn.Module, data: dataloader.TokenData) -> Callable[[], str] | None:
    """
    A function that writes the sample of an evaluation; None if there is to be none. Raises ValueError for a prompt or a seed that it
    cannot begin with.
    """
    if config.eval_sample_tokens == 0:
        return None
    text, sampling = tokenizer.load(data.folder), generate.Sampling(seed=config.seed)
    written, pairs = config.eval_sample_prompt, isinstance(data, dataloader.PairData)
    if written is None:
        prompt = next(data.questions("val", 1))[0] if pairs else text.encode("\n")
    else:
        prompt = tokenizer.encode_question(text, written, data.separator) if pairs else text.encode(written)
    if not prompt:
        raise ValueError("eval_sample_prompt is empty: a sample needs a token to begin with; leave the setting out for a line end")
    generate.check_prompts(model.eval(), [prompt])
    return lambda: text.decode(
        generate.generate(model, [prompt], config.eval_sample_tokens, sampling, text.eos, tokenizer=text)[0]
    )


# ----------------------------------------------------------------------------------------------------------------------
# the whole of it


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
    config = parsed.sections[0]
    machine = runtime.start(config.device, config.dtype, config.compile, several=True)
    try:
        out = run_dir(config, parsed.config_file)
        with checkpoint.alone_in(out) if machine.is_main else contextlib.nullcontext():
            summary = train(parsed, machine, out)
    except BaseException as error:
        runtime.stop(failed=isinstance(error, Exception))  # an interruption reaches all processes
        if isinstance(error, torch.OutOfMemoryError):
            size = config.micro_batch_size or config.batch_size
            values = "N" if size == "auto" else "N or auto"
            less = [] if size == 1 else [f"compute fewer sequences at a time, --micro_batch_size={values} (it is {size})"]
            less += [] if config.activation_checkpointing else ["keep less of them, --activation_checkpointing"]
            less += ["take a smaller model or block_size"]
            raise ValueError(f"{str(error).split('. ')[0].strip('. ')}; {', or '.join(less)}") from None
        if machine.world_size > 1 and isinstance(error, RuntimeError) and "by peer" in str(error):  # gloo's, of a closed connection
            raise SystemExit(f"process {machine.rank} ends because another one has ended, which says why") from None
        raise
    runtime.stop()
    return summary


def train(parsed: configurator.Settings, machine: runtime.Runtime, out: Path) -> dict:
    """One run, from its settings to its summary."""
    config, model_config = parsed.sections
    machine.say(machine.reasons)
    check_warmup(config, parsed.flags, machine)
    commit = git_commit()  # now: by the end of a long run the checkout may have moved on
    if machine.is_main:
        dataloader.prepare_if_missing(config.dataset)
    machine.barrier()

    encoder_run, codes_run = find_autoencoder(config, model_config, out, machine)
    autoencoder = None
    if encoder_run is not None:  # it settles all sizes of text and codes
        autoencoder = checkpoint.load_autoencoder(encoder_run)
        model_config = model_config.fitted_to(autoencoder, parsed.given)
    data, model_config = open_data(config, model_config, encoder_run, parsed.given)
    config = dataclasses.replace(config, out_dir=str(out))
    if machine.is_main:
        configurator.print_differences(config, model_config)
    model = build_model(config, model_config, data)
    check_inputs(config, model, data, out)
    write_sample = make_sampler(config, model, data)
    model.to(device=machine.device, dtype=machine.weight_dtype)
    if autoencoder is not None:
        model.attach(autoencoder)
    if config.activation_checkpointing:
        runtime.checkpoint_activations(model, (Block, DecoderBlock))

    flags = (parsed.flags | (checkpoint.first_flags(out) if config.resume else set())) - COMMAND_ONLY
    settings = {"train": configurator.to_dict(config), "model": configurator.to_dict(model_config), "flags": sorted(flags)}
    if isinstance(data, dataloader.PairData):
        settings["separator"] = data.separator  # sample.py has no other way to know that a prompt is a question
    trainer = Trainer(config, model, data, machine)
    record = Recorder(trainer, out)
    record.begin(settings, codes_run)
    lanes = trainer.lanes.count
    machine.say(
        f"{config.model}: {model.get_num_params():,} parameters, {model.flops_per_token() / 1e6:.1f} MFLOP per token; "
        f"{config.dataset}: {len(data.train):,} training and {len(data.val):,} validation tokens; "
        f"{record.tokens_per_step:,} tokens a step{', padding included' if isinstance(data, dataloader.PairData) else ''}"
        f"{f', in {lanes} lanes' if lanes > 1 else ''}"
    )
    estimates = loop(record, write_sample)

    record.lap(training=False)
    machine.say(f"evaluating on {'the whole validation file' if config.final_eval_tokens is None else 'part of the validation file'}")
    summary = {"run": out.name, "commit": commit, **summarize(trainer, record.state, estimates or trainer.estimates())}
    record.finish(summary)
    if "exact_pairs" in summary:
        machine.say(f"{summary['exact_pairs']:.2%} of {summary['pairs']:,} unseen pairs answered exactly")
    machine.say(f"done: {in_words(summary)}; {runtime.duration(record.state['seconds'])}; {out}/summary.json")
    return summary


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def loop(record: Recorder, write_sample: Callable[[], str] | None) -> dict | None:
    """
    Train until max_iters, or until patience has had enough. Returns the estimates of the last evaluation, None where a resumed
    run had made it already. Told to stop, it saves and raises KeyboardInterrupt, or SystemExit where SIGTERM has told it.
    """
    trainer, config, machine, state = record.trainer, record.config, record.machine, record.state
    estimates, tokens, logged_at = None, 0, state["train_seconds"]  # the last two for tokens/s, the speed of training alone
    ask_every = 1  # steps between two questions of several processes whether any of them has been interrupted
    with interruptible() as interrupted:
        while True:
            due = trainer.step % config.eval_interval == 0 or trainer.step >= config.max_iters
            if due and state["evaluated"] != trainer.step:
                machine.wait()
                record.lap(training=True)
                estimates = evaluate(record, write_sample)
                record.lap(training=False)
            if trainer.step >= config.max_iters:
                return estimates
            if config.patience and state["no_better"] >= config.patience and state["evaluated"] == trainer.step:  # and saved
                machine.say(f"patience={config.patience}: no val loss is lower than that of step {state['best_step']}")
                return estimates
            # All processes have to stop at the same step. They ask each other only every few seconds, because all wait for the answer,
            # and that often, because torchrun kills them half a minute after a signal.
            if trainer.step % ask_every == 0 and machine.in_any_process(bool(interrupted)):
                stop(record, by_sigterm=signal.SIGTERM in interrupted)
            record.note_decay()
            sums = trainer.update()
            tokens += record.tokens_per_step
            if trainer.is_logged(trainer.step):
                values = {name: machine.sum_over_processes(value).item() for name, value in sums.items()}  # waits for the device
                stop_if_not_finite(values["total"], trainer.step, record.out)
                record.lap(training=True)
                speed = tokens / (state["train_seconds"] - logged_at)
                logged_at, tokens = state["train_seconds"], 0
                if machine.world_size > 1:
                    speeds = machine.sum_over_processes(torch.tensor(speed)).item() / machine.world_size  # the same for all of them
                    ask_every = max(1, min(config.log_interval, int(5 * speeds / record.tokens_per_step)))
                report(values, speed, record)


def evaluate(record: Recorder, write_sample: Callable[[], str] | None) -> dict:
    """Estimate both losses, log them, keep the checkpoints. Returns the estimates."""
    trainer, machine = record.trainer, record.machine
    found, step = trainer.estimates(), trainer.step
    what = "reconstruction loss" if trainer.raw_model.reconstructs else "loss"
    stop_if_not_finite(found["val_loss"], step, record.out)
    if step > 0 or record.config.init_from:  # of an untrained model there is nothing to say
        batches = trainer.eval_batches("val", trainer.rows_that_fit)
        found |= measured(trainer.raw_model, trainer.data, batches, machine, trainer.data.bytes_per_token)
    accuracy = f", accuracy {found['token_accuracy']:.2%}" if "token_accuracy" in found else ""
    machine.say(f"step {step}: train {what} {found['train_loss']:.4f}, val {what} {found['val_loss']:.4f}{accuracy}")
    record.log("eval", found)
    if write_sample and machine.is_main:
        machine.say(f"sample: {write_sample()!r}")
    record.save(found["val_loss"], found.get("codes_of_data", True))
    return found


def report(values: dict[str, float], speed: float, record: Recorder) -> None:
    """Print and log what a step gave: its losses, `total` among them, and the tokens/s since the step reported before."""
    config, step = record.config, record.trainer.step
    rate, left = learning_rate(config, step - 1), (config.max_iters - step) * record.tokens_per_step / speed
    named = {"loss": values["total"]}
    named |= {name if name == "grad_norm" else f"{name}_loss": value for name, value in values.items() if name != "total"}
    shown = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in named.items() if key != "token_loss")
    record.machine.say(
        f"step {step}/{config.max_iters}: {shown}, lr {rate:.2e}, {speed:,.0f} tokens/s, "
        f"{runtime.duration(record.state['seconds'])} gone, {runtime.duration(left)} to go"
    )
    record.log("train", {**named, "lr": rate, "tokens_per_second": speed, "seconds": record.state["seconds"]})


def stop(record: Recorder, by_sigterm: bool) -> None:
    """Save, and raise KeyboardInterrupt or, `by_sigterm`, SystemExit."""
    trainer, out = record.trainer, record.out
    if not all(p.isfinite().all() for p in trainer.raw_model.parameters()):
        stop_if_not_finite(math.nan, trainer.step, out)
    record.lap(training=True)
    record.save_last()
    trainer.machine.barrier()  # half a minute after one process has left torchrun ends the others, writing or not
    trainer.machine.say(f"stopped at step {trainer.step}; {out}/last is saved: --resume --out_dir={shlex.quote(str(out))} goes on")
    raise SystemExit(128 + signal.SIGTERM) if by_sigterm else KeyboardInterrupt


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


def stop_if_not_finite(loss: float, step: int, out: Path) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss} by step {step}; start again with a lower learning_rate, grad_clip=1.0, or another dtype"
            + (f", or so from the best weights until here, with --init_from={out} --out_dir=..." if (out / "best").is_dir() else "")
        )


# ----------------------------------------------------------------------------------------------------------------------
# the summary


def summarize(trainer: Trainer, state: dict, estimates: dict) -> dict:
    """What summary.json says of a trained model, the loss on the whole validation file first of all."""
    config, model, data, machine = trainer.config, trainer.raw_model, trainer.data, trainer.machine
    tokens = trainer.step * trainer.sequences * data.block_size
    summary = {
        "model": config.model, "dataset": config.dataset,
        "parameters": model.get_num_params(), "flops_per_token": model.flops_per_token(),
        "steps": trainer.step, "tokens": tokens,
        "train_loss": estimates["train_loss"],
        # not compiled, as evaluate.py computes it, and without two more shapes to compile
        **judge(model, data, machine, config.final_eval_tokens),
        "best_val_loss": state["best_val_loss"], "best_step": state["best_step"], "ended_early": trainer.step < config.max_iters,
        "decay_ends": state["decay_ends"],  # step at which the learning rate is lowest; several: it was resumed with another
        "seconds": state["seconds"], "tokens_per_second": tokens / max(state["train_seconds"], 1e-9),
        "peak_memory_bytes": machine.peak_memory_bytes(), "seed": config.seed,
        "data_hash": data.val_hash, "train_hash": data.meta["train"]["sha256"],  # of the validation and of the training file
        "torch": torch.__version__, "device": device_name(machine), "dtype": str(machine.dtype).removeprefix("torch."),
        "compiled": machine.compile, "graphs": machine.graphs, "world_size": machine.world_size, "lanes": trainer.lanes.count,
    }  # fmt: skip
    if summary.get("codes_of_data") is False and machine.is_main:
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


def device_name(machine: runtime.Runtime) -> str:
    if machine.device.type == "cuda":
        return torch.cuda.get_device_name(machine.device)
    return f"{machine.device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
    runtime.end_process()
