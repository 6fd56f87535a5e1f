"""
Sequence-level distillation (arXiv:1606.07947): a data set whose training side was written by a trained run.

    python data/distill/prepare.py --run out/latent/numbers_baseline --name numbers_distilled     # pairs: its answer to every x
    python data/distill/prepare.py --run out/stdlib/baseline --name stdlib_distilled --count 4000 # text: its continuations
    python train.py config/latent/numbers_8.py --dataset=numbers_distilled

Pairs keep their x and get the run's y; an answer that is empty, has no end, or is not UTF-8 is left out. A text is a prompt from a
random place of the training side and what the run writes after it, up to its block_size or the first byte that is not UTF-8
(a model of bytes can write those); where nothing stands after the prompt it is left out. The validation side stays as it was, so
losses can be compared with those of runs on the original. Text number i draws the noise of sample number i in sample.py, and pairs
are numbered by the length of x, then as they come; so neither --batch nor --device changes what is drawn.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

import checkpoint
import dataloader
import generate
import runtime
from data import corpus
from data.pairs.sides import SEPARATOR, write_pairs
from errors import exit_on_user_error

TRIES = 100  # places to look at, for each prompt wanted


class Teacher:
    """A run and how it is sampled; counts what it wrote and what was left out."""

    def __init__(self, run: str, which: str, temperature: float, seed: int, batch: int, device: str):
        self.machine = runtime.start(device, "float32", "off")
        self.model, self.tokenizer, trainer = checkpoint.load_run(run, which, self.machine.device)
        self.model.to(self.machine.weight_dtype)
        if self.model.reconstructs:
            raise ValueError(f"--run {run} is an autoencoder, which writes nothing new; give the run of a language model")
        generate.prepare_for_decoding(self.model)
        self.sampling, self.batch = generate.Sampling(temperature, seed=seed), batch
        self.written = self.left_out = 0
        weights = checkpoint.find_first(Path(run), which, "last") / "model.safetensors"
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.facts = {
            "run": run,
            "step": trainer["step"],
            "weights_sha256": digest,
            "temperature": temperature,
            "seed": seed,
        }

    def continuations(self, prompts: Iterable[list[int]], answer: int | None = None) -> Iterator[generate.Continuation]:
        """What follows each prompt, in their order: what block_size leaves, or an answer of so many tokens with its end, if it fits."""
        prompts, ahead, first = iter(prompts), [], 0
        while some := [*ahead, *islice(prompts, self.batch - len(ahead))]:
            # those that are sampled together have one length
            count = next((i for i, prompt in enumerate(some) if len(prompt) != len(some[0])), len(some))
            some, ahead = some[:count], some[count:]
            left = self.model.config.block_size - len(some[0])
            most = left if answer is None else min(answer, left + 1)  # nothing comes after the end, so that the model need not see it
            samples = [generate.Continuation(prompt, most, self.tokenizer, self.tokenizer.eos) for prompt in some]
            for _ in generate.sample_together(self.model, samples, self.sampling, first_sample=first):
                pass
            first += count
            yield from samples

    def sign(self, meta: dict) -> None:
        """Note in the meta of a data set who the teacher was."""
        meta["teacher"] = self.facts | {"written": self.written, "left_out": self.left_out}

    def check_written(self) -> None:
        if self.written == 0:
            raise ValueError(f"--run {self.facts['run']} wrote nothing but empty or endless texts; train it longer")

    def pairs(self, data: dataloader.PairData, count: int | None) -> Iterator[tuple[bool, str, str]]:
        """(is it validation?, x, y): the first `count` pairs (none: all) of training with the run's y, and validation as it is."""
        questions = sorted((x for x, _ in data.questions("train", count)), key=len)
        for sample in self.continuations(questions, int(data.longest_y)):
            answer = utf8_part(sample.bytes)
            whole = sample.reason == "eos" and answer.encode() == sample.bytes
            if not whole or not answer.strip() or SEPARATOR in answer:
                self.left_out += 1
                continue
            self.written += 1
            yield False, self.tokenizer.decode(sample.tokens[: sample.n_prompt - 1]), answer
        self.check_written()
        for x, y in data.questions("val", None):
            yield True, self.tokenizer.decode(x[:-1]), self.tokenizer.decode(y)

    def texts(self, data: dataloader.TokenData, count: int, prompt_tokens: int) -> Iterator[tuple[bool, str]]:
        """(is it validation?, document): `count` prompts with what the run writes after them, and validation as it is."""
        for sample in self.continuations(self.prompts(data, count, prompt_tokens)):
            text = utf8_part(sample.bytes)
            if not text:
                self.left_out += 1
                continue
            self.written += 1
            # where no token marks the end of a document, an empty line does
            end = "\n\n" if self.tokenizer.eos is None else ""
            yield False, self.tokenizer.decode(sample.tokens[: sample.n_prompt]) + text + end
        self.check_written()
        ends = [] if self.tokenizer.eos is None else np.flatnonzero(data.val == self.tokenizer.eos)
        for begin, end in zip([0, *(end + 1 for end in ends)], [*ends, len(data.val)]):
            if begin < end:
                yield True, self.tokenizer.decode(data.val[begin:end].tolist())

    def prompts(self, data: dataloader.TokenData, count: int, length: int) -> Iterator[list[int]]:
        """Prompts from random places of the training side, none with the end of a document or a part of a character in it."""
        rng, found = np.random.default_rng(self.sampling.seed), 0
        for _ in range(TRIES * count):
            begin = int(rng.integers(len(data.train) - length + 1))
            prompt = data.train[begin : begin + length].tolist()
            written = self.tokenizer.decode_bytes(prompt)
            if self.tokenizer.eos not in prompt and utf8_part(written).encode() == written:
                yield prompt
                found += 1
            if found == count:
                return
        raise ValueError(
            f"--prompt_tokens {length}: documents of {data.folder} are mostly shorter, or so long a piece cuts a character; "
            "choose another number"
        )


def utf8_part(data: bytes) -> str:
    """The text up to the first byte that is not UTF-8, or belongs to a character that is not complete."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.bare_arguments(__doc__, None)
    parser.add_argument("--run", required=True, help="run directory of the teacher")
    parser.add_argument("--name", help="name of the data set, written to data/NAME unless --out_dir is given")
    parser.add_argument("--dataset", help="where prompts and validation come from, the run's own unless given")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"), help="which one of the run")
    parser.add_argument("--temperature", type=float, help="0 is greedy; 0 for pairs and 1 for text unless given")
    parser.add_argument("--count", type=int, help="pairs to answer, all unless given, or texts to write, 1000 unless given")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="text: tokens of each that are not the run's")
    parser.add_argument("--batch", type=int, default=64, help="texts sampled together")
    parser.add_argument("--seed", type=int, default=1337, help="of places and noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    args = parser.parse_args(argv)
    out_dir = corpus.folder_for(args.name, args.out_dir)
    if (out_dir / "meta.json").exists():
        raise ValueError(f"{out_dir} holds a data set already; give another --name or --out_dir, or remove it")
    for key in ("count", "prompt_tokens", "batch"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"--{key} {getattr(args, key)}: at least 1 is needed")
    checkpoint.find_first(Path(args.run), args.checkpoint, "last")  # raises for what is no run
    separator = checkpoint.separator(args.run)
    temperature = args.temperature if args.temperature is not None else 0.0 if separator is not None else 1.0
    teacher = Teacher(args.run, args.checkpoint, temperature, args.seed, args.batch, args.device)
    block_size = teacher.model.config.block_size
    dataset = args.dataset or checkpoint.read_config(Path(args.run))[0]["dataset"]
    data = dataloader.open_data(dataloader.prepare_if_missing(dataset), block_size)
    checkpoint.check_data(data, args.run)
    source = f"{data.meta['source']}, as {args.run} continues it"
    if separator is not None:
        meta = write_pairs(teacher.pairs(data, args.count), teacher.tokenizer, out_dir, source, args.name, teacher.sign)
    else:
        if args.prompt_tokens >= block_size:
            raise ValueError(
                f"--prompt_tokens {args.prompt_tokens} leaves no room in the run's block_size={block_size}; lower it"
            )
        documents = teacher.texts(data, args.count or 1000, args.prompt_tokens)
        meta = corpus.write_sides(documents, teacher.tokenizer, out_dir, source, args.name, complete=teacher.sign)
    print(f"{teacher.written:,} texts by {args.run}, {teacher.left_out:,} left out")
    return meta


if __name__ == "__main__":
    with exit_on_user_error():
        main()
