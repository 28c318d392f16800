"""A checkpoint in the making: its files, written aside and renamed when they are whole.

    .tmp-step_00001200     made by rank 0, with files of full size
    blocks                 bytes of a file, and where they go: each rank writes its own, hashed
    step_00001200          the same folder once state.json is in it and all of it is on the disk

Layer: checkpoint. Nothing here talks to other ranks, so a thread may do it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.checkpoint.record import (
    RECORD,
    REPLACED,
    Piece,
    Record,
    checkpoint_step,
    checkpoints,
    folder_name,
    sync_folder,
)
from hpctrain.errors import CheckpointError

__all__ = ["Block", "Draft", "opened", "write_at", "write_whole"]

LOG = logging.getLogger(__name__)
ASIDE = ".tmp-"
SPARE = 1 << 20  # bytes of free space wanted beyond the files, for state.json and folders


class Block(NamedTuple):
    """Bytes of a file, from `start` on."""

    file: str
    start: int
    data: memoryview


def _nothing() -> None:
    """What a beat does where nobody listens."""


@dataclass(frozen=True)
class Draft:
    """What is to become `folder`/step_00001200.

    Args:
        keep: how many checkpoints remain.
        sizes: name of each file -> bytes.
        dtypes: of the tensors.
        state: the caller's; only rank 0's is written.
    """

    folder: Path
    step: int
    keep: int
    sizes: Mapping[str, int]
    dtypes: list[str]
    state: dict[str, Any]

    @property
    def aside(self) -> Path:
        """Where it is made."""
        return self.folder / f"{ASIDE}{folder_name(self.step)}"

    @property
    def final(self) -> Path:
        """Where it will be."""
        return self.folder / folder_name(self.step)

    def prepare(self) -> None:
        """Rank 0: an empty folder aside, with files of full size. Leftovers of a killed save go."""
        new = not self.folder.is_dir()
        self.folder.mkdir(parents=True, exist_ok=True)
        if new:
            sync_folder(self.folder.parent)
        for stale in self.folder.glob(f"{ASIDE}*"):
            shutil.rmtree(stale)
        needed, disk = sum(self.sizes.values()) + SPARE, os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and free < needed:  # some file systems tell nothing: 0 blocks
            raise CheckpointError(
                f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; "
                "make room, or keep fewer checkpoints"
            )
        self.aside.mkdir()
        for name, size in self.sizes.items():
            with opened(self.aside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                os.ftruncate(descriptor, size)

    def write(self, blocks: Iterable[Block], beat: Callable[[], None] = _nothing) -> list[Piece]:
        """Write and hash `blocks`, those of a file after each other, and put them on the disk.

        `beat` is called after each.
        """
        pieces: list[Piece] = []
        with ExitStack() as stack:
            file, descriptor = "", -1
            for block in blocks:
                if block.file != file:
                    stack.close()
                    file = block.file
                    descriptor = stack.enter_context(opened(self.aside / file, os.O_WRONLY))
                    stack.callback(os.fsync, descriptor)
                pieces.append(write_at(descriptor, block))
                beat()
        return pieces

    def publish(self, lists: list[list[Piece]]) -> Path:
        """Rank 0: complete the folder and give it its name. `lists`: every rank's pieces."""
        pieces = [piece for pieces in lists for piece in pieces]
        pieces.sort(key=lambda piece: (piece.file, piece.start))
        record = Record(self.step, self.state, self.dtypes, dict(self.sizes), pieces)
        with opened(self.aside / RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            write_whole(descriptor, memoryview(record.encode()), 0)
            os.fsync(descriptor)
        sync_folder(self.aside)
        if self.final.exists():
            spare = self.final.with_name(f"{REPLACED}{self.final.name}")
            if spare.exists():
                shutil.rmtree(spare)
            self.final.rename(spare)  # until the next line `latest_valid` finds it there
        self.aside.rename(self.final)
        sync_folder(self.folder)
        return self.final

    def prune(self) -> None:
        """Rank 0: remove all but the newest `keep` up to this step. A failure is only a warning."""
        folder = self.folder
        old = [path for path in checkpoints(folder) if checkpoint_step(path) <= self.step]
        newest = {checkpoint_step(path): path for path in reversed(old)}  # of one step the first
        kept = sorted(newest, reverse=True)[: self.keep]
        for path in old:
            if path != newest[checkpoint_step(path)] or checkpoint_step(path) not in kept:
                try:
                    gone = path.rename(folder / f"{ASIDE}{path.name}")  # never half a checkpoint
                    shutil.rmtree(gone)
                except OSError as error:
                    LOG.warning("the old checkpoint %s cannot be removed: %s", path, error.strerror)

    def discard(self) -> None:
        """Rank 0: remove what was written; no rank may write any more."""
        shutil.rmtree(self.aside, ignore_errors=True)


def write_at(descriptor: int, block: Block, offset: int | None = None) -> Piece:
    """Write a block at its place, or at `offset`, and hash it."""
    start, data = block.start, block.data
    write_whole(descriptor, data, start if offset is None else offset)
    return Piece(block.file, start, start + data.nbytes, hashlib.sha256(data).hexdigest())


def write_whole(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor; an OSError on the way names the file."""
    try:
        with ExitStack() as stack:
            descriptor = os.open(path, flags, 0o644)
            stack.callback(os.close, descriptor)
            yield descriptor
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
