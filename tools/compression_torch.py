"""The PyTorch side of compression_study.py: DDP over gloo with its hooks, on the same links.

    mpirun ... python tools/compression_torch.py FOLDER STEPS

Random images, the same network and global batch; writes FOLDER/torch.json. Needs PyTorch only.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

BATCH, WARM_UP = 512, 4  # PowerSGD begins with dense steps


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
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    return 0


def seconds_of(name: str, steps: int, size: int) -> dict[str, Any]:
    model = hooked(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    x, labels = torch.randn(BATCH // size, 784), torch.arange(BATCH // size) % 10
    seconds, sent = [], 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            sent = link_bytes()
        distributed.barrier()
        begun = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        spent = torch.tensor([time.perf_counter() - begun])
        distributed.all_reduce(spent, distributed.ReduceOp.MAX)
        seconds.append(spent.item())
    sent = (link_bytes() - sent) // steps
    return {"seconds": statistics.median(seconds[WARM_UP:]), "bytes": sent}


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    os.environ.update(MASTER_ADDR="n0", MASTER_PORT="29577", GLOO_SOCKET_IFNAME="eth0")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    found = {}
    for name in ("torch dense", "torch fp16", "torch powersgd 4"):
        found[name] = seconds_of(name, steps, size)
        if rank == 0:
            print(name, found[name], flush=True)
    if rank == 0:
        (folder / "torch.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
