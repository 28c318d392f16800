"""What a checkpoint is made of: parts, each a store or a rank's range of one.

A `Part` says which flat array holds the elements of a layout, and which range of it this rank
answers for. From all parts follows, on every rank alike, where each tensor lies in the files: a
tensor's padding stays behind, so a range of the layout is one contiguous range of the file.

Layer: checkpoint. Knows nothing of ranks, optimizers and files' contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpctrain.checkpoint.tensors import CODES, SUFFIX, Tensor, encode_header
from hpctrain.errors import CheckpointError
from hpctrain.nn.layout import Entry, Layout

__all__ = ["CHUNK", "Part", "Plan", "check_owners", "check_parts", "plan_files"]

CHUNK = 16 << 20  # bytes copied, written or hashed at once; 64 chunks a GiB in state.json


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Elements of one layout, and this rank's range of them.

    All ranks pass the same parts in the same order; only `array`, `owned` and `begin` differ.

    Args:
        file: the file's name without suffix, such as "parameters" or "optimizer". Several parts
            may share a file: they follow each other.
        prefix: "" or what comes before a tensor's name, joined by a dot: "momentum" gives
            "momentum.fc1.weight".
        layout: names, shapes and dtype.
        array: flat, one-dimensional, of the layout's dtype, on any device; it belongs to the
            caller. Anything, None too, where `owned` is empty.
        owned: (start, stop) in elements of the layout, padding counted: what this rank writes, or
            what it wants filled. A rank of several ranges passes a part for each, with one layout.
        begin: the element of the layout that `array[0]` is: 0 for a whole store, the slice's start
            where `array` is only a rank's slice.
    """

    file: str
    prefix: str
    layout: Layout
    array: Any
    owned: tuple[int, int]
    begin: int = 0

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.file}, {self.prefix}" if self.prefix else self.file

    def name(self, entry: Entry) -> str:
        """A tensor's name in the file."""
        return f"{self.prefix}.{entry.name}" if self.prefix else entry.name

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The owned range cut into ranges of at most `CHUNK` bytes."""
        start, stop = self.owned
        step = CHUNK // self.layout.dtype.itemsize
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def view(self, first: int, last: int) -> Any:
        """Elements first up to last of the layout."""
        return self.array[first - self.begin : last - self.begin]

    def runs(
        self, tensors: Mapping[str, Tensor], start: int, stop: int
    ) -> list[tuple[int, int, int]]:
        """Where elements start up to stop lie in a file: as few contiguous runs as there are.

        Each is (offset in the file, first, last), elements counted from `start`. Padding falls
        between the runs. `tensors`: the file's, by name.
        """
        found: list[tuple[int, int, int]] = []
        bytes_each = self.layout.dtype.itemsize
        for entry, begin, end in self.layout.pieces(start, stop):
            first = entry.offset + begin - start
            last = first + end - begin
            offset = tensors[self.name(entry)].start + begin * bytes_each
            if found and found[-1][2] == first:  # no padding between the two tensors
                before, earlier, _ = found[-1]
                if before + (first - earlier) * bytes_each == offset:
                    found[-1] = before, earlier, last
                    continue
            found.append((offset, first, last))
        return found

    def key(self) -> tuple[str, str, int]:
        """Equal for parts that are ranges of the same tensors."""
        return self.file, self.prefix, id(self.layout)


@dataclass(frozen=True, slots=True)
class Plan:
    """A file: its first bytes, and where its tensors lie."""

    header: bytes
    tensors: dict[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes in the whole file."""
        return max((t.stop for t in self.tensors.values()), default=len(self.header))


def plan_files(parts: Sequence[Part]) -> dict[str, Plan]:
    """The files that hold `parts`, by name: the same on all ranks, as it depends on no array.

    Raises:
        CheckpointError: a file's name or a dtype cannot be used, or two tensors have one name.
    """
    files: dict[str, dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = {}
    for part in _distinct(parts):
        if not re.fullmatch("[a-z][a-z0-9_]*", part.file):
            raise CheckpointError(
                f"a file of a checkpoint cannot be called {part.file!r}: "
                "use lower-case letters, digits and _, without a suffix"
            )
        if part.layout.dtype not in CODES:
            raise CheckpointError(f"{part.label}: elements of {part.layout.dtype} cannot be stored")
        tensors = files.setdefault(f"{part.file}{SUFFIX}", {})
        for entry in part.layout.entries:
            name = part.name(entry)
            if name in tensors:
                raise CheckpointError(
                    f"{part.file}: two tensors are called {name!r}; give each part its own prefix"
                )
            tensors[name] = entry.shape, part.layout.dtype
    return {
        file: Plan(*encode_header((name, *kind) for name, kind in tensors.items()))
        for file, tensors in files.items()
    }


def check_parts(parts: Sequence[Part]) -> None:
    """Whether each part's range lies in its layout and in its array, of the layout's dtype."""
    for part in parts:
        (start, stop), size = part.owned, part.layout.size
        if not 0 <= start <= stop <= size:
            raise CheckpointError(f"{part.label}: range {part.owned} is not within 0 to {size}")
        if start == stop:
            continue
        if part.array.dtype != part.layout.dtype or part.array.ndim != 1:
            raise CheckpointError(
                f"{part.label}: a flat array of {part.layout.dtype} is needed, "
                f"got {part.array.ndim} dimensions of {part.array.dtype}"
            )
        if not part.begin <= start or stop - part.begin > part.array.size:
            raise CheckpointError(
                f"{part.label}: an array of elements {part.begin} up to "
                f"{part.begin + part.array.size} does not hold the range {part.owned}"
            )


def check_owners(parts: Sequence[Part], owned: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Whether every element is owned once. `owned`: for each rank, its range of each part."""
    for part in _distinct(parts):
        same = [index for index, other in enumerate(parts) if other.key() == part.key()]
        ranges = sorted(ranks[index] for ranks in owned for index in same)
        end = 0
        for start, stop in [(a, b) for a, b in ranges if a < b] + [(part.layout.size,) * 2]:
            if start != end:
                fault = "are owned by no rank" if start > end else "are owned more than once"
                first, last = sorted((start, end))
                raise CheckpointError(f"{part.label}: elements {first} up to {last} {fault}")
            end = stop


def _distinct(parts: Sequence[Part]) -> list[Part]:
    """One part for each set of tensors."""
    found: dict[tuple[str, str, int], Part] = {}
    for part in parts:
        found.setdefault(part.key(), part)
    return list(found.values())
