"""
Pairs of texts, a question and its answer, as a data set: tokens x SEP y EOS of one pair after the other, SEP being a tab.

    python data/pairs/prepare.py --numbers                                # 4711 -> four thousand seven hundred and eleven
    python data/pairs/prepare.py --input pairs.tsv --name translations    # a pair a line, a tab between its sides
    python data/pairs/prepare.py --input pairs.jsonl --name qa --keys question,answer
    python train.py config/latent/numbers_8.py                            # or any model, with --dataset=translations
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

import tokenizer as tokenizers
from data import corpus
from data.pairs.sides import SEPARATOR, write_pairs
from errors import exit_on_user_error

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety"
)
BELOW_20, TENS = WORDS.split()[:20], WORDS.split()[20:]
LARGEST = 10**6  # numbers are below it
COUNT = 100_000  # of them that make the set


def in_words(number: int) -> str:
    """English words of 0 <= number < 10^6, with "and" before the last two digits of each group: 1,005 is one thousand and five."""
    assert 0 <= number < LARGEST, f"{number} has no words here"
    if number < 20:
        return BELOW_20[number]
    if number < 100:
        return TENS[number // 10 - 2] + ("-" + BELOW_20[number % 10] if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, unit)
    link = " and " if rest < 100 else " "
    return f"{in_words(head)} {name}" + (link + in_words(rest) if rest else "")


def numbers() -> Iterator[tuple[str, str]]:
    """COUNT different numbers in digits and in words, always the same ones."""
    for number in random.Random(0).sample(range(LARGEST), COUNT):
        yield str(number), in_words(number)


def read_pairs(path: Path, keys: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """
    Pairs of a .tsv file (two columns) or a .jsonl file (under two keys), space around them cut off. Raises FileNotFoundError, or
    ValueError with the line, for what is not two texts, for an empty side, and for a tab inside one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give a .tsv or .jsonl file of pairs")
    if path.suffix not in (".tsv", ".jsonl"):
        raise ValueError(f"{path}: pairs are read from .tsv files (x, tab, y) or .jsonl files; rename or convert it")
    with open(path, "rb") as file:  # line by line, however large it is
        for number, line in enumerate(file, start=1):
            if line.strip(b"\r\n"):
                yield read_pair(line, path.suffix, keys, f"{path}, line {number}")


def read_pair(line: bytes, suffix: str, keys: tuple[str, str], place: str) -> tuple[str, str]:
    """The pair of a line; `place` names it in messages. See read_pairs."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason}); convert the file") from error
    if suffix == ".tsv":
        sides = text.split(SEPARATOR)
        if len(sides) != 2:
            raise ValueError(f"{place}: {len(sides)} columns; a pair is x, one tab, y")
    else:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from error
        sides = [row.get(key) for key in keys] if isinstance(row, dict) else [None]
        if not all(isinstance(side, str) for side in sides):
            raise ValueError(f"{place}: no texts under {keys[0]!r} and {keys[1]!r}; set --keys")
    x, y = (side.strip() for side in sides)
    for name, side in (("first", x), ("second", y)):
        if not side:
            raise ValueError(f"{place}: the {name} side is empty; leave the line out")
        if SEPARATOR in side or "\0" in side:
            raise ValueError(f"{place}: a tab or a zero byte in the {name} side, which stand between sides and pairs here")
    return x, y


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.arguments(__doc__, None, "byte", 0.02)
    parser.add_argument("--numbers", action="store_true", help=f"{COUNT:,} numbers and their English words; needs no file")
    parser.add_argument("--input", nargs="+", type=corpus.given_path, help=".tsv or .jsonl files")
    parser.add_argument("--keys", default="x,y", help="the two keys of .jsonl")
    parser.add_argument("--name", help="name of the data set, written to data/NAME unless --out_dir is given")
    args = corpus.parse(parser, argv)
    if args.numbers == bool(args.input):
        raise ValueError("give either --numbers or --input FILE, the pairs to prepare")
    keys = tuple(args.keys.split(","))
    if len(keys) != 2:
        raise ValueError(f"--keys {args.keys}: give two, such as question,answer")
    if args.numbers and args.name in (None, "numbers") and args.out_dir is None:
        out_dir = corpus.DATA / "numbers"
    else:
        out_dir = corpus.folder_for(args.name, args.out_dir)
    tokenizer = tokenizers.get(args.tokenizer) if args.tokenizer != "char" else None
    if tokenizer is None or tokenizer.eos is None or len(tokenizer.encode(SEPARATOR)) != 1:
        raise ValueError(
            f"tokenizer={args.tokenizer} has no token for the end of an answer or none for a tab; use byte or gpt2"
        )
    if args.numbers:
        pairs, source = numbers(), "numbers in digits and in words"
    else:
        pairs, source = (pair for path in args.input for pair in read_pairs(path, keys)), ", ".join(path.name for path in args.input)
    # of x alone: no question is on both sides
    sided = ((corpus.is_validation(x, args.val_fraction), x, y) for x, y in pairs)
    return write_pairs(sided, tokenizer, out_dir, source, args.name)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
