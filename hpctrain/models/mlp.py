"""A fully connected network.

    x -> [linear -> norm -> activation -> dropout] per hidden layer -> linear -> logits

Layer: models.
"""

from __future__ import annotations

import math

from hpctrain.autograd import Tape, Variable
from hpctrain.nn.layers import BatchNorm, Dropout, LayerNorm, Linear, activation
from hpctrain.nn.module import Module
from hpctrain.nn.operations import reshape
from hpctrain.sections import Mlp

__all__ = ["MLP"]


class MLP(Module):
    """See the top of the file; samples of any shape are flattened."""

    def __init__(self, config: Mlp, sample_shape: tuple[int, ...], outputs: int) -> None:
        self.activation = config.activation
        self.features = math.prod(sample_shape)
        widths = [self.features, *config.hidden]
        self.layers = [
            HiddenLayer(config, before, after)
            for before, after in zip(widths, widths[1:], strict=False)
        ]
        self.head = Linear(widths[-1], outputs, gain=1.0)

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (N, *sample_shape) -> logits (N, outputs)."""
        x = reshape(tape, x, (x.shape[0], self.features))
        for layer in self.layers:
            x = layer(tape, x)
        return self.head(tape, x)


class HiddenLayer(Module):
    """linear -> norm -> activation -> dropout."""

    def __init__(self, config: Mlp, before: int, after: int) -> None:
        self.activation = config.activation
        self.linear = Linear(before, after, bias=config.norm == "none")
        self.norm: Module | None = None
        if config.norm != "none":
            self.norm = BatchNorm(after) if config.norm == "batch" else LayerNorm(after)
        self.dropout = Dropout(config.dropout) if config.dropout else None

    def __call__(self, tape: Tape, x: Variable) -> Variable:
        """x: (N, before) -> (N, after)."""
        x = self.linear(tape, x)
        if self.norm is not None:
            x = self.norm(tape, x)
        x = activation(self.activation, tape, x)
        return self.dropout(tape, x) if self.dropout is not None else x
