"""sums.cu: order of additions, exact bits, aliases."""

from __future__ import annotations

import cases_sums  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels, same_when_split

CASES = (
    *("column_partials", "column_sum", "column_merge", "square_sum_partials"),
    *("sum_peers", "sum_widened", "average_update"),
)
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split("average_update")


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 20])
@pytest.mark.parametrize("mine", [0, -1])
def test_peers_may_be_summed_in_place(count, mine):
    """Ranks reduce their slice of the gradient into their own gradient buffer."""
    n, offset = 3000, 7
    peers = [np.random.default_rng(k).integers(-99, 99, n).astype(np.float32) for k in range(count)]
    expected = sum(peer[offset:2000].copy() for peer in peers)
    out = peers[mine][offset:2000]
    device = device_for()
    device.launch("sum_peers", device.peers(peers), count, offset, out, out.size, work=out.size)
    np.testing.assert_array_equal(out, expected)


def test_peers_split_anywhere_give_the_same_bits():
    peers = [np.random.default_rng(k).standard_normal(5000) for k in range(5)]
    device = device_for()
    table, whole, pieces = device.peers(peers), np.empty(5000), np.empty(5000)
    device.launch("sum_peers", table, 5, 0, whole, 5000, work=5000)
    for first, last in ((0, 1), (1, 1234), (1234, 5000)):
        out = pieces[first:last]
        device.launch("sum_peers", table, 5, first, out, out.size, work=out.size)
    np.testing.assert_array_equal(pieces, whole)


def test_sums_that_are_not_finite_show():
    x = np.ones(5000, np.float32)
    x[4500] = np.inf
    part = np.empty(2, np.float32)
    device_for().launch("square_sum_partials", x, part, x.size, work=2)
    np.testing.assert_array_equal(part, [4096, np.inf])
