"""What tests of checkpoints save and expect: layouts, arrays whose elements tell where they belong,
ranges drawn at random (by seed, alike on all ranks), and a communicator of one rank without MPI.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from hpctrain.checkpoint import Part, load, save
from hpctrain.nn.layout import Layout

NAMES = {"parameters.safetensors", "optimizer.safetensors", "state.json"}


class Alone:
    """The part of a communicator that checkpoints use, for one rank."""

    rank, size = 0, 1

    def allgather(self, value):
        return [value]

    def gather(self, value):
        return [value]

    def bcast(self, value):
        return value

    def barrier(self):
        pass


ALONE = Alone()


def memory_folder():
    """A new folder, in memory where there is such a file system: a busy disk syncs in seconds."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return Path(tempfile.mkdtemp(prefix="hpctrain-", dir=memory if usable else None))


@contextlib.contextmanager
def shared_folder(comm):
    """A path for checkpoints, the same on all ranks; its parent exists, and is removed at the end.

    Not pytest's `tmp_path`: ranks that end together trip over each other in removing old ones.
    """
    parent = comm.bcast(memory_folder() if comm.rank == 0 else None)
    yield parent / "checkpoints"
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(parent)


# Small and odd sizes, padding, a scalar, tensors without elements at both ends and in the middle.
SHAPES = [("none", (0,)), ("fc.weight", (7, 5)), ("fc.bias", (7,)), ("zero", (3, 0, 2))]
SHAPES += [("scale", ()), ("blocks.0.conv.weight", (4, 3, 3, 3)), ("last", (0, 4))]


def layout_of(dtype, shapes=SHAPES):
    return Layout([(name, shape, False) for name, shape in shapes], dtype)


def filled(layout, base):
    """A flat array: element i of the layout is base + i, padding is zero."""
    array = np.zeros(layout.size, layout.dtype)
    for entry, first, last in layout.pieces(0, layout.size):
        begin, end = entry.offset + first, entry.offset + last
        array[begin:end] = base + np.arange(begin, end)
    return array


def cut(rng, size, ranks):
    """A partition of 0 to size in ranges, some of them empty."""
    bounds = np.sort(rng.integers(0, size + 1, ranks - 1))
    bounds = [0, *(int(bound) for bound in bounds), size]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


class Run:
    """Stores like those of a run: parameters and averages by name, two optimizer states."""

    def __init__(self, dtype="float32"):
        self.layout = layout_of(dtype)
        self.averages = layout_of(dtype, [("norm.mean", (5,)), ("norm.variance", (5,))])
        self.kinds = [
            ("parameters", "", self.layout, 1000),
            ("parameters", "", self.averages, 2000),
            ("optimizer", "momentum", self.layout, 3000),
            ("optimizer", "variance", self.layout, 4000),
        ]

    def saved(self, step, owned):
        """Parts to save: `owned` gives this rank's range of each. Optimizer states are slices."""
        parts = []
        for (file, prefix, layout, base), (start, stop) in zip(self.kinds, owned, strict=True):
            array, begin = filled(layout, base * step), 0
            if file == "optimizer":
                array, begin = array[start:stop].copy(), start
            parts.append(Part(file, prefix, layout, array, (start, stop), begin))
        return parts

    def wanted(self, owned):
        """Parts to load into, full of a number that no element has."""
        arrays = [np.full(layout.size, -1, layout.dtype) for _, _, layout, _ in self.kinds]
        return [
            Part(file, prefix, layout, array, part_range)
            for (file, prefix, layout, _), array, part_range in zip(
                self.kinds, arrays, owned, strict=True
            )
        ]

    def whole(self):
        """All of everything: what a single rank owns."""
        return [(0, layout.size) for _, _, layout, _ in self.kinds]

    def check(self, parts, step):
        """Each wanted range holds its elements of that step, padding zero; nothing else changed."""
        for part, (_, _, layout, base) in zip(parts, self.kinds, strict=True):
            expected = np.full(layout.size, -1, layout.dtype)
            start, stop = part.owned
            expected[start:stop] = filled(layout, base * step)[start:stop]
            np.testing.assert_array_equal(part.array, expected)


def save_alone(folder, step, keep=2, run=None):
    run = run or Run()
    return save(folder, step, run.saved(step, run.whole()), {"at": step}, ALONE, keep=keep)


def check_alone(path, step, run=None):
    run = run or Run()
    parts = run.wanted(run.whole())
    assert load(path, parts, ALONE) == {"at": step, "step": step}
    run.check(parts, step)
