"""Exchanges of payloads of any size, as messages and as schedules."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.collectives.opaque import Exchange, gather_and_add, two_shot
from hpctrain.collectives.schedule import Traffic
from hpctrain.collectives.verifier import spot_check, verify
from hpctrain.errors import UsageError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [0, 1, 100, 5000])
def test_the_schedules_are_right(size, n):
    """Every element once from every rank, the same bits everywhere, bytes as the formulas say."""
    nodes = tuple(range(size))
    moved = verify(gather_and_add(nodes, n, 4, 77))
    count = size - 1 if n else 0
    assert moved == [Traffic(77 * count, count, 77 * count, count)] * size
    moved = verify(two_shot(nodes, n, 4, 77))
    if n >= 16 * size:  # no chunk is empty
        assert moved == [Traffic(2 * 77 * (size - 1), 2 * (size - 1)) + received(size)] * size


def received(size):
    return Traffic(received=2 * 77 * (size - 1), receives=2 * (size - 1))


def test_a_thousand_nodes_are_looked_at_by_a_few_ranks():
    nodes = tuple(range(1024))
    spot_check(gather_and_add(nodes, 1 << 20, 4, 1000), [0, 511, 1023])
    spot_check(two_shot(nodes, 1 << 20, 4, 1000), [0, 511, 1023])


@pytest.mark.ranks(1, 2, 3, 4)
def test_everyone_gets_what_was_meant_for_it(comm):
    exchange = Exchange(comm)
    for length in (0, 5, 1000, 3):
        payloads = [
            np.full(max(length - rank, 0), 16 * comm.rank + rank, np.uint8)
            for rank in range(comm.size)
        ]
        got = exchange.all_to_all(payloads, [length] * comm.size)
        for rank, payload in enumerate(got):
            expected = np.full(max(length - comm.rank, 0), 16 * rank + comm.rank, np.uint8)
            np.testing.assert_array_equal(payload, expected)
    own = sum(max(length - comm.rank, 0) for length in (0, 5, 1000, 3))
    assert exchange.received == (comm.size - 1) * own


@pytest.mark.ranks(2)
def test_a_payload_above_its_bound_is_refused(comm):
    with pytest.raises(UsageError, match="above the bound of 3"):
        Exchange(comm).all_gather(np.zeros(4, np.uint8), [3, 3])
