"""
The validation loss of trained runs over a whole file, each token once, as the last line of train.py reports it (of an autoencoder
how well it gives a text back); with --json also what summary.json says of codes.

    python evaluate.py results/models/baseline results/models/encdec_mse_possub
    python evaluate.py out/stdlib/baseline_s1 --dataset=my_texts        # on other text of the same tokenizer
    python evaluate.py out/stdlib/baseline_dropout_s1 --attention_dropout

--attention_dropout leaves dropout of attention weights on, and only that: so did the original encoder-decoder code when it
evaluated, because it passed its probability to the attention kernel in training and evaluation alike.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import configurator
import dataloader
import runtime
from baseline_transformer.model import DecoderOnly
from errors import exit_on_user_error
from model import EncoderDecoder
from runs import find_runs
from validation import in_words, judge


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: Literal["last", "best"] | None = None  # which weights; none: last, or best where only these were kept
    dataset: str | None = None  # whose validation file; none: that of the run's own data set
    attention_dropout: bool = False  # leave dropout of attention weights on, as in training
    final_eval_tokens: int | None = None  # tokens judged; none: all
    seed: int = 1337  # of attention dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of matrix products
    json: str | None = None  # also write the numbers to this file

    def __post_init__(self):
        configurator.at_least_one(self, "final_eval_tokens")
        configurator.check_given(self, "json", "dataset")


def keep_attention_dropout(model: torch.nn.Module, run: Path) -> None:
    """From now on attention weights are dropped in evaluation too. Raises ValueError where that cannot be or does nothing."""
    if not isinstance(model, (EncoderDecoder, DecoderOnly)):  # the others have attention of their own
        raise ValueError(f"attention_dropout=True: {run} is neither of encoder_decoder nor of decoder_only; leave it out")
    if not model.config.dropout:
        raise ValueError(f"attention_dropout=True: {run} was trained without dropout, so there is none to leave on")
    model.evaluation_dropout = model.config.dropout


def evaluate(run: Path, which: str, config: EvaluateConfig, machine: runtime.Runtime) -> dict:
    """What judge() finds of a run's checkpoint, and on what. Raises ValueError for data, or dropout, that is not for this model."""
    model, _, state = checkpoint.load_run(run, which, machine.device)
    model.to(machine.weight_dtype)
    name = config.dataset or checkpoint.read_config(run)[0]["dataset"]
    data = dataloader.open_data(dataloader.prepare_if_missing(name), model.config.block_size, "val")
    checkpoint.check_data(data, run)
    summary = checkpoint.read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    if config.dataset is None and summary.get("data_hash", data.val_hash) != data.val_hash:
        print(f"note: {name} has another validation file now than when {run} was trained on it", file=sys.stderr)
    dtype = str(machine.dtype).removeprefix("torch.")
    if config.dataset is None and (was := summary.get("dtype", dtype)) != dtype:
        print(f"note: {run} gave its loss in {was}, this is {dtype}; --dtype={was} is the same as there", file=sys.stderr)
    if hasattr(model, "check"):  # whether its pairs fit
        model.check(data, 0)
    if config.attention_dropout:
        keep_attention_dropout(model, run)
        runtime.seed_everything(config.seed)
    return {
        "run": str(run), "step": state["step"], "dataset": name, "data_hash": data.val_hash,
        "attention_dropout": model.evaluation_dropout,
        **judge(model, data, machine, config.final_eval_tokens),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> list[dict]:
    settings = configurator.configure(argv, [EvaluateConfig], positional="RUN ...", description=__doc__)
    config: EvaluateConfig = settings.sections[0]
    machine = runtime.start(config.device, config.dtype, "off")
    print(machine.reasons.split("; compile")[0])
    if config.json is not None:
        if Path(config.json).is_dir():
            raise ValueError(f"json={config.json} is a folder; give the name of a file")
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
    which = (config.checkpoint,) if config.checkpoint else ("last", "best")
    folders = {run: checkpoint.find_first(run, *which) for run in find_runs(settings.words)}  # of all, before the first takes long
    found = []
    for run, folder in folders.items():
        found.append(line := evaluate(run, folder.name.removesuffix(".old"), config, machine))
        dropped = f", attention dropout {line['attention_dropout']}" if config.attention_dropout else ""
        print(f"{line['run']}, step {line['step']}: {in_words(line)} of {line['dataset']}{dropped}", flush=True)
        if config.json is not None:  # after each run: the next one may fail
            checkpoint.write_json(Path(config.json), found)
    return found


if __name__ == "__main__":
    with exit_on_user_error():
        main()
