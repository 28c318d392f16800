"""Random changes to samples (augmentation) that no rank, batch or history enters.

A transform is called with a batch's fields and the ids of its samples; what it draws is a function
of (seed, epoch, sample): the same sample looks alike on any number of ranks, and different in the
next epoch.

    words(seed, epoch, samples, count)   random 64-bit words: splitmix64 of a counter per sample
    FlipAndShift(field, pixels)          images: mirrored or not, moved by up to `pixels`

Layer: data.

Reference: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014 (the mixing function).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.order import stream_key

__all__ = ["FlipAndShift", "Transform", "words"]

Arrays = dict[str, NDArray[Any]]
# (fields, samples, seed, epoch) -> fields; the arrays belong to the transform.
Transform = Callable[[Arrays, NDArray[np.int64], int, int], Arrays]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def words(seed: int, epoch: int, samples: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Random words, uint64 (len(samples), count), that depend on seed, epoch and sample only."""
    key = np.array(stream_key(seed, epoch, "transform") & 0xFFFFFFFFFFFFFFFF, np.uint64)
    counter = samples.astype(np.uint64)[:, None] * np.uint64(count)
    z: Any = counter + np.arange(1, count + 1, dtype=np.uint64)
    z = key + z * _STEP
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


class FlipAndShift:
    """Mirror half of the images left to right, and move each by up to `pixels` along both dims.

    Images are (n, height, width) or (n, height, width, channels); borders are filled with 0.
    """

    def __init__(self, field: str, pixels: int, flip: bool = True) -> None:
        self._field, self._pixels, self._flip = field, pixels, flip

    def __call__(self, fields: Arrays, samples: NDArray[np.int64], seed: int, epoch: int) -> Arrays:
        images = fields[self._field]
        height, width = images.shape[1:3]
        drawn = words(seed, epoch, samples, 3)
        pixels = self._pixels
        moves = (drawn[:, :2] % np.uint64(2 * pixels + 1)).astype(np.int64)
        border = [(0, 0)] + [(pixels, pixels)] * 2 + [(0, 0)] * (images.ndim - 3)
        padded = np.pad(images, border)
        out = np.empty_like(images)
        for i, (down, right) in enumerate(moves.tolist()):
            moved = padded[i, down : down + height, right : right + width]
            mirrored = self._flip and drawn[i, 2] >> np.uint64(63)
            out[i] = moved[:, ::-1] if mirrored else moved
        return {**fields, self._field: out}
