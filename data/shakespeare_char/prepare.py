"""
Tiny Shakespeare by characters, split as nanoGPT splits it: the first 90 % of the text train, the rest validates
(1,003,854 and 111,540 characters, 65 different ones), so that losses can be compared.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input input.txt
"""

import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

from data import corpus, sources
from errors import exit_on_user_error

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CHARACTERS = 1_115_394  # of the file nanoGPT uses; the address names no revision


def download(url: str = URL) -> str:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            text = response.read().decode("utf-8")
    except OSError as error:  # URLError and time-outs
        raise FileNotFoundError(f"could not reach {url} ({error}); check the network, or give the file with --input") from error
    if len(text) != CHARACTERS:
        size = f"{len(text):,} characters instead of {CHARACTERS:,}"
        raise ValueError(f"{url} has {size}: not the known file; give that with --input")
    return text


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.arguments(__doc__, Path(__file__).resolve().parent, "char", 0.1)
    parser.add_argument("--input", type=corpus.given_path, help="the text, instead of downloading it")
    args = corpus.parse(parser, argv)
    text = "".join(sources.read_text(args.input)) if args.input else download()
    cut = int(len(text) * (1 - args.val_fraction))
    tokenizer = corpus.make_tokenizer(args.tokenizer, lambda: [text])
    sided = [(False, text[:cut]), (True, text[cut:])]
    return corpus.write_sides(sided, tokenizer, args.out_dir, args.input.name if args.input else URL, "shakespeare_char")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
