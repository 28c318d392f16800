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
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from hpctrain.cli.bench import cpu_name, report
from hpctrain.cli.bench_fit_report import fit_report, prediction, prediction_report
from hpctrain.collectives.algorithms import PRESETS, all_reduce, preset
from hpctrain.collectives.buffers import Buffers
from hpctrain.collectives.cost import price
from hpctrain.collectives.cost_choice import Choice, choose, described, load_choices, save_choices
from hpctrain.collectives.cost_fit import Observation, fit
from hpctrain.collectives.cost_probes import probes
from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.interpreter import Interpreter, node_list
from hpctrain.collectives.network import COMMON, Network, load_network, save_network
from hpctrain.collectives.schedule import Schedule
from hpctrain.device import open_device, visible_gpus
from hpctrain.device.build import lowest_level
from hpctrain.errors import UsageError
from hpctrain.mpi import facts, gpu, start
from hpctrain.mpi.agree import on_first_rank
from hpctrain.mpi.topology import Topology, topology
from hpctrain.parallel.communicator import open_chosen_device

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["chosen", "reads_peers", "run"]

LEAST, BUDGET = 3, 1.5  # rounds of a schedule, and seconds it may take beyond them


def run(args: argparse.Namespace) -> int:
    """Fit or predict on all ranks, print on rank 0. Collective."""
    itemsize = np.dtype(args.dtype).itemsize
    for size in args.sizes:
        if size % itemsize:
            raise UsageError(f"--sizes: {size} bytes is no whole number of {args.dtype} elements")
    for name in args.algorithm:
        if name != "all":
            preset(name)
    device = open_chosen_device(args.device)
    world = start.start()
    if device.name == "cpu":
        device = open_device("cpu", lowest_level(world.allgather(device.level)))
    with topology(world) as ranks:
        device.prepare([args.dtype], ranks.node)
        bench = Bench(ranks, device, args)
        found = bench.fitted(args.fit) if args.fit else bench.predicted(args.predict)
        bench.free()
        if world.rank == 0:
            report(args.json, *found)
    return 1 if bench.wrong else 0


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


def reads_peers(schedule: Schedule) -> bool:
    """Whether any rank reads another one's memory."""
    return any(schedule.traffic(rank).read for rank in range(schedule.size))


class Timed(NamedTuple):
    """Seconds of a schedule, and how many elements of all ranks were not the exact sum."""

    seconds: float
    wrong: int


class Bench:
    """Times of schedules on the ranks at hand.

    Attributes:
        wrong: elements that were not the exact sum so far, of all schedules and ranks.
    """

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
        visible = any(map(reads_peers, self._all(GRAIN))) or (
            bool(args.fit) and max(ranks.local_sizes) > 1
        )
        self._buffers = Buffers(ranks, device, max(largest), args.dtype, visible)
        crosses = device.name != "cpu" and ranks.size > 1
        self._gpu_mpi = crosses and gpu.decide(ranks.comm, device.name, args.gpu_mpi).on
        self.wrong = 0

    def free(self) -> None:
        """Give the buffers back. Collective."""
        self._buffers.free()

    def _all(self, n: int) -> list[Schedule]:
        """Every algorithm that was asked for."""
        return [
            all_reduce(self._nodes, n, self._itemsize, PRESETS[name], name=name)
            for name in self._names
        ]

    def measured(self, schedules: Sequence[Schedule]) -> list[Timed]:
        """Medians over rounds of the slowest rank; in a round all run in turn. Collective."""
        comm, rounds, buffers = self._ranks.comm, LEAST, self._buffers
        programs = [
            Interpreter(
                self._ranks,
                self._device,
                schedule,
                buffers.array,
                buffers.peers,
                gpu_mpi=self._gpu_mpi,
            )
            for schedule in schedules
        ]
        taken: list[list[float]] = []
        wrong = np.zeros(len(programs), np.int64)
        while len(taken) <= rounds:
            row = []
            for index, program in enumerate(programs):
                row.append(self._seconds(program))
                if not taken:  # the first round warms up, and is not timed
                    wrong[index] = self._differing(program.schedule)
            taken.append(np.max(comm.allgather(row), axis=0).tolist())
            if len(taken) == 2:
                most = int(BUDGET * len(programs) / sum(taken[1]))
                rounds = max(LEAST, min(self._args.repeat, most))
        wrong = np.sum(comm.allgather(wrong), axis=0)
        self.wrong += int(wrong.sum())
        medians = np.median(taken[1:], axis=0)
        return [Timed(float(m), int(w)) for m, w in zip(medians, wrong, strict=True)]

    def _seconds(self, program: Interpreter) -> float:
        """What one run takes on this rank, from ones in every buffer. Collective."""
        n, device = program.schedule.n, self._device
        device.launch("fill", self._buffers.array, 1.0, n, work=n)
        device.synchronize()
        self._ranks.comm.Barrier()
        begun = time.perf_counter()
        program.run()
        device.synchronize()
        return time.perf_counter() - begun

    def _differing(self, schedule: Schedule) -> int:
        """Elements of this rank's buffer that are not the sum of ones; of probes, which add
        nothing up, none."""
        if schedule.kind != "all-reduce":
            return 0
        found = self._device.to_host(self._buffers.array[: schedule.n])
        return int(np.count_nonzero(found != self._ranks.size))

    def fitted(self, path: str) -> tuple[dict[str, Any], list[str]]:
        """Measure, fit on rank 0, save. Collective."""
        groups = [self._probes]
        groups += [self._all(size // self._itemsize) for size in self._args.sizes]
        found, wrong = [], []
        for group in groups:
            for schedule, timed in zip(group, self.measured(group), strict=True):
                found.append(Observation(schedule, timed.seconds))
                wrong.append(timed.wrong)
        network = on_first_rank(self._ranks.comm, lambda: self._fit(path, found))
        return fit_report(path, network, found, wrong)

    def _fit(self, path: str, found: Sequence[Observation]) -> Network:
        cores = (
            visible_gpus("cuda") if self._device.name == "cuda" else len(os.sched_getaffinity(0))
        )
        begin = msgspec.structs.replace(
            COMMON, node=msgspec.structs.replace(COMMON.node, cores=cores)
        )
        network = fit(found, begin)
        sizes = ", ".join(f"{size:,}" for size in self._args.sizes)
        network = msgspec.structs.replace(
            network,
            name=f"{platform.node()} {described(self._nodes)}",
            source=f"fitted to probes and all-reduces of {sizes} bytes, {facts.library()}, "
            f"{cpu_name()}, memory of the device {self._device.name}; NICs, duplex and "
            "cores are not fitted: change them by hand",
        )
        save_network(path, network)
        return network

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
            for choice, schedule, timed in zip(
                each, schedules, self.measured(schedules), strict=True
            ):
                priced = price(schedule, network)
                rows.append(prediction(choice, priced, *timed, picked=choice is pick))
        if self._args.choices:
            on_first_rank(comm, lambda: _add_choices(self._args.choices, picks))
        return prediction_report(path, picks, rows)


def _add_choices(path: str, picks: Sequence[Choice]) -> None:
    """Put the picks into a file; they replace those for the same ranks and size."""

    def key(choice: Choice) -> tuple[str, int, int]:
        return choice.topology, choice.nbytes, choice.itemsize

    kept = {key(choice): choice for choice in (*load_choices(path), *picks)}
    save_choices(path, list(kept.values()))
