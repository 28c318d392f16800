"""The PyTorch side of compression_study.py: DDP over gloo with its hooks, on the same links.

    mpirun ... python tools/compression_torch.py seconds|accuracy|final ORDER.json

The same network, global batch and data; the order comes from the study. Needs PyTorch only.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

WARM_UP = 4  # PowerSGD begins with dense steps


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    )


def hooked(name: str) -> DistributedDataParallel:
    """The network under DDP, with the hook of this name.

    PowerSGD gets one bucket: the hook begins its later sums in callbacks, which gloo's threads run
    in an order of their own on each rank, so with several buckets sums of different sizes meet.
    """
    whole = 1000 if name.startswith("torch powersgd") else None  # MB; None: DDP's own buckets
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True, bucket_cap_mb=whole)
    if name == "torch fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name.startswith("torch powersgd"):
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=int(name.split()[-1]), start_powerSGD_iter=2
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return model


def link_bytes() -> int:
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


class Run:
    """A method's model and optimizer."""

    def __init__(self, order: dict[str, Any], name: str) -> None:
        self.model = hooked(name)
        self.rate, momentum = order["methods"][name]["tuned"]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.rate, momentum=momentum, fused=True
        )

    def step(self, x: torch.Tensor, labels: torch.Tensor, left: float = 1.0) -> None:
        """Train on this rank's part of a batch, at what is `left` of the rate."""
        self.optimizer.param_groups[0]["lr"] = self.rate * left
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(x), labels).backward()
        self.optimizer.step()

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        with torch.no_grad():
            return (self.model.module(images).argmax(1) == labels).float().mean().item()


def seconds_of(order: dict[str, Any], name: str, size: int) -> dict[str, Any]:
    """The median step of a method, by the slowest rank; bytes of a node's link per step."""
    run, steps, n = Run(order, name), order["steps"], order["batch"] // size
    x, labels = torch.randn(n, 784), torch.arange(n) % 10
    seconds, sent = [], 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            sent = link_bytes()
        distributed.barrier()
        begun = time.perf_counter()
        run.step(x, labels)
        spent = torch.tensor([time.perf_counter() - begun])
        distributed.all_reduce(spent, distributed.ReduceOp.MAX)
        seconds.append(spent.item())
    sent = (link_bytes() - sent) // steps
    return {"seconds": statistics.median(seconds[WARM_UP:]), "bytes": sent}


def trained(order: dict[str, Any], name: str, rank: int, size: int, what: str) -> dict[str, Any]:
    """Steps to the target, or the accuracy after some epochs; as compression_rank.py counts."""
    data = {key: torch.from_numpy(array) for key, array in np.load(order["data"]).items()}
    pixels = data["train_image"].reshape(-1, 784) / 255.0
    mean, deviation = pixels.mean(), pixels.std()
    tests = (data["test_image"].reshape(-1, 784) / 255.0 - mean) / deviation
    labels, answers = data["train_label"].long(), data["test_label"].long()
    run, batch, rng = Run(order, name), order["batch"], np.random.default_rng(0)
    per_epoch = -(-len(labels) // batch)
    most = per_epoch * order["epochs"] if what == "final" else order["most_steps"]
    step, curve = 0, []
    while step < most:
        shuffled = rng.permutation(len(labels))
        for first in range(0, len(labels) - batch + 1, batch):  # DDP wants batches of one size
            mine = torch.from_numpy(shuffled[first + rank : first + batch : size])
            left = 1 - step / (most - 1) if what == "final" else 1.0
            run.step((pixels[mine] - mean) / deviation, labels[mine], left)
            step += 1
            if what == "accuracy" and step % order["every"] == 0:
                curve.append((step, run.accuracy(tests, answers)))
                if curve[-1][1] >= order["target"]:
                    return {"target": order["target"], "steps": step, "curve": curve}
            if step == most:
                break
    if what == "final":
        return {"steps": step, "accuracy": run.accuracy(tests, answers)}
    return {"target": order["target"], "steps": None, "curve": curve}


def main() -> None:
    what, order = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    if what == "seconds":  # on the cluster's nodes
        os.environ.update(MASTER_ADDR="n0", GLOO_SOCKET_IFNAME="eth0")
    else:
        os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    os.environ["MASTER_PORT"] = "29577"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    found: dict[str, Any] = {}
    rounds = order["rounds"] if what == "seconds" else 1
    for name in list(order["methods"]) * rounds:
        if what == "seconds":
            one = seconds_of(order, name, size)
            ones = [*found.get(name, {}).get("rounds", []), one["seconds"]]
            found[name] = one | {"seconds": statistics.median(ones), "rounds": ones}
        else:
            found[name] = trained(order, name, rank, size, what)
        if rank == 0 and what == "seconds":
            print(f"{name:12} {one['seconds']:.3f} s {one['bytes']:,} bytes", flush=True)
    if rank == 0:
        Path(order["result"]).write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
