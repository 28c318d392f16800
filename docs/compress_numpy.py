"""Compressed gradients in a loop of one's own.    mpirun -n 4 python compress_numpy.py"""

import numpy as np
from mpi4py import MPI

from hpctrain.compress import GradientSum

comm = MPI.COMM_WORLD
total = GradientSum(comm, [(200, 100)], method="topk", density=0.02, nodes=f"{comm.size}x1")
weights, target = np.zeros((200, 100), np.float32), np.arange(20000).reshape(200, 100) / 20000
noise = np.random.default_rng(comm.rank)  # every rank sees other samples

for _ in range(600):
    total.tensors[0][:] = weights - target + 0.1 * noise.standard_normal(target.shape)
    total.sum()
    weights -= 0.01 / comm.size * total.tensors[0]

if comm.rank == 0:
    sent = total.compression.columns[0].sent if comm.size > 1 else 0
    print(f"error {np.abs(weights - target).mean():.4f}, {sent} bytes sent in the last step")
total.free()
