"""Data parallelism: replicated parameters, each rank reduces and updates its own slice.

    backward        every rank writes its gradient, the sum over its samples, into its store
    reduce          every rank adds up its slice of all ranks' gradients
    norm            every rank contributes its slice's squares
    update          every rank updates its slice of the parameters and of the optimizer state
    gather          every rank gets all parameters (CPU: a node shares one array, and it is a fence)

Buckets of gradients that are `ready` may be reduced while the backward pass goes on, and gathered
while the next forward pass does: see docs/overlap.md.

With 16-bit gradients the sums, the weights that are updated (*master* weights) and the optimizer's
state are float32, each rank's for its own slice; all ranks get the parameters in 16 bits.

As many bytes as an all-reduce, 1/P of the optimizer's memory and traffic (ZeRO stage 1), and
replicas that cannot drift apart.

Layer: parallel. Is given a topology, a layout and a rule. Knows nothing of networks and files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint import Part
from hpctrain.collectives.between import Crossing
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device import Device
from hpctrain.device.dtypes import wide_dtype
from hpctrain.mpi.topology import Topology
from hpctrain.nn.layout import Layout, Store
from hpctrain.optim.rules import Range, Rule, square_sum
from hpctrain.parallel.buckets import Readiness
from hpctrain.timeline import span

__all__ = ["DataParallel"]

Array = Any  # of the device


class DataParallel:
    """Stores of the parameters, gradients and this rank's optimizer state, and the update.

    Collective to create, and to `update`: all ranks of the topology's communicator, with the same
    layout, rule and reduction.

    Attributes:
        parameters: Store of all parameters, the same on all ranks; inside a node it may be one
            array that the ranks share. Write to it only where `writes_parameters` is true, and
            call `publish` afterwards.
        gradients: Store that a backward pass writes this rank's gradient into.
        owned: the ranges (start, stop) of the flat arrays that this rank updates, one per bucket.
        masters: for each of them the parameters that the update works on: that range of
            `parameters`, or of 16-bit ones an array of float32.
        states: optimizer state by name: an array for each range in `owned`.
        exchange_seconds, update_seconds: what `update` and `arrive` have taken so far: adding up,
            gathering and waiting for others; norm and rule. On a GPU exchange has the wait for the
            kernels before it, and update is only their launches.
    """

    def __init__(
        self,
        topology: Topology,
        device: Device,
        layout: Layout,
        rule: Rule,
        reduction: str = "auto",
        gpu_mpi: str = "auto",
        buckets: Sequence[tuple[int, int]] | None = None,
        crossing: Crossing | None = None,
        overlap: str = "off",
    ) -> None:
        """See `SliceReduction` for the arguments from `reduction` on.

        With `overlap`, whoever reads a parameter after `update` calls `arrive` before.
        """
        self.device = device
        self.layout = layout
        self.rule = rule
        self.slices = SliceReduction(
            topology,
            device,
            layout.size,
            layout.dtype,
            reduction,
            gpu_mpi=gpu_mpi,
            buckets=buckets,
            crossing=crossing,
            overlap=overlap,
        )
        self._readiness = Readiness(layout, self.slices.buckets)
        self.comm = topology.comm
        self.parameters = Store(layout, self.slices.parameters)
        self.gradients = Store(layout, self.slices.gradients)
        self.owned = self.slices.owned
        self.wide_layout = layout.with_dtype(wide_dtype(layout.dtype))
        self.masters = [self.parameters.array[start:stop] for start, stop in self.owned]
        if self.masters_apart:
            self.masters = self._zeros()
        self.states = {name: self._zeros() for name in rule.states}
        self.exchange_seconds = self.update_seconds = 0.0

    def _zeros(self) -> list[Array]:
        """An array of the wide type for each owned range, one after the other in memory."""
        wide = self.wide_layout.dtype
        flat = self.device.zeros(sum(stop - start for start, stop in self.owned), wide)
        return [flat[at : at + count] for at, count in self._places()]

    def _places(self) -> Iterator[tuple[int, int]]:
        """Where each owned range begins in a flat array of all, and its length."""
        at = 0
        for start, stop in self.owned:
            yield at, stop - start
            at += stop - start

    @property
    def writes_parameters(self) -> bool:
        """Whether this rank is the one that may write the parameters its node shares."""
        return self.slices.writes_parameters

    @property
    def masters_apart(self) -> bool:
        """Whether `masters` is an array of its own, from which `parameters` are rounded."""
        return self.wide_layout.dtype != self.layout.dtype

    def publish(self) -> None:
        """After `parameters`, or `masters` apart, were written: bring them to all. Collective."""
        if self.masters_apart:
            for masters, (start, _) in zip(self.masters, self.owned, strict=True):
                self._narrow(masters, start)
            self.slices.gather()
        self.slices.fence()

    def set_parameters(self, value_of: Callable[[str], NDArray[Any]]) -> None:
        """Write `value_of(name)`, the same on all ranks, into every parameter. Collective."""
        if self.masters_apart:
            for masters, (start, stop) in zip(self.masters, self.owned, strict=True):
                for entry, first, last in self.layout.pieces(start, stop):
                    place = masters[entry.offset + first - start : entry.offset + last - start]
                    self._fill(place, value_of(entry.name).reshape(-1)[first:last])
        elif self.writes_parameters:
            for entry in self.layout.entries:
                self._fill(self.parameters.view(entry.name), value_of(entry.name))
        self.publish()

    def _fill(self, place: Array, value: NDArray[Any]) -> None:
        host = np.ascontiguousarray(value, place.dtype)
        self.device.copy(place, self.device.from_host(host))

    def _narrow(self, masters: Array, begin: int) -> None:
        """Round the masters of a range that begins at `begin` into `parameters`."""
        count = masters.shape[0]
        short = self.parameters.array[begin : begin + count]
        self.device.launch("narrow", masters, short, count, work=count)

    def update(self, step: int, lr: float, weight: float, clip_norm: float = 0.0) -> float:
        """Reduce the gradients, divide them by `weight`, update and gather. Collective.

        Args:
            step: counts updates from 0.
            lr: learning rate of this step.
            weight: sum of the loss weights over all ranks: the same on all of them.
            clip_norm: scale the gradient down to this global norm; 0 for no limit.

        Returns:
            the norm of the averaged gradient before clipping; the same on all ranks. It is not
            finite if any gradient is not, and then nothing was updated.
        """
        begun, exchanged = time.perf_counter(), self.exchange_seconds
        self._exchange(self.slices.reduce)
        self._readiness.reset()
        scale = 1.0 / weight if weight else 0.0
        norm = self._norm() * scale
        if math.isfinite(norm):
            if clip_norm and norm > clip_norm:
                scale *= clip_norm / norm
            with span("update"):
                for begin, part in self._ranges():
                    self.rule.update(self.device, part, step=step, lr=lr, scale=scale)
                    if self.masters_apart:
                        self._narrow(part.parameters, begin)
        self._exchange(self.slices.gather, not math.isfinite(norm))
        self.update_seconds += time.perf_counter() - begun - self.exchange_seconds + exchanged
        return norm

    def _exchange(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call it, and count its time as exchange."""
        begun = time.perf_counter()
        function(*arguments)
        self.exchange_seconds += time.perf_counter() - begun

    def abandon(self) -> None:
        """End a step without an update: finish the exchange that has begun. Collective."""
        self.slices.reduce()
        self._readiness.reset()

    def ready(self, name: str) -> None:
        """This rank's gradient of a parameter is final: its bucket may go out. Not collective.

        Between `update` and the next, once for each parameter or not at all.
        """
        self.slices.begin(self._readiness.done(name))

    def arrive(self, name: str) -> None:
        """Wait until a parameter is current after `update`. Not collective."""
        for bucket in self._readiness.buckets(name)[:1]:  # later buckets arrive first
            self._exchange(self.slices.arrive, bucket)

    def _norm(self) -> float:
        counted = self.slices.counted or not self.slices.sliced
        total = np.array([square_sum(self.device, self.slices.sums) if counted else 0.0])
        if self.slices.sliced:
            self._exchange(self.slices.all_reduce, total)
        return math.sqrt(total[0]) if total[0] >= 0 else math.nan

    def _ranges(self) -> Iterator[tuple[int, Range]]:
        """The owned ranges, cut where weight decay switches: where each begins, and its arrays."""
        places = list(self._places())
        for index, (first, stop) in enumerate(self.owned):
            at, count = places[index]
            sums = self.slices.sums[at : at + count]
            for begin, end, decay in self.layout.decay_runs(first, stop):
                here = slice(begin - first, end - first)
                states = {name: ranges[index][here] for name, ranges in self.states.items()}
                yield begin, Range(self.masters[index][here], sums[here], states, decay)

    def saved_parts(self) -> list[Part]:
        """This rank's ranges of parameters and optimizer state, to write a checkpoint."""
        return self._parts(self.owned if self.slices.counted else [(0, 0)] * len(self.owned))

    def loaded_parts(self) -> list[Part]:
        """The ranges that this rank wants filled from a checkpoint; `publish` afterwards."""
        if self.masters_apart:
            return self._parts(self.owned)
        whole = (0, self.layout.size) if self.writes_parameters else (0, 0)
        parameters = Part("parameters", "", self.wide_layout, self.parameters.array, whole)
        return [parameters, *self._parts(self.owned)[len(self.owned) :]]

    def _parts(self, ranges: Sequence[tuple[int, int]]) -> list[Part]:
        """Parameters and states of each of `ranges`, which are those of `owned` or empty."""
        held = [("parameters", "", self.masters)]
        held += [("optimizer", name, arrays) for name, arrays in self.states.items()]
        return [
            Part(file, prefix, self.wide_layout, array, span, start)
            for file, prefix, arrays in held
            for array, span, (start, _) in zip(arrays, ranges, self.owned, strict=True)
        ]

    def free(self) -> None:
        """Give shared memory and communicators back. Collective; the stores are dead afterwards."""
        self.slices.free()
