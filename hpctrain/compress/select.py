"""The k elements of a device array with the largest absolute values: exact, and never waiting.

    guess        a threshold from a sample, or the one of the last call, somewhat lower
    candidates   what lies above it, in one pass over x
    again        where these are fewer than k, or more than there is room for: the exact threshold
                 from histograms of x, and candidates anew
    finish       the exact threshold of the candidates, and what lies above it

All of it is launched every time; launches that have nothing to do find a size of 0 in device
memory, so the host knows nothing of the data and waits for nothing.

Layer: compress. Knows nothing of gradients, ranks and payloads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.device import Device

__all__ = ["GUESSES", "Selector"]

Array = Any  # of the device
TILE, SLOTS, BINS = 4096, 128, 2048  # of select.cu
SAMPLE = 16384
SLACK = 1 / 8  # of an octave: how much lower than the last threshold a kept one is
GUESSES = ("none", "sample", "last")
# (shift, bits) of the digits of a key, the highest first
DIGITS = {
    "float32": ((20, 11), (10, 10), (0, 10)),
    "float64": ((52, 11), (41, 11), (30, 11), (20, 10), (10, 10), (0, 10)),
}
MANTISSA = {"float32": 23, "float64": 52}


class Selector:
    """Selects from arrays of n elements; keeps its memory, about n / 14 elements, for the next.

    Attributes:
        values, indices: after `select`: shape (k,), of x's dtype and int64, ascending by index; the
            selector's memory, until its next call.
    """

    values: Array
    indices: Array

    def __init__(
        self, device: Device, n: int, dtype: DTypeLike = np.float32, guess: str = "sample"
    ) -> None:
        """`guess`: the threshold that a call begins with: "sample", "last" or "none".

        It changes the time only, never the result.

        Raises:
            UsageError: another dtype than float32 and float64, or another guess.
        """
        self._name = np.dtype(dtype).name
        if self._name not in DIGITS:
            raise UsageError(
                f"no selection from {self._name}, only from {' and '.join(DIGITS)}: widen x first"
            )
        if guess not in GUESSES:
            raise UsageError(f"guess {guess!r}: it is one of {', '.join(GUESSES)}")
        self._device, self.n, self._guess = device, n, guess
        self._histogram = device.zeros(BINS, np.uint32)
        # size of x, of x where the guess was wrong, of the candidates, of the result
        self._sizes = device.from_host(np.array([n, 0, 0, 0, min(n, SAMPLE)], np.int64))
        self._first, self._last = device.zeros(2, np.int64), device.zeros(2, np.int64)
        self._sample = device.empty(min(n, SAMPLE), dtype)
        self._tiles = _Tiles(device, n)
        self._room = -1  # of the candidates
        self._known_k = -1
        self.values, self.indices = device.empty(0, dtype), device.empty(0, np.int64)

    def select(self, x: Array, k: int) -> tuple[Array, Array]:
        """The `k` largest of |x|: (values, indices), ascending by index.

        Of equal ones the lowest indices are taken; NaN counts as larger than infinity.

        Args:
            x: shape (n,), C-contiguous, only read.
            k: 0 up to n.

        Raises:
            UsageError: x is of another shape or dtype, or k is out of range.
        """
        if x.shape != (self.n,) or x.dtype.name != self._name:
            raise UsageError(
                f"this selector takes ({self.n},) of {self._name}, not {x.shape} of {x.dtype}"
            )
        if not 0 <= k <= self.n:
            raise UsageError(f"k = {k}: of {self.n} elements 0 to {self.n} can be selected")
        self._make_room(k)
        if k == 0:
            return self.values, self.indices
        found, result = self._size(2), self._size(3)
        if self._room == 0:  # so many are wanted that candidates would be most of x
            self._search(x, self._size(0), self.n, self._last, k)
            self._tiles.count(x, self._size(0), self._last, result, None, k, self.n)
            self._tiles.pack(x, None, self._size(0), self._last, result, self.values, self.indices)
            return self.values, self.indices
        self._begin(x, k)
        again = self._size(1)
        self._tiles.count(x, self._size(0), self._first, found, again, k, self._room)
        self._search(x, again, self.n, self._first, k)
        self._tiles.count(x, again, self._first, found, None, k, self._room)
        numbers, places = self._numbers, self._places
        self._tiles.pack(x, None, self._size(0), self._first, found, numbers, places)
        self._search(numbers, found, self._room, self._last, k)
        self._few.count(numbers, found, self._last, result, None, k, k)
        self._few.pack(numbers, places, found, self._last, result, self.values, self.indices)
        self._known_k = k
        return self.values, self.indices

    def _size(self, which: int) -> Array:
        return self._sizes[which : which + 1]

    def _make_room(self, k: int) -> None:
        """Memory for k results and their candidates; kept while k is the same."""
        if self.values.shape[0] == k and self._room >= 0:
            return
        device, dtype = self._device, self.values.dtype
        self.values, self.indices = device.empty(k, dtype), device.empty(k, np.int64)
        self._room = 8 * k + TILE if k > 0 and 8 * k + TILE < self.n // 2 else 0
        if self._guess == "none":
            self._room = 0
        self._numbers = device.empty(self._room, dtype)
        self._places = device.empty(self._room, np.int64)
        self._few = _Tiles(device, self._room)

    def _begin(self, x: Array, k: int) -> None:
        """A threshold that somewhat more than k elements exceed, probably."""
        launch = self._device.launch
        if self._guess == "last" and self._known_k == k:
            slack = int(SLACK * (1 << MANTISSA[self._name]))
            launch("select_loosen", self._last, self._first, slack, work=1)
            return
        count = self._sample.shape[0]
        mean = k * count / self.n
        need = min(math.ceil(mean + 5 * math.sqrt(mean) + 8), count)
        launch("select_sample", x, self._sample, self.n, count, work=count)
        self._search(self._sample, self._size(4), count, self._first, need)
        launch("select_loosen", self._first, self._first, 0, work=1)

    def _search(self, x: Array, size: Array, most: int, state: Array, k: int) -> None:
        """The exact threshold of the k largest of x, and how many that equal it are among them."""
        launch, histogram = self._device.launch, self._histogram
        for index, (shift, bits) in enumerate(DIGITS[self._name]):
            launch(
                "select_histogram", x, size, state, histogram, shift, bits, work=_tiles_of(most),
            )  # fmt: skip
            launch("select_digit", size, state, histogram, k, shift, bits, int(index == 0), work=1)


class _Tiles:
    """Counts of an array cut into tiles, and where the first of each tile are."""

    def __init__(self, device: Device, most: int) -> None:
        self._device, self._tiles = device, _tiles_of(most)
        self._counts = device.empty((self._tiles, 2), np.int64)
        self._starts = device.empty((self._tiles, 2), np.int64)
        self._slots = device.empty((self._tiles, SLOTS), np.uint16)

    def count(
        self,
        x: Array,
        size: Array,
        state: Array,
        found: Array,
        again: Array | None,
        least: int,
        most: int,
    ) -> None:
        """How many are taken, in `found`; `size` in `again` where not from `least` to `most`."""
        launch, work = self._device.launch, self._tiles
        launch("select_count", x, size, state, self._counts, self._slots, work=work)
        launch(
            "select_scan", size, state, self._counts, self._starts, found, again, least, most,
            work=1,
        )  # fmt: skip

    def pack(
        self,
        x: Array,
        places: Array | None,
        size: Array,
        state: Array,
        found: Array,
        values: Array,
        indices: Array,
    ) -> None:
        """What is taken, and its indices (or what `places` says of them)."""
        self._device.launch(
            "select_pack", x, places, size, state, self._counts, self._starts, self._slots, found,
            values.shape[0], values, indices, work=self._tiles,
        )  # fmt: skip


def _tiles_of(n: int) -> int:
    return -(-n // TILE)
