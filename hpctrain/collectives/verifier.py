"""Checks a schedule for any number of ranks, without MPI and without memory for the elements.

`verify` lets all ranks do their rounds on symbols (`verifier_memory`) and raises `ScheduleFault`
where a rule is broken:

    sums        no rank's input is added twice, or to other elements than its own
    result      what the schedule's kind promises, everywhere, with the same bits on all ranks
    messages    every send meets a receive of the same size and wire, in order
    deadlock    none, even if every send waits for its receive (rendezvous)
    races       nothing is read before it was written; in a round nothing is touched that a
                message writes, or written that a message reads; between a rank's write and a peer's
                read lies a fence, and likewise between a peer's read and the next write, of which
                one follows the end of the schedule (the next backward pass)
    traffic     bytes and messages of every rank are those of the schedule's formula

The order in which ranks happen to run here does not matter: races are found by what fences order,
as vector clocks tell. `spot_check` looks at a few ranks where all of them would be too many.

Layer: collectives. Knows nothing of MPI and of how schedules are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpctrain.collectives.schedule import Message, Round, Schedule, Send, Traffic
from hpctrain.collectives.verifier_access import ScheduleFault, shown
from hpctrain.collectives.verifier_memory import Segment
from hpctrain.collectives.verifier_ranks import Machine

__all__ = ["ScheduleFault", "spot_check", "verify"]


def verify(schedule: Schedule) -> list[Traffic]:
    """What every rank moved, if no rule is broken. Time goes with the number of messages.

    Raises:
        ScheduleFault: a rule is broken; the text names rank, round and range.
    """
    _check_owned(schedule)
    machine = Machine(schedule)
    lives = [_life(machine, rank) for rank in range(schedule.size)]
    machine.ready.extend(range(schedule.size))
    ended: set[int] = set()
    while machine.ready:
        rank = machine.ready.popleft()
        if next(lives[rank], "end") == "end":
            ended.add(rank)
    if len(ended) < schedule.size:
        raise ScheduleFault(_stuck(machine, ended))
    machine.check_end()
    _check_result(machine)
    for rank, moved in enumerate(machine.traffic):
        _check_traffic(schedule, rank, moved)
    return machine.traffic


def spot_check(schedule: Schedule, ranks: Sequence[int], peers: int = 4) -> None:
    """The messages of a few ranks against some of their partners', and against the formula.

    Args:
        ranks: those whose rounds are read; with each the first `peers` it has messages with.

    Finds wrong sizes, order, partners and traffic, not wrong sums.
    """
    for rank in ranks:
        between: dict[int, list[Message]] = {}
        moved = Traffic()
        for turn in schedule.rounds(rank):
            for message in turn.messages:
                moved += _one(schedule, message)
                if message.peer in between or len(between) < peers:
                    between.setdefault(message.peer, []).append(message)
        formula = schedule.traffic(rank)
        if (moved.sent, moved.sends, moved.received, moved.receives) != (
            formula.sent,
            formula.sends,
            formula.received,
            formula.receives,
        ):
            raise ScheduleFault(f"rank {rank} moves {moved}, and its formula says {formula}")
        for peer, mine in between.items():
            _check_pair(schedule, rank, peer, mine)


def _one(schedule: Schedule, message: Message) -> Traffic:
    nbytes = schedule.nbytes(message)
    if isinstance(message, Send):
        return Traffic(sent=nbytes, sends=1)
    return Traffic(received=nbytes, receives=1)


def _check_pair(schedule: Schedule, rank: int, peer: int, mine: list[Message]) -> None:
    """Each way, the k-th message sent has the size of the k-th received."""
    theirs = [m for turn in schedule.rounds(peer) for m in turn.messages if m.peer == rank]
    for one, other, sent, got in ((rank, peer, mine, theirs), (peer, rank, theirs, mine)):
        sends = [schedule.nbytes(m) for m in sent if isinstance(m, Send)]
        receives = [schedule.nbytes(m) for m in got if not isinstance(m, Send)]
        if sends != receives:
            k = next(
                (k for k, (a, b) in enumerate(zip(sends, receives, strict=False)) if a != b), -1
            )
            raise ScheduleFault(
                f"rank {one} sends {len(sends)} messages to rank {other}, which expects "
                f"{len(receives)}; the first to differ in size is number {k}"
            )


def _life(machine: Machine, rank: int) -> Iterator[str]:
    """Do all rounds of a rank, stopping wherever it has to wait."""
    for number, turn in enumerate(machine.schedule.rounds(rank)):
        machine.round[rank] = number
        yield from _operations(machine, rank, turn, turn.first, busy=False)
        arrivals = machine.post(rank, turn.messages)
        yield from _operations(machine, rank, turn, turn.meanwhile, busy=True)
        while machine.outstanding[rank]:
            yield "messages"
        machine.receive(rank, arrivals)


def _operations(
    machine: Machine, rank: int, turn: Round, operations: tuple[object, ...], busy: bool
) -> Iterator[str]:
    for operation in operations:
        if machine.local(rank, operation, turn.messages if busy else ()):
            while rank in machine.fenced:
                yield "fence"


def _stuck(machine: Machine, ended: set[int]) -> str:
    """Who waits for whom, from the first rank that waits until it is clear why."""
    rank = min(set(range(machine.schedule.size)) - ended)
    lines: list[str] = []
    seen: set[int] = set()
    while rank not in seen:
        seen.add(rank)
        other, what = machine.waits_for(rank, ended)
        lines.append(f"rank {rank} in round {machine.round[rank]} waits for rank {other} {what}")
        if other in ended:
            return f"{'; '.join(lines[-3:])}, which has ended: something is missing there"
        rank = other
    return f"deadlock: {'; '.join(lines[-6:])}"


def _check_owned(schedule: Schedule) -> None:
    at = 0
    if schedule.kind == "all-reduce":
        return
    for start, stop in sorted(r for rank in range(schedule.size) for r in schedule.owned(rank)):
        if start != at:
            raise ScheduleFault(f"the ranges that ranks own do not meet at {min(at, start)}")
        at = stop
    if at != schedule.n:
        raise ScheduleFault(f"nobody owns {shown(at, schedule.n)}")


def _check_result(machine: Machine) -> None:
    """What the kind of the schedule promises."""
    schedule, first = machine.schedule, None
    for rank in range(schedule.size):
        if schedule.kind == "reduce-scatter":
            ranges = schedule.owned(rank)
        else:
            ranges = ((0, schedule.n),)
        held: list[tuple[int, int, int]] = []
        for start, stop in ranges:
            _check_range(machine, rank, start, stop, held)
        if first is None:
            first = held
        elif schedule.kind != "reduce-scatter" and held != first:
            differs = next(b for a, b in zip(first, held, strict=False) if a != b)
            raise ScheduleFault(
                f"rank {rank} and rank 0 hold different bits from {differs[0]} on: the same ranks' "
                "inputs, added in another order or rounded differently"
            )


def _check_range(
    machine: Machine, rank: int, start: int, stop: int, held: list[tuple[int, int, int]]
) -> None:
    """The right inputs in a range; appends what it holds, in joined pieces."""
    symbols, at = machine.symbols, start
    wanted = symbols.all if "reduce" in machine.schedule.kind else 0
    for segment in [*machine.memory[rank].read(start, stop), Segment(stop, stop, -1, 0, 0)]:
        if segment.start > at:
            raise ScheduleFault(f"rank {rank} has nothing in {shown(at, segment.start)} at the end")
        if segment.symbol < 0:
            break
        if segment.shift:
            raise ScheduleFault(
                f"rank {rank} holds elements {shown(*segment[:2], segment.shift)} in "
                f"{shown(*segment[:2])} at the end"
            )
        inputs = symbols.ranks(segment.symbol)
        if wanted and inputs != wanted:
            raise ScheduleFault(
                f"rank {rank} lacks the input of rank {symbols.names(wanted & ~inputs)} in "
                f"{shown(segment.start, segment.stop)} at the end"
            )
        if held and held[-1][1:] == (segment.start, segment.symbol):
            held[-1] = (held[-1][0], segment.stop, segment.symbol)
        else:
            held.append((segment.start, segment.stop, segment.symbol))
        at = segment.stop


def _check_traffic(schedule: Schedule, rank: int, moved: Traffic) -> None:
    formula = schedule.traffic(rank)
    if moved != formula:
        raise ScheduleFault(f"rank {rank} moves {moved}, and its formula says {formula}")
