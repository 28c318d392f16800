"""From a batch of the data set to a loss: inputs, labels, weights.

A task is classification where the label field holds integers, else regression. It knows which
fields to read, how to normalize the input, and what the network must put out. Two kinds of input
are cut by the loader:

    text_window = L   the value that follows L values of a text; they are given as L x tokens zeros
                      and ones
    patch = (...)     the label of the voxel in the middle of a box

Layer: train. Knows nothing of ranks and optimizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.data import Batch, Dataset, Patches, Windows
from hpctrain.data.manifest import Field
from hpctrain.data.transforms import FlipAndShift, Transform
from hpctrain.device import Device
from hpctrain.device.dtypes import dtype_named, wide_dtype
from hpctrain.errors import DataError, UsageError, nearest
from hpctrain.nn.losses import IGNORE, mean_squared_error, softmax_cross_entropy
from hpctrain.sections import DataSection

__all__ = ["Sums", "Task", "task_of"]

Array = Any
ONE_HOT_MOST = 1 << 16  # inputs of a network that windows of text are given to


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
    view: Windows | Patches | None = None
    transform: Transform | None = None  # in training

    @property
    def fields(self) -> list[str]:
        """Names of the fields that a loader must read."""
        return list(dict.fromkeys(n for n in (self.input, self.label, self.weight) if n))

    def inputs(self, device: Device, batch: Batch) -> Variable:
        """The normalized input on the device, (N, *sample_shape).

        Bytes go as they were read: a copy from page-locked memory is not waited for.
        """
        host = batch.fields[self.input]
        if isinstance(self.view, Windows):
            return Variable(device.from_host(self._one_hot(host[:, :-1])))
        if host.dtype != np.uint8:
            return Variable(device.from_host(self._normalized(host)))
        x, values = device.empty(host.shape, self.dtype), device.empty(host.shape, host.dtype)
        device.upload(host, values)
        a, b = 1 / float(self.spread), -float(self.shift) / float(self.spread)
        device.launch("from_bytes", values, x, a, b, x.size, work=x.size)
        return Variable(x)

    def _one_hot(self, codes: NDArray[Any]) -> NDArray[Any]:
        out = np.zeros((codes.size, self.outputs), self.dtype)
        out[np.arange(codes.size), codes.reshape(-1)] = 1
        return out.reshape(*codes.shape, self.outputs)

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
        labels = self._of_samples(batch).reshape(-1).astype(np.int64)
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= self.outputs))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"the field {self.label!r} of sample {batch.samples[row]} is {labels[row]}; "
                f"classes are 0 to {self.outputs - 1}, and {IGNORE} for a sample to leave out; "
                "pack the data set again"
            )
        return labels

    def _of_samples(self, batch: Batch) -> NDArray[Any]:
        """The labels as the loader gave them, one per sample where they are classes."""
        values = batch.fields[self.label]
        if isinstance(self.view, Windows):
            return values[:, -1]
        if isinstance(self.view, Patches):
            middle: Any = (slice(None), *(size // 2 for size in self.view.size))
            labels: NDArray[Any] = values[middle]
            return labels
        return values

    def _weights(self, batch: Batch) -> tuple[Array | None, float]:
        """The samples' loss weights (None for ones) and their sum over those that count."""
        labels = self._of_samples(batch)
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
        if name and name not in fields and not (key == "label" and section.text_window):
            raise UsageError(
                f"data.{key} is {name!r}, but {section.path} has no such field"
                f"{nearest(name, fields)}; it has {', '.join(fields)}"
            )
    if section.text_window:
        return _of_text(section, fields[section.input], dtype)
    if section.patch:
        return _of_patches(section, dataset, dtype)
    image, label = fields[section.input], fields[section.label]
    if image.shape == "ragged" or label.shape == "ragged":
        raise UsageError(
            "fields of varying length cannot be trained on: set data.text_window for windows of "
            "text or sequences, or pack fixed shapes"
        )
    classes = np.dtype(label.dtype).kind in "iu"
    if classes and math.prod(label.shape) != 1:
        raise UsageError(
            f"the label {section.label!r} has shape {label.shape}; classification needs one "
            "integer per sample"
        )
    shift, spread = _normalization(section, dataset)
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
        transform=_changes(section, image.shape),
    )


def _of_text(section: DataSection, field: Field, dtype: str) -> Task:
    """Predict the value that follows each window."""
    tokens = field.tokens or len(field.vocab or ())
    if field.shape != "ragged" or not tokens or section.patch or section.weight:
        raise UsageError(
            f"data.text_window is for one ragged field of text or sequences, without weights and "
            f"patches; {section.input!r} is {field.dtype} {field.shape}"
        )
    if tokens * section.text_window > ONE_HOT_MOST:
        raise UsageError(
            f"data.text_window {section.text_window} of {tokens} codes makes "
            f"{tokens * section.text_window:,} inputs, more than {ONE_HOT_MOST:,}: take a shorter "
            f"window, or pack bytes"
        )
    return Task(
        input=section.input,
        label=section.input,
        weight="",
        sample_shape=(section.text_window, tokens),
        outputs=tokens,
        classes=True,
        shift=0.0,
        spread=1.0,
        dtype=dtype_named(dtype),
        view=Windows(section.input, section.text_window),
    )


def _of_patches(section: DataSection, dataset: Dataset, dtype: str) -> Task:
    """Predict the label of the voxel in the middle of each box."""
    image, label = dataset.field(section.input), dataset.field(section.label)
    dims, stats = len(section.patch), label.stats
    whole = np.dtype(label.dtype).kind in "iu" and stats is not None and stats.min >= 0
    if len(image.shape) != dims or label.shape != image.shape or not whole or section.weight:
        raise UsageError(
            f"data.patch {section.patch} is for an input and a label of {dims} dims and one shape, "
            f"the label whole numbers from 0, without weights; {section.input!r} is {image.shape}, "
            f"{section.label!r} is {label.dtype} {label.shape}"
        )
    assert stats is not None  # `whole` says so
    shift, spread = _normalization(section, dataset)
    return Task(
        input=section.input,
        label=section.label,
        weight="",
        sample_shape=section.patch,
        outputs=int(stats.max) + 1,
        classes=True,
        shift=shift,
        spread=spread,
        dtype=dtype_named(dtype),
        view=Patches(section.patch, section.patch_stride or None),
    )


def _changes(section: DataSection, shape: Any) -> Transform | None:
    if not section.flip and not section.shift:
        return None
    if len(shape) not in (2, 3):
        raise UsageError(
            f"data.flip and data.shift are for images; {section.input!r} has the shape {shape}"
        )
    return FlipAndShift(section.input, section.shift, section.flip)


def _normalization(section: DataSection, dataset: Dataset) -> tuple[Any, Any]:
    """Mean and deviation of the train split: numbers, or one per column of a table."""
    if section.normalize != "standard":
        return 0.0, 1.0
    mean, deviation = dataset.moments(section.input)
    return mean, np.where(deviation > 0, deviation, 1.0)  # a constant column becomes 0


def _total(device: Device, losses: Array) -> float:
    return float(device.to_host(losses).sum(dtype=np.float64))
