#!/usr/bin/env python
"""What compression between nodes is worth: seconds per step, and steps to a test accuracy.

    sudo .venv/bin/python tools/compression_study.py seconds --rate 100mbit --out study
    .venv/bin/python tools/compression_study.py accuracy --data packed --out study
    .venv/bin/python tools/compression_study.py table --out study

A fully connected network 784-2048-2048-10, global batch 512. `seconds` trains for a few steps on
tools/netns-cluster, 4 nodes of 2 ranks, with random images, and takes medians; with --torch-python
PyTorch's DDP over gloo does the same on the same links. `accuracy` counts the steps that each
method needs on Fashion-MNIST until the test accuracy is reached, on 4 nodes that are played by
ranks of one machine: this does not depend on links. `table` multiplies the two. So the time to the
accuracy is a product, not the time of one run: 8 ranks on few cores would need hours for that.

--data: Fashion-MNIST packed by `hpctrain data pack`. Figures are kept in --out as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NODES, RANKS = 4, 2
BATCH, WARM_UP, EVALUATE_EVERY = 512, 2, 10
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
TUNED = 0.05, 0.9  # rate and momentum; best of those tried (docs/compression.md)
SPARSE_TUNED = 0.15, 0.5  # what a residual holds back comes late: a momentum of its own
TRIALS = 14  # steps in which auto decides
RUN = """
[data]
path = {path!r}
[model]
name = "mlp"
hidden = [2048, 2048]
[batch]
size = {batch}
microbatch = {micro}
[optimizer]
name = "sgd"
lr = {lr}
momentum = {momentum}
[run]
device = "cpu"
[parallel]
threads = 1
"""


def main() -> int:
    args = parsed()
    if args.rank:
        on_ranks(args)
        return 0
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
    parser.add_argument("what", choices=("seconds", "accuracy", "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rate", default="100mbit", help="of the links (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each method and round")
    parser.add_argument("--rounds", type=int, default=1, help="all methods in turn, so often")
    parser.add_argument("--data", type=Path, help="Fashion-MNIST, packed")
    parser.add_argument("--target", type=float, default=0.85, help="test accuracy (%(default)s)")
    parser.add_argument("--most-steps", type=int, default=1200, help="of one method (%(default)s)")
    parser.add_argument("--torch-python", help="a Python that has PyTorch")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_seconds(args: argparse.Namespace) -> None:
    """Both stacks on the links, one after the other; seconds-RATE.json."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="study-") as place:
        folder = Path(place)
        random_images(folder)
        command = [sys.executable, __file__, "seconds", "--rank", "--out", place]
        command += ["--steps", str(args.steps), "--rounds", str(args.rounds)]
        cluster(args.rate, [*command, "--methods", *args.methods], PYTHONPATH=str(ROOT))
        found |= json.loads((folder / "found.json").read_text())
        write(args.out / f"seconds-{args.rate}.json", found)
        if args.torch_python:
            script = [args.torch_python, str(ROOT / "tools/compression_torch.py"), place]
            cluster(args.rate, [*script, str(args.steps)])
            found |= json.loads((folder / "torch.json").read_text())
            write(args.out / f"seconds-{args.rate}.json", found)


def cluster(rate: str, command: list[str], **environment: str) -> None:
    """Run a command on the nodes."""
    tool = [sys.executable, str(ROOT / "tools/netns-cluster"), "run", f"{NODES}x{RANKS}"]
    done = subprocess.run(
        [*tool, "--rate", rate, "--timeout", "3600", "--", *command],
        env=os.environ | environment,
        cwd=ROOT,
    )
    if done.returncode:
        raise SystemExit(done.returncode)


def measure_accuracy(args: argparse.Namespace) -> None:
    """Steps to the target, method after method; accuracy.json, which is added to."""
    if args.data is None:
        raise SystemExit("accuracy needs --data, Fashion-MNIST packed by `hpctrain data pack`")
    path = args.out / "accuracy.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    beside = Path(sys.executable).parent / "mpirun"
    for name in args.methods:
        command = [str(beside), "-n", str(NODES), sys.executable, __file__, "accuracy", "--rank"]
        command += ["--out", str(args.out), "--methods", name, "--data", str(args.data)]
        command += ["--target", str(args.target), "--most-steps", str(args.most_steps)]
        environment = {"PYTHONPATH": str(ROOT), "HPCTRAIN_TOPOLOGY": f"{NODES}x1"}
        shell = ["bash", "-c", 'source tools/env.sh && exec "$@"', "bash"]
        subprocess.run([*shell, *command], env=os.environ | environment, cwd=ROOT, check=True)
        found[name] = json.loads((args.out / "one.json").read_text())
        (args.out / "one.json").unlink()
        write(path, found)
        print(name, found[name], flush=True)


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def random_images(folder: Path) -> None:
    """A data set in the shape of Fashion-MNIST, a few batches long."""
    import numpy as np

    from hpctrain.data import pack

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (4 * BATCH, 28, 28), np.uint8)
    labels = np.arange(4 * BATCH) % 10
    pack({"image": images, "label": labels.astype(np.int64)}, folder / "data")


def on_ranks(args: argparse.Namespace) -> None:
    """A rank of either measurement."""
    from hpctrain.mpi.start import start

    comm = start()
    found = {}
    if args.what == "seconds":
        for _ in range(args.rounds):
            for name in args.methods:
                one = seconds_of(comm, args.out / "data", name, args.steps)
                found.setdefault(name, []).append(one)
        result: dict[str, Any] = {name: median_of(ones) for name, ones in found.items()}
        target = args.out / "found.json"
    else:
        result = steps_to(comm, args)
        target = args.out / "one.json"
    if comm.rank == 0:
        write(target, result)


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several rounds the median seconds, and the last one's other figures."""
    seconds = [one["seconds"] for one in rounds]
    return rounds[-1] | {"seconds": statistics.median(seconds), "rounds": seconds}


def trainer_of(comm: Any, path: Path, name: str) -> Any:
    """A context with the session and trainer of a method."""
    import contextlib

    from hpctrain.config import resolve
    from hpctrain.device import open_device
    from hpctrain.train.session import open_session
    from hpctrain.train.step import Trainer

    @contextlib.contextmanager
    def opened() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.toml"
            micro = BATCH // comm.size
            lr, momentum = SPARSE_TUNED if "density" in METHODS[name] else TUNED
            place = str(path.resolve())
            text = RUN.format(path=place, batch=BATCH, micro=micro, lr=lr, momentum=momentum)
            lines = [f"{key} = {json.dumps(value)}" for key, value in METHODS[name].items()]
            file.write_text(text + "[compress]\n" + "\n".join(lines) + "\n")
            config = resolve(file, environment={}).config
        with open_session(config, open_device("cpu"), comm) as session:
            trainer = Trainer(session)
            trainer.initialize()
            yield session, trainer
            trainer.free()

    return opened()


def link_bytes() -> int:
    """Bytes that this node's link has sent so far; 0 where there is none."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def seconds_of(comm: Any, path: Path, name: str, steps: int) -> dict[str, Any]:
    """The median step of a method, by the slowest rank; bytes of a node's link per step."""
    with trainer_of(comm, path, name) as (session, trainer):
        loader = session.loader("train")
        batches = list(loader.epoch(0))
        warm = WARM_UP + (TRIALS if METHODS[name]["method"] == "auto" else 0)
        seconds, sent = [], 0
        for step in range(warm + steps):
            if step == warm:
                sent = link_bytes()
            comm.Barrier()
            begun = time.perf_counter()
            result = trainer.step(batches[step % len(batches)], step)
            seconds.append(max(comm.allgather(time.perf_counter() - begun)))
        sent = (link_bytes() - sent) // steps
        loader.close()
        used = result.between.get("compress", ["dense"])
    if comm.rank == 0:
        print(
            f"{name:12} {statistics.median(seconds[warm:]):.3f} s {sent:,} bytes {used}", flush=True
        )
    return {"seconds": statistics.median(seconds[warm:]), "bytes": sent, "used": used}


def steps_to(comm: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of a method until the target is reached, and the accuracies on the way."""
    from hpctrain.train.evaluate import evaluate

    with trainer_of(comm, args.data, args.methods[0]) as (session, trainer):
        loader = session.loader("train")
        step, epoch, curve, reached = 0, 0, [], None
        while step < args.most_steps and reached is None:
            for batch in loader.epoch(epoch):
                trainer.step(batch, step)
                step += 1
                if step % EVALUATE_EVERY == 0:
                    curve.append((step, evaluate(session, "test").accuracy))
                    if curve[-1][1] >= args.target and reached is None:
                        reached = step
                    if reached is not None or step >= args.most_steps:
                        break
            epoch += 1
        loader.close()
    return {"target": args.target, "steps": reached, "curve": curve}


def table(out: Path) -> str:
    """The figures as a table of Markdown."""
    steps = json.loads((out / "accuracy.json").read_text())
    steps |= {"torch dense": steps["dense"], "torch fp16": steps["dense"]}
    lines = []
    for path in sorted(out.glob("seconds-*.json")):
        lines += [
            f"| {path.stem.removeprefix('seconds-')} | KB per step | s per step | steps "
            "| s to target |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, one in json.loads(path.read_text()).items():
            count = steps.get(name, {}).get("steps")
            product = f"{count * one['seconds']:.0f}" if count else "-"
            lines.append(
                f"| {name} | {one['bytes'] / 1e3:,.0f} | {one['seconds']:.3f} | {count or '-'} | "
                f"{product} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
