"""gloo's all-reduce as a contender of tools/bench_nodes.py; in an environment with PyTorch.

    bench_nodes_gloo.py BYTES REPEAT

Started by mpirun, of which it only uses the rank. Prints what bench_nodes_rank.py prints.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist


def main() -> None:
    nbytes, repeat = int(sys.argv[1]), int(sys.argv[2])
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{what}"]) for what in ("RANK", "SIZE"))
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29511", rank=rank, world_size=size)
    array, took = torch.empty(nbytes // 4), torch.empty(1, dtype=torch.float64)
    seconds = []
    for turn in range(repeat + 1):
        array.fill_(rank + 1)
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(array)
        took[0] = time.perf_counter() - begun
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if not bool((array == size * (size + 1) // 2).all()):
            raise SystemExit("gloo: a wrong sum")
        if turn:
            seconds.append(float(took[0]))
    dist.destroy_process_group()
    if rank == 0:
        record = {"name": "gloo", "seconds": seconds, "payload": 0, "sent": 0}
        print("found", json.dumps([record]), flush=True)


if __name__ == "__main__":
    main()
