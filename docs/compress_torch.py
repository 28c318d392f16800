"""Compressed gradients of PyTorch, by DLPack, no copy.    mpirun -n 4 python compress_torch.py"""

import torch
from mpi4py import MPI

from hpctrain.compress import GradientSum

comm = MPI.COMM_WORLD
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / comm.size, momentum=0.9)

shapes = [parameter.shape for parameter in model.parameters()]
total = GradientSum(comm, shapes, method="topk", density=0.05, nodes=f"{comm.size}x1")
for parameter, gradient in zip(model.parameters(), total.tensors, strict=True):
    parameter.grad = torch.from_dlpack(gradient)  # backward passes add to hpctrain's memory

for step in range(200):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step * comm.size + comm.rank))
    optimizer.zero_grad(set_to_none=False)
    loss = torch.nn.functional.mse_loss(model(x), x.roll(1, dims=1))
    loss.backward()
    total.sum()
    optimizer.step()

if comm.rank == 0:
    print(f"loss {loss.item():.4f}, {comm.size} ranks")
