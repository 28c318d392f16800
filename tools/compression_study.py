#!/usr/bin/env python
"""What compression between nodes is worth: seconds per step, and steps to a test accuracy.

    sudo .venv/bin/python tools/compression_study.py seconds --rate 100mbit --out study
    .venv/bin/python tools/compression_study.py accuracy --data packed --out study
    .venv/bin/python tools/compression_study.py final --data packed --out study
    .venv/bin/python tools/compression_study.py table --out study

A fully connected network 784-2048-2048-10, global batch 512. `seconds` trains for a few steps on
tools/netns-cluster, 4 nodes of 2 ranks, with random images, and takes medians; with --torch-python
PyTorch's DDP over gloo does the same on the same links. `accuracy` counts the steps that each
method needs on Fashion-MNIST until the test accuracy is reached, on 4 nodes that are played by
ranks of one machine: this does not depend on links. `final` trains for five epochs, in which the
rate falls to zero. `table` multiplies seconds and steps: the time to the accuracy is a product, not
the time of one run.

--data: Fashion-MNIST packed by `hpctrain data pack`. Figures are kept in --out as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NODES, RANKS = 4, 2
BATCH, WARM_UP, EVALUATE_EVERY, EPOCHS = 512, 2, 10, 5
TRIALS = 20  # steps in which auto decides, and a few more
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "off"},
    "bf16": {"method": "bf16"},
    "topk 1%": {"method": "topk", "density": 0.01, "memory": "momentum"},
    "topk 0.1%": {"method": "topk", "density": 0.001, "memory": "momentum"},
    "oktopk 1%": {"method": "oktopk", "density": 0.01, "memory": "momentum"},
    "powersgd 4": {"method": "powersgd", "rank": 4},
    "int8": {"method": "int8"},
    "sign": {"method": "sign"},
    "auto 1%": {"method": "auto", "density": 0.01, "memory": "momentum"},
}
TORCH = ("torch dense", "torch fp16", "torch powersgd 4")
TUNED = 0.05, 0.9  # rate and momentum; best of those tried (docs/compression.md)
SPARSE_TUNED = 0.15, 0.5  # what a residual holds back comes late: a momentum of its own


def main() -> int:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "table":
        print(table(args.out))
    elif args.what == "seconds":
        measure_seconds(args)
    else:
        measure_accuracy(args)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("seconds", "accuracy", "final", "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    names = [*METHODS, *TORCH]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--rate", default="100mbit", help="of the links (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each method and round")
    parser.add_argument("--rounds", type=int, default=1, help="all methods in turn, so often")
    parser.add_argument("--data", type=Path, help="Fashion-MNIST, packed")
    parser.add_argument("--target", type=float, default=0.85, help="test accuracy (%(default)s)")
    parser.add_argument("--most-steps", type=int, default=1200, help="of one method (%(default)s)")
    parser.add_argument("--torch-python", help="a Python that has PyTorch; default: without it")
    return parser.parse_args()


def measure_seconds(args: argparse.Namespace) -> None:
    """Both stacks on the links, one after the other; seconds-RATE.json."""
    path = args.out / f"seconds-{args.rate}.json"
    with tempfile.TemporaryDirectory(prefix="study-") as place:
        random_images(Path(place))
        for script, order in orders(args, place):
            add(path, cluster(args.rate, [*script, "seconds", ordered(order)], order))


def measure_accuracy(args: argparse.Namespace) -> None:
    """Steps to the target, or the accuracy at the end; WHAT.json, which is added to."""
    if args.data is None:
        raise SystemExit(f"{args.what} needs --data, Fashion-MNIST packed by `hpctrain data pack`")
    path = args.out / f"{args.what}.json"
    for name in args.methods:
        one = argparse.Namespace(**vars(args) | {"methods": [name]})
        with tempfile.TemporaryDirectory(prefix="study-") as place:
            for script, order in orders(one, place):
                order["data"] = arrays(args.data, place) if name in TORCH else str(args.data)
                found = one_machine([*script, args.what, ordered(order)], order)
                print(name, {key: found[name][key] for key in found[name] if key != "curve"})
                add(path, found)


def orders(args: argparse.Namespace, place: str) -> list[tuple[list[str], dict[str, Any]]]:
    """Scripts that measure the methods asked for, each with what it is told."""
    common: dict[str, Any] = {
        "batch": BATCH, "steps": args.steps, "rounds": args.rounds, "every": EVALUATE_EVERY,
        "target": args.target, "most_steps": args.most_steps, "epochs": EPOCHS,
        "data": f"{place}/data", "result": f"{place}/found.json", "place": place,
    }  # fmt: skip
    ours = {name: told(name) for name in args.methods if name in METHODS}
    theirs = {name: {"tuned": TUNED} for name in args.methods if name in TORCH}
    found = []
    if ours:
        script = [sys.executable, str(ROOT / "tools/compression_rank.py")]
        found.append((script, common | {"methods": ours}))
    if theirs and args.torch_python:
        script = [args.torch_python, str(ROOT / "tools/compression_torch.py")]
        found.append((script, common | {"methods": theirs}))
    return found


def told(name: str) -> dict[str, Any]:
    method = METHODS[name]
    warm = WARM_UP + (TRIALS if method["method"] == "auto" else 0)
    tuned = SPARSE_TUNED if "density" in method else TUNED
    return {"compress": method, "tuned": tuned, "warm": warm}


def ordered(order: dict[str, Any]) -> str:
    path = Path(order["place"]) / "order.json"
    path.write_text(json.dumps(order), encoding="utf-8")
    return str(path)


def cluster(rate: str, command: list[str], order: dict[str, Any]) -> dict[str, Any]:
    """Run a command on the nodes; what it has found."""
    tool = [sys.executable, str(ROOT / "tools/netns-cluster"), "run", f"{NODES}x{RANKS}"]
    return found_by([*tool, "--rate", rate, "--timeout", "3600", "--", *command], order)


def one_machine(command: list[str], order: dict[str, Any]) -> dict[str, Any]:
    """Run a command on as many ranks of this machine, each a node; what it has found."""
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(NODES)]
    shell = ["bash", "-c", 'source tools/env.sh && exec "$@"', "bash"]
    return found_by([*shell, *mpirun, *command], order, HPCTRAIN_TOPOLOGY=f"{NODES}x1")


def found_by(command: list[str], order: dict[str, Any], **environment: str) -> dict[str, Any]:
    paths = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | paths | environment, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(Path(order["result"]).read_text(encoding="utf-8"))
    return found


def add(path: Path, found: dict[str, Any]) -> None:
    """Keep figures beside those that are there."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | found, indent=2) + "\n", encoding="utf-8")


def random_images(folder: Path) -> None:
    """A data set in the shape of Fashion-MNIST, a few batches long."""
    import numpy as np

    from hpctrain.data import pack

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4 * BATCH, 28, 28), np.uint8)
    labels = np.arange(4 * BATCH) % 10
    pack({"image": images, "label": labels.astype(np.int64)}, folder / "data")


def arrays(data: Path, place: str) -> str:
    """All samples as a file of NumPy, for a stack that does not read packed data."""
    import numpy as np

    from hpctrain.data import Loader, open_dataset

    parts = {}
    for split in ("train", "test"):
        loader = Loader(open_dataset(data), split, BATCH, order="sequential")
        batches = list(loader.epoch(0))
        loader.close()
        for field in ("image", "label"):
            parts[f"{split}_{field}"] = np.concatenate([batch.fields[field] for batch in batches])
    path = Path(place) / "arrays.npz"
    np.savez(path, **parts)
    return str(path)


def table(out: Path) -> str:
    """The figures as a table of Markdown."""
    steps, final = (kept(out / f"{what}.json") for what in ("accuracy", "final"))
    for name in ("torch dense", "torch fp16"):
        steps.setdefault(name, steps.get("dense", {}))
    lines = []
    for path in sorted(out.glob("seconds-*.json")):
        lines += [
            f"| {path.stem.removeprefix('seconds-')} | KB per step | s per step | steps "
            "| s to target | accuracy at the end |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for name, one in kept(path).items():
            count, end = steps.get(name, {}).get("steps"), final.get(name, {}).get("accuracy")
            product = f"{count * one['seconds']:.1f}" if count else "-"
            lines.append(
                f"| {name} | {one['bytes'] / 1e3:,.0f} | {one['seconds']:.3f} | {count or '-'} | "
                f"{product} | {f'{end:.2%}' if end else '-'} |"
            )
        lines.append("")
    return "\n".join(lines)


def kept(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
