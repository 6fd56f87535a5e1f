"""
Your own text as a data set. Files or folders; text, .jsonl or .parquet; plain, .gz, .xz or .zst; any size.

    python data/text/prepare.py --input notes/ --name notes --tokenizer byte
    python data/text/prepare.py --input novels.txt --name novels --tokenizer gpt2 --separator '<|endoftext|>'
    python train.py config/quickstart.py --dataset=notes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

from data import corpus, sources
from errors import exit_on_user_error


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.arguments(__doc__, None, "byte", 0.1)
    corpus.input_arguments(parser, required=True)
    parser.add_argument("--name", help="name of the data set, written to data/NAME unless --out_dir is given")
    args = corpus.parse(parser, argv)
    out_dir = corpus.folder_for(args.name, args.out_dir)
    tokenizer = corpus.make_tokenizer(args.tokenizer, lambda: sources.take_bytes(corpus.read_inputs(args), args.max_bytes))
    source = ", ".join(path.name for path in args.input)
    return corpus.write_dataset(corpus.read_inputs(args), tokenizer, out_dir, args.val_fraction, source, args.name, args.max_bytes)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
