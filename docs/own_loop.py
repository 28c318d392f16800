"""A training loop of one's own: any gradients, any communicator.  mpirun -n 2 python own_loop.py"""

import numpy as np
from mpi4py import MPI

import hpctrain

comm = hpctrain.Communicator(MPI.COMM_WORLD, device="cpu")  # the gradients below are NumPy's
rng = np.random.default_rng(0)  # the same data everywhere; each rank works on its share
x = rng.standard_normal((6000, 8))
y = x @ np.arange(8.0) + 3 + 0.1 * rng.standard_normal(6000)

initial = {"slope": np.zeros((8, 1)), "offset": np.zeros(1)}
optimizer = hpctrain.DistributedOptimizer(hpctrain.SGD(lr=0.1, momentum=0.5), initial, comm)
slope, offset = optimizer.parameters["slope"], optimizer.parameters["offset"]

for batch in np.array_split(np.arange(6000), 60):  # the global batch: 100 samples
    mine = batch[comm.rank :: comm.size]
    error = x[mine] @ slope[:, 0] + offset - y[mine]
    gradients = {"slope": x[mine].T @ error[:, None], "offset": error.sum(keepdims=True)}
    optimizer.step(gradients, weight=len(mine))  # sums over samples; divided by all weights

loss = comm.mean(float(np.mean(error**2)), weight=len(mine))
if comm.rank == 0:
    print(f"offset {offset[0]:.3f}, loss of the last batch {loss:.5f}, {comm.size} ranks")
optimizer.free()
comm.free()
