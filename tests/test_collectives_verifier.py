"""The verifier finds mistakes: each is planted in a schedule that is right without it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpctrain.collectives.algorithms import PRESETS, Level, all_gather, all_reduce, reduce_scatter
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
)
from hpctrain.collectives.verifier import ScheduleFault, spot_check, verify
from hpctrain.collectives.verifier_memory import Memory, Segment, Symbols

N = 4096  # elements: 1024 for each of 4 ranks


def made(name="ring", nodes=(0, 0, 1, 1), **options):
    schedule = all_reduce(nodes, N, 4, PRESETS[name], **options)
    verify(schedule)
    return schedule


def changed(schedule, change, ranks=None):
    """The schedule with `change` applied to the list of rounds of some ranks (default: all)."""

    def rounds(rank):
        turns = [turn for turn in schedule.rounds(rank) if any(turn)]
        return iter(change(turns) if ranks is None or rank in ranks else turns)

    return replace(schedule, rounds=rounds)


def without(turns, unwanted):
    """The rounds without the operations and messages for which `unwanted` is true."""
    return [Round(*(tuple(p for p in part if not unwanted(p)) for part in turn)) for turn in turns]


def by_hand(rounds, nodes=(0, 0), kind="all-reduce", owned=None, n=64):
    """A schedule written out: a list of rounds per rank; its formula is what it moves."""
    schedule = Schedule(
        "by hand",
        kind,
        n,
        4,
        nodes,
        lambda rank: iter(rounds[rank]),
        lambda rank: owned[rank] if owned else (),
        lambda rank: moved(schedule, rank),
    )
    return schedule


def moved(schedule, rank):
    found = Traffic()
    for turn in schedule.rounds(rank):
        for message in turn.messages:
            nbytes = schedule.nbytes(message)
            sends = isinstance(message, Send)
            found += Traffic(nbytes, 1) if sends else Traffic(received=nbytes, receives=1)
        for part in (*turn.first, *turn.meanwhile):
            places = part.sources if isinstance(part, Reduce) else ()
            places = (part.source,) if isinstance(part, Copy) else places
            read = sum(4 * (part.stop - part.start) for place in places if place.rank != rank)
            found += Traffic(read=read)
    return found


def test_wrong_slice_index():
    """Rank 1 sends the neighbouring chunk once: as long, but other elements."""

    def change(turns):
        first = turns[0].messages
        [send] = [m for m in first if isinstance(m, Send)]
        other = send._replace(start=(send.start + 1024) % N, stop=(send.start + 1024) % N + 1024)
        return [Round((), tuple(other if m is send else m for m in first)), *turns[1:]]

    with pytest.raises(ScheduleFault, match=r"rank 2, .* adds elements .* to \["):
        verify(changed(made(), change, {1}))


@pytest.mark.parametrize("name", ["ring", "doubling", "rabenseifner", "direct", "two-level"])
def test_missing_round(name):
    """Of any rank, any round that does something."""
    schedule = made(name)
    for rank in range(4):
        for k in range(sum(1 for turn in schedule.rounds(rank) if any(turn))):
            with pytest.raises(ScheduleFault):
                verify(changed(schedule, lambda turns, k=k: turns[:k] + turns[k + 1 :], {rank}))


def test_missing_last_round_is_told():
    with pytest.raises(ScheduleFault, match="rank . in round . waits for rank . .*has ended"):
        verify(changed(made(), lambda turns: turns[:-1], {2}))


@pytest.mark.parametrize("name", ["ring", "rabenseifner", "torus"])
def test_swapped_order(name):
    """Two rounds with messages, exchanged on one rank or on all."""
    schedule = made(name, nodes=(0, 1, 2, 3))

    def change(turns):
        a, b = [k for k, turn in enumerate(turns) if turn.messages][:2]
        turns[a], turns[b] = turns[b], turns[a]
        return turns

    for ranks in ({0}, {3}, None):
        with pytest.raises(ScheduleFault):
            verify(changed(schedule, change, ranks))


@pytest.mark.parametrize(
    ("which", "says"),
    [
        (0, "reads .* with no fence after it was written"),
        (1, "reads .* with no fence after it was written"),
        (2, "writes .* with no fence after rank . read"),
    ],
)
@pytest.mark.parametrize("name", ["two-level", "leader"])
def test_missing_fence(name, which, says):
    """Before the sum, before the copies, and after them: each is needed."""

    def change(turns):
        fences = [part for turn in turns for part in (*turn.first, *turn.meanwhile)]
        seen = iter(range(sum(isinstance(part, Fence) for part in fences)))
        return without(turns, lambda part: isinstance(part, Fence) and next(seen) == which)

    with pytest.raises(ScheduleFault, match=says):
        verify(changed(made(name), change))


def test_deadlocking_order():
    """All send first and receive afterwards: it works only where MPI buffers messages."""

    def change(turns):
        apart = []
        for turn in turns:
            for kind in (Send, Recv):
                messages = tuple(m for m in turn.messages if isinstance(m, kind))
                apart.append(Round((), messages))
            apart[-2] = apart[-2]._replace(first=turn.first)
        return apart

    with pytest.raises(ScheduleFault, match="deadlock: rank 0 in round 0 waits for rank 1 to rec"):
        verify(changed(made(), change))


def test_fences_in_another_order_deadlock():
    pair, other = Fence((0, 1)), Fence((1, 0))
    with pytest.raises(ScheduleFault, match=r"deadlock: .* at the fence of ranks \(0, 1\)"):
        verify(by_hand([[Round((pair,))], [Round((other,))]]))


def test_element_summed_twice():
    def change(turns):
        [k] = [k for k, turn in enumerate(turns) if turn.first][:1]
        return [*turns[: k + 1], Round(turns[k].first), *turns[k + 1 :]]

    with pytest.raises(ScheduleFault, match="rank 1, round 2: adds the input of rank . twice"):
        verify(changed(made(), change, {1}))


@pytest.mark.parametrize("name", ["ring", "direct", "doubling", "two-level", "three-level"])
def test_no_message_sum_or_copy_is_superfluous(name):
    """Leaving out any one of a rank's leads to a fault: what is there is needed, and checked."""
    schedule = made(name)
    for rank in (0, 3):
        parts = [p for turn in schedule.rounds(rank) for part in turn for p in part]
        for unwanted in parts:
            if isinstance(unwanted, Fence):
                continue
            with pytest.raises(ScheduleFault):
                wrong = changed(schedule, lambda t, u=unwanted: without(t, u.__eq__), {rank})
                verify(wrong)


def test_missing_input_is_named():
    add = Reduce(0, 64, (Place(0, 0), Place(0, 64)))
    rounds = [
        [Round((), (Recv(1, 64, 128),)), Round((add,), (Send(1, 0, 64), Send(2, 0, 64)))],
        [Round((), (Send(0, 0, 64),)), Round((), (Recv(0, 0, 64),))],
        [Round((), (Recv(0, 0, 64),))],
    ]
    with pytest.raises(ScheduleFault, match=r"rank 0 lacks the input of rank 2 in \[0, 64\)"):
        verify(by_hand(rounds, (0, 1, 2)))


def test_another_order_of_additions_is_not_the_same_bits():
    """All three ranks get everything and add, each beginning with its own: exact, yet unequal."""
    rounds = []
    for rank in range(3):
        others = [k for k in range(3) if k != rank]
        rows = {k: 64 * (1 + i) for i, k in enumerate(others)}
        messages = tuple(Send(k, 0, 64) for k in others)
        messages += tuple(Recv(k, row, row + 64) for k, row in rows.items())
        sources = (Place(rank, 0), *(Place(rank, row) for row in rows.values()))
        rounds.append([Round((), messages), Round((Reduce(0, 64, sources),))])
    with pytest.raises(ScheduleFault, match="rank . and rank 0 hold different bits"):
        verify(by_hand(rounds, (0, 1, 2)))


def test_a_wire_that_rounds_needs_a_cast_of_ones_own():
    schedule = all_reduce((0, 1), N, 4, (Level("direct", wire=BFLOAT16),))
    verify(schedule)
    with pytest.raises(ScheduleFault, match="hold different bits"):
        verify(
            changed(schedule, lambda turns: without(turns, lambda p: type(p).__name__ == "Cast"))
        )


BOTH = (Fence((0, 1)),)
HALF = Round((), (Send(1, 0, 64), Recv(1, 64, 128)))


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (Round((), (Recv(1, 64, 96), Send(1, 80, 128))), "overlaps another message"),
        (HALF._replace(meanwhile=(Copy(0, 64, Place(0, 0)),)), "is used while Send"),
        (HALF._replace(meanwhile=(Copy(200, 210, Place(0, 100)),)), "is used while Recv"),
        (Round((), (Send(1, 5, 5),)), "is empty"),
        (Round((), (Send(0, 0, 64),)), "no message between two ranks"),
        (Round((), (Send(1, 60, 124),)), r"uses \[64, 124\) in a message, which nobody has"),
        (Round((Reduce(0, 9, (Place(0, 0), Place(0, 99))),)), "which nobody has written"),
        (Round((Fence((1, 2)),)), "rank 0, round 0: is at a fence of"),
        (Round((Send(1, 0, 64),)), "is no local operation"),
    ],
)
def test_rules_of_a_round(turn, says):
    peer = Round((), (Recv(0, 64, 128), Send(0, 0, 64)))
    with pytest.raises(ScheduleFault, match=says):
        verify(by_hand([[turn], [peer]]))


def test_nothing_is_read_while_a_message_writes_it():
    receives = [Round(BOTH, (Recv(1, 0, 64),), BOTH)]
    reads = [Round((*BOTH, *BOTH, Copy(0, 64, Place(0, 0)))), Round((), (Send(0, 0, 64),))]
    with pytest.raises(ScheduleFault, match=r"rank 1, .* of rank 0 while Recv.* writes it"):
        verify(by_hand([receives, reads]))
    reads[0] = Round((*BOTH, Copy(0, 64, Place(0, 0)), *BOTH))
    with pytest.raises(ScheduleFault, match="rank 0, .* with no fence after rank 1 read"):
        verify(by_hand([receives, reads]))


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (Recv(0, 64, 127), "another size"),
        (Recv(0, 64, 128, BFLOAT16), "another size"),
    ],
)
def test_messages_that_do_not_fit(theirs, says):
    with pytest.raises(ScheduleFault, match=says):
        verify(by_hand([[Round((), (Send(1, 0, 64),))], [Round((), (theirs,))]]))


def test_peer_reads_stay_on_the_node_and_in_the_buffer():
    fence, read = Fence((0, 1)), Copy(0, 8, Place(1, 0))
    with pytest.raises(ScheduleFault, match="of rank 1, which is on another node"):
        verify(by_hand([[Round((fence, read))], [Round((fence,))]], (0, 1)))
    write = Copy(64, 128, Place(1, 0))
    scratch = Copy(0, 8, Place(1, 64))
    with pytest.raises(ScheduleFault, match="which is scratch memory"):
        verify(by_hand([[Round((fence, scratch))], [Round((write, fence))]]))


def test_traffic_must_be_the_formulas():
    schedule = replace(made(), traffic=lambda rank: Traffic(sent=4))
    with pytest.raises(ScheduleFault, match=r"rank 0 moves Traffic\(sent=24576, .*formula says"):
        verify(schedule)
    with pytest.raises(ScheduleFault, match="its formula says"):
        spot_check(schedule, [0])


def test_owned_ranges_must_cover_everything_once():
    nodes, levels = (0, 0, 1, 1), PRESETS["direct"]
    schedule = reduce_scatter(nodes, N, 4, levels)
    with pytest.raises(ScheduleFault, match=r"nobody owns \[3,072, 4,096\)"):
        verify(replace(schedule, owned=lambda rank: schedule.owned(rank) if rank < 3 else ()))
    with pytest.raises(ScheduleFault, match="do not meet at"):
        verify(replace(schedule, owned=lambda rank: schedule.owned(min(rank, 2))))


def test_an_all_gather_that_leaves_something_out():
    schedule = all_gather((0, 0, 1, 1), N, 4, PRESETS["two-level"])
    verify(schedule)
    with pytest.raises(ScheduleFault, match=r"rank 1 has nothing in \[.*\) at the end"):
        verify(changed(schedule, lambda turns: without(turns, lambda p: isinstance(p, Copy)), {1}))
    shifted = by_hand(
        [[Round((), (Send(1, 0, 64),))], [Round((), (Recv(0, 64, 128),)), Round((COPY,))]],
        (0, 1),
        "broadcast",
        [((0, 64),), ()],
    )
    with pytest.raises(ScheduleFault, match=r"rank 1 holds elements \[32, 64\) in \[0, 32\) at"):
        verify(shifted)


COPY = Copy(0, 32, Place(1, 96))


def test_spot_checks_find_what_does_not_match():
    for name in PRESETS:
        spot_check(made(name, nodes=(0, 0, 0, 1, 2, 2)), range(6), peers=6)
    wrong = changed(made("ring", nodes=(0, 1, 2)), lambda turns: turns[::-1], {1})
    with pytest.raises(ScheduleFault, match="rank 1 sends 4 .* in size is number 1"):
        spot_check(wrong, [2])
    fewer = changed(made(), lambda turns: turns[:-1], {1})
    with pytest.raises(ScheduleFault, match="to rank 1, which expects 5; .*number -1"):
        spot_check(fewer, [0])


def test_symbols():
    symbols = Symbols(5)
    pair = symbols.add(1, 0)
    assert pair == symbols.add(0, 1) and symbols.add(pair, 2) != symbols.add(0, symbols.add(1, 2))
    assert symbols.ranks(symbols.add(pair, 4)) == 0b10011
    short = symbols.cast(pair, "bfloat16")
    assert short not in (pair, symbols.cast(pair, "float16"))
    assert symbols.cast(short, "bfloat16") == short
    assert symbols.names(0b11111) == "0, 1, 2, 3, ..." and symbols.names(0b100) == "2"


def test_memory_ranges():
    memory = Memory()
    memory.write(0, 100, [Segment(0, 100, 7, 0, 0)])
    memory.write(40, 60, [Segment(40, 60, 8, 0, 1)])
    assert [(s.start, s.stop, s.symbol) for s in memory.read(30, 70)] == [
        (30, 40, 7),
        (40, 60, 8),
        (60, 70, 7),
    ]
    memory.write(40, 60, [Segment(40, 60, 7, 0, 0)])
    assert memory.read(0, 200) == [Segment(0, 100, 7, 0, 0)]
    memory.write(10, 90, [])
    assert [(s.start, s.stop) for s in memory.read(0, 200)] == [(0, 10), (90, 100)]
