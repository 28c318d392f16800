"""This rank's part of a step's gradient, computed in one or more passes, and exchanged once.

A pass is a forward and a backward pass over whole microbatches. With `batch.accumulate` = N a rank
computes its part of every global batch in up to N of them, one after the other, so that only the
activations of one are in memory at a time: about 1/N. All add to the same gradients, and nothing is
sent before the last pass, in which every parameter's gradient becomes final.

    rank 0   | pass m0 | pass m1 |          gradient [ m0 + m1 ] --+
    rank 1   | pass m2 |                    gradient [ m2 ]      --+-- one exchange
    rank 2   (a pass over no samples)       gradient [ 0 ]       --+

16-bit gradients are added in float32, in memory of 4 bytes per parameter, and rounded once more
when they are final: N roundings to 16 bits, one after the other, would lose what is small.

Layer: train. Knows nothing of messages; whoever exchanges is told which gradients are final.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.data import Batch
from hpctrain.device.dtypes import wide_dtype
from hpctrain.nn.layout import Store
from hpctrain.timeline import span
from hpctrain.train.session import Session

__all__ = ["Passes"]


class Passes:
    """Forward and backward over a batch, in `batch.accumulate` passes, into a store of gradients.

    Args:
        gradients: the store that the model's parameters have their places in.
        sums: the store that its statistics have their sums in.
    """

    def __init__(self, session: Session, gradients: Store, sums: Store) -> None:
        self._session, self._gradients, self._sums = session, gradients, sums
        self._parameters = session.model.parameters()
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.count = session.config.batch.accumulate
        self._totals: Store | None = None  # of 16-bit gradients: what the passes add up to
        layout, wide = gradients.layout, wide_dtype(gradients.layout.dtype)
        if self.count > 1 and wide != layout.dtype:
            self._totals = Store(layout.with_dtype(wide), session.device.zeros(layout.size, wide))

    def run(
        self,
        batch: Batch,
        step: int,
        scale: float,
        ready: Callable[[str], None] | None,
        before_backward: Callable[[], None],
    ) -> NDArray[np.float64]:
        """Write the gradient of `scale` times the losses. Collective only if an operation is.

        Args:
            batch: this rank's part of the global batch; it may be empty.
            ready: called in the last pass with the name of each parameter whose gradient is final.
                Those it is not called with are final at the end.
            before_backward: called once, before the first gradient is written.

        Returns:
            this rank's sums of losses, weights and correct answers, then of the statistics.
        """
        parts, sums = batch.split(self.count), np.zeros(3 + self._sums.layout.size)
        totals = self._totals if len(parts) > 1 else None
        unsettled = set(self._parameters) if totals is not None else set()

        def final(parameter: Variable) -> None:
            name = self._names[id(parameter)]
            if totals is not None:
                self._settle(totals, name)
                unsettled.discard(name)
            if ready is not None:
                ready(name)

        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            tape = self._forward_backward(
                part, step, scale, final if last else None, sums, before_backward
            )
            before_backward = _nothing
            if last or totals is not None:
                tape.finish(self._parameters.values())  # else the next pass adds to the gradients
            if not last and totals is not None:
                self._keep(totals, first=index == 0)
        for name in unsettled:  # without a gradient in the last pass
            assert totals is not None
            self._settle(totals, name)
        return sums

    def _forward_backward(
        self,
        batch: Batch,
        step: int,
        scale: float,
        ready: Callable[[Variable], None] | None,
        sums: NDArray[np.float64],
        before_backward: Callable[[], None],
    ) -> Tape:
        """One pass; of what it computed nothing but gradients and `sums` is left."""
        session = self._session
        tape = session.tape(batch, step, training=True, loss_scale=scale, ready=ready)
        with span("forward", samples=len(batch)):
            output = session.model(tape, session.task.inputs(session.device, batch))
            losses, found = session.task.loss(tape, output, batch)
            sums[:3] += found.loss, found.weight, found.correct
            sums[3:] += session.device.to_host(self._sums.array)  # each pass writes them anew
        before_backward()
        with span("backward"):
            tape.backward(losses)
        return tape

    def _keep(self, totals: Store, first: bool) -> None:
        """Add the 16-bit gradients of a pass to the totals; the next pass writes them anew."""
        device, n = self._session.device, totals.layout.size
        if first:
            device.launch("fill", totals.array, 0.0, n, work=n)
        device.launch("add_widened", self._gradients.array, totals.array, n, work=n)

    def _settle(self, totals: Store, name: str) -> None:
        """Replace a parameter's 16-bit gradient, that of the last pass, by all passes' sum."""
        device, total, gradient = (
            self._session.device,
            totals.view(name),
            self._gradients.view(name),
        )
        device.launch("add_widened", gradient, total, total.size, work=total.size)
        device.launch("narrow", total, gradient, total.size, work=total.size)


def _nothing() -> None:
    """What is done before the backward pass of a later pass."""
