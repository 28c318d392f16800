"""Layers' parameters and statistics: declared by layers, placed in stores, initialized by name.

A `Module` declares parameters as attributes; their names are the attribute paths, such as
"blocks.0.conv.weight". `bind` places all of them in stores. Nothing is allocated before that.

Layer: nn. Knows nothing of ranks and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.device import Device
from hpctrain.device.dtypes import wide_dtype
from hpctrain.nn.initialize import uniform
from hpctrain.nn.layout import Layout, Store

__all__ = ["Layouts", "Module", "Parameter", "Statistic"]


class Parameter(Variable):
    """A trained tensor. `value` and `place` are set by `Module.bind`.

    `arrive`, if not None, is called whenever the value is read: other ranks' updates may still be
    on their way, and it waits for them.

    Args:
        shape: its shape.
        bound: initial values are uniform in [-bound, bound); ignored where `constant` is given.
        constant: initial value of all elements.
        decay: whether weight decay applies (default: not for biases and norms' parameters,
            that is, only for tensors of two or more dimensions).
    """

    __slots__ = ("_value", "arrive", "bound", "constant", "decay", "declared_shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        bound: float = 0.0,
        constant: float | None = None,
        decay: bool | None = None,
    ) -> None:
        self.arrive: Callable[[], None] | None = None
        super().__init__(None, needs_grad=True)
        self.declared_shape = shape
        self.bound = bound
        self.constant = constant
        self.decay = len(shape) > 1 if decay is None else decay

    @property
    def value(self) -> Any:
        """The parameter's current value, a view of a store."""
        if self.arrive is not None:
            self.arrive()
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._value = value

    def initial(self, seed: int, name: str) -> NDArray[np.float64]:
        """The initial value: a pure function of seed and name."""
        if self.constant is not None:
            return np.full(self.declared_shape, self.constant)
        return uniform(seed, name, self.declared_shape, self.bound)


class Statistic:
    """A running average that training keeps but does not differentiate, such as a mean.

    `value` is the average, of the declared shape (n,). `sum`, of shape (n + 1,), is where a
    training pass *writes* its weighted sum over this rank's microbatches, and in the last element
    the sum of the weights (0 where it has nothing to say). After the step all ranks' sums are
    added, and the average moves towards sum / weight. Both are set by `Module.bind`.
    """

    __slots__ = ("constant", "declared_shape", "momentum", "sum", "value")

    def __init__(self, shape: tuple[int], constant: float, momentum: float) -> None:
        """`constant`: the average before the first step; `momentum`: how far a step moves it."""
        self.declared_shape = shape
        self.constant = constant
        self.momentum = momentum
        self.value: Any = None
        self.sum: Any = None


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts of a model: its parameters, and its statistics as averages and as sums."""

    parameters: Layout
    averages: Layout
    sums: Layout


class Module:
    """Base of layers and models: finds parameters and statistics among its attributes."""

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """The forward pass."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward pass")

    def named(self, kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """(name, object) of every `kind` below this module, in order of declaration.

        An object that occurs twice (a tied weight) is yielded once, under its first name.
        """
        seen: set[int] = set()
        for name, found in _walk(self, kind, prefix):
            if id(found) not in seen:
                seen.add(id(found))
                yield name, found

    def parameters(self) -> dict[str, Parameter]:
        """All parameters by name, in order of declaration, which is that of the forward pass."""
        return dict(self.named(Parameter))

    def statistics(self) -> dict[str, Statistic]:
        """All statistics by name."""
        return dict(self.named(Statistic))

    def layouts(self, dtype: DTypeLike) -> Layouts:
        """Layouts for stores of `dtype`, and of its wide dtype for the statistics.

        Parameters are in the order their gradients become ready.
        """
        parameters = [(n, p.declared_shape, p.decay) for n, p in self.parameters().items()]
        averages = [(n, s.declared_shape, False) for n, s in self.statistics().items()]
        sums = [(name, (shape[0] + 1,), False) for name, shape, _ in averages]
        wide = wide_dtype(dtype)
        return Layouts(
            Layout(reversed(parameters), dtype), Layout(averages, wide), Layout(sums, wide)
        )

    def bind(
        self,
        parameters: Store,
        averages: Store,
        gradients: Store | None = None,
        sums: Store | None = None,
    ) -> None:
        """Place parameters and statistics in stores; without the last two only for evaluation."""
        for name, parameter in self.parameters().items():
            parameter.value = parameters.view(name)
            parameter.place = gradients.view(name) if gradients else None
        for name, statistic in self.statistics().items():
            statistic.value = averages.view(name)
            statistic.sum = sums.view(name) if sums else None

    def initialize(self, device: Device, seed: int, parameters: bool = True) -> None:
        """Write the initial values; `bind` comes first. `parameters`: False for statistics only."""
        for name, parameter in self.parameters().items():
            if parameters:
                value = parameter.initial(seed, name).astype(parameter.value.dtype)
                device.copy(parameter.value, device.from_host(value))
        for statistic in self.statistics().values():
            value = np.full(statistic.declared_shape, statistic.constant, statistic.value.dtype)
            device.copy(statistic.value, device.from_host(value))


def _walk(item: Any, kind: type[Any], path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(item, kind):
        yield path, item
    elif isinstance(item, Module):
        for name, child in vars(item).items():
            yield from _walk(child, kind, f"{path}.{name}" if path else name)
    elif isinstance(item, list | tuple):
        for index, child in enumerate(item):
            yield from _walk(child, kind, f"{path}.{index}")
