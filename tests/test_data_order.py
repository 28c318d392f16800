"""The order blockwin-v1 against its definition written out, and that nothing else enters it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.order import make_order, permutation, stream_key
from hpctrain.errors import UsageError

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def reference(lengths, seed, epoch, window):
    """The whole epoch, one block and one sample at a time."""
    starts = starts_of(lengths)
    blocks = permutation(len(lengths), seed, epoch, "blocks")
    width = len(lengths) if window == "all" else window
    order = []
    for w, first in enumerate(range(0, len(blocks), width)):
        inside = [s for b in blocks[first : first + width] for s in range(starts[b], starts[b + 1])]
        order += [inside[i] for i in permutation(len(inside), seed, epoch, "win", w)]
    return order


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 2**63), st.integers(0, 5), st.sampled_from([1, 2, 3, 100, "all"]))
def test_is_the_definition_and_a_permutation(lengths, seed, epoch, window):
    order = make_order("blockwin-v1", starts_of(lengths), seed, epoch, window)
    found = order.samples(0, sum(lengths)).tolist()
    assert found == reference(lengths, seed, epoch, window)
    assert sorted(found) == list(range(sum(lengths)))


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.data())
def test_any_range_of_positions_at_any_time(lengths, data):
    """Random access: what was asked for before does not matter."""
    n = sum(lengths)
    order = make_order("blockwin-v1", starts_of(lengths), 3, 1, 2)
    whole = np.array(reference(lengths, 3, 1, 2))
    for _ in range(4):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
        np.testing.assert_array_equal(order.samples(start, stop), whole[start:stop])


def test_order_never_changes():
    """A golden value: an epoch begun with one version must end as that epoch with the next."""
    order = make_order("blockwin-v1", starts_of([4] * 256), 7, 3, 16)
    ids = order.samples(0, 1024).astype("<i8")
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    assert stream_key(7, 3, "blocks") == 160035207600899052663550092888660836461
    assert digest[:16] == "f51330f137ed3a71"


def test_seed_and_epoch_change_the_order():
    starts = starts_of([8] * 8)
    seen = {
        tuple(make_order("blockwin-v1", starts, seed, epoch, "all").samples(0, 64).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(seen) == 9


def test_numpy_integers_are_the_same_seed():
    starts = starts_of([5, 5])
    a = make_order("blockwin-v1", starts, np.int64(4), np.int32(2), "all").samples(0, 10)
    b = make_order("blockwin-v1", starts, 4, 2, "all").samples(0, 10)
    np.testing.assert_array_equal(a, b)


def test_positions_mix_blocks_evenly():
    """Within a window every sample is as likely at every position: mean rank near the middle."""
    starts = starts_of([16] * 16)
    place = np.zeros(256)
    for epoch in range(200):
        ids = make_order("blockwin-v1", starts, 0, epoch, "all").samples(0, 256)
        place[ids] += np.arange(256)
    mean = place / 200  # uniform: 127.5, standard deviation 73.9 / sqrt(200) = 5.2
    assert np.abs(mean - 127.5).max() < 5 * 5.2


def test_sequential_is_manifest_order():
    order = make_order("sequential", starts_of([3, 4]), 1, 2, "all")
    assert order.samples(2, 6).tolist() == [2, 3, 4, 5]
    assert order.samples(5, 5).dtype == np.int64


@pytest.mark.parametrize(
    ("name", "window", "says"),
    [("blockwin", 1, "blockwin-v1"), ("sequential", 0, "1 or more"), ("blockwin-v1", -2, "-2")],
)
def test_refuses(name, window, says):
    with pytest.raises(UsageError, match=says):
        make_order(name, starts_of([1]), 0, 0, window)
