"""Data parallelism: replicated parameters, each rank reduces and updates its own slice.

    backward        every rank writes its gradient, the sum over its samples, into its store
    reduce          every rank adds up its slice of all ranks' gradients
    norm            every rank contributes its slice's squares
    update          every rank updates its slice of the parameters and of the optimizer state
    gather          every rank gets all parameters (CPU: a node shares one array, and it is a fence)

With 16-bit gradients the sums, the weights that are updated (*master* weights) and the optimizer's
state are float32, each rank's for its own slice; all ranks get the parameters in 16 bits.

As many bytes as an all-reduce, 1/P of the optimizer's memory and traffic (ZeRO stage 1), and
replicas that cannot drift apart.

Layer: parallel. Is given a topology, a layout and a rule. Knows nothing of networks and files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint import Part
from hpctrain.collectives.slices import SliceReduction
from hpctrain.device import Device
from hpctrain.device.dtypes import wide_dtype
from hpctrain.mpi.topology import Topology
from hpctrain.nn.layout import Layout, Store
from hpctrain.optim.rules import Range, Rule, square_sum

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
        owned: (start, stop), the range of the flat arrays that this rank updates.
        masters: the parameters in `owned` that the update works on: that range of `parameters`, or
            of 16-bit ones an array of float32.
        states: optimizer state by name, flat arrays over `owned`.
    """

    def __init__(
        self,
        topology: Topology,
        device: Device,
        layout: Layout,
        rule: Rule,
        reduction: str = "auto",
        gpu_mpi: str = "auto",
    ) -> None:
        """`reduction`, `gpu_mpi`: see `SliceReduction`."""
        self.device = device
        self.layout = layout
        self.rule = rule
        self.slices = SliceReduction(
            topology, device, layout.size, layout.dtype, reduction, gpu_mpi=gpu_mpi
        )
        self.comm = topology.comm
        self.parameters = Store(layout, self.slices.parameters)
        self.gradients = Store(layout, self.slices.gradients)
        self.owned = self.slices.owned
        start, stop = self.owned
        self.wide_layout = layout.with_dtype(wide_dtype(layout.dtype))
        wide = self.wide_layout.dtype
        self.masters = self.parameters.array[start:stop]
        if wide != layout.dtype:
            self.masters = device.zeros(stop - start, wide)
        self.states = {name: device.zeros(stop - start, wide) for name in rule.states}

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
            self._narrow(*self.owned)
            self.slices.gather()
        self.slices.fence()

    def set_parameters(self, value_of: Callable[[str], NDArray[Any]]) -> None:
        """Write `value_of(name)`, the same on all ranks, into every parameter. Collective."""
        if self.masters_apart:
            start, stop = self.owned
            for entry, first, last in self.layout.pieces(start, stop):
                place = self.masters[entry.offset + first - start : entry.offset + last - start]
                self._fill(place, value_of(entry.name).reshape(-1)[first:last])
        elif self.writes_parameters:
            for entry in self.layout.entries:
                self._fill(self.parameters.view(entry.name), value_of(entry.name))
        self.publish()

    def _fill(self, place: Array, value: NDArray[Any]) -> None:
        host = np.ascontiguousarray(value, place.dtype)
        self.device.copy(place, self.device.from_host(host))

    def _narrow(self, begin: int, end: int) -> None:
        """Round a range of `masters` into `parameters`."""
        first, count = self.owned[0], end - begin
        wide, short = self.masters[begin - first : end - first], self.parameters.array[begin:end]
        self.device.launch("narrow", wide, short, count, work=count)

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
        self.slices.reduce()
        scale = 1.0 / weight if weight else 0.0
        norm = self._norm() * scale
        if math.isfinite(norm):
            if clip_norm and norm > clip_norm:
                scale *= clip_norm / norm
            for begin, end, part in self._ranges():
                self.rule.update(self.device, part, step=step, lr=lr, scale=scale)
                if self.masters_apart:
                    self._narrow(begin, end)
        self.slices.gather()
        return norm

    def _norm(self) -> float:
        total = np.array([square_sum(self.device, self.slices.sums)])
        if self.slices.sliced:
            self.slices.all_reduce(total)
        return math.sqrt(total[0]) if total[0] >= 0 else math.nan

    def _ranges(self) -> Iterator[tuple[int, int, Range]]:
        """The owned range, cut where weight decay switches: where it lies, and its arrays."""
        first = self.owned[0]
        for begin, end, decay in self.layout.decay_runs(*self.owned):
            here = slice(begin - first, end - first)
            states = {name: state[here] for name, state in self.states.items()}
            yield begin, end, Range(self.masters[here], self.slices.sums[here], states, decay)

    def saved_parts(self) -> list[Part]:
        """This rank's ranges of parameters and optimizer state, to write a checkpoint."""
        alone = not self.slices.sliced  # then every rank holds everything, and rank 0 writes it
        owned = (0, 0) if alone and self.comm.rank else self.owned
        return self._parts(owned, owned)

    def loaded_parts(self) -> list[Part]:
        """The ranges that this rank wants filled from a checkpoint; `publish` afterwards."""
        whole = (0, self.layout.size) if self.writes_parameters else (0, 0)
        return self._parts(self.owned if self.masters_apart else whole, self.owned)

    def _parts(self, parameters: tuple[int, int], states: tuple[int, int]) -> list[Part]:
        begin, layout = self.owned[0], self.wide_layout
        weights, first = self.parameters.array, 0
        if self.masters_apart:
            weights, first = self.masters, begin
        return [
            Part("parameters", "", layout, weights, parameters, first),
            *(
                Part("optimizer", name, layout, array, states, begin)
                for name, array in self.states.items()
            ),
        ]

    def free(self) -> None:
        """Give shared memory and communicators back. Collective; the stores are dead afterwards."""
        self.slices.free()
