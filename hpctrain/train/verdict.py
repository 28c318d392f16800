"""Who waits for whom: what the ranks of a run that stands still wrote, compared.

Layer: train. Knows nothing of threads, and of when to ask; `watchdog` writes the records.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.mpi.calls import compact, expand

__all__ = ["Record", "busy", "read", "silent_nodes", "verdict"]

BUSY = 0.03  # of a core; on a crowded node a rank may get little, and a blocked one uses none
Record = Mapping[str, Any]


def read(folder: Path) -> dict[int, Record]:
    """The records of all ranks that wrote one."""
    found = {}
    for path in folder.glob("rank*.txt"):
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
            found[int(record["rank"])] = record
    return found


def verdict(found: Mapping[int, Record], hosts: Sequence[str], idle: float) -> list[str]:
    """Lines that say who waits in what, and who did not come.

    Args:
        found: what ranks wrote, by rank.
        hosts: the host of every rank.
        idle: for how many seconds nothing went on.
    """
    slow = busy(found)
    lines = [f"{'slow' if slow else 'hang'}: nothing has gone on for {idle:.0f} s"]
    if slow:
        lines[0] += f", but {_ranks(slow)} {'are' if len(slow) > 1 else 'is'} computing"
    waits: dict[tuple[str, int], list[int]] = {}
    for rank, record in sorted(found.items()):
        if record["inside"] and record["group"]:
            waits.setdefault((record["group"], record["number"]), []).append(rank)
    absent: set[int] = set()
    for (group, number), ranks in waits.items():
        names = {found[rank]["inside"] for rank in ranks}
        lines.append(f"{_ranks(ranks)} in {' and '.join(sorted(names))} #{number} of ranks {group}")
        if len(names) > 1:
            lines += [f"  {_told(found[rank], hosts)}" for rank in ranks]
        gone = [r for r in expand(group) if _count(found, r, group) < number]
        absent.update(gone)
        if gone:
            lines.append(f"  {_ranks(gone)} did not enter it")
    others = set(range(len(hosts))) - {rank for ranks in waits.values() for rank in ranks}
    for rank in sorted(absent | others):
        if rank in found:
            lines.append(_told(found[rank], hosts))
        else:
            lines.append(
                f"rank {rank} ({hosts[rank]}): no sign of life; it is stopped or dead, or its node "
                "cannot be reached"
            )
    return lines


def busy(found: Mapping[int, Record]) -> list[int]:
    """Ranks that compute, outside MPI."""
    return [rank for rank, record in sorted(found.items()) if _computes(record)]


def _computes(record: Record) -> bool:
    return bool(not record["inside"] and record["cpu"] > BUSY)


def silent_nodes(found: Mapping[int, Record], hosts: Sequence[str]) -> list[str]:
    """Hosts of which no rank wrote."""
    heard = {hosts[rank] for rank in found}
    return sorted(set(hosts) - heard) if heard else []


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {compact(ranks)}"


def _count(found: Mapping[int, Record], rank: int, group: str) -> int:
    return int(found[rank]["counts"].get(group, 0)) if rank in found else 0


def _told(record: Record, hosts: Sequence[str]) -> str:
    """What one rank is at."""
    rank, last = record["rank"], f"its last call was {record['last'] or 'none'}"
    if record["inside"]:
        what = f"waits in {record['inside']}"
    elif _computes(record):
        what = f"busy ({record['cpu']:.0%} of a core), so slow rather than hung; {last}"
    else:
        what = f"blocked outside MPI: a disk, a lock, a network?; {last}"
    return f"rank {rank} ({hosts[rank]}): {what}; at {record['at']}"
