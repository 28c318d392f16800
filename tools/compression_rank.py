#!/usr/bin/env python
"""A rank of compression_study.py: seconds of a step, steps to an accuracy, accuracy at the end.

    mpirun ... python tools/compression_rank.py seconds|accuracy|final ORDER.json

ORDER.json, written by the study, says which methods, how many steps, where data and results lie.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpctrain.config import resolve
from hpctrain.device import open_device
from hpctrain.mpi.start import start
from hpctrain.optim import Schedule
from hpctrain.train.evaluate import evaluate
from hpctrain.train.session import open_session
from hpctrain.train.step import Trainer

RUN = """
[data]
path = {path}
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


def main() -> None:
    what, order = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    comm = start()
    found: dict[str, Any] = {}
    if what == "seconds":
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in order["methods"]}
        for _ in range(order["rounds"]):
            for name, ones in rounds.items():
                ones.append(seconds_of(comm, order, name))
        found = {name: median_of(ones) for name, ones in rounds.items()}
    else:
        measured = {"accuracy": steps_to, "final": final_of}[what]
        found = {name: measured(comm, order, name) for name in order["methods"]}
    if comm.rank == 0:
        Path(order["result"]).write_text(json.dumps(found), encoding="utf-8")


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several rounds the median seconds, and the last one's other figures."""
    seconds = [one["seconds"] for one in rounds]
    return rounds[-1] | {"seconds": statistics.median(seconds), "rounds": seconds}


@contextlib.contextmanager
def trainer_of(comm: Any, order: dict[str, Any], name: str) -> Any:
    """The session and trainer of a method."""
    method = order["methods"][name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        batch, (lr, momentum) = order["batch"], method["tuned"]
        path = json.dumps(str(Path(order["data"]).resolve()))
        text = RUN.format(
            path=path, batch=batch, micro=batch // comm.size, lr=lr, momentum=momentum
        )
        lines = [f"{key} = {json.dumps(value)}" for key, value in method["compress"].items()]
        file.write_text(text + "[compress]\n" + "\n".join(lines) + "\n", encoding="utf-8")
        config = resolve(file, environment={}).config
    with open_session(config, open_device("cpu"), comm) as session:
        trainer = Trainer(session)
        trainer.initialize()
        yield session, trainer
        trainer.free()


def link_bytes() -> int:
    """Bytes that this node's link has sent so far; 0 where there is none."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def seconds_of(comm: Any, order: dict[str, Any], name: str) -> dict[str, Any]:
    """The median step of a method, by the slowest rank; bytes of a node's link per step."""
    steps, warm = order["steps"], order["methods"][name]["warm"]
    with trainer_of(comm, order, name) as (session, trainer):
        loader = session.loader("train")
        batches = list(loader.epoch(0))
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
    median = statistics.median(seconds[warm:])
    if comm.rank == 0:
        print(f"{name:12} {median:.3f} s {sent:,} bytes {used}", flush=True)
    return {"seconds": median, "bytes": sent, "used": used}


def steps_to(comm: Any, order: dict[str, Any], name: str) -> dict[str, Any]:
    """Steps of a method until the target is reached, and the accuracies on the way."""
    with trainer_of(comm, order, name) as (session, trainer):
        loader = session.loader("train")
        step, epoch, curve, reached = 0, 0, [], None
        while step < order["most_steps"] and reached is None:
            for batch in loader.epoch(epoch):
                trainer.step(batch, step)
                step += 1
                if step % order["every"] == 0:
                    curve.append((step, evaluate(session, "test").accuracy))
                    if curve[-1][1] >= order["target"]:
                        reached = step
                    if reached is not None or step >= order["most_steps"]:
                        break
            epoch += 1
        loader.close()
    return {"target": order["target"], "steps": reached, "curve": curve}


def final_of(comm: Any, order: dict[str, Any], name: str) -> dict[str, Any]:
    """The test accuracy after some epochs, in which the rate falls to zero in a line."""
    with trainer_of(comm, order, name) as (session, trainer):
        loader = session.loader("train")
        trainer.schedule = Schedule("linear", loader.steps * order["epochs"])
        step = 0
        for epoch in range(order["epochs"]):
            for batch in loader.epoch(epoch):
                trainer.step(batch, step)
                step += 1
        accuracy = evaluate(session, "test").accuracy
        loader.close()
    return {"steps": step, "accuracy": accuracy}


if __name__ == "__main__":
    main()
