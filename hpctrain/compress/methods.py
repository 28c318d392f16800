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

Layer: compress. Is given arrays on the host; knows nothing of layouts, and of when to use what.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.cut import bound
from hpctrain.collectives.opaque import Exchange
from hpctrain.compress.interface import Codec, Extent, Payload
from hpctrain.compress.powersgd import PowerSGD
from hpctrain.compress.sparse import AllGather, OkTopk
from hpctrain.compress.topk import TopK

__all__ = ["DenseSum", "Method", "PowerSgd", "Sent", "Sparse", "TwoShot", "dense_bytes"]

Values = NDArray[np.float32]
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

    def run(self, x: Values, out: Values, density: float) -> Sent | None:
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

    def __init__(self, exchange: Exchange, n: int) -> None:
        self._exchange, self._n = exchange, n

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return dense_bytes(self._n, self._exchange.size)

    def run(self, x: Values, out: Values, density: float) -> None:
        """See `Method`."""
        me, size = self._exchange.rank, self._exchange.size
        spans = chunks(x.size, size)
        nbytes = [4 * (stop - start) for start, stop in spans]
        rows = self._exchange.all_to_all([x[a:b].view(np.uint8) for a, b in spans], nbytes)
        start, stop = spans[me]
        total = rows[0].view(np.float32).copy()
        for row in rows[1:]:
            total += row.view(np.float32)
        rows = self._exchange.all_gather(total.view(np.uint8), nbytes)
        for row, (start, stop) in zip(rows, spans, strict=True):
            out[start:stop] = row.view(np.float32)
        x[:] = 0


class Sparse:
    """The `density` n largest elements of each rank, by a reducer of sparse payloads."""

    def __init__(self, codec: TopK, reducer: AllGather | OkTopk) -> None:
        """`reducer`: of what `codec` makes."""
        self.name, self._codec, self._reducer = reducer.name, codec, reducer
        self._step = 0

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return self._reducer.traffic(self._codec.kept(density))

    def run(self, x: Values, out: Values, density: float) -> Sent:
        """See `Method`."""
        self._codec.density = density
        payload = self._codec.compress(x, self._step)
        self._step += 1
        out[:] = 0
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
        self, exchange: Exchange, extent: Extent, codec: Callable[[Extent], Codec]
    ) -> None:
        """`codec`: makes the codec of a part of the extent; of fixed size."""
        self._exchange, base = exchange, extent.start
        self._spans = chunks(extent.n, exchange.size)
        self._codecs = [codec(Extent(base + a, base + b, extent.layout)) for a, b in self._spans]
        self.name = self._codecs[0].name
        self._step = 0

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return 2 * (self._exchange.size - 1) * self._codecs[0].nbytes

    def run(self, x: Values, out: Values, density: float) -> None:
        """See `Method`."""
        me, codecs, spans, step = self._exchange.rank, self._codecs, self._spans, self._step
        nbytes = [codec.nbytes for codec in codecs]
        payloads = [c.compress(x[a:b], step) for c, (a, b) in zip(codecs, spans, strict=True)]
        got = self._exchange.all_to_all([payload.data for payload in payloads], nbytes)
        start, stop = spans[me]
        total = np.zeros(stop - start, np.float32)
        for rank, data in enumerate(got):
            if rank == me:
                total += x[start:stop]
            else:
                codecs[me].add_into(codecs[me].received(data, step), total)
        for rank, (first, last) in enumerate(spans):
            if rank != me:
                codecs[rank].add_into(payloads[rank], x[first:last], -1.0)
        sums = self._exchange.all_gather(codecs[me].compress(total, step).data, nbytes)
        out[:] = 0
        for codec, data, (first, last) in zip(codecs, sums, spans, strict=True):
            codec.add_into(codec.received(data, step), out[first:last])
        np.subtract(total, out[start:stop], out=x[start:stop])
        self._step += 1


class PowerSgd:
    """See `powersgd`; what is not part of a matrix must be 0 in `x`."""

    name = "powersgd"

    def __init__(self, exchange: Exchange, n: int, codec: PowerSGD) -> None:
        self._dense, self._size, self._codec = DenseSum(exchange, n), exchange.size, codec

    def traffic(self, density: float) -> int:
        """See `Method`."""
        return dense_bytes(self._codec.nbytes // 4, self._size)

    def run(self, x: Values, out: Values, density: float) -> None:
        """See `Method`."""
        p = self._summed(self._codec.left(x))
        q = self._summed(self._codec.right(x, p))
        out[:] = 0
        self._codec.finish(x, q, out)

    def _summed(self, flat: Values) -> Values:
        """The sum over ranks; `flat` is 0 afterwards."""
        total = np.empty_like(flat)
        self._dense.run(flat, total, 1.0)
        return total

    def state(self) -> dict[str, Any]:
        """See `Method`."""
        return {"q": base64.b64encode(self._codec.q.tobytes()).decode()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Method`."""
        if state:
            self._codec.q[:] = np.frombuffer(base64.b64decode(state["q"]), np.float32)
