"""Who owns what: every element once, for any nodes, without starting MPI."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.collectives.cut import GRAIN, Cut

cuts = st.builds(
    Cut,
    st.one_of(st.integers(0, 300), st.integers(0, 1 << 40)),
    st.sampled_from([4, 8]),
    st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple),
)


def ranks(cut):
    return [(k, c) for k, size in enumerate(cut.local_sizes) for c in range(size)]


def check_partition(ranges, n):
    """The non-empty ranges, put in order, follow on one another from 0 to n."""
    ranges = sorted(r for r in ranges if r[0] < r[1])
    ends = [0, *(stop for _, stop in ranges)]
    assert [start for start, _ in ranges] == ends[:-1] and ends[-1] == n


@given(cuts)
def test_owned_slices_are_the_whole_array(cut):
    check_partition([cut.slice(*rank) for rank in ranks(cut)], cut.n)


@given(cuts)
def test_a_node_adds_up_the_whole_array_once(cut):
    for node, size in enumerate(cut.local_sizes):
        sums = [piece for local in range(size) for piece in cut.sums(node, local)]
        check_partition([piece[1:] for piece in sums], cut.n)
        for owner, start, stop in sums:
            first, last = cut.column(owner)
            assert first <= start < stop <= last


@given(cuts)
def test_no_two_ranks_write_one_cache_line(cut):
    pieces = [cut.slice(*rank) for rank in ranks(cut)]
    pieces += [piece[1:] for rank in ranks(cut) for piece in cut.sums(*rank)]
    for start, stop in pieces:
        assert start == stop or start * cut.itemsize % GRAIN == 0
        assert stop in (start, cut.n) or stop * cut.itemsize % GRAIN == 0


@given(cuts)
def test_shares_are_even(cut):
    """No rank's share is more than two cache lines larger than another's of its kind."""
    for node, size in enumerate(cut.local_sizes):
        loads = [sum(b - a for _, a, b in cut.sums(node, local)) for local in range(size)]
        assert max(loads) - min(loads) <= 2 * cut.grain
    owned = [b - a for a, b in (cut.slice(k, c) for k, c in ranks(cut) if c < cut.columns)]
    assert max(owned) - min(owned) <= 3 * cut.grain


@pytest.mark.parametrize("local", [0, 1])
def test_equal_nodes_add_up_where_they_own(local):
    cut = Cut(1000, 4, (2, 2))
    assert list(cut.sums(1, local)) == [(local, *cut.column(local))]
    assert cut.column(local) == ((0, 496), (496, 1000))[local]


def test_ranks_beyond_the_smallest_node_own_nothing():
    cut = Cut(1000, 4, (3, 1))
    assert [cut.slice(k, c) for k, c in ranks(cut)] == [(0, 496), (0, 0), (0, 0), (496, 1000)]
