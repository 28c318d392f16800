"""Layers: parameters with initial values, and the operation that uses them.

Initial values follow He et al., "Delving deep into rectifiers", ICCV 2015: uniform with variance
2 / fan-in for weights before a rectifier, so bound = sqrt(6 / fan-in); biases are 0.

Layer: nn. Knows nothing of ranks and optimizers.
"""

from __future__ import annotations

import math

from hpctrain.autograd import Tape, Variable
from hpctrain.errors import UsageError
from hpctrain.nn import operations
from hpctrain.nn.batch_norm import batch_norm
from hpctrain.nn.convolution import conv2d
from hpctrain.nn.dropout import dropout
from hpctrain.nn.embedding import embedding
from hpctrain.nn.module import Module, Parameter, Statistic

__all__ = ["BatchNorm", "Conv2d", "Dropout", "Embedding", "LayerNorm", "Linear", "activation"]


def activation(name: str, tape: Tape, x: Variable) -> Variable:
    """The activation called "relu" or "gelu"."""
    if name == "relu":
        return operations.relu(tape, x)
    if name == "gelu":
        return operations.gelu(tape, x)
    raise UsageError(f"no activation is called {name!r}; there are relu and gelu")


class Linear(Module):
    """y = x W^T + b; weight (outputs, features), bias (outputs,)."""

    def __init__(self, features: int, outputs: int, bias: bool = True, gain: float = 2.0) -> None:
        """`gain`: variance of the weights times `features`; 1 where no rectifier follows."""
        self.weight = Parameter((outputs, features), bound=math.sqrt(3 * gain / features))
        self.bias = Parameter((outputs,), constant=0.0) if bias else None

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (..., features) -> (..., outputs)."""
        return operations.linear(tape, x, self.weight, self.bias)


class Conv2d(Module):
    """A convolution of NHWC images; weight (outputs, kernel, kernel, channels)."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> None:
        self.stride, self.padding = stride, padding
        fan_in = kernel * kernel * channels
        self.weight = Parameter((outputs, kernel, kernel, channels), bound=math.sqrt(6 / fan_in))
        self.bias = Parameter((outputs,), constant=0.0) if bias else None

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (N, H, W, channels) -> (N, H', W', outputs)."""
        return conv2d(tape, x, self.weight, self.bias, stride=self.stride, padding=self.padding)


class BatchNorm(Module):
    """Batch norm over all dims but the last, with statistics per microbatch or over the step."""

    def __init__(
        self,
        channels: int,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        whole_step: bool = False,
        gamma: float = 1.0,
    ) -> None:
        """`momentum`: how far a step moves the running statistics; `gamma`: its initial value."""
        self.epsilon, self.whole_step = epsilon, whole_step
        self.gamma = Parameter((channels,), constant=gamma)
        self.beta = Parameter((channels,), constant=0.0)
        self.mean = Statistic((channels,), constant=0.0, momentum=momentum)
        self.variance = Statistic((channels,), constant=1.0, momentum=momentum)

    def __call__(
        self, tape: Tape, x: Variable, relu: bool = False, shortcut: Variable | None = None
    ) -> Variable:
        """x: (N, ..., channels), same shape out; then + `shortcut` and ReLU where asked for."""
        return batch_norm(
            tape, x, self.gamma, self.beta, self.mean, self.variance,
            epsilon=self.epsilon, whole_step=self.whole_step, relu=relu, shortcut=shortcut,
        )  # fmt: skip


class LayerNorm(Module):
    """Layer norm over the last dim."""

    def __init__(self, features: int, epsilon: float = 1e-5) -> None:
        self.epsilon = epsilon
        self.gamma = Parameter((features,), constant=1.0)
        self.beta = Parameter((features,), constant=0.0)

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (..., features), same shape out."""
        return operations.layer_norm(tape, x, self.gamma, self.beta, self.epsilon)


class Dropout(Module):
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise UsageError(f"the dropout rate is {rate}; it must be at least 0 and less than 1")
        self.rate = rate

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (N, ...); which elements fall depends on seed, step, sample and layer only."""
        return dropout(tape, x, self.rate)


class Embedding(Module):
    """Rows of a table, by number; weight (vocabulary, features)."""

    def __init__(self, vocabulary: int, features: int) -> None:
        self.weight = Parameter((vocabulary, features), bound=math.sqrt(3 / features))

    def __call__(self, tape: Tape, ids: Variable) -> Variable:
        """ids: (...) int64 -> (..., features)."""
        return embedding(tape, ids, self.weight)
