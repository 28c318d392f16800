"""From a batch of the data set to a loss: inputs, labels, weights.

A task is classification where the label field holds integers, else regression. It knows which
fields to read, how to normalize the input, and what the network must put out.

Layer: train. Knows nothing of ranks and optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.data import Batch, Dataset
from hpctrain.device import Device
from hpctrain.device.dtypes import dtype_named, wide_dtype
from hpctrain.errors import DataError, UsageError, nearest
from hpctrain.nn.losses import IGNORE, mean_squared_error, softmax_cross_entropy
from hpctrain.sections import DataSection

__all__ = ["Task", "task_of"]

Array = Any


@dataclass(frozen=True)
class Task:
    """What is learned from which fields. `outputs`: classes, or values of a regression."""

    input: str
    label: str
    weight: str
    sample_shape: tuple[int, ...]
    outputs: int
    classes: bool
    shift: Any  # the network sees (x - shift) / spread: numbers, or one per column of a table
    spread: Any
    dtype: np.dtype[Any]

    @property
    def fields(self) -> list[str]:
        """Names of the fields that a loader must read."""
        return [name for name in (self.input, self.label, self.weight) if name]

    def inputs(self, device: Device, batch: Batch) -> Variable:
        """The normalized input on the device, (N, *sample_shape)."""
        host = batch.fields[self.input]
        if host.dtype != np.uint8:
            return Variable(device.from_host(self._normalized(host)))
        x = device.empty(host.shape, self.dtype)
        a, b = 1 / float(self.spread), -float(self.shift) / float(self.spread)
        device.launch("from_bytes", device.from_host(host), x, a, b, x.size, work=x.size)
        return Variable(x)

    def _normalized(self, values: NDArray[Any]) -> NDArray[Any]:
        normalized: NDArray[Any] = (values - self.shift) / self.spread
        normalized[np.isnan(normalized)] = 0.0  # a missing number is taken for the mean
        return normalized.astype(self.dtype, copy=False)

    def loss(self, tape: Tape, output: Variable, batch: Batch) -> tuple[Variable, Sums]:
        """The losses of this rank's samples, to start the backward pass from, and their sums."""
        weights, total = self._weights(batch)
        device = tape.device
        on_device = None if weights is None else device.from_host(weights)
        if not self.classes:
            target = batch.fields[self.label].astype(wide_dtype(self.dtype))
            target = target.reshape(output.shape)
            losses = mean_squared_error(tape, output, device.from_host(target), on_device)
            return losses, Sums(_total(device, losses.value), total, 0.0)
        labels = device.from_host(self._labels(batch))
        losses, correct = softmax_cross_entropy(tape, output, labels, on_device)
        hits = float(device.to_host(correct).sum(dtype=np.int64))
        return losses, Sums(_total(device, losses.value), total, hits)

    def _labels(self, batch: Batch) -> NDArray[np.int64]:
        labels = batch.fields[self.label].reshape(-1).astype(np.int64)
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= self.outputs))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"the field {self.label!r} of sample {batch.samples[row]} is {labels[row]}; "
                f"classes are 0 to {self.outputs - 1}, and {IGNORE} for a sample to leave out; "
                "pack the data set again"
            )
        return labels

    def _weights(self, batch: Batch) -> tuple[Array | None, float]:
        """The samples' loss weights (None for ones) and their sum over those that count."""
        labels = batch.fields[self.label]
        counted = labels.reshape(-1) != IGNORE if self.classes else None
        if not self.weight:
            return None, float(len(labels) if counted is None else counted.sum())
        weights = batch.fields[self.weight].reshape(-1).astype(wide_dtype(self.dtype))
        kept = weights if counted is None else weights[counted]
        return weights, float(kept.sum(dtype=np.float64))


@dataclass(frozen=True)
class Sums:
    """Sums over this rank's samples: weighted loss, weights, correct answers."""

    loss: float
    weight: float
    correct: float


def task_of(section: DataSection, dataset: Dataset, dtype: str) -> Task:
    """The task of a data set's fields. Raises `UsageError` for a field that is not there."""
    fields = dataset.fields
    for key in ("input", "label", "weight"):
        name = getattr(section, key)
        if name and name not in fields:
            raise UsageError(
                f"data.{key} is {name!r}, but {section.path} has no such field"
                f"{nearest(name, fields)}; it has {', '.join(fields)}"
            )
    image, label = fields[section.input], fields[section.label]
    if image.shape == "ragged" or label.shape == "ragged":
        raise UsageError("fields of varying length cannot be trained on; pack fixed shapes")
    classes = np.dtype(label.dtype).kind in "iu"
    if classes and math.prod(label.shape) != 1:
        raise UsageError(
            f"the label {section.label!r} has shape {label.shape}; classification needs one "
            "integer per sample"
        )
    standard = section.normalize == "standard"
    shift, spread = _normalization(dataset, section.input) if standard else (0.0, 1.0)
    return Task(
        input=section.input,
        label=section.label,
        weight=section.weight,
        sample_shape=tuple(image.shape),
        outputs=dataset.classes or 1 if classes else math.prod(label.shape),
        classes=classes,
        shift=shift,
        spread=spread,
        dtype=dtype_named(dtype),
    )


def _normalization(dataset: Dataset, name: str) -> tuple[Any, Any]:
    """Mean and deviation of the train split: numbers, or one per column of a table."""
    mean, deviation = dataset.moments(name)
    return mean, np.where(deviation > 0, deviation, 1.0)  # a constant column becomes 0


def _total(device: Device, losses: Array) -> float:
    return float(device.to_host(losses).sum(dtype=np.float64))
