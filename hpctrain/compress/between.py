"""Compressed sums between nodes: what a sliced reduction is given in place of `Dense`.

A node's ranks add up their gradients in full; each then compresses its own column of the node's
sum, so that a residual is held once per node, 1 / C of it by each of C ranks. Every node ends with
the same sums of the column, and updates its own copy: no parameters cross.

    gradients that are not finite on any node are refused
    x <- what the memory makes of it       residual + gradient, or with momentum gathered before
    small tensors are taken out of x       and summed as they are, in one message
    sums <- what the method applies        the rest is kept by the memory

All of it is done on the device that holds the gradients; see `transport` for what crosses to the
host. `Settings.method` "oktopk" adds up its selected entries on the host.

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

from hpctrain.collectives.between import Column
from hpctrain.collectives.carry import settle
from hpctrain.collectives.network import COMMON, Network
from hpctrain.compress.cast import Cast
from hpctrain.compress.finite import square_sums
from hpctrain.compress.int8 import Int8
from hpctrain.compress.interface import Codec, Extent, extent_of
from hpctrain.compress.memory import Kept, Momentum, Residual
from hpctrain.compress.methods import DenseSum, Method, PowerSgd, Sent, Sparse, TwoShot, fill
from hpctrain.compress.portions import Pieces, portions
from hpctrain.compress.powersgd import PowerSGD
from hpctrain.compress.prior import predicted
from hpctrain.compress.settings import SPARSE, Choice, Settings
from hpctrain.compress.sign import Sign
from hpctrain.compress.sparse import AllGather, OkTopk
from hpctrain.compress.topk import TopK
from hpctrain.compress.transport import transport_for
from hpctrain.errors import UsageError
from hpctrain.nn.layout import Layout

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["CompressedColumn", "Compression"]

Array = Any  # of the device: float32, shape (n,)


class Compression:
    """Makes the compressed sum of every column; see `hpctrain.collectives.between.Crossing`.

    Attributes:
        whole: True: each node owns all.
        columns: those made so far, one per bucket.
    """

    whole = True

    def __init__(self, settings: Settings, layout: Layout, network: Network = COMMON) -> None:
        """`layout`: of the gradients. `network`: by which "auto" begins.

        Raises:
            UsageError: gradients that are not float32.
        """
        if layout.dtype != np.float32:
            raise UsageError(
                f"gradients of {layout.dtype} are not compressed, only float32 ones: use "
                'run.dtype = "float32", or compress.method = "off"'
            )
        self.settings, self._layout, self._network = settings, layout, network
        self.columns: list[CompressedColumn] = []
        self._settled = False

    def __call__(self, column: Column) -> CompressedColumn:
        made = CompressedColumn(column, self.settings, self._layout, self._network)
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

    def flush(self) -> None:
        """Send the next step's sums in full, and with them all residuals, which are 0 afterwards.

        Not collective; all ranks call it before the same step.
        """
        for column in self.columns:
            column.full = True

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
        mine = [(c.choice.settled, c.choice.found()) for c in self.columns]
        rows = [row for row in comm.allgather(mine) if row]
        self._settled = all(settled for row in rows for settled, _ in row)
        for bucket, column in enumerate(self.columns):
            found = [row[bucket][1] for row in rows if row[bucket][1] is not None]
            if not column.choice.settled and len(found) == len(rows):
                column.choice.settle(found)


class CompressedColumn:
    """One column of one bucket.

    Attributes:
        span: (start, stop) of the column in the flat arrays.
        nodes, node: how many there are, and which of them this one is.
        memory: of the device: what was not applied yet, float32, shape (stop - start,).
        sent: bytes that this rank sent in the last step. density: of its selection. used: its
            method.
        choice: the method, and why. full: whether the next step is a dense sum whatever it says.
    """

    def __init__(
        self, column: Column, settings: Settings, layout: Layout, network: Network = COMMON
    ) -> None:
        """Not collective; all ranks of the column give equal arguments."""
        self.span, self.settings = column.span, settings
        self._column, self._device = column, column.device
        self._transport = transport_for(column.device, column.comm, column.gpu_mpi, column.idle)
        self.nodes, self.node = self._transport.size, self._transport.rank
        n = column.span[1] - column.span[0]
        self._portions = portions(layout, *column.span, settings.least_size)
        small, gaps = self._portions.small, self._portions.gaps
        if settings.method == "powersgd":
            small = (*small, *self._portions.edges)
        self._small, self._gaps = Pieces(column.device, small), Pieces(column.device, gaps)
        self._apart = Pieces(column.device, (*small, *gaps))
        extent = extent_of(layout, *column.span)
        self._topk = TopK(column.device, extent, settings.density, settings.values)
        self.memory = self._remembering(n)
        self._methods = {name: self._make(name, extent) for name in settings.names}
        self._dense = DenseSum(self._transport, n)
        steps = range(settings.warmup_steps + 1)
        densities = [settings.density_at(step) for step in steps]
        self.choice = Choice(
            settings,
            {name: [m.traffic(d) for d in densities] for name, m in self._methods.items()},
            self._predicted(network) if settings.method == "auto" else None,
        )
        self.steps, self._changed, self.full = 0, False, False
        self._timed = False  # whether the last step counted for the choice
        self.sent, self.density, self.used = 0, 1.0, "dense"

    def _predicted(self, network: Network) -> dict[str, float]:
        """Seconds of a step by each method, of a model; columns of a node share its NICs."""
        first, last = self._column.bucket
        n = self.span[1] - self.span[0]
        columns = round((last - first) / n) if n else 1
        traffic = {name: m.traffic(self.settings.density) for name, m in self._methods.items()}
        return predicted(network, self.nodes, n, columns, traffic)

    def _remembering(self, n: int) -> Kept:
        settings = self.settings
        if settings.momentum:
            return Momentum(self._device, self._topk, settings.momentum)
        if any(name in SPARSE for name in settings.names):
            return Residual(self._device, self._topk)
        return Kept(self._device, n)

    def _make(self, name: str, extent: Extent) -> Method:
        transport, settings, topk = self._transport, self.settings, self._topk
        if name == "dense":
            return DenseSum(transport, extent.n)
        if name == "powersgd":
            matrices = self._portions.matrices
            return PowerSgd(transport, extent.n, PowerSGD(self._device, matrices, settings.rank))
        if name in SPARSE:
            reducer = AllGather if name == "topk" else OkTopk
            return Sparse(self._device, topk, reducer(transport, topk))
        codecs: dict[str, Callable[[Extent], Codec]] = {
            "int8": partial(Int8, self._device),
            "sign": partial(Sign, self._device),
            "bf16": partial(Cast, self._device),
        }
        return TwoShot(transport, extent, codecs[name])

    def reduce(self) -> None:
        """See `Between`."""
        start, stop = self.span
        column, before = self._column, self._transport.sent
        gradient = column.gradients[start:stop]
        self._changed = self._finite(gradient)
        full, self.full = self.full, False
        if self._changed:
            self._sum(self.memory.compensate(gradient), column.sums, full)
        else:
            fill(self._device, column.sums, np.nan)
        self.sent = self._transport.sent - before

    def _sum(self, x: Array, out: Array, full: bool) -> None:
        begun = time.perf_counter()
        name = self.choice.begin(self.steps)
        self._timed = self.choice.timing and not full
        method = self._methods["dense" if full else name]
        self.used = method.name
        self.density = self.settings.density_at(self.steps) if method.name in SPARSE else 1.0
        apart = self._small.size > 0 and method.name != "dense"
        small = self._small.take(x) if apart else None
        sent = method.run(x, out, self.density)
        if small is not None:
            total = self._device.empty(self._small.size, np.float32)
            self._dense.run(small, total, 1.0)
            self._small.put(out, total)
        self._gaps.clear(out)  # to which the sign of 0 adds something
        self._keep(x, sent)
        if self._timed:
            settle(self._device, self._column.idle)
            self.choice.end(self._all(time.perf_counter() - begun))
        self.steps += 1

    def _keep(self, x: Array, sent: Sent | None) -> None:
        """Small tensors have nothing left; of the others, what was not sent."""
        if isinstance(self.memory, Residual) and sent is not None:
            self.memory.update(*sent)
        else:
            self._apart.clear(x)
            self.memory.keep()

    def gather(self) -> None:
        """Nothing: every node has updated all of the column."""

    def undo(self) -> None:
        """Go back to what was before the last `reduce`."""
        if self._changed:
            self.memory.undo()
            if self._timed:
                self.choice.undo()
            self.steps -= 1
            self._changed = False

    def _finite(self, x: Array) -> bool:
        """Whether every rank's numbers, and sums of their squares, are; the same on all."""
        squares = self._transport.fetch(square_sums(self._device, x)).view(np.float32)
        return bool(np.isfinite(self._all(float(squares.sum(dtype=np.float64)))).all())

    def _all(self, number: float) -> list[float]:
        """Every rank's number, by rank."""
        row = np.array([number]).view(np.uint8)
        rows = self._transport.host.all_gather(row, [8] * self.nodes)
        return [float(r.view(np.float64)[0]) for r in rows]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the residual: the same on all ranks of the column."""
        return {
            "span": list(self.span),
            "nodes": self.nodes,
            "steps": self.steps,
            "choice": self.choice.state(),
            "methods": {name: method.state() for name, method in self._methods.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a column with the same span and nodes; else from the step."""
        self.steps = int(state["steps"])
        if list(self.span) != list(state["span"]) or self.nodes != state["nodes"]:
            return
        self.choice.restore(state["choice"])
        for name, method in self._methods.items():
            method.restore(state["methods"].get(name, {}))
