"""`hpctrain doctor --affinity`: which cores, memory and GPU each rank has got, in one table.

    nodes   local  ranks  cores  NUMA  GPU           threads
    n1, n2      0  0, 4   0-15   0     0 (NUMA 0)         16
    n1, n2      1  1, 5   16-31  1     1 (NUMA 0)         16

Nodes on which the ranks are placed alike are one line per local rank. Below it: ranks that share
cores, more threads than cores, GPUs that hang on another part of the machine than the cores.

Layer: cli. `here` looks at this rank; the rest is arithmetic on what ranks have told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpctrain.mpi.calls import compact

__all__ = ["Place", "here", "numa_of_gpu", "run", "table_of", "warnings_of"]

SYSFS = Path("/sys")


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        node: number of its node; nodes are counted by their lowest rank.
        cores: numbers of the hardware threads it may use.
        numa: the NUMA nodes of these; () where the system does not tell.
        gpu: its UUID and PCI address; "" without one.
        gpu_numa: the GPU's NUMA node; -1 where the system does not tell.
        threads: BLAS threads: of OMP_NUM_THREADS, else what a run of hpctrain takes.
    """

    rank: int
    node: int
    host: str
    local_rank: int
    cores: tuple[int, ...]
    numa: tuple[int, ...]
    gpu: str
    gpu_numa: int
    threads: int


def run(args: argparse.Namespace) -> int:
    """Print the table and the warnings on rank 0; 0 whatever they say. Collective under MPI."""
    from hpctrain.mpi.start import start
    from hpctrain.mpi.topology import topology
    from hpctrain.parallel.communicator import open_chosen_device

    uuid = open_chosen_device("auto").uuid
    world = start()
    with topology(world) as where:
        masks = where.node.allgather(os.sched_getaffinity(0))
        cores = len(set().union(*masks))
        mine = here(where.rank, where.node_index, where.local_rank, where.local_size, cores, uuid)
        told = world.gather(mine)
    if told is not None:
        warnings = warnings_of(told)
        if args.json:
            ranks = [asdict(place) for place in told]
            print(json.dumps({"ranks": ranks, "warnings": warnings}, indent=2), flush=True)
        else:
            lines = [*table_of(told), *(f"[warn] {text}" for text in warnings)]
            print("\n".join(lines), flush=True)
    return 0


def here(rank: int, node: int, local_rank: int, local_size: int, cores: int, uuid: str) -> Place:
    """This process. `cores`: of all ranks of its node together; `uuid`: of its GPU."""
    own = tuple(sorted(os.sched_getaffinity(0)))
    named = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(named) if named.isdigit() and int(named) else max(cores // local_size, 1)
    return Place(
        rank,
        node,
        platform.node(),
        local_rank,
        own,
        numa_of_cores(own),
        uuid,
        numa_of_gpu(uuid),
        threads,
    )


def numa_of_cores(cores: Collection[int], sysfs: Path = SYSFS) -> tuple[int, ...]:
    """The NUMA nodes that these cores belong to, ascending; () where the system does not tell."""
    found = []
    for folder in (sysfs / "devices/system/node").glob("node[0-9]*"):
        try:
            text = (folder / "cpulist").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text and not set(cores).isdisjoint(_listed(text)):
            found.append(int(folder.name.removeprefix("node")))
    return tuple(sorted(found))


def numa_of_gpu(uuid: str, sysfs: Path = SYSFS) -> int:
    """The NUMA node of the GPU at the PCI address in which `uuid` ends; -1 where unknown."""
    match = re.search(r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9]$", uuid)
    if match is None:
        return -1
    try:
        text = (sysfs / "bus/pci/devices" / match[0].lower() / "numa_node").read_text("ascii")
        return int(text)
    except (OSError, ValueError):
        return -1


def _listed(text: str) -> set[int]:
    """The numbers of "0-3,8"."""
    parts = (part.partition("-") for part in text.split(","))
    return {n for first, _, last in parts for n in range(int(first), int(last or first) + 1)}


def table_of(places: Sequence[Place]) -> list[str]:
    """The table as lines; nodes whose ranks are placed alike are shown together."""
    from hpctrain.cli.bench import table

    alike: dict[tuple[Any, ...], list[list[Place]]] = {}
    for ranks in _by_node(places):
        layout = tuple((p.local_rank, p.cores, p.numa, p.gpu_numa, p.threads) for p in ranks)
        alike.setdefault((layout, _gpus(ranks)), []).append(ranks)
    rows = []
    for (_, gpus), nodes in alike.items():
        for local, same in enumerate(zip(*nodes, strict=True)):
            first = same[0]
            numa = "" if first.gpu_numa < 0 else f" (NUMA {first.gpu_numa})"
            rows.append(
                [
                    ", ".join(dict.fromkeys(p.host for p in same)) if local == 0 else "",
                    str(first.local_rank),
                    compact(p.rank for p in same),
                    compact(first.cores),
                    compact(first.numa) or "?",
                    f"{gpus[local]}{numa}" if gpus[local] >= 0 else "none",
                    str(first.threads),
                ]
            )
    head = ["nodes", "local", "ranks", "cores", "NUMA", "GPU", "BLAS threads"]
    return table(head, rows, left=6)


def _by_node(places: Iterable[Place]) -> list[list[Place]]:
    """The ranks of each node, by local rank."""
    nodes: dict[int, list[Place]] = {}
    for place in sorted(places, key=lambda p: (p.node, p.local_rank)):
        nodes.setdefault(place.node, []).append(place)
    return list(nodes.values())


def _gpus(ranks: Sequence[Place]) -> tuple[int, ...]:
    """For each rank of a node which of the node's GPUs it has, counted as they occur; -1: none."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(p.gpu, len(numbers)) if p.gpu else -1 for p in ranks)


def warnings_of(places: Sequence[Place]) -> list[str]:
    """What is wrong, and what to do: a line for each kind, with the first node that has it."""
    found: dict[str, list[str]] = {}
    for ranks in _by_node(places):
        for kind, text in (
            *_sharing(ranks),
            *_crowded(ranks),
            *(("far", far) for far in map(_far, ranks) if far),
            *_same_gpu(ranks),
        ):
            found.setdefault(kind, []).append(text)
    lines = []
    for texts in found.values():
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        lines.append(texts[0] + more)
    return lines


def _sharing(ranks: Sequence[Place]) -> list[tuple[str, str]]:
    masks = {p.cores for p in ranks}
    united = sorted(set().union(*masks))
    if len(ranks) > 1 and masks == {tuple(united)}:
        return [
            (
                "unbound",
                f"{ranks[0].host}: the {len(ranks)} ranks all may use cores {compact(united)}: "
                "they are not bound, and the system may move them. Bind them (mpirun --bind-to "
                "core, srun --cpu-bind=cores) where nothing else runs on the node",
            )
        ]
    for number, one in enumerate(ranks):
        for other in ranks[number + 1 :]:
            if both := sorted(set(one.cores) & set(other.cores)):
                return [
                    (
                        "overlap",
                        f"{one.host}: ranks {one.rank} and {other.rank} share cores "
                        f"{compact(both)}: give each its own (mpirun --map-by core:PE=N, srun "
                        "--cpus-per-task=N), or bind none",
                    )
                ]
    return []


def _crowded(ranks: Sequence[Place]) -> list[tuple[str, str]]:
    cores = len(set().union(*(p.cores for p in ranks)))
    threads = sum(p.threads for p in ranks)
    if threads <= cores:
        return []
    fits = cores // len(ranks)
    way = f"set OMP_NUM_THREADS={fits}" if fits else "start fewer ranks per node"
    told = f"{len(ranks)} ranks with {threads} BLAS threads in all have {cores} cores"
    return [("crowded", f"{ranks[0].host}: {told}: they wait for each other; {way}")]


def _far(place: Place) -> str:
    if place.gpu_numa < 0 or not place.numa or place.gpu_numa in place.numa:
        return ""
    return (
        f"{place.host}: rank {place.rank} has a GPU at NUMA node {place.gpu_numa} and cores of "
        f"{compact(place.numa)}: what it copies to the GPU crosses the machine; see "
        "jobs/select_gpu.sh and HPCTRAIN_GPU_ORDER"
    )


def _same_gpu(ranks: Sequence[Place]) -> list[tuple[str, str]]:
    users: dict[str, list[int]] = {}
    for place in ranks:
        if place.gpu:
            users.setdefault(place.gpu, []).append(place.rank)
    shared = next((found for found in users.values() if len(found) > 1), None)
    if shared is None:
        return []
    return [
        (
            "gpu",
            f"{ranks[0].host}: ranks {compact(shared)} have the same GPU: start one rank per GPU, "
            "or look at CUDA_VISIBLE_DEVICES",
        )
    ]
