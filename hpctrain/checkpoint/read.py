"""Reading a checkpoint: which one, is it whole, does it fit, and its tensors, for any ranks.

Verifying comes first (`latest_valid`, or `verify` for a path that the user named): every byte is
hashed, the work shared by the ranks. `load` then reads only what each rank wants.

Layer: checkpoint. Is given arrays and a communicator; knows nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint.agree import on_every_rank, on_rank_zero
from hpctrain.checkpoint.parts import CHUNK, Part, Plan, check_parts, plan_files
from hpctrain.checkpoint.record import Piece, checkpoints, read_record
from hpctrain.checkpoint.tensors import SUFFIX, Tensor, read_header
from hpctrain.errors import CheckpointError, nearest

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Description", "describe", "latest_valid", "load", "verify"]

LOG = logging.getLogger(__name__)
SHOWN = 5  # tensors named in a message

Fill = Callable[[Any, NDArray[Any]], None]


@dataclass(frozen=True, slots=True)
class Description:
    """What a checkpoint holds: `files` as name -> bytes, `tensors` as file -> name -> tensor."""

    path: Path
    step: int
    state: dict[str, Any]
    dtypes: list[str]
    files: dict[str, int]
    tensors: dict[str, dict[str, Tensor]]


def describe(path: Path | str) -> Description:
    """What the checkpoint `path` holds. Reads state.json and headers only; needs no MPI.

    Raises:
        CheckpointError: it is missing, or a file is not complete. Data are not verified.
    """
    path = Path(path)
    try:
        record = read_record(path)
        tensors = {name: read_header(path / name) for name in record.files}
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    return Description(path, record.step, record.state, record.dtypes, record.files, tensors)


def latest_valid(folder: Path | str, comm: MPI.Intracomm) -> Path | None:
    """The newest checkpoint in `folder` that is whole, the same on all ranks. Collective.

    Each that is not is named in a warning, with the reason, and the one before it is tried. None
    where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints but none is whole. Starting anew would hide that.
    """
    folder = Path(folder)
    found = on_rank_zero(comm, f"checkpoints in {folder}", lambda: checkpoints(folder))
    for path in found:
        try:
            verify(path, comm)
        except CheckpointError as error:
            if comm.rank == 0:
                LOG.warning("%s; trying the one before it", error)
        else:
            return path
    if not found:
        return None
    raise CheckpointError(
        f"none of the {len(found)} checkpoints in {folder} is whole; "
        "move them away to start from the beginning"
    )


def verify(path: Path | str, comm: MPI.Intracomm) -> None:
    """Check every byte of the checkpoint `path`, the ranks sharing the work. Collective.

    Raises:
        CheckpointError: the same on all ranks; it names the file and what is wrong with it.
    """
    path = Path(path)
    doing = f"checkpoint {path} is not whole"
    record = on_rank_zero(comm, doing, lambda: read_record(path))
    count = len(record.pieces)
    first, last = comm.rank * count // comm.size, (comm.rank + 1) * count // comm.size
    on_every_rank(comm, doing, lambda: _verify_pieces(path, record.pieces[first:last]))


def load(
    path: Path | str,
    parts: Sequence[Part],
    comm: MPI.Intracomm,
    partial: bool = False,
    fill: Fill = np.copyto,
) -> dict[str, Any]:
    """Fill each part's range of its array from the checkpoint `path`. Collective.

    Returns the state that was saved, and in "step" its step.

    The tensors' names, shapes and dtypes must be those of the parts' layouts, the same on all
    ranks. The ranges are what each rank wants: they may overlap, be empty, leave gaps. Padding in
    a range is set to zero. Nothing is verified: see `latest_valid` and `verify`.

    Args:
        partial: parts need not name every file of the checkpoint (evaluation reads parameters
            only). Within a file all tensors are always needed.
        fill: copies a host array (at most 16 MiB) into a flat piece of an array; for a device
            `lambda piece, host: device.copy(piece, device.from_host(host))`.

    Raises:
        CheckpointError: the same on all ranks: it cannot be read, or does not fit, naming tensors.
            Arrays may be partly filled only where reading itself failed.
    """
    path = Path(path)
    doing = f"checkpoint {path} cannot be loaded"
    plans = on_every_rank(comm, doing, lambda: _checked_plans(parts))
    state, files = on_rank_zero(comm, doing, lambda: _fitting(path, plans, partial))
    on_every_rank(comm, doing, lambda: _fill(path, files, parts, fill))
    return state


def _checked_plans(parts: Sequence[Part]) -> dict[str, Plan]:
    check_parts(parts)
    return plan_files(parts)


def _verify_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    longest = max((piece.stop - piece.start for piece in pieces), default=0)
    buffer = memoryview(bytearray(min(longest, CHUNK)))
    for piece in pieces:
        digest = hashlib.sha256()
        with _opened(path / piece.file) as file:
            file.seek(piece.start)
            for start in range(piece.start, piece.stop, CHUNK):
                block = buffer[: min(CHUNK, piece.stop - start)]
                _read_into(file, block)
                digest.update(block)
        if digest.hexdigest() != piece.sha256:
            raise CheckpointError(
                f"{piece.file} was changed: bytes {piece.start:,} up to {piece.stop:,} "
                "do not match their checksum"
            )


def _opened(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def _read_into(file: BinaryIO, block: memoryview) -> None:
    while block:
        count = file.readinto(block)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{Path(file.name).name} ends too early")
        block = block[count:]


def _fitting(
    path: Path, plans: Mapping[str, Plan], partial: bool
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Rank 0: the state and the files' headers, if they hold what the parts want, and no more."""
    record = read_record(path)
    headers = {name: read_header(path / name) for name in plans if name in record.files}
    faults = [f"it has no {name}" for name in plans if name not in headers]
    if not partial:
        faults += [f"the run has nothing like its {n}" for n in record.files if n not in plans]
    for name, header in headers.items():
        faults += _misfits(name, header, plans[name].tensors)
    if len(faults) > SHOWN:
        faults[SHOWN:] = [f"and {len(faults) - SHOWN} more differences"]
    if faults:
        raise CheckpointError(
            f"{'; '.join(faults)}. Use the model, optimizer and precision that it was written with"
        )
    return record.state | {"step": record.step}, headers


def _misfits(file: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in here if name not in there]
    surplus = [name for name in there if name not in here]
    faults = [f"{file} has no {name!r}{nearest(name, surplus)}" for name in missing]
    faults += [f"the run has no {n!r}{nearest(n, missing)}, which {file} holds" for n in surplus]
    for name, wanted in here.items():
        if name in there and there[name][:2] != wanted[:2]:  # dtype, shape
            faults.append(f"{name!r} is {there[name].kind} in {file}, {wanted.kind} in the run")
    return faults


def _fill(
    path: Path, files: Mapping[str, Mapping[str, Tensor]], parts: Sequence[Part], fill: Fill
) -> None:
    """Read what this rank wants; by name, whatever the order in the file."""
    for name, tensors in files.items():
        mine = [p for p in parts if f"{p.file}{SUFFIX}" == name and p.owned[0] < p.owned[1]]
        if not mine:
            continue
        with _opened(path / name) as file:
            for part in mine:
                for start, stop in part.chunks():
                    fill(part.view(start, stop), _chunk(file, tensors, part, start, stop))


def _chunk(
    file: BinaryIO, tensors: Mapping[str, Tensor], part: Part, start: int, stop: int
) -> NDArray[Any]:
    """Elements start up to stop of the part's layout, zero in the padding."""
    host = np.zeros(stop - start, part.layout.dtype)
    for offset, first, last in part.runs(tensors, start, stop):
        file.seek(offset)
        _read_into(file, host[first:last].data.cast("B"))
    return host
