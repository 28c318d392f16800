"""How a vector's sum over ranks is made, exactly or not: the methods between nodes.

    dense      every element as float32, by way of the owners of chunks
    topk       the k largest of each rank, given to all
    oktopk     the k largest of each rank, summed by regions, the largest sums given to all
    int8, sign, bf16   chunks encoded for their owners, the sums encoded for all (two shots)
    powersgd   products of narrow matrices

`run(x, out, density)` is collective: `x` is what a rank brings, its gradient and its residual;
afterwards `out` is the applied sum, the same bits on all ranks, and `x` is the new residual, or is
unchanged where `run` returns what was sent and rejected, for a memory to take off. Over all ranks,
out + new residuals = what was brought: exactly for dense and top-k methods in each element's books
(what a rank sent or kept is its own number, unchanged), up to one rounding of float32 for the
others.

All payloads of top-k methods, and all of two shots, begin with the header of `header.py`; a dense
sum and PowerSGD exchange plain arrays of float32, whose sizes both sides know and MPI's receive
checks, and which MPI could add up.

Layer: compress. Is given arrays of a device, and what carries them; knows nothing of layouts, and
of when to use what.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hpctrain.collectives.cut import bound
from hpctrain.compress.interface import Codec, Extent, Payload, require
from hpctrain.compress.powersgd import PowerSGD
from hpctrain.compress.sparse import AllGather, OkTopk
from hpctrain.compress.topk import TopK
from hpctrain.compress.transport import Transport

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["DenseSum", "Method", "PowerSgd", "Sent", "Sparse", "TwoShot", "dense_bytes", "fill"]

Array = Any  # of the device: float32, shape (n,)
GRAIN = 16  # elements: chunks start at multiples of 64 bytes


class Sent(NamedTuple):
    """What a memory takes off: the arguments of `Memory.update`."""

    payload: Payload
    rejected: Payload | None


class Method(Protocol):
    """See the module's text."""

    name: str

    def traffic(self, density: float) -> int:
        """Bytes that a rank receives in a step, about."""

    def run(self, x: Array, out: Array, density: float) -> Sent | None:
        """The sum over ranks. Collective."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside residuals: equal on all ranks, values of JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with as many ranks and elements."""


def chunks(n: int, size: int) -> list[tuple[int, int]]:
    """[0, n) cut for `size` owners."""
    ends = [bound((0, n), size, k, GRAIN) for k in range(size + 1)]
    return list(zip(ends, ends[1:], strict=False))


def dense_bytes(n: int, size: int) -> int:
    """Bytes that a rank receives for a dense sum of `n` numbers, on average."""
    return 8 * n * (size - 1) // size


class Stateless:
    """For methods that keep nothing between steps but residuals."""

    def state(self) -> dict[str, Any]:
        """See `Method`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Method`."""


class DenseSum(Stateless):
    """Every element, added in rank order by its chunk's owner. The residual is 0 afterwards."""

    name = "dense"

    def __init__(self, transport: Transport, n: int) -> None:
        self._transport, self._n = transport, n

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return dense_bytes(self._n, self._transport.size)

    def run(self, x: Array, out: Array, density: float) -> None:
        """See `Method`."""
        spans, limit = chunks(x.shape[0], self._transport.size), self._transport.round_bytes
        longest = max(stop - start for start, stop in spans)
        width = longest
        if limit is not None:
            width = max(limit // (4 * GRAIN * self._transport.size), 1) * GRAIN
        for at in range(0, longest, max(width, 1)):
            self._sum(x, out, [(min(a + at, b), min(a + at + width, b)) for a, b in spans])
        fill(self._transport.device, x, 0)

    def _sum(self, x: Array, out: Array, pieces: Sequence[tuple[int, int]]) -> None:
        """The sum of one piece of every owner's chunk."""
        transport, device = self._transport, self._transport.device
        nbytes = [4 * (stop - start) for start, stop in pieces]
        rows = transport.all_to_all([x[a:b].view(np.uint8) for a, b in pieces], nbytes)
        start, stop = pieces[transport.rank]
        total, count = out[start:stop], stop - start
        if count:
            device.copy(total, rows[0].view(np.float32))
            for row in rows[1:]:
                device.launch("add_into", total, row.view(np.float32), count, work=count)
        rows = transport.all_gather(total.view(np.uint8), nbytes)
        for rank, (first, last) in enumerate(pieces):
            if rank != transport.rank and first < last:
                device.copy(out[first:last], rows[rank].view(np.float32))


class Sparse:
    """The `density` n largest elements of each rank, by a reducer of sparse payloads."""

    def __init__(self, device: Device, codec: TopK, reducer: AllGather | OkTopk) -> None:
        """`reducer`: of what `codec` makes."""
        self._device = device
        self.name, self._codec, self._reducer = reducer.name, codec, reducer
        self._step = 0

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return self._reducer.traffic(self._codec.kept(density))

    def run(self, x: Array, out: Array, density: float) -> Sent:
        """See `Method`."""
        self._codec.density = density
        payload = self._codec.compress(x, self._step)
        self._step += 1
        fill(self._device, out, 0)
        return Sent(payload, self._reducer.combine(payload, out))

    def state(self) -> dict[str, Any]:
        """See `Method`."""
        return self._reducer.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Method`."""
        if state:
            self._reducer.restore(dict(state))


class TwoShot(Stateless):
    """Chunks go to their owners encoded; their sums go to everyone, encoded again.

    A chunk's payload has a header of its own both times: 64 bytes of at least some thousands.

    The owner adds its own chunk as it is, and keeps what the second encoding took away in its
    residual there: so one residual serves both errors.
    """

    def __init__(
        self, transport: Transport, extent: Extent, codec: Callable[[Extent], Codec]
    ) -> None:
        """`codec`: makes the codec of a part of the extent. `UsageError`: of no fixed size."""
        self._transport, base = transport, extent.start
        self._spans = chunks(extent.n, transport.size)
        self._codecs = [codec(Extent(base + a, base + b, extent.layout)) for a, b in self._spans]
        require(self._codecs[0], "fixed_size", "owners of chunks make room for payloads beforehand")
        self.name = self._codecs[0].name
        self._step = 0

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return 2 * (self._transport.size - 1) * self._codecs[0].nbytes

    def run(self, x: Array, out: Array, density: float) -> None:
        """See `Method`."""
        me, codecs, spans, step = self._transport.rank, self._codecs, self._spans, self._step
        nbytes = [codec.nbytes for codec in codecs]
        payloads = [c.compress(x[a:b], step) for c, (a, b) in zip(codecs, spans, strict=True)]
        total = self._own_chunk(x, payloads, nbytes)
        for rank, (first, last) in enumerate(spans):
            if rank != me:
                codecs[rank].add_into(payloads[rank], x[first:last], -1.0)
        said = codecs[me].compress(total, step)
        arrived = self._transport.all_gather(said.data, nbytes)
        fill(self._transport.device, out, 0)
        for rank, (data, (first, last)) in enumerate(zip(arrived, spans, strict=True)):
            codecs[rank].add_into(
                said if rank == me else self._received(rank, data, rank), out[first:last]
            )
        self._keep(x, total, out)
        self._step += 1

    def _own_chunk(self, x: Array, payloads: Sequence[Payload], nbytes: Sequence[int]) -> Array:
        """The sum of this rank's chunk: its own part as it is, the others' as they were encoded."""
        me, device = self._transport.rank, self._transport.device
        got = self._transport.all_to_all([payload.data for payload in payloads], nbytes)
        start, stop = self._spans[me]
        total, count = device.zeros(stop - start, np.float32), stop - start
        for rank, data in enumerate(got):
            if rank == me:
                device.launch("add_into", total, x[start:stop], count, work=count)
            else:
                self._codecs[me].add_into(self._received(rank, data, me), total)
        return total

    def _received(self, rank: int, data: Array, chunk: int) -> Payload:
        """What came from a rank, as a payload of a chunk."""
        return self._codecs[chunk].received(data, self._step, self._transport.head(rank))

    def _keep(self, x: Array, total: Array, out: Array) -> None:
        """x of this rank's chunk <- what encoding its sum took away."""
        start, stop = self._spans[self._transport.rank]
        kept, device, count = x[start:stop], self._transport.device, stop - start
        device.copy(kept, total)
        device.launch("cast_add", out[start:stop], kept, -1.0, count, work=count)


class PowerSgd:
    """See `powersgd`; what is not part of a matrix must be 0 in `x`."""

    name = "powersgd"

    def __init__(self, transport: Transport, n: int, codec: PowerSGD) -> None:
        """`UsageError`: a codec whose payloads cannot be added up as they are."""
        require(codec, "linear", "its payloads are added up by a dense sum, and would mean nothing")
        self._dense, self._codec = DenseSum(transport, n), codec
        self._device, self._size = transport.device, transport.size

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return dense_bytes(self._codec.nbytes // 4, self._size)

    def run(self, x: Array, out: Array, density: float) -> None:
        """See `Method`."""
        p = self._summed(self._codec.left(x))
        q = self._summed(self._codec.right(x, p))
        fill(self._device, out, 0)
        self._codec.finish(x, q, out)

    def _summed(self, flat: Array) -> Array:
        """The sum over ranks; `flat` is 0 afterwards."""
        total = self._device.empty(flat.shape[0], np.float32)
        self._dense.run(flat, total, 1.0)
        return total

    def state(self) -> dict[str, Any]:
        """See `Method`."""
        q = self._device.to_host(self._codec.q)
        return {"q": base64.b64encode(q.tobytes()).decode()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Method`."""
        if state:
            q = np.frombuffer(base64.b64decode(state["q"]), np.float32)
            self._device.copy(self._codec.q, self._device.from_host(q))


def fill(device: Device, array: Array, value: float) -> None:
    """Set all elements to one value."""
    n = array.shape[0]
    device.launch("fill", array, value, n, work=n)
