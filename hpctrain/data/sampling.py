"""Orders that look at the samples: by weight with replacement, and stratified without.

    balanced-v1         position p holds a class drawn uniformly and a sample drawn from it
    weighted-v1 FIELD   position p holds a sample drawn with a probability in proportion to FIELD
    stratified-v1       every sample once; sample j of a class of n_c, in a random order, stands at
                        (j + u) / n_c of the epoch, so that every batch has its share of each class

The first two draw with replacement: an epoch has as many positions as there are samples, but some
samples come several times and some not at all. What is at a position is a function of (seed, epoch,
position): one block of Philox per position, and a search in cumulated weights.

Memory: 8 bytes per sample.

Layer: data. Knows nothing of files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.dataset import Dataset
from hpctrain.data.order import ORDERS, Order, Window, make_order, permutation, stream_key
from hpctrain.errors import DataError, UsageError, nearest

__all__ = ["Orders", "StratifiedOrder", "WeightedOrder", "class_weights"]

BALANCED, WEIGHTED, STRATIFIED = "balanced-v1", "weighted-v1", "stratified-v1"
SAMPLING = (BALANCED, WEIGHTED, STRATIFIED)


def class_weights(classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights that give every class that occurs the same sum, 1: float64 (n,)."""
    counts = np.bincount(classes)
    weights: NDArray[np.float64] = 1.0 / counts[classes]
    return weights


class WeightedOrder:
    """Sampling with replacement, in one epoch. `weights`: float (n,), finite, at least 0."""

    def __init__(self, weights: NDArray[np.floating], seed: int, epoch: int) -> None:
        values = weights.astype(np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise DataError(
                "sampling weights must be finite numbers of 0 or more, and not all 0: "
                f"they are {values.min()} to {values.max()}"
            )
        self._sums = np.cumsum(values)
        self._key = stream_key(seed, epoch, "weighted")

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of the samples at positions [start, stop), int64 of shape (stop - start,)."""
        count = max(stop - start, 0)
        raw = np.random.Philox(key=self._key, counter=start).random_raw(4 * count)
        uniform = (raw[::4] >> np.uint64(11)) * 2.0**-53
        places = np.searchsorted(self._sums, uniform * self._sums[-1], side="right")
        last = len(self._sums) - 1  # rounding up at the very end
        ids: NDArray[np.int64] = np.minimum(places, last).astype(np.int64, copy=False)
        return ids


class StratifiedOrder:
    """Every sample once, every part of an epoch with its share of each class."""

    def __init__(self, classes: NDArray[np.int64], seed: int, epoch: int) -> None:
        n = len(classes)
        shuffled = permutation(n, seed, epoch, "strata")
        by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
        counts = np.bincount(classes)
        begins = np.cumsum(counts) - counts
        sorted_classes = classes[by_class]
        raw = np.random.Philox(key=stream_key(seed, epoch, "places")).random_raw(n)
        uniform = (raw >> np.uint64(11)) * 2.0**-53
        rank = np.arange(n) - begins[sorted_classes]
        place = (rank + uniform) / counts[sorted_classes]
        self._ids = by_class[np.argsort(place, kind="stable")]

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of the samples at positions [start, stop), int64 of shape (stop - start,)."""
        return self._ids[start:stop]


AnyOrder = Order | WeightedOrder | StratifiedOrder


class Orders:
    """The orders of a split's epochs. `name` says in a saved state which they are."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        order: str,
        starts: NDArray[np.int64],
        seed: int,
        window: Window,
        weights: str | None = None,
    ) -> None:
        """Reads the classes or weights of the split, if `order` is one that looks at them.

        Raises `UsageError` for an unknown order or one that does not go with the rest, `DataError`
        where the data set has no classes or no such weights.
        """
        self.name = order if weights is None else f"{order} {weights}"
        self._order, self._starts, self._seed, self._window = order, starts, seed, window
        self._classes, self._weights = np.empty(0, np.int64), np.empty(0)
        if order not in SAMPLING:
            known = (*ORDERS, *SAMPLING)
            if order not in known:
                raise UsageError(
                    f"no order is called {order!r}{nearest(order, known)}; there are "
                    f"{', '.join(known)}"
                )
            if weights is not None:
                raise UsageError(f"the order {order} takes no weights; {WEIGHTED} does")
            make_order(order, starts, seed, 0, window)  # refuses a wrong window
            return
        if window != "all":
            raise UsageError(
                f'the order {order} draws from the whole split: set the window to "all"'
            )
        if (order == WEIGHTED) != (weights is not None):
            raise UsageError(f"the order {WEIGHTED} needs the name of a field of weights, no other")
        if weights is not None:
            self._weights = _weights(dataset, split, weights)
            return
        if dataset.split(split).shards[0].class_counts is None:
            raise DataError(f"{dataset.path}: the order {order} needs a label with classes")
        classes = dataset.index(split, "label", np.dtype(np.int64))
        self._classes, self._weights = classes, class_weights(classes)

    def epoch(self, epoch: int) -> AnyOrder:
        """The order of an epoch."""
        if self._order == STRATIFIED:
            return StratifiedOrder(self._classes, self._seed, epoch)
        if self._order in SAMPLING:
            return WeightedOrder(self._weights, self._seed, epoch)
        return make_order(self._order, self._starts, self._seed, epoch, self._window)


def _weights(dataset: Dataset, split: str, name: str) -> NDArray[np.float64]:
    field = dataset.field(name)
    if field.shape != ():
        raise UsageError(f"field {name!r} cannot weigh samples: it takes one number per sample")
    weights = dataset.read(split, name)
    assert isinstance(weights, np.ndarray)  # a fixed shape
    return weights.astype(np.float64)
