"""
The training text as codes of a frozen autoencoder, extracted once and kept beside it: codes.bin holds bare uint16 codes, window
after window of M stacks of D codes, and meta.json says whose codes of which text they are. Codes of anything else are extracted
again, because nothing that is trained on them would notice.

Windows are block_size tokens long, encoded in evaluation mode. They begin at multiples of block_size; every further copy begins
elsewhere, up to S of them at different places modulo S, so that the same text is cut into other blocks.

Shapes: n windows, T tokens, S tokens of a block, M = T / S blocks, D levels.
"""

import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import runtime
from dataloader import TokenData, json_in
from latent.autoencoder import Autoencoder
from latent.quantize import distributed

TOKENS = 8192  # encoded at a time, and written before the next are read


class CodeData:
    """The store in `folder`, made where it is missing or stale; `batch_starts` and `gather` as TokenData has them."""

    def __init__(self, folder: Path, data: TokenData, autoencoder: Autoencoder, offsets: int = 1):
        """`data` is the text. Under several processes all have to come here: rank 0 extracts, the others wait."""
        config = autoencoder.config
        if config.codebook_size > 2**16:
            raise ValueError(f"codebook_size={config.codebook_size}: codes are stored in 16 bits, so 65536 is the limit")
        T, tokens = config.block_size, len(data.train)
        begins = begins_of_copies(T, config.latent_factor, offsets)
        starts = np.concatenate([np.arange(begin, tokens - T, T) for begin in begins])
        self.shape = (T // config.latent_factor, config.codebook_levels)  # M, D
        meta = {
            "codebook_hash": autoencoder.codebook_hash(), "data_hash": data.both_hash, "block_size": T,
            "latent_factor": config.latent_factor, "codebook_levels": config.codebook_levels,
            "codebook_size": config.codebook_size, "offsets": begins, "windows": len(starts),
        }  # fmt: skip
        self.windows, path = len(starts), folder / "codes.bin"
        if not distributed() or dist.get_rank() == 0:
            found = json_in(folder / "meta.json")
            stored = found if isinstance(found, dict) else {}
            changed = [key for key in meta if stored.get(key) != meta[key]]
            if not changed and not (path.is_file() and sha256(path) == stored.get("sha256")):
                changed = ["codes.bin is damaged"]
            if changed:
                if stored:
                    print(f"note: {folder} does not hold what is needed ({', '.join(changed)}): the codes are extracted again")
                extract(folder, data, autoencoder, starts, meta)
        if distributed():
            dist.barrier()
        self._file = io.FileIO(path)  # not a map, whose pages would stay resident

    def batch_starts(self, seed: int, step: int, count: int) -> np.ndarray:
        """(count,) int64 numbers of the windows of one optimizer step, a pure function of the arguments."""
        return np.random.default_rng([seed, step]).integers(0, self.windows, size=count, dtype=np.int64)

    def target_counts(self, starts: np.ndarray) -> np.ndarray:
        """Codes (count,) of the windows numbered `starts`."""
        return np.full(len(starts), np.prod(self.shape))

    def gather(self, split: str, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, M, D) int64 of the windows numbered `starts` (n,), as inputs and as targets."""
        assert split == "train", f"only the training text is stored as codes, not {split}"
        windows = np.empty((len(starts), *self.shape), dtype="<u2")
        for row, start in zip(windows, starts, strict=True):
            self._file.seek(int(start) * row.nbytes)
            size = self._file.readinto(row)
            assert size == row.nbytes, f"codes.bin ends within window {start}: it changed after the start of the run"
        codes = torch.from_numpy(windows.astype(np.int64))
        return codes, codes


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def begins_of_copies(T: int, S: int, copies: int) -> list[int]:
    """Tokens before the first window of each copy: spread over a window (copies <= M), all different modulo S (copies <= S)."""
    return [i * (T // copies // S * S) + i for i in range(copies)]


@torch.no_grad()
def extract(folder: Path, data: TokenData, autoencoder: Autoencoder, starts: np.ndarray, meta: dict) -> None:
    """Write the store: the codes first, what they are last, so that a crash leaves no store."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
    except OSError as error:  # the autoencoder is another user's, say
        raise OSError(
            f"{folder}: {error.strerror}; the codes of the training text are kept there, beside the autoencoder: make a copy of "
            "its run where you may write, and give that to --autoencoder"
        ) from None
    device, began, rows = next(autoencoder.parameters()).device, time.perf_counter(), max(1, TOKENS // meta["block_size"])
    print(
        f"encoding the training text: {len(starts):,} windows of {meta['block_size']} tokens, once, into {folder}", flush=True
    )
    # of this process alone: another run on the same autoencoder may be at the same work
    codes_file, meta_file = (folder / f"{name}.{os.getpid()}.tmp" for name in ("codes.bin", "meta.json"))
    try:
        with open(codes_file, "wb") as file:
            firsts = range(0, len(starts), rows)
            for first in runtime.with_progress(firsts, len(firsts), "encoded"):
                text, _ = data.gather("train", starts[first : first + rows])
                codes = autoencoder.encode(text.to(device)).cpu().numpy()
                file.write(codes.astype("<u2").tobytes())
        meta = meta | {"sha256": sha256(codes_file)}
        os.replace(codes_file, folder / "codes.bin")
    finally:
        codes_file.unlink(missing_ok=True)
    meta_file.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    os.replace(meta_file, folder / "meta.json")
    print(f"encoded in {time.perf_counter() - began:.0f} s", flush=True)
