"""Every algorithm passes the verifier on every topology, and moves what the literature says."""

from __future__ import annotations

import random

import pytest

from hpctrain.collectives.algorithms import (
    PRESETS,
    Level,
    all_gather,
    all_reduce,
    broadcast,
    preset,
    reduce_scatter,
)
from hpctrain.collectives.ports import BFLOAT16
from hpctrain.collectives.schedule import Chunks, Fence, Recv, Round, Send, Traffic, merged
from hpctrain.collectives.verifier import spot_check, verify
from hpctrain.errors import UsageError

TOPOLOGIES = {
    "1": (0,),
    "2": (0, 0),
    "1+1": (0, 1),
    "3": (0, 0, 0),
    "2x2": (0, 0, 1, 1),
    "round-robin": (0, 1, 0, 1),
    "3+1": (0, 0, 0, 1),
    "1+2+3": (0, 1, 1, 2, 2, 2),
    "mixed": (2, 0, 1, 0, 2, 2, 0),
    "2x4": (0,) * 4 + (1,) * 4,
    "4x2": (0, 0, 1, 1, 2, 2, 3, 3),
}
HUGE = (1 << 40) + 3
BIG = 1 << 44  # bytes: no message is cut


@pytest.mark.parametrize("nodes", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, nodes):
    for n, itemsize in ((0, 4), (1, 4), (5, 8), (1000, 4), (HUGE, 4), (HUGE, 8)):
        limit = 2048 if n < HUGE else BIG
        for depth in (1, 3):
            verify(all_reduce(nodes, n, itemsize, PRESETS[name], depth=depth, segment_bytes=limit))


@pytest.mark.parametrize("nodes", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "doubling"])
def test_halves(name, nodes):
    for n in (0, 1, 1000, HUGE):
        for make in (reduce_scatter, all_gather):
            verify(make(nodes, n, 4, PRESETS[name], segment_bytes=2048 if n < HUGE else BIG))


@pytest.mark.parametrize("nodes", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("long", [False, True])
def test_broadcasts(nodes, long):
    for n in (0, 1, 1000, HUGE):
        for root in range(len(nodes)):
            limit = 256 if n < HUGE else BIG
            verify(broadcast(nodes, n, 4, root, long=long, segment_bytes=limit))


def drawn(chance):
    """A topology of up to 64 ranks in any placement, levels, and everything else."""
    size = chance.choice([*range(1, 17), 24, 31, 48, 64])
    many = chance.randint(1, size)
    nodes = tuple(chance.randrange(many) for _ in range(size))
    levels = []
    if chance.random() < 0.7:
        if chance.random() < 0.3:
            levels.append(Level("peer", chance.choice([1, 2, 3]), chance.choice([0, 1, 2])))
        levels.append(Level("peer", "node", chance.choice([0, 0, 1, 2, 3])))
    if chance.random() < 0.4:
        algorithm = chance.choice(["ring", "direct", "halving"])
        group, stripes = chance.choice([2, 3, "square", "node"]), chance.choice([0, 1, 2])
        levels.append(Level(algorithm, group, stripes, chance.choice([None, BFLOAT16])))
    last = ["ring", "direct", "halving", "doubling"]
    stripes = chance.choice([0, 0, 1, 3])
    levels.append(Level(chance.choice(last), "all", stripes, chance.choice([None, BFLOAT16])))
    n = chance.choice([0, 1, 17, 100, 1000, 100_003, HUGE])
    few = chance.choice([64, 1000, 1 << 22])
    limit = few if n <= 1000 else max(n // chance.choice([1, 3, 20]), 64)
    return nodes, n, chance.choice([4, 8]), tuple(levels), limit, chance.random() < 0.7


@pytest.mark.parametrize("seed", range(60))
def test_random_topologies_and_levels(seed):
    chance = random.Random(seed)
    nodes, n, itemsize, levels, limit, by_node = drawn(chance)
    options = {"segment_bytes": limit, "by_node": by_node}
    depth = chance.choice([1, 1, 2, 4])
    verify(all_reduce(nodes, n, itemsize, levels, depth=depth, **options))
    if levels[-1].algorithm != "doubling":
        verify(reduce_scatter(nodes, n, itemsize, levels, **options))
        verify(all_gather(nodes, n, itemsize, levels, **options))


def flat(name, size, n=1 << 20):
    """Every rank's traffic in bytes per byte of the buffer, and messages; ranks on own nodes."""
    schedule = all_reduce(tuple(range(size)), n, 4, PRESETS[name], segment_bytes=BIG)
    return [(t.sent / (4 * n), t.sends) for t in map(schedule.traffic, range(size))]


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_bytes_and_messages_of_the_literature(size):
    """For powers of two, with n a multiple of everything, as in the tables of [TRG05]."""
    rounds, share = size.bit_length() - 1, 2 * (size - 1) / size
    assert flat("ring", size) == [(share, 2 * (size - 1))] * size
    assert flat("direct", size) == [(share, 2 * (size - 1))] * size
    assert flat("rabenseifner", size) == [(share, 2 * rounds)] * size
    assert flat("doubling", size) == [(rounds, rounds)] * size


@pytest.mark.parametrize("size", [3, 5, 6, 7, 12, 63])
def test_rabenseifner_sends_little_more_for_other_sizes(size):
    """Nothing is folded into a power of two first, which would cost two buffers more."""
    sent = [share for share, _ in flat("rabenseifner", size)]
    assert 2 * (size - 1) / size <= max(sent) < 2 * (size - 1) / size + 1
    assert sum(sent) / size == pytest.approx(2 * (size - 1) / size, rel=1e-3)


def test_traffic_of_two_levels():
    """M nodes of G ranks: 2 (M-1)/M of 1/G between nodes, 2 (G-1)/G out of peers' memory."""
    for many, ranks in ((2, 2), (4, 2), (2, 8), (16, 4)):
        n = 1 << 20
        nodes = tuple(node for node in range(many) for _ in range(ranks))
        for levels in (PRESETS["two-level"], (Level("peer", "node"), Level("ring"))):
            schedule = all_reduce(nodes, n, 4, levels, segment_bytes=BIG)
            across = 2 * (many - 1) * 4 * n // many // ranks
            inside = 2 * (ranks - 1) * 4 * n // ranks
            expected = Traffic(across, 2 * (many - 1), across, 2 * (many - 1), inside)
            assert {schedule.traffic(rank) for rank in range(many * ranks)} == {expected}


def test_a_node_sends_as_much_whatever_its_ranks():
    """3 + 1 ranks: the lone rank takes part in all three slices, nobody is idle."""
    n = 3 << 20
    schedule = all_reduce((0, 0, 0, 1), n, 4, PRESETS["two-level"], segment_bytes=BIG)
    sent = [schedule.traffic(rank).sent for rank in range(4)]
    assert sent[:3] == [4 * n // 3] * 3 and sent[3] == 4 * n


def test_a_ring_by_nodes_crosses_once_per_node_and_step():
    nodes = (0, 1, 0, 1, 0, 1)

    def crossings(by_node):
        schedule = all_reduce(nodes, 6000, 4, PRESETS["ring"], by_node=by_node)
        sends = [
            nodes[rank] != nodes[message.peer]
            for rank in range(6)
            for turn in schedule.rounds(rank)
            for message in turn.messages
            if isinstance(message, Send)
        ]
        return sum(sends) / len(sends)

    assert crossings(by_node=True) == pytest.approx(1 / 3)
    assert crossings(by_node=False) == 1


def test_pipelined_pieces_cross_while_others_are_added_up():
    """In the middle a round has messages of one piece, sums of the next, copies of the last."""
    schedule = all_reduce((0, 0, 1, 1), 4096, 4, PRESETS["two-level"], depth=4)
    kinds = [
        (bool(turn.messages), sorted({type(part).__name__ for part in turn.meanwhile}))
        for turn in schedule.rounds(0)
    ]
    assert (True, ["Copy", "Fence", "Reduce"]) in kinds


def test_rounds_are_lazy():
    """The first rounds of one of 32,768 ranks, without a list of anything per rank."""
    nodes = tuple(rank // 8 for rank in range(32_768))
    for name in PRESETS:
        schedule = all_reduce(nodes, 1 << 36, 4, PRESETS[name])
        assert isinstance(next(schedule.rounds(12_345)), Round)


NODES_512x8 = tuple(rank // 8 for rank in range(4096))


def test_leaders_of_4096_ranks_in_full():
    levels = (Level("peer", "node", 1), Level("doubling"))
    verify(all_reduce(NODES_512x8, 1 << 30, 4, levels, segment_bytes=BIG))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["doubling", "rabenseifner", "torus"])
def test_4096_ranks_in_full(name):
    """With few grains: what is cut further is alike."""
    verify(all_reduce(NODES_512x8, 1024, 4, PRESETS[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_4096_ranks_spot_checked(name):
    schedule = all_reduce(NODES_512x8, 1 << 36, 4, PRESETS[name], segment_bytes=BIG)
    spot_check(schedule, [0, 4095] if name in ("ring", "direct") else [0, 1, 777, 4095], peers=2)


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ((Level("rings"),), "'rings'.*did you mean 'ring'"),
        ((Level("ring", "nodes"),), "'nodes' is neither a number"),
        ((Level("ring", 2),), "2 groups are left"),
        ((Level("direct", 2), Level("peer")), "2 groups are left"),
        ((Level("doubling", 2), Level("ring")), "last level only"),
        ((Level("ring", 3), Level("peer", "all")), "peer reads need groups within one node"),
    ],
)
def test_levels_that_make_no_sense(levels, says):
    with pytest.raises(UsageError, match=says):
        all_reduce((0, 0, 1, 1), 10, 4, levels)


def test_other_wrong_arguments():
    with pytest.raises(UsageError, match="'two-levels'.*did you mean 'two-level'"):
        preset("two-levels")
    with pytest.raises(UsageError, match="reduce-scatter: with 'doubling'"):
        reduce_scatter((0, 1), 10, 4, PRESETS["doubling"])


def test_chunks():
    chunks = Chunks(16, 100, 3, 16)
    assert [chunks.chunk(k) for k in range(4)] == [(16, 48), (48, 80), (80, 100), (100, 100)]
    assert chunks.span(1, 3) == (48, 100)
    assert [chunks.holder(at) for at in (16, 47, 48, 99)] == [0, 0, 1, 2]
    many = Chunks(0, 40, 8, 16)
    assert [k for k in range(8) if many.chunk(k)[0] < many.chunk(k)[1]] == sorted(
        {many.holder(at) for at in range(40)}
    )


def test_merged_streams():
    a, b = Round((), (Send(1, 0, 1),)), Round((Fence((0, 1)),), (Recv(2, 3, 4),))
    assert list(merged([iter([a, b]), iter([b])])) == [
        Round(b.first, a.messages + b.messages),
        b,
    ]
    assert list(merged([])) == []
