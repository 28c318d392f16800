"""Messages on arrays, cut into pieces; sums that are the same on all ranks."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.mpi import messages


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("limit", [1, 24, 1 << 30])
def test_allreduce_in_pieces(comm, limit):
    array = np.arange(11.0) + comm.rank
    messages.allreduce(comm, array, limit)
    np.testing.assert_array_equal(array, comm.size * np.arange(11.0) + sum(range(comm.size)))


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_small_sums_are_added_in_rank_order(comm, n):
    """1e16 + 1 + 1 + ... differs from 1 + 1 + ... + 1e16."""
    values = np.full(n, 1e16 if comm.rank == 0 else 1.0)
    messages.allreduce_sum(comm, values)
    expected = 1e16
    for _ in range(1, comm.size):
        expected += 1.0
    assert values.tolist() == [expected] * n


@pytest.mark.ranks(1, 2, 3, 4)
def test_exchange_and_gather(comm):
    """Rank k's part is k + 1 lines, with a gap of a line before it."""
    parts, at = [], 0
    for rank in range(comm.size):
        parts.append((at + 1, at + 2 + rank))
        at += 2 + rank
    array = np.zeros(at * messages.LINE, np.uint8)
    for rank, (start, stop) in enumerate(parts):
        array[start * messages.LINE : stop * messages.LINE] = 10 * comm.rank + rank

    received = np.zeros((comm.size, 5 * messages.LINE), np.uint8)
    messages.exchange(comm, array, parts, received)
    filled = (comm.rank + 1) * messages.LINE
    for rank in range(comm.size):
        row = received[rank]
        expected = 0 if rank == comm.rank else 10 * rank + comm.rank
        assert (row[:filled] == expected).all() and not row[filled:].any()

    messages.gather_parts(comm, array, parts)
    for rank, (start, stop) in enumerate(parts):
        assert not array[(start - 1) * messages.LINE : start * messages.LINE].any()
        assert (array[start * messages.LINE : stop * messages.LINE] == 11 * rank).all()
