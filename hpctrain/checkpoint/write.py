"""Writing a checkpoint: all ranks side by side into one folder, made visible by one rename.

    rank 0        removes leftovers, checks the free space, makes .tmp-step_00001200 and its files
    every rank    writes and hashes the ranges it owns, and puts them on the disk (fsync)
    rank 0        writes state.json, syncs, renames the folder, syncs, removes old checkpoints

A folder that is called step_00001200 was therefore complete on the disk before it had the name.
A failure on any rank before the rename is an error on all, and the earlier checkpoints remain.

Layer: checkpoint. Is given arrays and a communicator; knows nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint.agree import on_every_rank, on_rank_zero
from hpctrain.checkpoint.parts import Part, Plan, check_owners, check_parts, plan_files
from hpctrain.checkpoint.record import (
    RECORD,
    REPLACED,
    Piece,
    Record,
    checked_state,
    checkpoint_step,
    checkpoints,
    folder_name,
    sync_folder,
)
from hpctrain.checkpoint.tensors import SUFFIX
from hpctrain.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["save"]

LOG = logging.getLogger(__name__)
ASIDE = ".tmp-"
SPARE = 1 << 20  # bytes of free space wanted beyond the files, for state.json and folders

ToHost = Callable[[Any], NDArray[Any]]


def save(
    folder: Path | str,
    step: int,
    parts: Sequence[Part],
    state: Mapping[str, Any],
    comm: MPI.Intracomm,
    keep: int = 2,
    to_host: ToHost = np.asarray,
) -> Path:
    """Write `folder`/step_00001200 (for step 1200) and return it. Collective.

    A checkpoint of the same step is replaced. Then only the newest `keep` up to this step remain;
    newer ones (after going back to an old one) are left alone. The result does not depend on the
    number of ranks or on who owns what, but for the list of pieces in state.json.

    Args:
        folder: where a run's checkpoints lie, and nothing else; shared by all ranks.
        parts: equally many and alike on all ranks; the ranges that the ranks own must cover each
            layout once. A replicated array is owned whole by one rank, (0, 0) by the others.
        state: rank 0's is written; plain JSON without NaN. `load` adds "step" to it.
        keep: at least 1.
        to_host: a host copy of a flat piece of an array (at most 16 MiB); `device.to_host`.

    The arrays must not change meanwhile. Returns when the checkpoint is on the disk.

    Raises:
        CheckpointError: the same on all ranks: the disk is full, a rank cannot write, the parts
            or the state cannot be stored. Nothing is left behind, earlier checkpoints remain.
    """
    folder, name = Path(folder), folder_name(step)
    aside, doing = folder / f"{ASIDE}{name}", f"checkpoint {name} cannot be written to {folder}"
    plans = on_every_rank(comm, doing, lambda: _plans(parts))
    owned = comm.gather((_digest(parts, plans), [part.owned for part in parts])) or []
    plain = on_rank_zero(comm, doing, lambda: _checked(parts, owned, state, keep))
    try:
        on_rank_zero(comm, doing, lambda: _prepare(folder, aside, plans))
        first = comm.rank == 0
        pieces = on_every_rank(comm, doing, lambda: _write(aside, plans, parts, to_host, first))
        lists = comm.gather(pieces) or []
        on_rank_zero(
            comm, doing, lambda: _publish(aside, folder / name, _record(step, plain, plans, lists))
        )
    except CheckpointError:
        on_rank_zero(comm, doing, lambda: shutil.rmtree(aside, ignore_errors=True))
        raise
    on_rank_zero(comm, doing, lambda: _prune(folder, step, keep))
    return folder / name


def _plans(parts: Sequence[Part]) -> dict[str, Plan]:
    check_parts(parts)
    return plan_files(parts)


def _digest(parts: Sequence[Part], plans: Mapping[str, Plan]) -> str:
    """Equal where all that must be equal on all ranks is."""
    keys = [part.key() for part in parts]
    same = [keys.index(key) for key in keys]
    described = [(part.file, part.prefix, part.layout.size) for part in parts]
    headers = [(name, plan.header) for name, plan in plans.items()]
    return hashlib.sha256(repr((same, described, headers)).encode()).hexdigest()


def _checked(
    parts: Sequence[Part],
    owned: list[tuple[str, list[tuple[int, int]]]],
    state: Mapping[str, Any],
    keep: int,
) -> dict[str, Any]:
    """Rank 0: do the ranks' parts fit together? Returns the state."""
    odd = [rank for rank, (digest, _) in enumerate(owned) if digest != owned[0][0]]
    if odd:
        raise CheckpointError(f"rank {odd[0]} passes other parts or layouts than rank 0")
    if keep < 1:
        raise CheckpointError(f"keep is {keep}, but at least 1 checkpoint must be kept")
    check_owners(parts, [ranges for _, ranges in owned])
    return checked_state(state)


def _prepare(folder: Path, aside: Path, plans: Mapping[str, Plan]) -> None:
    """Rank 0: an empty folder aside, with files of full size. Leftovers of a killed save go."""
    new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if new:
        sync_folder(folder.parent)
    for stale in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(stale)
    needed, disk = sum(plan.size for plan in plans.values()) + SPARE, os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:  # some file systems tell nothing: 0 blocks
        raise CheckpointError(
            f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; "
            "make room, or keep fewer checkpoints"
        )
    aside.mkdir()
    for name, plan in plans.items():
        with _opened(aside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            os.ftruncate(descriptor, plan.size)


def _write(
    aside: Path, plans: Mapping[str, Plan], parts: Sequence[Part], to_host: ToHost, first: bool
) -> list[Piece]:
    """Write and sync what this rank owns, and the headers where it is the first rank."""
    pieces: list[Piece] = []
    for name, plan in plans.items():
        mine = [p for p in parts if f"{p.file}{SUFFIX}" == name and p.owned[0] < p.owned[1]]
        if not (first or mine):
            continue
        with _opened(aside / name, os.O_WRONLY) as descriptor:
            for offset, data in _blocks(plan, mine, to_host, first):
                _write_at(descriptor, data, offset)
                digest = hashlib.sha256(data).hexdigest()
                pieces.append(Piece(name, offset, offset + data.nbytes, digest))
            os.fsync(descriptor)
    return pieces


def _blocks(
    plan: Plan, parts: Sequence[Part], to_host: ToHost, first: bool
) -> Iterator[tuple[int, memoryview]]:
    """(offset in the file, bytes) of all that this rank writes to it."""
    if first:
        yield 0, memoryview(plan.header)
    for part in parts:
        for start, stop in part.chunks():
            runs = part.runs(plan.tensors, start, stop)
            if not runs:
                continue  # only padding
            host = to_host(part.view(start, stop))
            cut = [host[begin:end] for _, begin, end in runs]
            data = cut[0] if len(cut) == 1 else np.concatenate(cut)  # they join in the file
            yield runs[0][0], np.ascontiguousarray(data).data.cast("B")


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor; an OSError on the way names the file."""
    try:
        with ExitStack() as stack:
            descriptor = os.open(path, flags, 0o644)
            stack.callback(os.close, descriptor)
            yield descriptor
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _record(
    step: int, state: dict[str, Any], plans: Mapping[str, Plan], lists: list[list[Piece]]
) -> Record:
    dtypes = {t.dtype for plan in plans.values() for t in plan.tensors.values()}
    pieces = [piece for pieces in lists for piece in pieces]
    return Record(
        step=step,
        state=state,
        dtypes=sorted(map(str, dtypes)),
        files={name: plan.size for name, plan in plans.items()},
        pieces=sorted(pieces, key=lambda piece: (piece.file, piece.start)),
    )


def _publish(aside: Path, final: Path, record: Record) -> None:
    """Rank 0: complete the folder and give it its name."""
    with _opened(aside / RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        _write_at(descriptor, memoryview(record.encode()), 0)
        os.fsync(descriptor)
    sync_folder(aside)
    if final.exists():
        spare = final.with_name(f"{REPLACED}{final.name}")
        if spare.exists():
            shutil.rmtree(spare)
        final.rename(spare)  # until the next line `latest_valid` finds it there
    aside.rename(final)
    sync_folder(final.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Rank 0: remove all but the newest `keep` up to this step. A failure is only a warning."""
    old = [path for path in checkpoints(folder) if checkpoint_step(path) <= step]
    newest = {checkpoint_step(path): path for path in reversed(old)}  # of one step the first
    kept = sorted(newest, reverse=True)[:keep]
    for path in old:
        if path != newest[checkpoint_step(path)] or checkpoint_step(path) not in kept:
            try:
                gone = path.rename(folder / f"{ASIDE}{path.name}")  # never half a checkpoint
                shutil.rmtree(gone)
            except OSError as error:
                LOG.warning("the old checkpoint %s cannot be removed: %s", path, error.strerror)
