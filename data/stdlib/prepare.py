"""
The default data set: the source of the running Python's own standard library, as bytes. Real text of about 12 MB on every
machine, without a download. One file is one document.

    python data/stdlib/prepare.py
"""

import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, when run as a script

from data import corpus
from errors import exit_on_user_error

# tests (a third of the tree, much of it data), what pip installed, and files generated for one machine
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
GENERATED = ("_sysconfigdata", "_sysconfig_vars", "config-")


def documents(library: Path) -> Iterator[str]:
    """Text of every .py file under `library`, in the order of their relative paths; files that are not UTF-8 are left out."""
    for path in sorted((p.relative_to(library) for p in library.rglob("*.py")), key=lambda p: p.as_posix()):
        if LEFT_OUT.intersection(path.parts) or any(part.startswith(GENERATED) for part in path.parts):
            continue
        try:
            text = (library / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield text


def main(argv: list[str] | None = None) -> dict:
    parser = corpus.arguments(__doc__, Path(__file__).resolve().parent, "byte", 0.05)
    args = corpus.parse(parser, argv)
    source = f"standard library of {platform.python_implementation()} {platform.python_version()}, without tests"
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer = corpus.make_tokenizer(args.tokenizer, lambda: documents(library))
    return corpus.write_dataset(documents(library), tokenizer, args.out_dir, args.val_fraction, source, dataset="stdlib")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
