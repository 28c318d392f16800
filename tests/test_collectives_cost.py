"""Prices of schedules against formulas worked out by hand, and a few clocks against all of them."""

from __future__ import annotations

import random
from math import log2

import pytest

from hpctrain.collectives.algorithms import PRESETS, Level, all_gather, all_reduce, reduce_scatter
from hpctrain.collectives.cost import floor_seconds, price, representatives
from hpctrain.collectives.network import Between, Inside, Network, Node, Rank
from hpctrain.collectives.ports import BFLOAT16
from hpctrain.collectives.schedule import (
    Copy,
    Fence,
    Place,
    Recv,
    Reduce,
    Round,
    Schedule,
    Send,
    Traffic,
    Wire,
)
from hpctrain.errors import UsageError

ALPHA, BETA, GAMMA = 1e-5, 1e-9, 2e-10  # between nodes
INNER, READ, FENCE = 2e-6, 5e-11, 1e-6
N, BYTES = 1 << 16, 4 << 16


def toy(**changes):
    """No overheads, one full-duplex NIC, as many cores as needed, memory for all."""
    values = {
        "inside": Inside(INNER, 1e-10, 0.0, READ, FENCE),
        "between": Between(ALPHA, BETA, 0.0),
        "rank": Rank(0.0, GAMMA, 1e-10),
        "node": Node(64),
    }
    return Network("toy", "by hand", **(values | changes))


def by_hand(rounds, nodes, n=N):
    """A schedule written out: a list of rounds per rank."""
    return Schedule(
        "by hand",
        "by hand",
        n,
        4,
        nodes,
        lambda r: iter(rounds[r]),
        lambda r: (),
        lambda r: Traffic(),
    )


def seconds(name, nodes, network=None, n=N, **options):
    return price(all_reduce(nodes, n, 4, PRESETS[name], **options), network or toy()).seconds


# formulas: S bytes, P ranks or M nodes of G ranks


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ring(size):
    """2 (P - 1) alpha + 2 (P - 1) / P S beta + (P - 1) / P S gamma."""
    n = 48 * 16 * 16  # divisible by every size in lines of 64 bytes
    part = 4 * n / size
    expected = (size - 1) * (2 * ALPHA + 2 * part * BETA + part * GAMMA)
    assert seconds("ring", tuple(range(size)), n=n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_doubling(size):
    """lg P (alpha + S beta + S gamma)."""
    expected = log2(size) * (ALPHA + BYTES * (BETA + GAMMA))
    assert seconds("doubling", tuple(range(size))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_rabenseifner(size):
    """2 lg P alpha + 2 (P - 1) / P S beta + (P - 1) / P S gamma."""
    part = BYTES * (size - 1) / size
    expected = 2 * log2(size) * ALPHA + part * (2 * BETA + GAMMA)
    assert seconds("rabenseifner", tuple(range(size))) == pytest.approx(expected, rel=1e-12)


def test_direct_sends_all_at_once():
    """2 alpha + 2 (P - 1) / P S beta + (P - 1) / P S gamma, of which the sum is not overlapped."""
    part = BYTES * 3 / 4
    expected = 2 * ALPHA + part * (2 * BETA + GAMMA)
    found = seconds("direct", (0, 1, 2, 3), segment_bytes=4 * BYTES)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nodes", [2, 4])
def test_two_level_shares_the_nic(nodes):
    """G chunks of S / G each, of which (M - 1) / M cross, both ways; three fences.

    With one NIC for G = 2 ranks the bytes take twice as long, and one rank's additions overlap with
    the other's messages.
    """
    ranks = 2
    placed = tuple(k // ranks for k in range(nodes * ranks))
    crossing = BYTES * (nodes - 1) / nodes
    adding = (ranks - 1) * BYTES / ranks * GAMMA + crossing / ranks * GAMMA
    reading = (ranks - 1) * BYTES / ranks * READ
    expected = 3 * FENCE + 2 * ALPHA + crossing * BETA + adding + reading
    each = seconds(
        "two-level", placed, toy(between=Between(ALPHA, BETA, 0.0, 2)), segment_bytes=BYTES * 4
    )
    assert each == pytest.approx(expected, rel=1e-12)
    shared = seconds("two-level", placed, segment_bytes=BYTES * 4)
    assert 2 * crossing * BETA < shared <= expected + crossing * BETA


def test_leader_waits_for_the_leader_and_the_node_for_it():
    placed = (0, 0, 0, 0, 1, 1, 1, 1)
    adding = 3 * BYTES * GAMMA
    across = 2 * ALPHA + BYTES * BETA + BYTES / 2 * GAMMA
    expected = 2 * FENCE * 3 + adding + across + BYTES * READ
    assert seconds("leader", placed) == pytest.approx(expected, rel=1e-12)


def test_halves_add_up():
    nodes = (0, 1, 2, 3)
    parts = [f(nodes, N, 4, PRESETS["ring"]) for f in (reduce_scatter, all_gather)]
    both = sum(price(part, toy()).seconds for part in parts)
    assert both == pytest.approx(seconds("ring", nodes), rel=1e-12)


# what takes nothing


@pytest.mark.parametrize("name", PRESETS)
def test_one_rank_and_no_elements(name):
    network = toy()
    assert seconds(name, (0,), network) == 0
    found = price(all_reduce((0, 1, 2), 0, 4, PRESETS[name]), network)
    assert (found.seconds, found.wire_seconds) == (0, 0)


# links


def test_links_carry_what_the_schedule_says():
    schedule = all_reduce((0, 0, 1, 1), N, 4, PRESETS["two-level"])
    found = price(schedule, toy())
    for node, link in found.links.items():
        moved = [schedule.traffic(rank) for rank in (2 * node, 2 * node + 1)]
        assert (link.sent, link.received) == (
            sum(m.sent for m in moved),
            sum(m.received for m in moved),
        )
        assert (link.inside, link.read) == (0, sum(m.read for m in moved))
    assert found.wire_seconds == pytest.approx(BYTES * BETA)


def test_messages_inside_a_node_do_not_touch_the_wire():
    found = price(all_reduce((0, 0, 1, 1), N, 4, PRESETS["ring"]), toy())
    assert [link.sent for link in found.links.values()] == [BYTES * 3 / 2] * 2
    assert [link.inside for link in found.links.values()] == [BYTES * 3 / 2] * 2


def test_wires():
    """A 16-bit wire halves the bytes; an opaque payload is priced by its bound."""
    levels = {
        wire: (Level("peer", "node"), Level("direct", wire=wire))
        for wire in (None, BFLOAT16, Wire("topk", bound=640))
    }
    sent = {
        wire: price(all_reduce((0, 0, 1, 1), N, 4, made), toy()).links[0].sent
        for wire, made in levels.items()
    }
    full, half, opaque = sent.values()
    assert (half, opaque) == (full // 2, 2 * 2 * 640)  # two ranks, one message each way


# what is shared


def exchange(nodes, pairs):
    """Each (a, b): N elements from a to b, all at once."""
    rounds = {rank: [Round()] for rank in range(len(nodes))}
    for a, b in pairs:
        rounds[a] = [Round((), (*rounds[a][0].messages, Send(b, 0, N)))]
        rounds[b] = [Round((), (*rounds[b][0].messages, Recv(a, N, 2 * N)))]
    return by_hand(rounds, nodes)


def test_ranks_of_a_node_share_its_nics():
    pairs = [(0, 3), (1, 4), (2, 5)]
    nodes = (0, 0, 0, 1, 1, 1)
    times = [
        price(exchange(nodes, pairs), toy(between=Between(0.0, BETA, 0.0, nics))).seconds
        for nics in (1, 2, 3, 4)
    ]
    assert times == pytest.approx([3 * BYTES * BETA, 2 * BYTES * BETA, BYTES * BETA, BYTES * BETA])


def test_half_duplex_sends_and_receives_in_turn():
    both = exchange((0, 1), [(0, 1), (1, 0)])
    for duplex, times in (("full", 1), ("half", 2)):
        found = price(both, toy(between=Between(0.0, BETA, 0.0, duplex=duplex)))
        assert found.seconds == pytest.approx(times * BYTES * BETA)


PAUSE = BYTES * 1e-10  # a copy of N elements: a tenth of a message's time


@pytest.mark.parametrize(
    ("burst", "in_a_row", "with_a_pause"),
    [
        (0, 2 * BYTES * BETA, 2 * BYTES * BETA + PAUSE),
        (1000, (2 * BYTES - 1000) * BETA, (2 * BYTES - 2000) * BETA + PAUSE),
        (BYTES, BYTES * BETA, BYTES * BETA),
        (3 * BYTES, 0, PAUSE),
    ],
)
def test_a_burst_passes_at_once_and_again_after_a_pause(burst, in_a_row, with_a_pause):
    network = toy(between=Between(0.0, BETA, 0.0, burst_bytes=burst))
    send, receive = Round((), (Send(1, 0, N),)), Round((), (Recv(0, 0, N),))
    found = price(by_hand([[send, send], [receive, receive]], (0, 1)), network)
    assert found.seconds == pytest.approx(in_a_row)
    pause = Round((Copy(0, N, Place(0, N)),))
    found = price(by_hand([[send, pause, send], [receive, receive]], (0, 1)), network)
    assert found.seconds == pytest.approx(with_a_pause)


@pytest.mark.parametrize(("cores", "times"), [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_ranks_beyond_the_cores_take_turns(cores, times):
    adding = Reduce(0, N, (Place(0, 0), Place(0, N)))
    rounds = [[Round((adding._replace(sources=(Place(r, 0), Place(r, N))),))] for r in range(4)]
    found = price(by_hand(rounds, (0, 0, 0, 0)), toy(node=Node(cores)))
    assert found.seconds == pytest.approx(times * BYTES * GAMMA)


def test_memory_is_shared_and_only_that_of_the_node():
    rounds = [[Round((Copy(0, N, Place(r, N)),))] for r in range(4)]
    network = toy(node=Node(8, 3e-10))
    assert price(by_hand(rounds, (0, 0, 0, 0)), network).seconds == pytest.approx(4 * BYTES * 3e-10)
    assert price(by_hand(rounds, (0, 1, 0, 1)), network).seconds == pytest.approx(2 * BYTES * 3e-10)
    assert price(by_hand(rounds, (0, 1, 2, 3)), network).seconds == pytest.approx(BYTES * 3e-10)


def test_every_message_costs_both_ends():
    """A rank posts one after the other: eight small messages, the receives before the sends."""
    many = exchange((0, 1), [(0, 1)] * 4 + [(1, 0)] * 4)
    found = price(many, toy(between=Between(0.0, 0.0, 1e-6)))
    assert found.seconds == pytest.approx(8e-6)


def test_fences_wait_for_the_last():
    late = Round((Copy(0, N, Place(1, N)), Fence((0, 1, 2))))
    rounds = [[Round((Fence((0, 1, 2)),))], [late], [Round((Fence((0, 1, 2)),))]]
    found = price(by_hand(rounds, (0, 0, 0)), toy())
    assert found.seconds == pytest.approx(BYTES * 1e-10 + 2 * FENCE)


def test_additions_overlap_with_messages():
    """In segments, an addition takes nothing while the next segment travels."""
    network = toy(between=Between(0.0, BETA, 0.0))
    sizes = (BYTES, BYTES // 8)
    whole, cut = (seconds("direct", (0, 1), network, segment_bytes=size) for size in sizes)
    assert cut < whole - 0.5 * BYTES / 2 * GAMMA


def test_a_schedule_that_never_ends():
    rounds = [[Round((), (Recv(1, 0, N),))], []]
    with pytest.raises(UsageError, match="'by hand' cannot be priced: rank 0 never ends"):
        price(by_hand(rounds, (0, 1)), toy())


# order


@pytest.mark.parametrize("name", PRESETS)
def test_more_bytes_and_slower_networks_take_longer(name):
    nodes = (0, 0, 1, 1, 2, 2, 2)
    times = [seconds(name, nodes, n=1 << k) for k in (10, 14, 18, 20)]
    assert times == sorted(times) and times[0] > 0
    base = seconds(name, nodes)
    slower = {
        "between": Between(2 * ALPHA, 2 * BETA, 1e-6),
        "rank": Rank(1e-6, 2 * GAMMA, 2e-10),
    }
    for key, value in slower.items():
        assert seconds(name, nodes, toy(**{key: value})) > base


# a few clocks, and all of them


def drawn(generator):
    """(nodes, n, algorithm, options): up to 48 ranks, equal or unequal nodes, any placement."""
    count = generator.randint(1, 12)
    equal = generator.random() < 0.6
    size = generator.randint(1, 4)
    nodes = [
        node for node in range(count) for _ in range(size if equal else generator.randint(1, 4))
    ]
    if generator.random() < 0.3:
        generator.shuffle(nodes)
    options = {"segment_bytes": generator.choice((1 << 16, 1 << 18, 4 << 20))}
    n = generator.randint(1 << 14, 1 << 19)
    return tuple(nodes), equal, n, generator.choice(list(PRESETS)), options


@pytest.mark.parametrize("seed", range(40))
def test_few_clocks_agree_with_all(seed):
    """Within a quarter: what few clocks miss is waiting for ranks that have more to do.

    They have where P is no power of two, or nodes are unequal.
    """
    nodes, equal, n, name, options = drawn(random.Random(seed))
    network = toy(
        between=Between(ALPHA, BETA, 5e-7, random.Random(seed).randint(1, 3)),
        node=Node(2, 2e-11),
    )
    schedule = all_reduce(nodes, n, 4, PRESETS[name], **options)
    exact = price(schedule, network, set(nodes))
    few = price(schedule, network, representatives(nodes))
    assert floor_seconds(schedule, network) <= exact.seconds
    assert few.seconds == pytest.approx(exact.seconds, rel=0.25 if equal else 0.5)
    for node, link in few.links.items():
        assert link == exact.links[node]


def test_4096_nodes_of_8_ranks():
    """Only the clocks of one node run; the price is the sum of what the formula names."""
    nodes = tuple(k // 8 for k in range(8 * 4096))
    schedule = all_reduce(nodes, 25_600_000, 4, PRESETS["torus"], segment_bytes=16 << 20)
    found = price(schedule, toy(between=Between(ALPHA, BETA, 0.0, 8)))
    assert set(found.links) == {0}
    own = 4 * 25_600_000 / 8
    crossing = 2 * own * (63 / 64 + 63 / 64 / 64)
    adding = 7 * own * GAMMA + crossing / 2 * GAMMA
    expected = 4 * 63 * ALPHA + crossing * BETA + adding + 7 * own * READ + 9 * FENCE
    assert found.seconds == pytest.approx(expected, rel=0.01)
