"""
The registry of models, and what is written to disk about one.

A run directory holds config.json and tokenizer.json, and up to two checkpoint folders:

    last/   model.safetensors, optimizer.safetensors, trainer.json: all that is needed to go on
    best/   model.safetensors, trainer.json: the lowest validation loss so far

and, where a model needs a frozen autoencoder, autoencoder/: the run directory of that, without its last/.

Nothing is pickled, so loading a checkpoint cannot run code. A folder is written under another name and then renamed, so
that a crash of the program leaves either the old checkpoint or the new one.
"""

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

import configurator
import dataloader
import tokenizer
from baseline_transformer.model import DecoderOnly, DecoderOnlyConfig
from errors import naming
from latent.autoencoder import Autoencoder, AutoencoderConfig
from latent.latent_transformer import LatentTransformer, LatentTransformerConfig
from latent.rq_transformer import RQTransformer, RQTransformerConfig
from model import EncoderDecoder, EncoderDecoderConfig
from runs import NOT_OF_A_ROW
from trainer import TrainConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A model is called as model(idx, targets) -> (logits, losses by name, `total` among them). What else training and evaluation ask of it,
# the methods only where it has them (latent/ gives their shapes):
#   side_by_side, reconstructs, writes_blocks     its kind (model.py, CausalModel)
#   fitted_to (of its config), attach             it works on the codes of a frozen autoencoder, the run config.autoencoder, if any
#   training_data                                 what a step draws from then, if not text
#   check                                         raises ValueError for data or a number of steps that it cannot be trained on, or warns
#   named_backbone_parameters, backbone_rate      parameters with a learning rate of their own, and their share of the common one
#   after_step, steps                             statistics that are collected once a step; steps so far, for its own schedules
#   measure, summarize                            what an evaluation says beside the loss: sums over batches, and what they come to
#   embedding_loss, embedding_loss_report         what the embedding loss does to the model, said in every evaluation
MODELS = {
    "encoder_decoder": (EncoderDecoderConfig, EncoderDecoder),
    "decoder_only": (DecoderOnlyConfig, DecoderOnly),
    "autoencoder": (AutoencoderConfig, Autoencoder),
    "rq_transformer": (RQTransformerConfig, RQTransformer),
    "latent_transformer": (LatentTransformerConfig, LatentTransformer),
}
CONFIGS = {name: config for name, (config, _) in MODELS.items()}


def build(name: str, config) -> torch.nn.Module:
    """A freshly initialised model of the registry."""
    return MODELS[name][1](config)


def write_json(path: Path, value: dict | list) -> None:
    """Write through a temporary name, so that the file is never half there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where the disk was full


def read_json(path: Path) -> dict:
    """Raises ValueError with the file's name if it is not a JSON object in UTF-8."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"{json.dumps(value)[:20]} instead of keys and values")
        return value
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or start the run again, or make the data set again") from None


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there, or the link to one, which rmtree leaves."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


# settings that may differ between a run and its continuation; micro_batch_size, which is one of them, draws dropout's masks anew
FREE_ON_RESUME = NOT_OF_A_ROW - {"seed"} | {"max_iters", "dataset", "patience"}


# ----------------------------------------------------------------------------------------------------------------------
# run directories


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """
    Inside, the run directory is there and no other process of this machine is inside; afterwards a new one stays unless it is empty.
    Raises FileExistsError where another one is. (On Windows nobody looks.)
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give --out_dir the name of a folder")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(f"another training writes to {out}: wait for it, stop it, or choose another --out_dir") from None
            except OSError:  # a file system without locks
                pass
        with naming(out):
            yield
    finally:
        if fcntl:
            os.close(handle)
        if new:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


def parts_of_run(out: Path) -> list[Path]:
    """What a new run replaces in its directory. Last, as the other parts are known by it, config.json."""
    folders = [name + suffix for name in ("last", "best") for suffix in ("", ".old", ".tmp")] + ["autoencoder"]
    return [out / name for name in (*folders, "metrics.jsonl", "summary.json", tokenizer.FILE_NAME, "config.json")]


def check_free(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError for a folder that holds anything, unless it is a run that may be overwritten."""
    if not out.exists() or not any(out.iterdir()):
        return
    found = [path.name for path in parts_of_run(out) if path.exists()]
    if found and "config.json" not in found:  # perhaps other runs, or a data set
        raise FileExistsError(f"{out} is no run, but has {', '.join(found)}, which a run would replace; --out_dir=... writes elsewhere")
    if not found and (inside := sorted(out.glob("*/config.json"))):
        raise FileExistsError(f"{out} is no run, but holds runs ({inside[0].parent.name}, ...); give --out_dir={out}/NAME")
    if not overwrite:
        resume = "--resume continues it, " if any((out / name).is_dir() for name in ("last", "last.old")) else ""
        raise FileExistsError(f"{out} exists; {resume}--overwrite starts it again, --out_dir=... writes elsewhere")


def start_run(settings: dict, data_folder: Path, out: Path) -> None:
    """Make the run directory, without anything of a run that was there."""
    for path in parts_of_run(out):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", settings)  # first: without it the rest would not be known as a run's
    (out / tokenizer.FILE_NAME).write_bytes((data_folder / tokenizer.FILE_NAME).read_bytes())


def copy_autoencoder(run: Path, out: Path, autoencoder: Autoencoder) -> None:
    """
    Make a run directory self-contained: what sampling needs of the autoencoder goes to out/autoencoder, as it has been loaded. Its
    own run, `run`, may have been trained further meanwhile: the codes of a long text take minutes.
    """
    copy = out / "autoencoder"
    save(copy / "best", autoencoder, None, read_json(find_first(run, "best", "last") / "trainer.json"))
    write_json(copy / "config.json", read_json(run / "config.json") | {"model": configurator.to_dict(autoencoder.config)})
    shutil.copyfile(run / tokenizer.FILE_NAME, copy / tokenizer.FILE_NAME)  # not its mode: a copy has to be removable


def first_flags(run: Path) -> set[str]:
    """The settings that were flags when a run was started or resumed; unknown, hence none, of older runs."""
    return set(read_json(run / "config.json").get("flags", ()))


TRAINER = {  # what a trainer.json says, and of which type
    "step": int, "scaler": dict, "data_hash": str, "best_val_loss": float | int | None, "no_better": int, "evaluated": int | None,
    "seconds": float | int, "train_seconds": float | int, "micro_batch_size": int | None, "lanes": int, "decay_ends": list,
    "dtype": str | None,
}  # fmt: skip


def read_trainer(folder: Path, needed: tuple[str, ...], advice: str) -> dict:
    """The trainer state of a checkpoint folder. Raises ValueError where it lacks what is needed, with what to do."""
    trainer = read_json(folder / "trainer.json")
    wrong = [f"it lacks {key}" for key in needed if key not in trainer]
    wrong += [f"its {key} is {trainer[key]!r}" for key in TRAINER if key in trainer and not isinstance(trainer[key], TRAINER[key])]
    if wrong:
        raise ValueError(f"{folder / 'trainer.json'} is damaged: {', '.join(wrong)}; {advice}")
    return trainer


def end_last_line(path: Path) -> None:
    """Put a line end after a record that a crash has cut off, or the next one would be lost with it."""
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def state_to_resume(settings: dict, data_hash: str, out: Path) -> dict:
    """The trainer state to resume from. Raises FileNotFoundError where there is none, ValueError if the run is another one."""
    was, _, model_config = read_config(out)
    needed = ("step", "scaler", "data_hash", "best_val_loss", "seconds", "train_seconds")
    trainer = read_trainer(find(out, "last"), needed, "start the run again")
    changed = [
        f"{key}={new[key]!r} (was {before[key]!r})"
        for before, new, free in (
            (configurator.defaults(TrainConfig) | was, settings["train"], FREE_ON_RESUME),
            (configurator.to_dict(model_config), settings["model"], set()),
        )
        for key in sorted(before.keys() & new.keys())  # one that older runs have not had has its default
        if key not in free and before[key] != new[key]
    ]
    if changed:
        raise ValueError(
            f"{out} was made with other settings: {', '.join(changed)}. To go on, leave them out: what its config.json lists need "
            f"not be given again. With the new ones, start a new run: --out_dir=..., and --init_from={out} for its weights, if they fit"
        )
    if (length := settings["train"]["max_iters"]) < trainer["step"]:
        raise ValueError(f"max_iters={length}, but {out} has come to step {trainer['step']}: it can only go on from there")
    # runs that did not note at which step their learning rate would end: TrainConfig.decay_end
    end = (was.get("lr_decay_iters") or was.get("max_iters")) if was.get("decay_lr", True) else None
    trainer.setdefault("decay_ends", [end] if trainer["step"] > 0 else [])
    trainer.setdefault("evaluated", trainer["step"])
    if trainer["data_hash"] != data_hash:
        raise ValueError(
            f"{out} was trained on other data than {settings['train']['dataset']} is now (sha256 {trainer['data_hash'][:12]}..., now "
            f"{data_hash[:12]}...): prepare the old data again, or start a new run from its weights, --init_from={out}"
        )
    return trainer


# ----------------------------------------------------------------------------------------------------------------------
# writing


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, trainer: dict) -> None:
    """Write a checkpoint folder: weights, the optimizer's state unless None, and the JSON-able trainer state."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        safetensors.torch.save_model(model, str(temporary / "model.safetensors"))  # writes a tied tensor once
        if optimizer is not None:
            safetensors.torch.save_file(optimizer_tensors(model, optimizer), str(temporary / "optimizer.safetensors"))
        write_json(temporary / "trainer.json", trainer)
        with contextlib.suppress(OSError):  # some file systems have no modes
            for file in temporary.glob("*.safetensors"):  # which safetensors lets nobody else read, whatever the umask
                file.chmod((temporary / "trainer.json").stat().st_mode)
    except (safetensors.SafetensorError, OSError) as error:  # the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{folder} could not be written, what was there before still is: {error}") from None
    if folder.exists():  # if not, `old` is all there is
        remove_folder(old)
        folder.rename(old)
    temporary.rename(folder)
    remove_folder(old)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named by parameter: "wte.weight/exp_avg"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# reading


def find(run: Path, which: str) -> Path:
    """The checkpoint folder `which` ("last" or "best") of a run. Raises FileNotFoundError with what is missing."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a directory; give a run directory, as written by train.py --out_dir=...")
    if not (run / "config.json").exists():
        inside = [path.parent.name for path in sorted(run.glob("*/config.json"))]
        found = f"; there are {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''} in it" if inside else ""
        if (run.parent / "config.json").exists():  # one of its folders
            found = f"; give {run.parent}, with --checkpoint={run.name}"
        raise FileNotFoundError(f"{run} is not a run directory: it has no config.json{found}")
    for folder in (run / which, run / f"{which}.old"):  # .old: a crash struck between the two renames of save()
        if (folder / "trainer.json").exists() and (folder / "model.safetensors").exists():
            return folder
    why = ": it holds no weights (best/ or last/), stopped before its first evaluation or copied without"
    if others := [name for name in ("last", "best") if name != which and (run / name).is_dir()]:
        why = f", but a {others[0]}: sample.py and evaluate.py take it with --checkpoint={others[0]}, a new run with --init_from={run}"
    raise FileNotFoundError(f"{run} has no complete {which} checkpoint{why}")


def find_first(run: Path, *which: str) -> Path:
    """The first of several checkpoint folders that a run has. Raises FileNotFoundError if it has none of them."""
    for name in which[:-1]:
        with contextlib.suppress(FileNotFoundError):
            return find(run, name)
    return find(run, which[-1])


def read_config(run: Path) -> tuple[dict, str, object]:
    """(training settings as a dict, model name, model config) of a run. Raises ValueError where config.json is not that of a run."""
    settings = read_json(run / "config.json")
    train, model, flags = settings.get("train"), settings.get("model"), settings.get("flags", [])
    if not (
        isinstance(train, dict) and "model" in train and isinstance(train.get("dataset", ""), str)
        and isinstance(model, dict) and isinstance(flags, list) and all(isinstance(flag, str) for flag in flags)
    ):  # fmt: skip
        raise ValueError(
            f"{run / 'config.json'} is damaged: it lacks settings of a run, or one has a wrong type; restore it or start the run again"
        )
    name = train["model"]
    if name not in list(MODELS):
        raise ValueError(f"{run / 'config.json'}: unknown model '{name}'; this version knows {', '.join(MODELS)}")
    with warnings.catch_warnings(action="ignore"):  # what has no effect was said when the run was made
        return train, name, configurator.from_dict(CONFIGS[name], model)


def separator(run: str | Path) -> int | None:
    """The token that ends a question, of a run on pairs; None of a run on text."""
    return read_json(Path(run) / "config.json").get("separator")


class Misfit(ValueError):
    """Weights of other names or shapes than the model's."""


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Fill the model from a checkpoint folder. Raises ValueError for a damaged file, Misfit for one of another model."""
    path = folder / "model.safetensors"
    try:
        safetensors.torch.load_model(model, str(path))
    except safetensors.SafetensorError as error:
        other = folder.with_name("last" if folder.name.startswith("best") else "best")
        raise ValueError(f"{path} is damaged: {error}{f'; {other} may be whole' if other.is_dir() else ''}") from None
    except RuntimeError as error:
        raise Misfit(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from None


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore what optimizer_tensors() wrote. Raises ValueError where a tensor of a parameter is missing or has another shape."""
    path = folder / "optimizer.safetensors"
    try:
        tensors = safetensors.torch.load_file(str(path))
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is missing or damaged: {error}; a new run can begin with the weights, --init_from={folder.parent}"
        ) from None
    if not tensors:  # written before the first step
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        prefix = names[parameter] + "/"
        # copies, or the optimizer would go on in a map of the file, which Windows does not let anyone replace
        found = {key.removeprefix(prefix): value.clone() for key, value in tensors.items() if key.startswith(prefix)}
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if {key: value.shape for key, value in found.items()} != shapes:
            raise ValueError(f"{path} is damaged: it has no whole state for {names[parameter]}; start the run again")
        state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_run(run: str | Path, which: str = "best", device: str | torch.device = "cpu"):
    """
    (model in evaluation mode, tokenizer, trainer state) of a run directory, which is all that is needed: no data set, no
    network. Where there is no best checkpoint yet, the last one serves, and a note says so.
    """
    run = Path(run)
    if which == "best" and (run / "last").is_dir() and not any((run / name).is_dir() for name in ("best", "best.old")):
        print(f"note: {run} has no best checkpoint; this is the last", file=sys.stderr)
        which = "last"
    folder = find(run, which)
    settings, name, config = read_config(run)
    trainer = read_trainer(folder, ("step",), "use another checkpoint")
    model, text = build(name, config), tokenizer.load(run)
    if settings.get("dtype") == "float64" and torch.device(device).type != "mps":  # then weights are, too; Apple GPUs have none
        model.double()
    if text.vocab_size > config.vocab_size:
        raise ValueError(
            f"{run / tokenizer.FILE_NAME} has {text.vocab_size} tokens, but the model {config.vocab_size}: it is of another run"
        )
    load_weights(model, folder)
    if getattr(config, "autoencoder", None) is not None:
        model.attach(load_autoencoder(run / "autoencoder"))
    return model.to(device).eval(), text, trainer


def load_autoencoder(run: str | Path) -> Autoencoder:
    """The autoencoder of a run directory, for a model over its codes. Raises ValueError for a run that has none to give."""
    advice = "a trained autoencoder is needed there, such as python train.py config/latent/rqvae_stdlib.py makes"
    try:
        model = load_run(run)[0]
    except FileNotFoundError as error:
        raise ValueError(f"autoencoder={run}: {error}; {advice}") from None
    if not isinstance(model, Autoencoder):
        raise ValueError(f"autoencoder={run} is the run of another model, {read_config(Path(run))[1]}; {advice}")
    if not model.quantizer.initialized:
        raise ValueError(f"autoencoder={run} was stopped before its codebooks were made of data; train it longer")
    return model


def has_codebooks(run: Path, codebook_hash: str) -> bool:
    """Whether a run holds an autoencoder with the codebooks of that hash."""
    try:
        return load_autoencoder(run).codebook_hash() == codebook_hash
    except ValueError:
        return False


def check_tokenizers(data_folder: Path, run: str | Path) -> None:
    """Raise ValueError unless a data set has the tokenizer of a run."""
    if read_json(data_folder / tokenizer.FILE_NAME) != read_json(Path(run) / tokenizer.FILE_NAME):
        raise ValueError(
            f"{data_folder} has another tokenizer than {run}: its tokens mean something else; use the same data set"
        )


def check_data(data: dataloader.TokenData, run: str | Path) -> None:
    """Raise ValueError unless a data set has the tokenizer of a run, and is what that was trained on: text, or pairs."""
    check_tokenizers(data.folder, run)
    learned, given = "text" if separator(run) is None else "pairs", data.meta.get("kind", "text")
    if given != learned:
        raise ValueError(f"{run} was trained on {learned}, but {data.folder} is a set of {given}; give one of {learned}")
