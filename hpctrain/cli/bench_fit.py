"""`hpctrain bench allreduce --fit` and `--predict`: the cost model beside what is measured.

--fit times small schedules (`cost_probes`) and all algorithms at the given sizes, finds the network
that explains the times best, and saves it. --predict takes such a network, prices every algorithm
at sizes that need not be those of the fit, times it, and shows which one it would have picked.

Layer: cli. Knows nothing of how prices are made.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hpctrain.cli.bench import cpu_name, report, table
from hpctrain.collectives.algorithms import PRESETS, all_reduce, preset
from hpctrain.collectives.cost import Price, price
from hpctrain.collectives.cost_choice import Choice, choose, described, load_choices, save_choices
from hpctrain.collectives.cost_fit import PARAMETERS, START, Observation, fit, predictions
from hpctrain.collectives.cost_probes import probes
from hpctrain.collectives.interpreter import Interpreter, node_list, shared_buffers
from hpctrain.collectives.network import Network, load_network, save_network
from hpctrain.collectives.schedule import Schedule
from hpctrain.device import open_device
from hpctrain.device.build import lowest_level
from hpctrain.errors import UsageError
from hpctrain.mpi import facts, start
from hpctrain.mpi.agree import on_first_rank
from hpctrain.mpi.topology import Topology, topology

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["chosen", "run"]

LEAST, BUDGET = 3, 1.5  # rounds of a schedule, and seconds it may take beyond them
WIRE = 0.8  # of a predicted time: from here on the wire is what it takes


def run(args: argparse.Namespace) -> int:
    """Fit or predict on all ranks, print on rank 0. Collective."""
    if args.device != "cpu":
        raise UsageError(f"--fit and --predict measure host memory, not --device {args.device}")
    itemsize = np.dtype(args.dtype).itemsize
    for size in args.sizes:
        if size % itemsize:
            raise UsageError(f"--sizes: {size} bytes is no whole number of {args.dtype} elements")
    for name in args.algorithm:
        if name != "all":
            preset(name)
    world = start.start()
    device = open_device("cpu")
    device = open_device("cpu", lowest_level(world.allgather(device.level)))
    with topology(world) as ranks:
        device.prepare([args.dtype], ranks.node)
        bench = Bench(ranks, device, args)
        found = bench.fitted(args.fit) if args.fit else bench.predicted(args.predict)
        if world.rank == 0:
            report(args.json, *found)
    return 0


def chosen(ranks: Topology, n: int, itemsize: int, path: str | None) -> Schedule:
    """The all-reduce that a file of choices names for these ranks and this size. Collective.

    Raises:
        UsageError: on all ranks; no file was given, or it has no such choice.
    """
    if path is None:
        raise UsageError("--algorithm auto needs --choices FILE, which --predict NETWORK writes")
    choices = on_first_rank(ranks.comm, lambda: load_choices(path))
    nodes = node_list(ranks)
    wanted = (described(nodes), n * itemsize, itemsize)
    for choice in choices:
        if (choice.topology, choice.nbytes, choice.itemsize) == wanted:
            schedule = choice.schedule(nodes)
            return replace(schedule, name=f"auto: {schedule.name}")
    raise UsageError(
        f"{path} has no choice for {n * itemsize:,} bytes of {itemsize}-byte elements on "
        f"{wanted[0]}: add it by --predict NETWORK --choices {path} with this size"
    )


class Bench:
    """Times of schedules on the ranks at hand."""

    def __init__(self, ranks: Topology, device: Device, args: argparse.Namespace) -> None:
        """Collective."""
        self._ranks, self._device, self._args = ranks, device, args
        self._itemsize = np.dtype(args.dtype).itemsize
        self._nodes = node_list(ranks)
        names = args.algorithm or ("all",)
        self._names = tuple(PRESETS) if "all" in names else names
        self._probes = probes(self._nodes, self._itemsize) if args.fit else []
        largest = [size // self._itemsize for size in args.sizes]
        largest += [schedule.n for schedule in self._probes]
        self._array, self._peers = shared_buffers(ranks, device, max(largest), args.dtype)

    def seconds(self, schedules: Sequence[Schedule]) -> list[float]:
        """Medians over rounds of the slowest rank; in a round all run in turn. Collective."""
        comm, rounds = self._ranks.comm, LEAST
        programs = [
            Interpreter(self._ranks, self._device, schedule, self._array, self._peers)
            for schedule in schedules
        ]
        taken: list[list[float]] = []
        while len(taken) <= rounds:
            row = []
            for program in programs:
                self._array[: program.schedule.n].fill(1)
                comm.Barrier()
                begun = time.perf_counter()
                program.run()
                row.append(time.perf_counter() - begun)
            taken.append(np.max(comm.allgather(row), axis=0).tolist())
            if len(taken) == 2:
                most = int(BUDGET * len(programs) / sum(taken[1]))
                rounds = max(LEAST, min(self._args.repeat, most))
        return [float(median) for median in np.median(taken[1:], axis=0)]  # the first warms up

    def fitted(self, path: str) -> tuple[dict[str, Any], list[str]]:
        """Measure, fit on rank 0, save. Collective."""
        groups = [self._probes]
        for size in self._args.sizes:
            n = size // self._itemsize
            groups.append(
                [
                    all_reduce(self._nodes, n, self._itemsize, PRESETS[name], name=name)
                    for name in self._names
                ]
            )
        found = [
            Observation(schedule, seconds)
            for group in groups
            for schedule, seconds in zip(group, self.seconds(group), strict=True)
        ]
        network = on_first_rank(self._ranks.comm, lambda: self._fit(path, found))
        return self._fit_report(path, network, found)

    def _fit(self, path: str, found: Sequence[Observation]) -> Network:
        cores = len(os.sched_getaffinity(0))
        begin = msgspec.structs.replace(
            START, node=msgspec.structs.replace(START.node, cores=cores)
        )
        network = fit(found, begin)
        sizes = ", ".join(f"{size:,}" for size in self._args.sizes)
        network = msgspec.structs.replace(
            network,
            name=f"{platform.node()} {described(self._nodes)}",
            source=f"fitted to probes and all-reduces of {sizes} bytes, {facts.library()}, "
            f"{cpu_name()}; NICs, duplex and cores are not fitted: change them by hand",
        )
        save_network(path, network)
        return network

    def _fit_report(
        self, path: str, network: Network, found: Sequence[Observation]
    ) -> tuple[dict[str, Any], list[str]]:
        ratios = predictions(network, found) / [one.seconds for one in found]
        rows = [
            {
                "schedule": one.schedule.name,
                "bytes": one.schedule.n * self._itemsize,
                "seconds": one.seconds,
                "fitted_over_measured": float(ratio),
            }
            for one, ratio in zip(found, ratios, strict=True)
        ]
        errors = np.abs(ratios - 1)
        lines = [f"# {path}: {network.source}"]
        lines += [
            f"{section}.{key} = {getattr(getattr(network, section), key):.3g}"
            for section, key in PARAMETERS
        ]
        lines += table(
            ["schedule", "bytes", "measured ms", "fitted / measured"],
            [
                [
                    str(row["schedule"]),
                    f"{row['bytes']:,}",
                    f"{row['seconds'] * 1e3:.3f}",
                    f"{row['fitted_over_measured']:.2f}",
                ]
                for row in rows
            ],
        )
        lines.append(f"# error: median {np.median(errors):.0%}, largest {errors.max():.0%}")
        return {"network": msgspec.to_builtins(network), "results": rows}, lines

    def predicted(self, path: str) -> tuple[dict[str, Any], list[str]]:
        """Price and measure every algorithm at every size. Collective."""
        comm = self._ranks.comm
        network = on_first_rank(comm, lambda: load_network(path))
        picks: list[Choice] = []
        rows: list[dict[str, Any]] = []
        for size in self._args.sizes:
            n = size // self._itemsize
            each = [
                choose(self._nodes, n, self._itemsize, network, (name,)) for name in self._names
            ]
            pick = min(each, key=lambda choice: choice.seconds)
            picks.append(pick)
            schedules = [choice.schedule(self._nodes) for choice in each]
            for choice, schedule, measured in zip(
                each, schedules, self.seconds(schedules), strict=True
            ):
                rows.append(_row(choice, price(schedule, network), measured, choice is pick))
        if self._args.choices:
            on_first_rank(comm, lambda: _add_choices(self._args.choices, picks))
        return _prediction_report(path, picks, rows)


def _row(choice: Choice, priced: Price, measured: float, picked: bool) -> dict[str, Any]:
    return {
        "bytes": choice.nbytes,
        "algorithm": choice.algorithm,
        "segment_bytes": choice.segment_bytes,
        "predicted_seconds": priced.seconds,
        "wire_seconds": priced.wire_seconds,
        "seconds": measured,
        "picked": picked,
    }


def _prediction_report(
    path: str, picks: Sequence[Choice], rows: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    head = ["bytes", "algorithm", "segment", "predicted ms", "measured ms", "ratio", "wire", ""]
    cells = []
    for row in rows:
        ratio, wire = row["predicted_seconds"] / row["seconds"], _wire(row)
        cells.append(
            [
                f"{row['bytes']:,}",
                row["algorithm"],
                f"{row['segment_bytes']:,}",
                f"{row['predicted_seconds'] * 1e3:.3f}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{ratio:.2f}",
                f"{wire:.0%}",
                "picked" if row["picked"] else "",
            ]
        )
    lines = [f"# predicted by {path}; wire: share of the predicted time", *table(head, cells, 2)]
    summary = []
    for pick in picks:
        same = [row for row in rows if row["bytes"] == pick.nbytes]
        best = min(same, key=lambda row: float(row["seconds"]))
        mine = next(row for row in same if row["picked"])
        over = mine["seconds"] / best["seconds"]
        summary.append({"bytes": pick.nbytes, "picked_over_best": over})
        lines.append(f"{pick}; measured {over:.2f} times the best, {best['algorithm']}")
    on_wire = [r["predicted_seconds"] / r["seconds"] - 1 for r in rows if _wire(r) > WIRE]
    if on_wire:
        worst = max(on_wire, key=abs)
        lines.append(
            f"# {len(on_wire)} times with the wire over {WIRE:.0%}: predicted within "
            f"{abs(worst):.0%}"
        )
    return {"network": path, "results": list(rows), "picks": summary}, lines


def _wire(row: dict[str, Any]) -> float:
    """The share of the wire in the predicted time; a burst passes in less than the wire's time."""
    return float(min(row["wire_seconds"] / max(row["predicted_seconds"], 1e-12), 1.0))


def _add_choices(path: str, picks: Sequence[Choice]) -> None:
    """Put the picks into a file; they replace those for the same ranks and size."""

    def key(choice: Choice) -> tuple[str, int, int]:
        return choice.topology, choice.nbytes, choice.itemsize

    kept = {key(choice): choice for choice in (*load_choices(path), *picks)}
    save_choices(path, list(kept.values()))
