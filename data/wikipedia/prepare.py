"""
English Wikipedia, the setting of the published runs: 178.7 MB of articles, GPT-2 byte-pair encoding, 10 % validation.

    python data/wikipedia/prepare.py                              # streams the articles from the Hugging Face Hub
    python data/wikipedia/prepare.py --input articles.txt.xz      # local text, two empty lines between articles
    python data/wikipedia/prepare.py --input *.parquet --text_key title,text   # files of the same repository fetched by hand

Without --input it stops after --max_bytes 178723194, the size of the published text.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

from data import corpus, sources
from errors import exit_on_user_error

REPOSITORY, SNAPSHOT = "wikimedia/wikipedia", "20231101.en"
REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"  # Parquet files: `datasets` runs no script of the repository
PUBLISHED_BYTES = 178_723_194  # text of the published runs


def articles(path: str = REPOSITORY, name: str | None = SNAPSHOT, revision: str | None = REVISION, **options) -> Iterator[str]:
    """Title, an empty line, text. The arguments are those of datasets.load_dataset, e.g. "parquet" with data_files=..."""
    for row in sources.stream_rows(path, name=name, revision=revision, **options):
        yield row["title"] + "\n\n" + row["text"]


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.arguments(__doc__, Path(__file__).resolve().parent, "gpt2", 0.1)
    corpus.input_arguments(parser)
    args = corpus.parse(parser, argv)
    if args.input:
        max_bytes, documents = args.max_bytes, lambda: corpus.read_inputs(args)
        source = ", ".join(path.name for path in args.input)
    else:
        max_bytes, documents = PUBLISHED_BYTES if args.max_bytes is None else args.max_bytes, articles
        source = f"{REPOSITORY} {SNAPSHOT} at revision {REVISION}, the first {max_bytes:,} bytes"
    tokenizer = corpus.make_tokenizer(args.tokenizer, lambda: sources.take_bytes(documents(), max_bytes))
    return corpus.write_dataset(documents(), tokenizer, args.out_dir, args.val_fraction, source, "wikipedia", max_bytes)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
