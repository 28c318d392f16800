"""How well the cost model predicts, on nodes in network namespaces (tools/netns-cluster; root).

For each shape and link rate: a fit on some sizes, then predictions on others, beside times measured
in turn. Prints a row for each shape, rate and size: how much slower the algorithm that was picked
is than the best one measured; the least and the largest share of the wire in what an algorithm is
predicted to take (bytes that pass in the burst of a shaped link do not wait for the wire); and how
far predictions are off at worst where that share is over 80 %, and elsewhere, with the number of
algorithms. `docs/scale.md` has the result.

    python tools/predict_cluster.py
    python tools/predict_cluster.py --shapes 2x2 --rates 100mbit --fit 16K,2M --sizes 1M
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIRE = 0.8


def measure(args: argparse.Namespace, shape: str, rate: str, *options: str) -> None:
    """`hpctrain bench allreduce` on a new cluster. Ends the program with the tool's status."""
    cluster = [sys.executable, str(ROOT / "tools" / "netns-cluster"), "run", shape]
    command = [sys.executable, "-m", "hpctrain", "bench", "allreduce", *options]
    repeat = ["--repeat", str(args.repeat)]
    done = subprocess.run(
        [*cluster, "--rate", rate, "--", *command, *repeat], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        sys.exit(done.returncode)


def share(one: dict[str, Any]) -> float:
    """The part of the predicted time in which a NIC carries bytes at its rate."""
    return float(one["wire_seconds"] / one["predicted_seconds"])


def off(found: list[dict[str, Any]]) -> str:
    """By how much the predictions are off at worst; how many there are."""
    errors = [abs(one["predicted_seconds"] / one["seconds"] - 1) for one in found]
    return f"{max(errors):.0%} ({len(found)})" if errors else "-"


def row(shape: str, rate: str, size: int, results: list[dict[str, Any]]) -> str:
    """A line of the table: what came out for one size."""
    best = min(results, key=lambda one: float(one["seconds"]))
    [picked] = [one for one in results if one["picked"]]
    over = picked["seconds"] / best["seconds"]
    shares = sorted(map(share, results))
    wired = [one for one in results if share(one) > WIRE]
    rest = [one for one in results if share(one) <= WIRE]
    return (
        f"| {shape} | {rate} | {size / 2**20:g} MiB | {picked['algorithm']} | "
        f"{best['algorithm']} | {over:.2f} | {shares[0]:.0%} to {shares[-1]:.0%} | {off(wired)} | "
        f"{off(rest)} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shapes", default="2x2,4x2")
    parser.add_argument("--rates", default="1gbit,100mbit")
    parser.add_argument("--fit", default="16K,256K,4M", help="sizes to fit on")
    parser.add_argument("--sizes", default="64K,1M,8M", help="sizes to predict")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    print(
        "| nodes x ranks | links | size | picked | best | picked over best | wire | off by, wire "
        "over 80% | off by, others |"
    )
    print("|---|---|--:|---|---|--:|--:|--:|--:|")
    for shape in args.shapes.split(","):
        for rate in args.rates.split(","):
            with tempfile.TemporaryDirectory() as folder:
                network, figures = Path(folder, "network.toml"), Path(folder, "figures.json")
                measure(args, shape, rate, "--fit", str(network), "--sizes", args.fit)
                options = ("--predict", str(network), "--sizes", args.sizes)
                measure(args, shape, rate, *options, "--json", str(figures))
                results = json.loads(figures.read_text())["results"]
            for size in dict.fromkeys(one["bytes"] for one in results):
                same = [one for one in results if one["bytes"] == size]
                print(row(shape, rate, size, same), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
