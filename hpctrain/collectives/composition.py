"""Who works with whom on which range, where ranks are grouped at several levels.

A unit of level 0 is a rank, a unit of level l + 1 is a group of level l. A rank's part in a
collective is a tree: its group at level 0 and the chunk it owns there; for every piece of this
chunk the group of all owners of this piece at level 1, and its chunk there; and so on.

All of it is a function of the rank and the piece: no list per rank is kept.

Layer: collectives. Knows nothing of how a group adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from hpctrain.collectives.algorithms_flat import ALGORITHMS
from hpctrain.collectives.algorithms_group import Algorithm, Group
from hpctrain.collectives.cut import GRAIN
from hpctrain.collectives.schedule import Chunks, Range, Round, Schedule, Traffic, Wire
from hpctrain.errors import UsageError, nearest

__all__ = ["Composition", "Level", "Node"]


@dataclass(frozen=True)
class Level:
    """One level of a composition.

    Attributes:
        algorithm: "peer", "ring", "direct", "halving" or, at the last level, "doubling".
        group: how many units make a group: a number, "node" (those of a node), "square" (as many
            as make about as many groups) or "all".
        stripes: how many members of a group get chunks; 0: all.
        wire: how elements travel; None: as they are.
    """

    algorithm: str = "ring"
    group: int | str = "all"
    stripes: int = 0
    wire: Wire | None = None


class Node(NamedTuple):
    """A rank's part at one level, and at the next ones for each piece of its chunk."""

    algorithm: Algorithm
    group: Group
    children: tuple[Node, ...]

    def levels(self) -> list[list[Node]]:
        """The nodes of every level, each in the order of their pieces."""
        found, nodes = [], [self]
        while nodes:
            found.append(nodes)
            nodes = [child for node in nodes for child in node.children]
        return found

    def all(self) -> list[Node]:
        """All nodes, the outermost level's first."""
        return [node for nodes in reversed(self.levels()) for node in nodes]


class Composition:
    """The groups of all levels, and every rank's tree. For the arguments see `all_reduce`."""

    def __init__(
        self,
        nodes: tuple[int, ...],
        levels: tuple[Level, ...],
        n: int,
        itemsize: int,
        depth: int,
        segment_bytes: int,
        by_node: bool,
        grain: int = GRAIN,
    ) -> None:
        self.nodes, self.levels, self.n, self.itemsize = nodes, levels, n, itemsize
        self._grain = grain // itemsize
        self._segment = max(segment_bytes // grain, 1) * self._grain
        self._pieces = Chunks(0, n, depth, self._grain)
        self._groups: list[list[list[int]]] = []
        ranks = list(range(len(nodes)))
        units = sorted(ranks, key=lambda rank: nodes[rank]) if by_node else ranks
        homes: list[int | None] = list(nodes)  # of every unit; None: on several nodes
        for number, level in enumerate(levels):
            _check(level, last=number == len(levels) - 1)
            groups = _grouped(units, homes, level)
            homes = [_home([homes[unit] for unit in group]) for group in groups]
            if level.algorithm == "peer" and None in homes:
                raise UsageError(
                    f"level {level}: peer reads need groups within one node; use group='node' or "
                    "another algorithm"
                )
            self._groups.append(groups)
            units = list(range(len(groups)))
        if len(units) != 1:
            raise UsageError(f"{len(units)} groups are left after {levels}: end with group='all'")
        self._place = [
            {unit: (g, k) for g, group in enumerate(groups) for k, unit in enumerate(group)}
            for groups in self._groups
        ]
        self._parts = [
            sorted({self._cut(level, group) for group in groups})
            for level, groups in enumerate(self._groups)
        ]

    def schedule(
        self,
        name: str,
        kind: str,
        rounds: Callable[[int], Iterator[Round]],
        owned: Callable[[int], tuple[Range, ...]],
        traffic: Callable[[int], Traffic],
    ) -> Schedule:
        return Schedule(name, kind, self.n, self.itemsize, self.nodes, rounds, owned, traffic)

    def tree(self, rank: int, piece: int = 0) -> Node:
        """A rank's part in one piece of the buffer."""
        span = self._pieces.chunk(piece)
        longest = self._longest(self._grains(self.n), self._pieces.parts)
        scratch = -(-self.n // self._grain) * self._grain
        return self._node(0, rank, (span,), longest, scratch)[0]

    def owned(self, rank: int) -> tuple[Range, ...]:
        """The ranges that a rank has at the end of the way down, or at the start of that up."""
        found = []
        for piece in range(self._pieces.parts):
            for node in self.tree(rank, piece).all():
                start, stop = node.group.own
                if start < stop and not node.children:
                    found.append((start, stop))
        return tuple(sorted(found))

    def _node(
        self, level: int, unit: int, spans: tuple[Range, ...], longest: int, scratch: int
    ) -> tuple[Node, int]:
        """(node, first scratch address behind it): `longest` elements in any span of this level."""
        group, index = self._place[level][unit]
        parts = self._cut(level, self._groups[level][group])
        chunks = Chunks(*spans[-1], parts, self._grain)
        chosen = self.levels[level]
        algorithm = ALGORITHMS[chosen.algorithm]
        made = Group(
            Owners(self, level, group, spans),
            index,
            chunks,
            self._longest(self._grains(longest), parts),
            self._segment,
            self.itemsize,
            scratch,
            chosen.wire,
        )
        scratch += algorithm.scratch(made)
        children = []
        if level + 1 < len(self.levels):
            below = self._longest(self._grains(longest), self._parts[level][-1])
            for piece in self._split(level, chunks, made.own):
                child, scratch = self._node(level + 1, group, (*spans, piece), below, scratch)
                children.append(child)
        return Node(algorithm, made, tuple(children)), scratch

    def owner(self, level: int, unit: int, spans: tuple[Range, ...]) -> int:
        """The rank that has the last of `spans` (one for each level up to this) for a unit."""
        if level == 0:
            return unit
        group = self._groups[level - 1][unit]
        chunks = Chunks(*spans[level - 1], self._cut(level - 1, group), self._grain)
        index = chunks.holder(spans[level][0])
        return self.owner(level - 1, group[index], spans)

    def units(self, level: int, group: int) -> list[int]:
        return self._groups[level][group]

    def _split(self, level: int, chunks: Chunks, own: Range) -> list[Range]:
        """`own` cut wherever any group of this level cuts the same span."""
        start, stop = own
        if start == stop:
            return []
        cuts = {start, stop}
        for parts in self._parts[level]:
            other = chunks._replace(parts=parts)
            index = other.holder(start) + 1
            while (at := other.bound(index)) < stop:
                cuts.add(at)
                index += 1
        ordered = sorted(cuts)
        return list(zip(ordered, ordered[1:], strict=False))

    def _cut(self, level: int, group: list[int]) -> int:
        return min(self.levels[level].stripes or len(group), len(group))

    def _grains(self, elements: int) -> int:
        return -(-elements // self._grain)

    def _longest(self, grains: int, parts: int) -> int:
        return -(-grains // parts) * self._grain


class Owners(Sequence[int]):
    """The ranks that have a range for the units of a group; found when they are asked for."""

    def __init__(self, made: Composition, level: int, group: int, spans: tuple[Range, ...]) -> None:
        self._made, self._level, self._spans = made, level, spans
        self._units = made.units(level, group)

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return self._made.owner(self._level, self._units[index], self._spans)


def _check(level: Level, last: bool) -> None:
    if level.algorithm not in ALGORITHMS:
        raise UsageError(
            f"no algorithm is called {level.algorithm!r}{nearest(level.algorithm, ALGORITHMS)}; "
            f"there are {', '.join(ALGORITHMS)}"
        )
    if ALGORITHMS[level.algorithm].whole and not last:
        raise UsageError(f"{level.algorithm!r} leaves the whole sum everywhere: last level only")
    named = level.group in ("node", "square", "all")
    if not named and not (isinstance(level.group, int) and level.group > 0):
        raise UsageError(f"group {level.group!r} is neither a number nor node, square or all")


def _grouped(units: list[int], homes: list[int | None], level: Level) -> list[list[int]]:
    """Consecutive units; those of a node where that is asked for, or needed to read peers."""
    runs = [units]
    if level.group == "node" or level.algorithm == "peer":
        by_home: dict[int | None, list[int]] = {}
        for unit in units:
            by_home.setdefault(homes[unit], []).append(unit)
        runs = list(by_home.values())
    if isinstance(level.group, int):
        size = level.group
    elif level.group == "square":
        size = _side(len(units))
    else:
        size = len(units)
    return [run[at : at + size] for run in runs for at in range(0, len(run), size)]


def _side(count: int) -> int:
    """The larger side of the nearly square grid of `count` places."""
    side = max(int(count**0.5), 1)
    while count % side:
        side -= 1
    return count // side


def _home(homes: list[int | None]) -> int | None:
    return homes[0] if len(set(homes)) == 1 else None
