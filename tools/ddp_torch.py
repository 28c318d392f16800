"""The PyTorch side of compare_ddp.py: the same networks, batches and initial values under DDP.

    python tools/ddp_torch.py FOLDER MODEL RANK SIZE PORT

FOLDER holds what the hpctrain side wrote: batches-RANK.npz and parameters.npz. The networks are
hpctrain's `mlp` and `convnet` with the same attribute names, so that parameters are found by name.
Needs PyTorch and NumPy, not hpctrain.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ddp_control import serve
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


class ConvNorm(nn.Module):
    """relu(norm(conv(x)) + shortcut)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return functional.relu_(x if shortcut is None else x.add_(shortcut))


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(before, after), ConvNorm(after, after)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False) if before != after else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.second(self.first(x), shortcut)


class ConvNet(nn.Module):
    """See hpctrain/models/convnet.py; one block per stage."""

    def __init__(self, widths: list[int], outputs: int) -> None:
        super().__init__()
        self.stem = ConvNorm(1, widths[0])
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.stages = nn.ModuleList(nn.ModuleList([Block(a, b)]) for a, b in pairs)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            if index < len(self.stages) - 1:
                x = functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


class Hidden(nn.Module):
    """relu(linear(x))."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(before, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu_(self.linear(x))


class Mlp(nn.Module):
    """See hpctrain/models/mlp.py."""

    def __init__(self, features: int, hidden: list[int], outputs: int) -> None:
        super().__init__()
        pairs = zip([features, *hidden], hidden, strict=False)
        self.layers = nn.ModuleList(Hidden(a, b) for a, b in pairs)
        self.head = nn.Linear(hidden[-1], outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def network(given: dict[str, np.ndarray]) -> nn.Module:
    """The network with hpctrain's initial values, which also tell its sizes."""
    if "stem.conv.weight" in given:
        names = [name for name in given if name.endswith("first.conv.weight")]
        model: nn.Module = ConvNet([given[n].shape[0] for n in names], len(given["head.bias"]))
    else:
        weights = [array for name, array in given.items() if name.endswith("linear.weight")]
        hidden = [array.shape[0] for array in weights]
        model = Mlp(weights[0].shape[1], hidden, len(given["head.bias"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = name.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta")
            value = torch.from_numpy(given.pop(theirs))
            parameter.copy_(value.permute(0, 3, 1, 2) if value.ndim == 4 else value)
    if given:
        raise SystemExit(f"parameters of hpctrain that the network here lacks: {sorted(given)}")
    return model


class Training:
    """Steps over a rank's batches, in one memory format."""

    def __init__(self, folder: Path, rank: int, memory_format: torch.memory_format) -> None:
        with np.load(folder / "batches.npz") as facts:
            self.lr, self.momentum = float(facts["lr"]), float(facts["momentum"])
        with np.load(folder / f"batches-{rank}.npz") as file:
            inputs, labels = torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"])
        self.batches = [
            (x[:, None].contiguous(memory_format=memory_format), y)
            for x, y in zip(inputs, labels, strict=True)
        ]
        with np.load(folder / "parameters.npz") as file:
            model = network(dict(file)).to(memory_format=memory_format)
        # Running statistics are not exchanged on this side.
        self.model = DistributedDataParallel(
            model, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, fused=True
        )
        self._next = itertools.cycle(self.batches)

    def steps(self, count: int) -> float:
        """Train; the loss of the last step on this rank."""
        for _ in range(count):
            x, labels = next(self._next)
            self.optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(self.model(x), labels)
            loss.backward()
            self.optimizer.step()
        return loss.item()


FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def quickest(folder: Path, rank: int, images: bool) -> tuple[str, Training]:
    """The training in the memory format in which three blocks of steps take least time."""
    names = list(FORMATS) if images else ["contiguous"]
    seconds = torch.zeros(len(names), dtype=torch.float64)
    for index, name in enumerate(names):
        training = Training(folder, rank, FORMATS[name])
        training.steps(2)
        begun = time.perf_counter()
        training.steps(6)
        seconds[index] = time.perf_counter() - begun
    torch.distributed.all_reduce(seconds)  # the ranks must choose alike
    name = names[int(seconds.argmin())]
    return name, Training(folder, rank, FORMATS[name])


def main() -> None:
    folder, model, rank, size, port = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    name, training = quickest(folder, rank, model == "convnet")
    text = f"PyTorch {torch.__version__}, DDP over gloo, {name}"
    serve(folder, "torch", rank, text, training.steps, torch.distributed.barrier)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
