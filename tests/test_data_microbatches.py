"""Cutting global batches and assigning microbatches to ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.microbatches import assign, batch_bounds, cut, steps


@given(st.integers(0, 300), st.integers(1, 70))
def test_batches_cover_an_epoch_once(samples, size):
    bounds = [batch_bounds(step, size, samples) for step in range(steps(samples, size))]
    assert [p for first, last in bounds for p in range(first, last)] == list(range(samples))
    assert all(last > first for first, last in bounds)
    assert all(last - first == size for first, last in bounds[:-1])


@given(st.integers(0, 300), st.integers(1, 70))
def test_microbatches_are_full_but_the_last(samples, microbatch):
    offsets = cut(samples, microbatch)
    lengths = [b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert offsets[0] == 0 and offsets[-1] == samples
    assert all(length == microbatch for length in lengths[:-1])
    assert all(0 < length <= microbatch for length in lengths)


@given(st.integers(0, 100), st.integers(1, 20))
def test_every_microbatch_has_one_rank(count, size):
    ranges = [assign(count, size, rank) for rank in range(size)]
    assert [m for mine in ranges for m in mine] == list(range(count))
    lengths = [len(mine) for mine in ranges]
    assert max(lengths) - min(lengths) <= 1
