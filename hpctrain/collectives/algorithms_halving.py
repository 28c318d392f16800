"""Recursive halving and doubling, for any number of ranks [TRG05].

Layer: collectives. Knows nothing of nodes, levels and memory.

References:
    [TRG05] R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication
    operations in MPICH", Int. J. High Perform. Comput. Appl. 19(1), 2005.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.collectives.algorithms_group import (
    Group,
    Rounds,
    blank,
    exchange,
    exchange_and_add,
    length,
)
from hpctrain.collectives.schedule import Range, Round, Traffic

__all__ = [
    "doubling_down",
    "doubling_down_traffic",
    "doubling_scratch",
    "doubling_up",
    "doubling_up_traffic",
    "halving_down",
    "halving_down_traffic",
    "halving_scratch",
]


# halving: the group is cut in two, again and again


def halves(size: int, index: int) -> Iterator[tuple[int, int, int]]:
    """(first, middle, last) of the parts of the group that hold member `index`, from all of it on.

    The lower half is the larger one, by one member at most.
    """
    first, last = 0, size
    while last - first > 1:
        middle = (first + last + 1) // 2
        yield first, middle, last
        first, last = (first, middle) if index < middle else (middle, last)


def partners(first: int, middle: int, last: int, index: int) -> tuple[int, tuple[int, ...]]:
    """The member of the other half that gets what this one has of it, and those it gets from.

    The k-th of a half with the k-th of the other; the odd one of the lower half gives to the last
    of the upper half and gets nothing.
    """
    if index < middle:
        other = middle + index - first
        return (other, (other,)) if other < last else (last - 1, ())
    other = first + index - middle
    odd = index == last - 1 and middle - first > last - middle
    return other, (other, middle - 1) if odd else (other,)


def sides(group: Group, first: int, middle: int, last: int) -> tuple[Range, Range]:
    """(this member's half, the other half) of the range."""
    lower, upper = group.chunks.span(first, middle), group.chunks.span(middle, last)
    return (lower, upper) if group.index < middle else (upper, lower)


def steps(group: Group) -> list[tuple[tuple[int, int, int] | None, int, int]]:
    """(halves or None, segments, width) of every step; the last one may have none for a member.

    Segments are those of the step's largest half, so that all members are in the same round.
    """
    found: list[tuple[tuple[int, int, int] | None, int, int]] = []
    cuts, size = list(halves(group.size, group.index)), group.size
    for step in range((group.size - 1).bit_length()):
        size = (size + 1) // 2
        count = group.segments(size * group.longest)
        width = group.width(size * group.longest, count)
        found.append((cuts[step] if step < len(cuts) else None, count, width))
    return found


def halving_down(group: Group) -> Rounds:
    """Rabenseifner's reduce-scatter: give the other half away, add what comes, go on with one half.

    ceil(lg P) steps, the last one not for all. Of the odd ones, at most one per step, one member
    gets two messages instead of one; nothing is sent twice.
    """
    for at, count, width in steps(group):
        if at is None:
            yield from blank(count + 1)
            continue
        to, sources = partners(*at, group.index)
        mine, theirs = sides(group, *at)
        order = (group.index, *sources)
        yield from exchange_and_add(group, mine, [(to, theirs)], sources, order, count, width)


def doubling_up(group: Group) -> Rounds:
    """The way back: give what is complete to those one got from, get the other half."""
    yield Round(group.cast(group.own))
    for at, count, _ in reversed(steps(group)):
        if at is None:
            yield from blank(1)
            continue
        source, to = partners(*at, group.index)
        mine, theirs = sides(group, *at)
        yield from exchange(group, [(k, mine) for k in to], [(source, theirs)], count)


def halving_traffic(group: Group) -> tuple[int, int, int, int]:
    """Bytes and messages given away (n - own elements in all), and those that come."""
    gone = going = come = coming = 0
    for at, count, _ in steps(group):
        if at is None:
            continue
        mine, theirs = sides(group, *at)
        times = len(partners(*at, group.index)[1])
        gone, going = gone + length(theirs), going + group.messages(theirs, count)
        come += times * length(mine)
        coming += times * group.messages(mine, count)
    return group.volume(gone, going), going, group.volume(come, coming), coming


def halving_down_traffic(group: Group) -> Traffic:
    return Traffic(*halving_traffic(group))


def doubling_up_traffic(group: Group) -> Traffic:
    gone, going, come, coming = halving_traffic(group)
    return Traffic(come, coming, gone, going)


def halving_scratch(group: Group) -> int:
    longest = (group.size + 1) // 2 * group.longest
    return 4 * min(group.width(longest, 1), group.segment)


# doubling: everyone adds everything


def pairs(group: Group) -> tuple[int, int]:
    """(2^k, rest): the largest power of two that is not above P, and P - 2^k."""
    power = 1 << (group.size.bit_length() - 1)
    return power, group.size - power


def doubling_down(group: Group) -> Rounds:
    """Recursive doubling: both partners add the same two, with partners 1, 2, 4, ... apart.

    lg P rounds of n bytes each way. With P = 2^k + r, of the first 2 r members those with an odd
    index give their n to the one before them at first and get the sum from it at last, and the
    others alone do the rounds: 2 rounds more.
    """
    power, rest = pairs(group)
    span, me = (group.chunks.start, group.chunks.stop), group.index
    longest = group.chunks.parts * group.longest
    count = group.segments(longest)
    width = group.width(longest, count)
    gives, gets = me < 2 * rest and me % 2 == 1, me < 2 * rest and me % 2 == 0
    if rest:
        sends, sources = [(me - 1, span)] if gives else [], [me + 1] if gets else []
        if gives or gets:
            order = [me, *sources]
            yield from exchange_and_add(group, span, sends, sources, order, count, width)
        else:
            yield from blank(count + 1)
    number, apart = me // 2 if gets else me - rest, 1
    while apart < power:
        if gives:
            yield from blank(count + 2)
        else:
            other = number ^ apart
            other = 2 * other if other < rest else other + rest
            yield Round(group.cast(span))
            sends, order = [(other, span)], [me, other]
            yield from exchange_and_add(group, span, sends, [other], order, count, width)
        apart *= 2
    if rest:
        yield Round(() if gives else group.cast(span))
        back = [(me + 1, span)] if gets else []
        yield from exchange(group, back, [(me - 1, span)] if gives else [], count)


def doubling_down_traffic(group: Group) -> Traffic:
    power, rest = pairs(group)
    span = (group.chunks.start, group.chunks.stop)
    once = group.messages(span, group.segments(group.chunks.parts * group.longest))
    times = 1
    if not (group.index < 2 * rest and group.index % 2):
        times = power.bit_length() - 1 + (group.index < 2 * rest)
    volume = group.volume(times * length(span), times * once)
    return Traffic(volume, times * once, volume, times * once)


def doubling_scratch(group: Group) -> int:
    longest = group.chunks.parts * group.longest
    return 2 * group.width(longest, group.segments(longest))
