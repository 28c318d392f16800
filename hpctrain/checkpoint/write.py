"""Writing a checkpoint: all ranks side by side into one folder, made visible by one rename.

    rank 0        removes leftovers, checks the free space, makes .tmp-step_00001200 and its files
    every rank    writes and hashes the ranges it owns, and puts them on the disk (fsync)
    rank 0        writes state.json, syncs, renames the folder, syncs, removes old checkpoints

A folder that is called step_00001200 was therefore complete on the disk before it had the name.
A failure on any rank before the rename is an error on all, and the earlier checkpoints remain.

`save` does it all while the caller waits; `background` begins in the same way, and goes on while
training does. Layer: checkpoint. Is given arrays and a communicator; knows nothing of what they
mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint.agree import on_every_rank, on_rank_zero
from hpctrain.checkpoint.draft import Block, Draft
from hpctrain.checkpoint.parts import Part, Plan, check_owners, check_parts, plan_files
from hpctrain.checkpoint.record import checked_state, folder_name
from hpctrain.checkpoint.tensors import SUFFIX
from hpctrain.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["begin", "doing", "headers", "save"]

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
    draft, plans = begin(Path(folder), step, parts, state, comm, keep)
    what = doing(draft)
    try:
        on_rank_zero(comm, what, draft.prepare)
        blocks = _blocks(plans, parts, to_host, comm.rank == 0)
        pieces = on_every_rank(comm, what, lambda: draft.write(blocks))
        lists = comm.gather(pieces) or []
        on_rank_zero(comm, what, lambda: draft.publish(lists))
    except CheckpointError:
        on_rank_zero(comm, what, draft.discard)
        raise
    on_rank_zero(comm, what, draft.prune)
    return draft.final


def begin(
    folder: Path,
    step: int,
    parts: Sequence[Part],
    state: Mapping[str, Any],
    comm: MPI.Intracomm,
    keep: int,
) -> tuple[Draft, dict[str, Plan]]:
    """Check that the ranks' parts make a checkpoint. Collective; touches no file.

    Arguments and errors are those of `save`.
    """
    what = f"checkpoint {folder_name(step)} cannot be written to {folder}"
    plans = on_every_rank(comm, what, lambda: _plans(parts))
    owned = comm.gather((_digest(parts, plans), [part.owned for part in parts])) or []
    plain = on_rank_zero(comm, what, lambda: _checked(parts, owned, state, keep))
    dtypes = sorted({str(t.dtype) for plan in plans.values() for t in plan.tensors.values()})
    sizes = {name: plan.size for name, plan in plans.items()}
    return Draft(folder, step, keep, sizes, dtypes, plain), plans


def doing(draft: Draft) -> str:
    """How messages begin that say why a checkpoint was not written."""
    return f"checkpoint {draft.final.name} cannot be written to {draft.folder}"


def headers(plans: Mapping[str, Plan]) -> Iterator[Block]:
    """The first bytes of every file, which rank 0 writes."""
    for name, plan in plans.items():
        yield Block(name, 0, memoryview(plan.header))


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


def _blocks(
    plans: Mapping[str, Plan], parts: Sequence[Part], to_host: ToHost, first: bool
) -> Iterator[Block]:
    """All that this rank writes, file by file; the headers where it is the first rank."""
    for name, plan in plans.items():
        if first:
            yield Block(name, 0, memoryview(plan.header))
        for part in parts:
            if f"{part.file}{SUFFIX}" != name:
                continue
            for start, stop in part.chunks():
                runs = part.runs(plan.tensors, start, stop)
                if not runs:
                    continue  # only padding
                host = to_host(part.view(start, stop))
                cut = [host[begin:end] for _, begin, end in runs]
                data = cut[0] if len(cut) == 1 else np.concatenate(cut)  # they join in the file
                yield Block(name, runs[0][0], np.ascontiguousarray(data).data.cast("B"))
