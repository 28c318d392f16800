"""Compressed sums between nodes: what a sliced reduction is given in place of `Dense`.

A node's ranks add up their gradients in full; each then compresses its own column of the node's
sum, so that a residual is held once per node, 1 / C of it by each of C ranks. Every node ends with
the same sums of the column, and updates its own copy: no parameters cross.

    gradients that are not finite on any node are refused
    x <- what the memory makes of it       residual + gradient, or with momentum gathered before
    small tensors are taken out of x       and summed as they are, in one message
    sums <- what the method applies        the rest is kept by the memory

The books: over all nodes, sums + residuals afterwards = gradients + residuals before. `undo` goes
back to the memory before, for a step that is not applied.

Layer: compress. Is given columns of gradients; knows nothing of who computed them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.between import Column
from hpctrain.collectives.opaque import Exchange
from hpctrain.compress.cast import Cast
from hpctrain.compress.int8 import Int8
from hpctrain.compress.interface import Codec, Extent, extent_of
from hpctrain.compress.memory import Kept, Momentum, Residual
from hpctrain.compress.methods import DenseSum, Method, PowerSgd, Sent, Sparse, TwoShot
from hpctrain.compress.portions import clear, portions, put, taken
from hpctrain.compress.powersgd import PowerSGD
from hpctrain.compress.settings import SPARSE, Choice, Settings
from hpctrain.compress.sign import Sign
from hpctrain.compress.sparse import AllGather, OkTopk
from hpctrain.compress.topk import TopK
from hpctrain.device import open_device
from hpctrain.errors import UsageError
from hpctrain.nn.layout import Layout

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["CompressedColumn", "Compression"]

Values = NDArray[np.float32]


class Compression:
    """Makes the compressed sum of every column; see `hpctrain.collectives.between.Crossing`.

    Attributes:
        whole: True: each node owns all.
        columns: those made so far, one per bucket.
    """

    whole = True

    def __init__(self, settings: Settings, layout: Layout) -> None:
        """`layout`: of the gradients.

        Raises:
            UsageError: gradients that are not float32.
        """
        if layout.dtype != np.float32:
            raise UsageError(
                f"gradients of {layout.dtype} are not compressed, only float32 ones: use "
                'run.dtype = "float32", or compress.method = "off"'
            )
        self.settings, self._layout = settings, layout
        self.columns: list[CompressedColumn] = []
        self._settled = False

    def __call__(self, column: Column) -> CompressedColumn:
        made = CompressedColumn(column, self.settings, self._layout)
        self.columns.append(made)
        return made

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what each column keeps on each node; see `Memory.arrays`."""
        return ("residual", "velocity") if self.settings.momentum else ("residual",)

    @property
    def nodes(self) -> int:
        """Nodes that sums are made over; 1 on a rank that has no column."""
        return max((column.nodes for column in self.columns), default=1)

    def undo(self) -> None:
        """The last step was not applied: take all residuals back to what they were before it."""
        for column in self.columns:
            column.undo()

    def settle(self, comm: MPI.Intracomm) -> None:
        """After a step: what `auto` has measured on all columns of a bucket decides for all.

        Collective over `comm`, all ranks, while something is undecided: on all or none.
        """
        if self.settings.method != "auto" or self._settled:
            return
        rows = [row for row in comm.allgather([c.choice.found() for c in self.columns]) if row]
        if any(found is None for row in rows for found in row):
            return
        for bucket, column in enumerate(self.columns):
            column.choice.settle([row[bucket] for row in rows])
        self._settled = True


class CompressedColumn:
    """One column of one bucket.

    Attributes:
        span: (start, stop) of the column in the flat arrays.
        nodes, node: how many there are, and which of them this one is.
        memory: of the host: what was not applied yet, float32, shape (stop - start,).
        sent: bytes that this rank sent in the last step. density: of its selection. used: its
            method.
        choice: the method, and why.
    """

    def __init__(self, column: Column, settings: Settings, layout: Layout) -> None:
        """Not collective; all ranks of the column give equal settings and layouts."""
        self.span, self.settings = column.span, settings
        self._column, self._device = column, column.device
        self._host = column.device if column.device.name == "cpu" else open_device("cpu")
        self._exchange = Exchange(column.comm, idle=column.idle)
        self.nodes, self.node = self._exchange.size, self._exchange.rank
        n = column.span[1] - column.span[0]
        self._portions = portions(layout, *column.span, settings.least_size)
        self._small = self._portions.small
        if settings.method == "powersgd":
            self._small = tuple(sorted(self._small + self._portions.edges))
        extent = extent_of(layout, *column.span)
        self._topk = TopK(self._host, extent, settings.density, settings.values)
        self.memory = self._remembering(n)
        self._methods = {name: self._make(name, extent) for name in settings.names}
        self._dense = DenseSum(self._exchange, n)
        steps = range(settings.warmup_steps + 1)
        densities = [settings.density_at(step) for step in steps]
        self.choice = Choice(
            settings,
            {name: [m.traffic(d) for d in densities] for name, m in self._methods.items()},
        )
        self.steps, self._changed = 0, False
        self.sent, self.density, self.used = 0, 1.0, "dense"

    def _remembering(self, n: int) -> Kept:
        settings = self.settings
        if settings.momentum:
            return Momentum(self._host, self._topk, settings.momentum)
        if any(name in SPARSE for name in settings.names):
            return Residual(self._host, self._topk)
        return Kept(self._host, n)

    def _make(self, name: str, extent: Extent) -> Method:
        exchange, settings, topk = self._exchange, self.settings, self._topk
        if name == "dense":
            return DenseSum(exchange, extent.n)
        if name == "powersgd":
            matrices = self._portions.matrices
            return PowerSgd(exchange, extent.n, PowerSGD(self._host, matrices, settings.rank))
        if name in SPARSE:
            reducer = AllGather if name == "topk" else OkTopk
            return Sparse(topk, reducer(exchange, topk))
        codecs: dict[str, Callable[[Extent], Codec]] = {
            "int8": partial(Int8, self._host),
            "sign": partial(Sign, self._host),
            "bf16": partial(Cast, self._host),
        }
        return TwoShot(exchange, extent, codecs[name])

    def reduce(self) -> None:
        """See `Between`."""
        start, stop = self.span
        column, before = self._column, self._exchange.sent
        gradient, out = self._device.to_host(column.gradients[start:stop]), self._target()
        self._changed = self._finite(gradient)
        if self._changed:
            self._sum(self.memory.compensate(gradient), out)
        else:
            out[:] = np.nan
        self.sent = self._exchange.sent - before
        if out is not column.sums:
            self._device.copy(column.sums, self._device.from_host(out))

    def _sum(self, x: Values, out: Values) -> None:
        begun = time.perf_counter()
        method = self._methods[self.choice.begin(self.steps)]
        self.used = method.name
        self.density = self.settings.density_at(self.steps) if method.name in SPARSE else 1.0
        small = taken(x, self._small) if method.name != "dense" else x[:0]
        sent = method.run(x, out, self.density)
        if small.size:
            total = np.empty_like(small)
            self._dense.run(small, total, 1.0)
            put(out, self._small, total)
        clear(out, self._portions.gaps)  # to which the sign of 0 adds something
        self._keep(x, sent)
        if self.choice.timing:
            self.choice.end(self._all(time.perf_counter() - begun))
        self.steps += 1

    def _keep(self, x: Values, sent: Sent | None) -> None:
        """Small tensors have nothing left; of the others, what was not sent."""
        if isinstance(self.memory, Residual) and sent is not None:
            self.memory.update(*sent)
        else:
            clear(x, self._small + self._portions.gaps)
            self.memory.keep()

    def gather(self) -> None:
        """Nothing: every node has updated all of the column."""

    def undo(self) -> None:
        """Go back to what was before the last `reduce`."""
        if self._changed:
            self.memory.undo()
            self.choice.undo()
            self.steps -= 1
            self._changed = False

    def _target(self) -> Values:
        """Where sums are made: in their place, if that is memory of the host."""
        if self._device.name == "cpu":
            target: Values = self._column.sums
            return target
        return np.empty(self.span[1] - self.span[0], np.float32)

    def _finite(self, x: Values) -> bool:
        """Whether every rank's numbers are; the same on all."""
        mine = float(np.dot(x, x))
        return bool(np.isfinite(self._all(mine)).all())

    def _all(self, number: float) -> list[float]:
        """Every rank's number, by rank."""
        row = np.array([number]).view(np.uint8)
        rows = self._exchange.all_gather(row, [8] * self._exchange.size)
        return [float(r.view(np.float64)[0]) for r in rows]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the residual: the same on all ranks of the column."""
        return {
            "span": list(self.span),
            "nodes": self._exchange.size,
            "steps": self.steps,
            "choice": self.choice.state(),
            "methods": {name: method.state() for name, method in self._methods.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a column with the same span and nodes; else from the step."""
        self.steps = int(state["steps"])
        if list(self.span) != list(state["span"]) or self._exchange.size != state["nodes"]:
            return
        self.choice.restore(state["choice"])
        for name, method in self._methods.items():
            method.restore(state["methods"].get(name, {}))
