#!/usr/bin/env python
"""All-reduce between nodes with links of a given speed: ours, MPI's and gloo's beside the limit.

    .venv/bin/python tools/bench_nodes.py                        2x2 and 4x2, 1 to 64 MiB, 1 Gbit/s
    .venv/bin/python tools/bench_nodes.py --shape 2x2 --size 64M --repeat 5
    .venv/bin/python tools/bench_nodes.py --torch-python /path/to/venv/bin/python

Nodes are those of tools/netns-cluster. For each shape and size three jobs run one after the other,
in several cycles, so that noise of the machine meets all: tools/bench_nodes_rank.py (each round of
it runs every contender once), Open MPI with all of its collectives, and gloo where --torch-python
or $HPCTRAIN_TORCH_PYTHON names a Python that has PyTorch. Every sum is checked.

Prints a table in Markdown. The limit is 2 (M - 1) / M S over the speed of the link: M nodes of
which each sends and receives that much of S bytes. "plain sockets" is what TCP reaches of it on
this machine: headers alone take 5 %. Times are medians over all rounds of the slowest rank. "x
two-level": of the quicker of the two without a shorter wire. "counted" is what the interface of the
node that sends most counted, less the same without a collective, where large packets are counted
before they are cut.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
PAGE = ROOT / "docs" / "collectives.md"
BEGIN, END = "<!-- measured -->", "<!-- end -->"
ALL_COLLECTIVES = "^monitoring"  # Open MPI's choice, han included; monitoring is off anyway
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
OURS = ("two-level", "two-level, in 2 pieces")  # others are compared with the quicker one


def number_of_bytes(text: str) -> int:
    if not (found := re.fullmatch(r"([1-9]\d*)([KMG]?)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 65536, 64K, 16M")
    return int(found[1]) * UNITS[found[2]]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    made.add_argument("--shape", nargs="+", default=["2x2", "4x2"], help="NODESxRANKS")
    sizes = [size << 20 for size in (1, 4, 16, 64)]
    made.add_argument("--size", nargs="+", type=number_of_bytes, default=sizes, help="1M, 64M")
    made.add_argument("--mbits", type=float, default=1000, help="speed of the links, Mbit/s")
    made.add_argument("--repeat", type=int, default=4, help="rounds in a cycle (default: 4)")
    made.add_argument("--cycles", type=int, default=2)
    made.add_argument(
        "--torch-python", default=os.environ.get("HPCTRAIN_TORCH_PYTHON"), help="for gloo"
    )
    made.add_argument("--json", type=Path, help="also write all rounds to this file")
    made.add_argument("--page", action="store_true", help="also put the tables into the docs")
    return made


def job(shape: str, mbits: float, coll: str, command: list[str]) -> list[dict[str, Any]]:
    """The records that a job on a new cluster prints."""
    tool = [sys.executable, str(TOOLS / "netns-cluster"), "run", shape]
    options = ["--rate", f"{mbits:g}mbit", "--coll", coll, "--timeout", "300", "--"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*tool, *options, *command], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    for line in done.stdout.splitlines():
        if line.startswith("found ") and done.returncode == 0:
            return list(json.loads(line.removeprefix("found ")))
    raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr}")


def measure(args: argparse.Namespace, shape: str, nbytes: int) -> dict[str, dict[str, Any]]:
    """Records by name, with the seconds of all cycles."""
    ranks = [sys.executable, str(TOOLS / "bench_nodes_rank.py")]
    counts = [str(nbytes), str(args.repeat)]
    jobs = [("", "^han", [*ranks, "all", *counts])]
    jobs.append((" (all components)", ALL_COLLECTIVES, [*ranks, "mpi", *counts]))
    if args.torch_python:
        gloo = [args.torch_python, str(TOOLS / "bench_nodes_gloo.py"), *counts]
        jobs.append(("", "^han", gloo))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(args.cycles):
        for suffix, coll, command in jobs:
            for record in job(shape, args.mbits, coll, command):
                name = record["name"] + suffix
                if name in found:
                    record["seconds"] = found[name]["seconds"] + record["seconds"]
                found[name] = record
    return found


def rows(found: dict[str, dict[str, Any]], limit: float) -> list[list[str]]:
    """Of the table: the quickest first."""
    medians = {name: statistics.median(record["seconds"]) for name, record in found.items()}
    ours = min(medians[name] for name in OURS)
    lines = []
    for name in sorted(medians, key=lambda name: medians[name]):
        payload, sent = found[name]["payload"], found[name]["sent"]
        lines.append(
            [
                name,
                f"{medians[name] * 1e3:.1f}",
                f"{min(found[name]['seconds']) * 1e3:.1f}",
                f"{medians[name] / limit:.2f}",
                f"{medians[name] / ours:.2f}",
                f"{payload / (1 << 20):g}" if payload else "",
                f"{sent / (1 << 20):.2f}" if sent else "",
                f"{sent / payload:.3f}" if payload and sent else "",
            ]
        )
    return lines


HEAD = ["all-reduce", "ms", "least", "x limit", "x two-level", "MiB sent, formula", "counted", "/"]


def tables(shape: str, nbytes: int, limit: float, lines: list[list[str]]) -> list[str]:
    """Lines of text in Markdown."""
    title = f"{nbytes / (1 << 20):g} MiB on {shape}: limit {limit * 1e3:.1f} ms"
    cells = [HEAD, ["---"] + ["--:"] * (len(HEAD) - 1), *lines]
    return ["", title, "", *(f"| {' | '.join(row)} |" for row in cells)]


def title(args: argparse.Namespace) -> list[str]:
    load = os.getloadavg()[0]
    return [
        f"{processor()}, {os.cpu_count()} processors, {time.strftime('%Y-%m-%d')}, load {load:.1f} "
        f"at the start; links of {args.mbits:g} Mbit/s, {args.cycles} x {args.repeat} rounds."
    ]


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def put_into_page(lines: list[str]) -> None:
    """Replace what stands between the page's marks."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text("\n".join([head + BEGIN, "", *lines, "", END]) + rest.partition(END)[2])


def main() -> None:
    args = parser().parse_args()
    if args.torch_python is None:
        print("gloo is left out: name a Python that has PyTorch by --torch-python")
    text, records = title(args), []
    print("\n".join(text), flush=True)
    for shape in args.shape:
        nodes = int(shape.partition("x")[0])
        for nbytes in args.size:
            limit = 2 * (nodes - 1) / nodes * nbytes / (args.mbits * 1e6 / 8)
            found = measure(args, shape, nbytes)
            lines = tables(shape, nbytes, limit, rows(found, limit))
            print("\n".join(lines), flush=True)
            text += lines
            records.append({"shape": shape, "bytes": nbytes, "limit": limit, "found": found})
    if args.json:
        args.json.write_text(json.dumps(records))
    if args.page:
        put_into_page(text)


if __name__ == "__main__":
    main()
