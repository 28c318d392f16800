#!/usr/bin/env python
"""What a checkpoint costs: the time that training stands still, against copying as many bytes.

    tools/bench_checkpoint.py --size 1G                    one rank
    mpirun -n 2 tools/bench_checkpoint.py --size 1G --steps 20 --seconds 60

Two tables. The first: for every round a copy of this rank's bytes, then a checkpoint, nothing else
going on; medians of the rounds' ratios. The second, with --steps: steps of matrix products that
take --seconds together, without and with a checkpoint among them, in turn, --pairs times; what it
adds. With 1 GB and the defaults that takes 5 minutes and more: 4 times 60 s, and the writing.

`stands still` is what `begin`, `settle` and the agreements take together. CPU seconds are those of
the writing threads of all ranks, per 10^9 bytes: hashing, copying to the system's cache.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hpctrain.checkpoint import Part, Saver
from hpctrain.device.cpu import CpuDevice
from hpctrain.mpi.start import start
from hpctrain.mpi.topology import topology
from hpctrain.nn.layout import Layout

TENSOR = 1 << 20  # elements: 4 MB


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=number, default=1 << 30, help="bytes of all ranks, as 1G")
    parser.add_argument("--folder", type=Path, default=None, help="where to (default: a temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="0: leave the second table out")
    parser.add_argument("--seconds", type=float, default=60.0, help="that the steps take together")
    parser.add_argument("--pairs", type=int, default=2, help="of steps without and with one")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def number(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number and K, M or G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


class Bench:
    """A state of three stores, as AdamW has, divided over the ranks; and a saver."""

    def __init__(self, size: int, folder: Path) -> None:
        comm = start()
        self.where, self.device = topology(comm), CpuDevice()
        self.comm = self.where.comm
        folder = Path(self.comm.bcast(str(folder)))
        self.saver = Saver(folder, self.where, self.device)
        count = max(size // (3 * 4 * TENSOR), 1)
        layout = Layout([(f"t{i}", (TENSOR,), True) for i in range(count)], np.float32)
        first, last = (layout.size * (comm.rank + i) // comm.size // 16 * 16 for i in (0, 1))
        self.arrays = [self.device.zeros(last - first, np.float32) for _ in range(3)]
        for index, array in enumerate(self.arrays):
            array[:] = index + np.arange(len(array)) % 1000
        names = [("parameters", ""), ("optimizer", "first"), ("optimizer", "second")]
        self.parts = [
            Part(file, prefix, layout, array, (first, last), first)
            for (file, prefix), array in zip(names, self.arrays, strict=True)
        ]
        self.saver.reserve(self.parts)
        self.step = 0

    def copy(self) -> float:
        """Seconds for a copy of this rank's arrays to memory that was used before."""
        if not hasattr(self, "room"):
            self.room = [np.ones_like(array) for array in self.arrays]
        self.comm.Barrier()
        begun = time.perf_counter()
        for room, array in zip(self.room, self.arrays, strict=True):
            np.copyto(room, array)
        return float(max(self.comm.allgather(time.perf_counter() - begun)))

    def begin(self) -> None:
        self.step += 1
        self.saver.begin(self.step, self.parts, {})
        self.saver.settle()

    def save(self) -> dict[str, float]:
        """A checkpoint, while nothing else goes on."""
        self.comm.Barrier()
        self.begin()
        saved = None
        while saved is None:
            time.sleep(0.01)
            saved = self.saver.agree(self.comm.allreduce(self.saver.wants()))
        return {
            "still": max(self.comm.allgather(saved.blocked)),
            "total": saved.total,
            "cpu": saved.cpu / saved.nbytes * 1e9,
            "bytes": saved.nbytes,
        }


def first_table(bench: Bench, rounds: int) -> dict[str, float]:
    found = []
    for turn in range(rounds + 1):
        copied = bench.copy()
        saved = bench.save()
        if turn:  # the first one warms up
            found.append(saved | {"copy": copied, "ratio": saved["still"] / copied})
    return {key: median(each[key] for each in found) for key in found[0]}


def steps(bench: Bench, count: int, products: int, saving: bool) -> float:
    """Seconds for `count` steps of `products` matrix products, with one checkpoint or without."""
    a = np.ones((768, 768), np.float32)
    out = np.empty_like(a)
    bench.comm.Barrier()
    begun = time.perf_counter()
    for number in range(count):
        for _ in range(products):
            np.matmul(a, a, out=out)
        bench.saver.agree(bench.comm.allreduce(bench.saver.wants()))
        if saving and number == 0:
            bench.begin()
    seconds = time.perf_counter() - begun
    bench.saver.finish()
    return seconds


def second_table(bench: Bench, count: int, seconds: float, turns: int) -> dict[str, float]:
    one = steps(bench, 1, 100, saving=False) / 100
    products = max(int(bench.comm.bcast(seconds / count / one)), 1)
    pairs = []
    for turn in range(turns):
        order = (True, False) if turn % 2 else (False, True)  # in turn: drift meets both alike
        pairs.append({saving: steps(bench, count, products, saving) for saving in order})
    without, with_one = (sum(pair[key] for pair in pairs) / len(pairs) for key in (False, True))
    return {"without": without, "with": with_one, "added": with_one / without - 1}


def main() -> None:
    options = arguments()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="hpctrain-bench-"))
    bench = Bench(options.size, folder / "checkpoints")
    shown = bench.comm.rank == 0
    found: dict[str, Any] = {"ranks": bench.comm.size, "one": first_table(bench, options.rounds)}
    if shown and not options.json:
        print(first_text(found), flush=True)
    if options.steps:
        found["steps"] = second_table(bench, options.steps, options.seconds, options.pairs)
    if shown and options.json:
        print(json.dumps(found))
    elif shown and options.steps:
        print(second_text(found["steps"], options.steps))
    bench.comm.Barrier()
    shutil.rmtree(folder, ignore_errors=True)


def first_text(found: dict[str, Any]) -> str:
    one = found["one"]
    lines = [
        f"{one['bytes'] / 1e9:.2f} GB on {found['ranks']} rank(s), medians",
        f"  copy of as many bytes          {one['copy']:8.3f} s",
        f"  training stands still for      {one['still']:8.3f} s   {one['ratio']:.2f} of the copy",
        f"  until it is complete           {one['total']:8.3f} s",
        f"  CPU of the threads             {one['cpu']:8.3f} s per GB",
    ]
    return "\n".join(lines)


def second_text(each: dict[str, float], count: int) -> str:
    lines = [
        f"{count} steps, one checkpoint among them",
        f"  without                        {each['without']:8.2f} s",
        f"  with                           {each['with']:8.2f} s   {each['added']:+.1%}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
