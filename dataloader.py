"""
Token files on disk -> batches of windows. Nothing here has a state that a resumed run would have to restore:

- training:   `batch_starts(seed, step, count)` is a pure function, so a run continues, or is split over more processes or
              micro-batches, without seeing other data;
- evaluation: `eval_starts` is one fixed set of windows for all runs, and `full_windows` visits the whole split in order.

A data set is a folder with train.bin, val.bin (bare uint16 or uint32 token ids), meta.json and tokenizer.json. In a set of pairs
(meta.json has kind "pairs") the tokens are x SEP y EOS, x SEP y EOS, ..., and a window is one pair: PairData.
Legend: T block_size, n windows.
"""

import hashlib
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

DATA = Path(__file__).resolve().parent / "data"
# prepared without network, hence on first use and unasked
OFFLINE_SETS = {"stdlib": "data/stdlib/prepare.py", "numbers": "data/pairs/prepare.py --numbers"}
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SCAN_TOKENS = 16_000_000  # per read when a file is checked: 32 MB of uint16


def known_sets() -> list[str]:
    """Names of the sets that need nothing from the user (text, pairs and distill make sets out of files or runs of theirs)."""
    scripts = {path.parent.name for path in DATA.glob("*/prepare.py")} - {"text", "pairs", "distill"}
    return sorted(scripts | OFFLINE_SETS.keys())


def resolve(dataset: str | Path) -> Path:
    """Folder of a data set: a name in data/ ("stdlib"), or a path to a folder that holds train.bin or is that of a known set.

    Raises FileNotFoundError for a name that is neither.
    """
    named, path = DATA / dataset, Path(dataset)
    if str(dataset) in known_sets() or (len(path.parts) == 1 and (named / "train.bin").is_file()):
        return named
    if (path / "train.bin").is_file() or in_data(path):
        return path
    if (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is a run directory, not a data set; give the data set that it names in its config.json")
    own = {path.parent.name for path in DATA.glob("*/meta.json")}
    raise FileNotFoundError(
        f"no data set {str(dataset)!r}; known sets: {', '.join(sorted(own.union(known_sets())))}; "
        "or give a folder with train.bin, val.bin and meta.json (python data/text/prepare.py makes one of your own text, "
        "python data/pairs/prepare.py of pairs)"
    )


def prepare_if_missing(dataset: str | Path) -> Path:
    """Folder of the data set, prepared here and now when that needs no network.

    Raises FileNotFoundError with the command to run otherwise. Under several processes call it in one of them first.
    """
    folder = resolve(dataset)
    missing = [name for name in ("train.bin", "val.bin", "meta.json", "tokenizer.json") if not (folder / name).is_file()]
    if not missing:
        return folder
    if not in_data(folder) or folder.name not in OFFLINE_SETS:
        raise FileNotFoundError(
            f"data set {str(dataset)!r} is not prepared yet (no {', '.join(missing)}); run: {prepare_command(folder)}"
        )
    print(f"data set {dataset} is not prepared yet: running {prepare_command(folder)}", file=sys.stderr)
    script, *options = OFFLINE_SETS[folder.name].split()
    if subprocess.run([sys.executable, str(DATA.parent / script), *options], check=False).returncode != 0:
        raise FileNotFoundError(f"data set {str(dataset)!r} could not be prepared, see the message above")
    return folder


def in_data(folder: Path) -> bool:
    """Whether this is the folder in data/ of a known set."""
    return folder.parent.resolve() == DATA.resolve() and folder.name in known_sets()


def prepare_command(folder: Path) -> str:
    """The command that writes this data set (again), as far as its folder and what is left of its meta.json tell."""
    if in_data(folder):
        return f"python {OFFLINE_SETS.get(folder.name, f'data/{folder.name}/prepare.py')}"
    meta = json_in(folder / "meta.json")
    if not isinstance(meta, dict):  # the wrong script would overwrite what is there with another kind of set
        return "the script that made it, which may be data/text/prepare.py, data/pairs/prepare.py or data/distill/prepare.py"
    name, pairs, teacher = meta.get("dataset"), meta.get("kind") == "pairs", meta.get("teacher")
    if isinstance(teacher, dict):
        run, out = shlex.quote(str(teacher.get("run"))), shlex.quote(str(folder))
        return f"python data/distill/prepare.py --run {run} --out_dir {out} (remove {out} first)"
    script, tokens = f"data/{'pairs' if pairs else 'text'}/prepare.py --input YOUR_{'PAIRS' if pairs else 'TEXT'}", ""
    if name in known_sets() and pairs == (name == "numbers"):
        script = OFFLINE_SETS.get(name, f"data/{name}/prepare.py")
    elif isinstance(meta.get("tokenizer"), str):
        tokens = f" --tokenizer {shlex.quote(meta['tokenizer'])}"
    return f"python {script} --out_dir {shlex.quote(str(folder))}{tokens}"


def json_in(path: Path) -> object:
    """What a file holds, None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_meta(folder: Path) -> dict:
    """Contents of meta.json. Raises FileNotFoundError or ValueError where it is missing or damaged."""
    path, again = folder / "meta.json", f"run again: {prepare_command(folder)}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {again}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        dtype, hashes = meta["dtype"], [meta[split]["sha256"] for split in SPLITS]
        numbers = [meta["vocab_size"], *(meta[split][key] for split in SPLITS for key in ("tokens", "bytes"))]
        if meta.get("kind") == "pairs":
            numbers += [meta["separator"], meta["end"], meta["val"]["target_bytes"], meta["val"]["target_tokens"]]
        for values, kind, name in ((numbers, int, "integer"), (hashes, str, "text")):
            for value in values:
                if not isinstance(value, kind):
                    raise TypeError(f"{value!r} is no {name}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error
    if dtype not in list(DTYPES):
        raise ValueError(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPES)}; {again}")
    return meta


class TokenData:
    """The two splits of a data set, or the `only` one that is asked for, checked once at the start.

    Attributes: meta (contents of meta.json), vocab_size, val_hash (sha256 of val.bin, what a loss was measured on: data_hash in
    summary.json), both_hash (sha256 over both splits: data_hash in trainer.json), bytes_per_token (of val: nats per token /
    ln 2 / bytes_per_token = bits per byte), and the token arrays train and val (np.memmap).
    """

    def __init__(self, folder: str | Path, block_size: int, only: str | None = None):
        self.folder, self.block_size = Path(folder), block_size
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: at least 1 is needed")
        self.meta = read_meta(self.folder)
        self.vocab_size: int = self.meta["vocab_size"]
        self.dtype = DTYPES[self.meta["dtype"]]
        paths = {split: self.folder / f"{split}.bin" for split in SPLITS if only in (None, split)}
        for split in paths:
            self._check(split, block_size + 1 if only is None else 2)  # all of a split is read in windows that may be short
        self._maps = {split: np.memmap(path, dtype=self.dtype, mode="r") for split, path in paths.items()}
        # Batches are read through these handles, not through the maps: every page that is touched in a map, and up to 2 MB
        # around it, counts as resident memory of the process until it is as large as the file. A read costs 2 us a window.
        self._files = {split: io.FileIO(path) for split, path in paths.items()}
        self.val_hash: str = self.meta["val"]["sha256"]
        self.both_hash = hashlib.sha256((self.meta["train"]["sha256"] + self.val_hash).encode()).hexdigest()
        self.bytes_per_token: float = self.meta["val"]["bytes"] / self.meta["val"]["tokens"]

    train = property(lambda self: self._maps["train"])
    val = property(lambda self: self._maps["val"])

    def _check(self, split: str, least: int) -> None:
        """Raise ValueError, or FileNotFoundError, unless the file is what meta.json says, with `least` tokens, all in the vocabulary."""
        path, tokens = self.folder / f"{split}.bin", self.meta[split]["tokens"]
        again = f"run again: {prepare_command(self.folder)}"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {again}")
        size = path.stat().st_size
        with open(path, "rb") as file:
            # 133 bytes that git writes in place of a large file when the LFS extension is not installed
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a Git LFS pointer, not data; run git lfs pull, or {again}")
        if size == 0 or size != tokens * self.dtype.itemsize:
            raise ValueError(
                f"{path} has {size:,} bytes, but meta.json says {tokens:,} tokens of {self.dtype.itemsize} bytes: "
                f"it is {'empty' if size == 0 else 'truncated or of another data set'}; {again}"
            )
        if tokens < least:
            shorter = f"set --block_size to {tokens - 1} or less, or " if tokens > 1 else ""
            why = f"too few for block_size={self.block_size}, which needs {least:,}" if tokens > 1 else "of which none can be predicted"
            raise ValueError(f"{path} has {tokens:,} tokens, {why}; {shorter}prepare more text")
        highest, digest = -1, hashlib.sha256()
        with open(path, "rb") as file:  # plain reads: a map of the whole file would count as resident memory
            while (chunk := np.fromfile(file, dtype=self.dtype, count=SCAN_TOKENS)).size:
                highest = max(highest, int(chunk.max()))
                digest.update(chunk)
        if highest >= self.vocab_size:
            raise ValueError(f"{path} holds token id {highest}, but the vocabulary ends at {self.vocab_size - 1}; {again}")
        if digest.hexdigest() != self.meta[split]["sha256"]:
            raise ValueError(f"{path} is not the file that meta.json describes (its sha256 differs); {again}")

    def places(self, split: str) -> int:
        """How many starts a window of the split can have."""
        return len(self._maps[split]) - self.block_size

    def batch_starts(self, seed: int, step: int, count: int) -> np.ndarray:
        """(count,) int64 starts in train of all windows of one optimizer step, a pure function of the arguments.

        The step's sequences are drawn at once; the caller divides them among micro-batches and processes.
        """
        return np.random.default_rng([seed, step]).integers(0, self.places("train"), size=count, dtype=np.int64)

    def target_counts(self, starts: np.ndarray) -> np.ndarray:
        """Targets (count,) of the windows of train that begin at `starts`."""
        return np.full(len(starts), self.block_size)

    def eval_starts(self, split: str, count: int) -> np.ndarray:
        """(count,) int64 window starts, the same ones in every run whatever its seed, so that curves can be compared."""
        # three words, the last one not 0: a stream that no (seed, step) of batch_starts can have
        rng = np.random.default_rng([0, 0, 1 + SPLITS.index(split)])
        return rng.integers(0, self.places(split), size=count, dtype=np.int64)

    def gather(self, split: str, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows that begin at `starts` (n,): inputs x and targets y, both int64 (n, T); y[:, t] is the token after x[:, t].

        Not for two threads at once: they would move the same file position.
        """
        windows = np.empty((len(starts), self.block_size + 1), dtype=self.dtype)
        for row, start in zip(windows, starts, strict=True):
            self._files[split].seek(int(start) * self.dtype.itemsize)
            size = self._files[split].readinto(row)
            assert size == row.nbytes, f"{split}.bin ends within the window at {start}: it changed after the start of the run"
        windows = torch.from_numpy(windows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def full_windows(
        self, split: str, rows: int, rank: int = 0, world: int = 1, first_targets: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The whole split, or its first `first_targets` targets, in fixed order: batches (x, y) of exactly (rows, T), batch i going
        to process i % world.

        Over all ranks every token except the first is a target exactly once. What pads the last window and the last batch has
        input 0 and target -1 (ignored), so that a compiled model sees one shape and the *sum* of the losses does not depend on
        `rows` or `world`. Processes may get different numbers of batches.
        """
        ids, T = self._maps[split], self.block_size
        tokens = len(ids) if first_targets is None else min(len(ids), first_targets + 1)
        batch = rows * T  # targets per batch
        for first in range(rank * batch, tokens - 1, world * batch):
            starts = np.arange(first, min(first + batch, tokens - 1), T)
            x, y = torch.zeros(rows, T, dtype=torch.int64), torch.full((rows, T), -1, dtype=torch.int64)
            whole = starts[starts + T < tokens]
            x[: len(whole)], y[: len(whole)] = self.gather(split, whole)
            if len(whole) < len(starts):  # the end of the split, shorter than a window
                tail = torch.from_numpy(ids[starts[-1] : tokens].astype(np.int64))
                x[len(whole), : len(tail) - 1], y[len(whole), : len(tail) - 1] = tail[:-1], tail[1:]
            yield x, y


class PairData(TokenData):
    """
    The two splits of a set of pairs; `starts` are numbers of pairs. x and y of a window hold one pair, and only the tokens of its
    second side, with its end, are targets: any model that predicts the next token learns to answer.

    Attributes besides those of TokenData: longest_x and longest_y, tokens with SEP or EOS, and separator, the id of SEP;
    bytes_per_token is that of the second sides.
    """

    def __init__(self, folder: str | Path, block_size: int, only: str | None = None):
        super().__init__(folder, 1, only)
        self.block_size, self.separator = block_size, self.meta["separator"]
        self.bytes_per_token = self.meta["val"]["target_bytes"] / self.meta["val"]["target_tokens"]
        self.bounds: dict[str, np.ndarray] = {}  # (pairs, 3): where each begins, has its SEP, and has its EOS
        for split, ids in self._maps.items():
            ends = np.flatnonzero(ids == self.meta["end"])
            begins = np.concatenate(([0], ends[:-1] + 1))
            separators = np.flatnonzero(ids == self.separator)
            if len(separators) != len(ends) or not ((begins < separators) & (separators < ends)).all():
                raise ValueError(f"{folder}/{split}.bin is no list of pairs; run again: {prepare_command(self.folder)}")
            self.bounds[split] = np.stack((begins, separators, ends), axis=1)
        begins, separators, ends = np.concatenate(list(self.bounds.values())).T
        self.longest_x, self.longest_y = (separators - begins).max() + 1, (ends - separators).max()
        longest = (ends - begins).max()  # inputs: all but the end
        if longest > block_size:
            raise ValueError(
                f"{folder} has a pair of {longest} tokens before its end, but block_size={block_size}; raise block_size, or leave "
                "long pairs out"
            )

    def places(self, split: str) -> int:
        """How many pairs the split has: what is a start elsewhere is the number of a pair here."""
        return len(self.bounds[split])

    def target_counts(self, starts: np.ndarray) -> np.ndarray:
        """Targets (count,) of the pairs of train numbered `starts`."""
        return self.bounds["train"][starts, 2] - self.bounds["train"][starts, 1]

    def gather(self, split: str, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs numbered `starts` (n,): inputs x and targets y, both int64 (n, T); y is -1 but for the second sides."""
        x = torch.zeros(len(starts), self.block_size, dtype=torch.int64)
        y = torch.full_like(x, -1)
        for row, (begin, separator, end) in enumerate(self.bounds[split][starts]):
            ids = torch.from_numpy(self._maps[split][begin : end + 1].astype(np.int64))
            x[row, : end - begin] = ids[:-1]
            y[row, separator - begin : end - begin] = ids[separator - begin + 1 :]
        return x, y

    def full_windows(
        self, split: str, rows: int, rank: int = 0, world: int = 1, first_targets: int | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All pairs of a split in fixed order, or the first, one at least, up to `first_targets` targets: see TokenData.full_windows."""
        targets = np.cumsum(self.bounds[split][:, 2] - self.bounds[split][:, 1])
        count = len(targets) if first_targets is None else max(1, int(np.searchsorted(targets, first_targets, side="right")))
        for first in range(rank * rows, count, world * rows):
            x, y = self.gather(split, np.arange(first, min(first + rows, count)))
            padding = (0, 0, 0, rows - len(x))
            yield F.pad(x, padding), F.pad(y, padding, value=-1)

    def questions(self, split: str, count: int) -> Iterator[tuple[list[int], list[int]]]:
        """The first sides, with SEP, and the second ones, without end, of the first `count` pairs of a split, as token ids."""
        for begin, separator, end in self.bounds[split][:count]:
            ids = self._maps[split][begin:end].tolist()
            yield ids[: separator + 1 - begin], ids[separator + 1 - begin :]


def open_data(folder: str | Path, block_size: int, only: str | None = None) -> TokenData:
    """
    A data set, or `only` one of its splits, by what its meta.json says of it. Raises ValueError or FileNotFoundError for one that
    cannot be used.
    """
    return (PairData if read_meta(Path(folder)).get("kind") == "pairs" else TokenData)(folder, block_size, only)
