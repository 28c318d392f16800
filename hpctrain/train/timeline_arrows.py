"""Which events of different ranks belong together: messages, and who kept whom waiting.

Layer: train. Is given events on one clock; knows nothing of files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hpctrain.mpi.calls import expand

__all__ = ["ALL_WAIT", "Arrow", "Shown", "arrows", "matches"]

# Collectives that nobody leaves before all have come.
ALL_WAIT = frozenset((
    "Allgather", "Allgatherv", "Allreduce", "Alltoall", "Barrier", "Reduce_scatter_block",
    "allgather", "allreduce", "alltoall", "barrier",
))  # fmt: skip
WAITS = ("exchange", "fence")  # for what was posted before

Track = tuple[int, int]
Message = tuple[int, int, str, int, int]  # from, to, communicator, tag, the how-manieth


class Shown(NamedTuple):
    """An event on its track, in nanoseconds of a clock that all ranks share."""

    rank: int
    pid: int
    tid: int
    name: str
    begin: int
    end: int
    facts: dict[str, Any]


class Arrow(NamedTuple):
    """From a time of one track to a time of another."""

    name: str
    source: Track
    begin: int
    target: Track
    end: int


def arrows(shown: list[Shown]) -> tuple[list[Arrow], int]:
    """The arrows between events of one start, each rank's in the order in which they ended.

    Arrows that would lead backwards in time, which no right clock allows, are left out: how many.
    """
    found = matches(shown)
    right = [arrow for arrow in found if arrow.begin <= arrow.end]
    return right, len(found) - len(right)


def matches(shown: list[Shown]) -> list[Arrow]:
    """All of them, whichever way they lead."""
    return [*_messages(shown), *_collectives(shown)]


def _messages(shown: list[Shown]) -> list[Arrow]:
    """From the call that sends to the end of what waits for the receive."""
    sent: dict[Message, Shown] = {}
    received: dict[Message, Shown] = {}
    posted: dict[tuple[int, int, str], list[Message]] = {}
    for each in shown:
        facts = each.facts
        if "with" in facts and "of" in facts:
            peer = expand(facts["of"])[facts["with"]]
            if each.name.lower().endswith("send"):
                sent[each.rank, peer, facts["of"], facts["tag"], facts["number"]] = each
                continue
            message = (peer, each.rank, facts["of"], facts["tag"], facts["number"])
            if each.name.startswith("I"):
                posted.setdefault((each.rank, each.tid, facts["of"]), []).append(message)
            else:
                received[message] = each
        elif each.name in WAITS:
            for message in posted.pop((each.rank, each.tid, facts.get("of", "")), []):
                received[message] = each
    return [
        Arrow("message", (one.pid, one.tid), one.begin, (to.pid, to.tid), _inside(to))
        for message, to in received.items()
        if (one := sent.get(message)) is not None
    ]


def _collectives(shown: list[Shown]) -> list[Arrow]:
    """From the rank that came last to the one that came first; where all are recorded."""
    calls: dict[tuple[str, int], list[Shown]] = {}
    for each in shown:
        if each.name in ALL_WAIT and "of" in each.facts:
            calls.setdefault((each.facts["of"], each.facts["number"]), []).append(each)
    found = []
    for (of, _), ranks in calls.items():
        if len(ranks) < 2 or len(ranks) != len(expand(of)):
            continue
        last, first = max(ranks, key=lambda r: r.begin), min(ranks, key=lambda r: r.begin)
        if last is not first:
            source, target = (last.pid, last.tid), (first.pid, first.tid)
            found.append(Arrow("last to come", source, last.begin, target, _inside(first)))
    return found


def _inside(each: Shown) -> int:
    """The last nanosecond that is still in an event, for an arrow to end in it."""
    return max(each.end - 1, each.begin)
