"""Small data sets for the tests of hpctrain.data, whose contents say which sample they are.

Row i of the source has x = [i, 2 i, 3 i] and label i % 5, so that a row that lands anywhere else
than it should is seen.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import h5py
import numpy as np

from hpctrain.data import Dataset, open_dataset, pack

__all__ = ["flip_chunk_byte", "make", "no_thread_left", "rows"]


def rows(n: int) -> dict[str, np.ndarray]:
    """The source arrays of n samples."""
    number = np.arange(n, dtype=np.float32)
    x = np.stack([number, 2 * number, 3 * number], axis=1)
    return {"x": x, "label": (np.arange(n) % 5).astype(np.int64)}


def make(path: Path | str, n: int, block: int = 4, shard: int = 10, **more) -> Dataset:
    """Pack n samples and open the data set."""
    pack(rows(n), path, block_samples=block, shard_samples=shard, **more)
    return open_dataset(path)


def flip_chunk_byte(path: Path, name: str, chunk: int) -> None:
    """Change one byte of a chunk's data, so that its checksum does not fit."""
    with h5py.File(path, "r", locking=False) as file:
        place = file[name].id.get_chunk_info(chunk).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@contextlib.contextmanager
def no_thread_left():
    """Fail if the block leaves a prefetch thread behind."""
    yield
    end = time.monotonic() + 5
    while time.monotonic() < end:
        left = [t for t in threading.enumerate() if t.name == "hpctrain-prefetch"]
        if not left:
            return
        time.sleep(0.01)
    raise AssertionError(f"threads left behind: {left}")
