"""Layouts: aligned, without overlap, and any range found again as parts of tensors."""

import numpy as np
import pytest

from hpctrain.errors import UsageError
from hpctrain.nn.layout import Layout, Store

SHAPES = {"a": (3, 5), "b": (), "c": (64,), "d": (0, 4), "e": (17,)}


def layout(dtype="float32"):
    return Layout([(name, shape, len(shape) > 1) for name, shape in SHAPES.items()], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_entries_are_aligned_and_do_not_overlap(dtype):
    made = layout(dtype)
    end = 0
    for entry in made.entries:
        assert entry.offset * made.dtype.itemsize % 64 == 0
        assert entry.offset >= end
        assert entry.size == np.prod(SHAPES[entry.name], dtype=int)
        end = entry.offset + entry.size
    assert end <= made.size
    assert made.size * made.dtype.itemsize % 64 == 0


def test_pieces_of_any_range_are_the_tensors_elements():
    made = layout()
    numbers = np.full(made.size, -1)
    for entry in made.entries:
        numbers[entry.offset : entry.offset + entry.size] = range(entry.size)
    rng = np.random.default_rng()
    for start, stop in np.sort(rng.integers(0, made.size + 1, (200, 2)), axis=1):
        found = [-1] * (stop - start)
        for entry, first, last in made.pieces(start, stop):
            begin = entry.offset + first - start
            found[begin : begin + last - first] = range(first, last)
        assert found == numbers[start:stop].tolist()


def test_decay_runs_cover_the_range_and_end_where_decay_changes():
    made = layout()
    decays = {e.offset: e.decay for e in made.entries if e.size}
    rng = np.random.default_rng()
    for start, stop in np.sort(rng.integers(0, made.size + 1, (200, 2)), axis=1):
        runs = list(made.decay_runs(start, stop))
        assert [a for a, _, _ in runs[1:]] == [b for _, b, _ in runs[:-1]]
        assert not runs or (runs[0][0], runs[-1][1]) == (start, stop)
        for begin, end, decay in runs:
            for entry, _, _ in made.pieces(begin, end):
                assert decays[entry.offset] == decay


def test_views_share_the_store():
    store = Store(layout(), np.zeros(layout().size, "float32"))
    store.view("a")[...] = 1
    store.view("e")[...] = 2
    assert store.array.sum() == 15 + 34
    assert {name: view.shape for name, view in store.views().items()} == SHAPES


def test_refusals_name_the_rule():
    with pytest.raises(UsageError, match="no tensor is called 'aa' .did you mean 'a'"):
        layout().locate("aa")
    with pytest.raises(UsageError, match="two tensors are called 'x'"):
        Layout([("x", (1,), False), ("x", (2,), False)], "float32")
    with pytest.raises(UsageError, match="needs .* elements of float32"):
        Store(layout(), np.zeros(3, "float32"))
