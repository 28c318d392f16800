#!/usr/bin/env python3
"""scale_study.py -- predicted step efficiency against nodes, as a table and a plot.

    python tools/scale_study.py             what docs/scale.md shows; --write: into the page
    python tools/scale_study.py --network FILE --ranks-per-node 4 --parameters 25.6e6 \\
        --compute-seconds 0.025 --algorithms two-level,torus --nodes 1,8,64

A step is: the forward pass, in which the parameters that it needs next may still be on their way
(all-gather, bucket by bucket); the backward pass, during which buckets are reduced as they become
ready, one after the other; the update of the own slice. Both collectives are priced on the network,
message by message (hpctrain/collectives/cost.py). Efficiency is the time of both passes alone over
the time of the step; every rank has the same samples whatever the number of nodes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import scale_plot

from hpctrain.collectives.algorithms import PRESETS, Level, all_gather, preset, reduce_scatter
from hpctrain.collectives.cost import price
from hpctrain.collectives.network import Network, load_network
from hpctrain.parallel.buckets import suited_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs/scale.md", ROOT / "docs/scale.svg"
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FORWARD = 1 / 3  # of the passes' time
UPDATE = 7  # bytes moved per byte of a slice: AdamW reads four arrays and writes three
ITEMSIZE = 4
RANKS = 8


@dataclass(frozen=True)
class Model:
    """What a step computes on one rank. `seconds`: both passes; an assumption, or measured."""

    name: str
    parameters: int
    seconds: float


MODELS = (
    Model("ResNet-50, 64 images a rank", 25_557_032, 0.025),
    Model("1.5 billion parameters, 8,192 tokens a rank", 1_557_611_200, 0.25),
)
NETWORKS = ("hgx-h100", "ethernet-25g")
ALGORITHMS = ("two-level", "torus", "ring")


@functools.cache
def halves(
    network: Network, nodes: int, ranks: int, algorithm: str, nbytes: int
) -> tuple[float, float]:
    """Seconds of the reduce-scatter and of the all-gather of one bucket."""
    placed = tuple(rank // ranks for rank in range(nodes * ranks))
    levels: tuple[Level, ...] = preset(algorithm)
    made = [f(placed, nbytes // ITEMSIZE, ITEMSIZE, levels) for f in (reduce_scatter, all_gather)]
    down, up = (price(schedule, network).seconds for schedule in made)
    return down, up


def step_seconds(model: Model, network: Network, nodes: int, ranks: int, algorithm: str) -> float:
    """A step, from one update to the next, of which one follows the other without a pause."""
    total = model.parameters * ITEMSIZE
    bucket = suited_bytes(total)
    count = -(-total // bucket)
    down, up = halves(network, nodes, ranks, algorithm, bucket)
    now = 0.0
    for k in range(count):  # the forward pass waits for the parameters that it comes to
        now = max(now, (k + 1) * up) + model.seconds * FORWARD / count
    done, backward = 0.0, model.seconds * (1 - FORWARD) / count
    for k in range(count):  # a bucket goes out when it is ready and the one before is through
        done = max(done, now + (k + 1) * backward) + down
    slice_bytes = total / (nodes * ranks)
    return done + UPDATE * slice_bytes * network.rank.copy_seconds_per_byte


def efficiencies(
    model: Model, network: Network, ranks: int, algorithms: Sequence[str], nodes: Sequence[int]
) -> list[list[float]]:
    """A row for each number of nodes, of an efficiency for each algorithm."""
    return [
        [model.seconds / step_seconds(model, network, count, ranks, name) for name in algorithms]
        for count in nodes
    ]


def table(
    nodes: Sequence[int], ranks: int, algorithms: Sequence[str], found: Sequence[Sequence[float]]
) -> Iterator[str]:
    """Lines of markdown."""
    yield f"| nodes | ranks | {' | '.join(algorithms)} |"
    yield "|--:|--:|" + "--:|" * len(algorithms)
    for count, row in zip(nodes, found, strict=True):
        cells = " | ".join(f"{value:.1%}" for value in row)
        yield f"| {count:,} | {count * ranks:,} | {cells} |"


def assumptions(model: Model, network: Network, ranks: int) -> str:
    total = model.parameters * ITEMSIZE
    bucket = suited_bytes(total)
    return (
        f"{model.parameters:,} parameters, gradients and parameters of float32 ({total / 1e6:,.0f} "
        f"MB) in {-(-total // bucket)} buckets; forward and backward pass {model.seconds * 1e3:g} "
        f"ms, a third of it forward (assumed); {ranks} ranks a node; {network.name}: "
        f"{network.source}."
    )


def study(
    cases: Sequence[tuple[Model, Network]], args: argparse.Namespace
) -> tuple[list[str], list[scale_plot.Panel]]:
    """Lines of the page, and the panels of the plot."""
    lines: list[str] = []
    panels = []
    for model, network in cases:
        found = efficiencies(model, network, args.ranks_per_node, args.algorithms, args.nodes)
        lines += ["", f"### {model.name}; {network.name}", ""]
        lines += [assumptions(model, network, args.ranks_per_node), ""]
        lines += table(args.nodes, args.ranks_per_node, args.algorithms, found)
        columns = dict(zip(args.algorithms, zip(*found, strict=True), strict=True))
        panels.append(scale_plot.Panel(f"{model.name}; {network.name}", args.nodes, columns))
    return lines, panels


def names(text: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in text.split(","))
    for name in found:
        if name not in PRESETS or PRESETS[name][-1].algorithm == "doubling":
            raise argparse.ArgumentTypeError(
                f"{name!r} is no algorithm in two halves: {', '.join(PRESETS)} but doubling"
            )
    return found


def counts(text: str) -> tuple[int, ...]:
    return tuple(int(count) for count in text.split(","))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    made.add_argument("--network", metavar="FILE", help="default: those of the page")
    made.add_argument("--parameters", type=float, help="of the model; default: those of the page")
    made.add_argument("--compute-seconds", type=float, help="of both passes; with --parameters")
    made.add_argument("--ranks-per-node", type=int, default=RANKS)
    made.add_argument("--algorithms", type=names, default=ALGORITHMS)
    made.add_argument("--nodes", type=counts, default=NODES)
    made.add_argument("--plot", metavar="FILE.svg", help="write the plot there")
    made.add_argument("--write", action="store_true", help="write docs/scale.md and docs/scale.svg")
    return made


def main() -> int:
    args = parser().parse_args()
    if bool(args.parameters) != bool(args.compute_seconds):
        parser().error("--parameters and --compute-seconds belong together")
    models = MODELS
    if args.parameters:
        models = (Model("model", int(args.parameters), args.compute_seconds),)
    files = [args.network] if args.network else [f"{ROOT}/jobs/networks/{n}.toml" for n in NETWORKS]
    networks = [load_network(file) for file in files]
    lines, panels = study([(m, n) for m in models for n in networks], args)
    print("\n".join(lines[1:]))
    if args.plot or args.write:
        Path(args.plot or PLOT).write_text(scale_plot.svg(panels), encoding="utf-8")
    if args.write:
        page, end = PAGE.read_text(encoding="utf-8"), "<!-- end -->"
        head, mark, rest = page.partition("<!-- study -->\n")
        PAGE.write_text(head + mark + "\n".join(lines) + f"\n\n{end}" + rest.partition(end)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
