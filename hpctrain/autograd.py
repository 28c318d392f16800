"""The tape: reverse-mode differentiation of the operations in `nn`.

An operation computes its output and records a function that, given the gradient of the output,
contributes to the gradients of its inputs. `Tape.backward` calls these functions in reverse and
frees each one, and what it held, as soon as it has run, so that memory goes back to the device's
pool while the backward pass still goes on.

A contribution is *written* the first time and *added* after that. A parameter's gradient has a
place of its own (a range of the gradient store), and the first contribution, such as a matrix
product, is written straight into it: nothing is zeroed, packed or copied. The passes of several
tapes add up until one of them is told to `finish`.

Is given a device. Knows nothing of layers, ranks and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.device import Device
from hpctrain.errors import UsageError

__all__ = ["Tape", "Variable"]

Array = Any  # numpy.ndarray or cupy.ndarray: an array of the tape's device
Backward = Callable[[Array], None]


class Variable:
    """A value on the device and, while the backward pass runs, the gradient of the loss by it.

    `place` is where the gradient must end up (a view of a gradient store), or None for memory from
    the pool. `grad` is None until the first contribution.
    """

    __slots__ = ("grad", "lent", "needs_grad", "place", "value")

    def __init__(self, value: Array, needs_grad: bool = False, place: Array | None = None) -> None:
        self.value = value
        self.needs_grad = needs_grad
        self.place = place
        self.grad: Array | None = None
        self.lent = False  # grad is another variable's array: do not write into it

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.value.shape)


class Tape:
    """Records operations of one forward pass, and what every one of them may need to know.

    Args:
        device: where the values are.
        training: False records nothing: dropout is off, batch norm uses running statistics.
        seed, step: key of this pass's random numbers, together with `samples`.
        samples: int64 (n,) on the host; the samples' ids, in the order of the batch.
        groups: int64 (microbatches + 1,) on the host; microbatch g is samples groups[g] up to
            groups[g + 1]. Default: the batch is one microbatch.
        all_reduce: sums a host float64 array over all ranks, in place; collective. Only operations
            with statistics over the whole step call it. Default: one rank.
        ready: called in the backward pass with each parameter (a variable with a `place`) whose
            gradient is final: after the last of its uses. Not with one that got no gradient.
        loss_scale: all gradients are those of the losses times this, so that small ones are not
            lost in float16; the losses themselves are not scaled.
    """

    def __init__(
        self,
        device: Device,
        *,
        training: bool = True,
        seed: int = 0,
        step: int = 0,
        samples: NDArray[np.int64] | None = None,
        groups: NDArray[np.int64] | None = None,
        all_reduce: Callable[[NDArray[np.float64]], None] | None = None,
        ready: Callable[[Variable], None] | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        self.device = device
        self.training = training
        self.seed = seed
        self.step = step
        self.samples = samples
        self.groups = groups
        self.all_reduce = all_reduce or (lambda _: None)
        self.ready = ready
        self.loss_scale = loss_scale
        self.draws = 0  # operations that drew random numbers so far: tells them apart
        self._records: list[tuple[Variable, Backward, list[Variable]]] = []
        self._uses: dict[int, int] = {}  # of parameters, by id: records that are still to come

    def record(self, value: Array, inputs: Iterable[Variable], backward: Backward) -> Variable:
        """The output of an operation on `inputs`. `backward(dy)` is kept if a gradient is needed.

        `backward` owns neither `dy` nor the values it refers to; it calls `accumulate` or `pass_on`
        for each input.
        """
        wanting = [variable for variable in inputs if variable.needs_grad]
        needed = self.training and bool(wanting)
        output = Variable(value, needed)
        if needed:
            parameters = [variable for variable in wanting if variable.place is not None]
            for parameter in parameters:
                self._uses[id(parameter)] = self._uses.get(id(parameter), 0) + 1
            self._records.append((output, backward, parameters))
        return output

    def accumulate(self, variable: Variable, compute: Callable[[Array], object]) -> None:
        """Let `compute(out)` write a contribution to the variable's gradient into `out`.

        `out` has the value's shape and undefined contents; `compute` must write all of it.
        """
        if not variable.needs_grad:
            return
        device, value = self.device, variable.value
        if variable.grad is None:
            out = variable.place
            variable.grad = device.empty(value.shape, value.dtype) if out is None else out
            compute(variable.grad)
            return
        contribution = device.empty(value.shape, value.dtype)
        compute(contribution)
        self._add(variable, contribution)

    def pass_on(self, variable: Variable, gradient: Array) -> None:
        """Contribute an array that exists already, of the value's shape; it is not written to."""
        if not variable.needs_grad:
            return
        if variable.place is not None:
            self.accumulate(variable, lambda out: self.device.copy(out, gradient))
        elif variable.grad is None:
            variable.grad, variable.lent = gradient, True
        else:
            self._add(variable, gradient)

    def _add(self, variable: Variable, contribution: Array) -> None:
        total = variable.grad
        assert total is not None
        n = contribution.size
        if variable.lent:
            fresh = self.device.empty(total.shape, total.dtype)
            self.device.launch("add", total, contribution, fresh, n, work=n)
            variable.grad, variable.lent = fresh, False
        else:
            self.device.launch("add_into", total, contribution, n, work=n)

    def backward(self, *losses: Variable) -> None:
        """Differentiate the sum of all elements of `losses` by everything that was recorded.

        A loss is what a loss operation returned; its own gradient is 1 in every element and is
        handed to the operation as None.
        """
        seeds = {id(loss) for loss in losses}
        unrecorded = seeds - {id(output) for output, _, _ in self._records}
        if unrecorded:
            raise UsageError(
                "backward() was given a variable that this tape did not record with training=True, "
                "or that depends on no parameter"
            )
        while self._records:
            output, backward, parameters = self._records.pop()
            if id(output) in seeds:
                backward(None)
            elif output.grad is not None:
                backward(output.grad)
            output.grad = None
            self._count_down(parameters)

    def _count_down(self, parameters: Iterable[Variable]) -> None:
        """After a record that uses them has run: tell which have their gradient now."""
        for parameter in parameters:
            self._uses[id(parameter)] -= 1
            final = not self._uses[id(parameter)] and parameter.grad is not None
            if final and self.ready is not None:
                self.ready(parameter)

    def finish(self, parameters: Iterable[Variable]) -> None:
        """End the step: zero the gradients that got no contribution, and forget the rest.

        Contributions of earlier tapes that were not told so are in the sum. Afterwards every
        parameter's place holds its gradient, and the next pass writes anew.
        """
        for parameter in parameters:
            if parameter.grad is None and parameter.place is not None:
                self.device.launch(
                    "fill", parameter.place, 0.0, parameter.place.size, work=parameter.place.size
                )
            parameter.grad, parameter.lent = None, False
