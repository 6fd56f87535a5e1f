"""
FineWeb: English web pages (arXiv:2406.17557), the first gigabyte of the 10-billion-token sample, GPT-2 byte-pair encoding.

    python data/fineweb/prepare.py --max_bytes 1000000000
    python data/fineweb/prepare.py --input 000_00000.parquet      # files of the same repository fetched by hand, all of them

Without --input it stops after --max_bytes 1000000000 unless told otherwise.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

from data import corpus, sources
from errors import exit_on_user_error

REPOSITORY, SAMPLE = "HuggingFaceFW/fineweb", "sample-10BT"
REVISION = "9bb295ddab0e05d785b879661af7260fed5140fc"  # tag v1.4.0
DEFAULT_BYTES = 1_000_000_000


def pages(path: str = REPOSITORY, name: str | None = SAMPLE, revision: str | None = REVISION, **options) -> Iterator[str]:
    """Text of the pages. The arguments are those of datasets.load_dataset, e.g. "parquet" with data_files=..."""
    for row in sources.stream_rows(path, name=name, revision=revision, **options):
        yield row["text"]


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.arguments(__doc__, Path(__file__).resolve().parent, "gpt2", 0.01)
    corpus.input_arguments(parser)
    args = corpus.parse(parser, argv)
    if args.input:
        max_bytes, documents = args.max_bytes, lambda: corpus.read_inputs(args)
        source = ", ".join(path.name for path in args.input)
    else:
        max_bytes, documents = DEFAULT_BYTES if args.max_bytes is None else args.max_bytes, pages
        source = f"{REPOSITORY} {SAMPLE} at revision {REVISION}, the first {max_bytes:,} bytes"
    tokenizer = corpus.make_tokenizer(args.tokenizer, lambda: sources.take_bytes(documents(), max_bytes))
    return corpus.write_dataset(documents(), tokenizer, args.out_dir, args.val_fraction, source, "fineweb", max_bytes)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
