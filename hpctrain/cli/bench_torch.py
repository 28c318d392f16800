"""Operations of hpctrain beside PyTorch's, for `hpctrain bench kernels` where PyTorch is installed.

Both sides run as in training: they allocate their outputs, record, and differentiate. Both see the
same numbers, and `difference` says how far their results are apart.

Layer: cli. The only module of the package that imports PyTorch; imported only for that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.cli.bench_launches import SIZES, Maker
from hpctrain.compress.select import Selector
from hpctrain.device.cpu import CpuDevice
from hpctrain.nn.batch_norm import batch_norm
from hpctrain.nn.losses import softmax_cross_entropy
from hpctrain.nn.module import Statistic
from hpctrain.nn.operations import gelu, layer_norm, relu
from hpctrain.nn.pooling import max_pool
from hpctrain.optim import AdamW, Range

__all__ = ["Operation", "operations"]

Array = NDArray[Any]
Tensor = Any  # torch.Tensor

# Not an import statement, as the package is checked without PyTorch.
torch: Any = importlib.import_module("torch")
functional = torch.nn.functional

N, ROWS, COLS, CLASSES, IMAGES = SIZES.n, SIZES.rows, SIZES.cols, SIZES.classes, SIZES.images


@dataclass
class Operation:
    """What both sides do. `difference`: of their results, relative to the largest element."""

    name: str
    size: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    difference: Callable[[], float]


def operations(device: CpuDevice, dtype: str) -> Iterator[Operation]:
    """All comparisons, each built when it is asked for. Sets PyTorch to one thread."""
    torch.set_num_threads(1)
    make = Maker(device, dtype)
    flat, rows, images = (N,), (ROWS, COLS), IMAGES
    yield from _pair(make, "ReLU", flat, (), relu, functional.relu)
    yield from _pair(make, "GELU", flat, (), gelu, lambda x: functional.gelu(x, approximate="tanh"))
    yield from _pair(
        make, "layer norm", rows, (COLS, COLS), layer_norm,
        lambda x, gamma, beta: functional.layer_norm(x, (COLS,), gamma, beta),
    )  # fmt: skip
    channels = images[-1]
    yield from _pair(
        make, "batch norm", images, (channels, channels), _batch_norm(make),
        _torch_batch_norm(channels),
    )  # fmt: skip
    yield from _pair(
        make, "max pool 2x2", images, (), lambda tape, x: max_pool(tape, x, 2),
        lambda x: functional.max_pool2d(x, 2),
    )  # fmt: skip
    yield _cross_entropy(make)
    yield _adamw(make)
    yield _selection(make)


def _pair(
    make: Maker,
    name: str,
    shape: Sequence[int],
    vectors: Sequence[int],
    ours: Callable[..., Variable],
    theirs: Callable[..., Tensor],
) -> Iterator[Operation]:
    """The forward pass, and forward and backward pass, of an operation on x and vectors."""
    hosts = [make.real(*shape), *(make.square(n) for n in vectors)]
    tensors = [_tensor(host) for host in hosts]
    size = " x ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0] >> 20} Mi"

    def forward() -> Array:
        variables = [Variable(host) for host in hosts]
        return _array(ours(Tape(make.device), *variables).value)

    def forward_theirs() -> Tensor:
        with torch.no_grad():
            return theirs(*tensors)

    dy = np.resize(make.real(65521), forward().shape)
    dy_tensor = _tensor(dy)

    def both() -> list[Array]:
        tape, variables = Tape(make.device), [Variable(host, True) for host in hosts]
        output = ours(tape, *variables)
        output.grad = dy
        tape.backward()
        return [_array(variable.grad) for variable in variables]

    def both_theirs() -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return list(torch.autograd.grad(theirs(*leaves), leaves, dy_tensor))

    yield Operation(
        f"{name} forward", size, forward, forward_theirs,
        lambda: _difference([forward()], [forward_theirs()]),
    )  # fmt: skip
    yield Operation(
        f"{name} forward + backward", size, both, both_theirs,
        lambda: _difference(both(), both_theirs()),
    )  # fmt: skip


def _batch_norm(make: Maker) -> Callable[..., Variable]:
    """Batch norm over the whole batch, with running statistics on the side."""
    channels = IMAGES[-1]
    statistics = [Statistic((channels,), constant, momentum=0.1) for constant in (0.0, 1.0)]
    for statistic in statistics:
        statistic.value, statistic.sum = make.empty(channels), make.empty(channels + 1)
    return lambda tape, *variables: batch_norm(tape, *variables, *statistics)


def _torch_batch_norm(channels: int) -> Callable[..., Tensor]:
    mean, variance = torch.zeros(channels), torch.ones(channels)

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = mean.to(x.dtype), variance.to(x.dtype)
        return functional.batch_norm(x, *running, gamma, beta, training=True)

    return function


def _cross_entropy(make: Maker) -> Operation:
    rows, classes = CLASSES
    logits, labels = make.real(*CLASSES), make.whole(classes, rows)
    tensor, label_tensor = torch.from_numpy(logits), torch.from_numpy(labels)

    def ours() -> list[Array]:
        tape, x = Tape(make.device), Variable(logits, True)
        losses, _ = softmax_cross_entropy(tape, x, labels)
        total = losses.value.sum(keepdims=True)
        tape.backward(losses)
        return [total, _array(x.grad)]

    def theirs() -> list[Tensor]:
        leaf = tensor.detach().requires_grad_()
        loss = functional.cross_entropy(leaf, label_tensor, reduction="sum")
        return [loss.detach().reshape(1), *torch.autograd.grad(loss, leaf)]

    size = " x ".join(map(str, CLASSES))
    return Operation(
        "cross-entropy forward + backward", size, ours, theirs,
        lambda: _difference(ours(), theirs()),
    )  # fmt: skip


def _adamw(make: Maker) -> Operation:
    rule = AdamW(lr=1e-3, weight_decay=0.01)
    parameters, gradients = make.real(N), make.real(N)
    states = {name: make.empty(N) for name in rule.states}
    tensor = torch.nn.Parameter(torch.from_numpy(parameters.copy()))
    tensor.grad = torch.from_numpy(gradients)
    optimizer = torch.optim.AdamW([tensor], lr=1e-3, weight_decay=0.01, fused=True)
    done = {"ours": 0, "theirs": 0}

    def ours() -> None:
        part = Range(parameters, gradients, states, decay=True)
        rule.update(make.device, part, step=done["ours"], lr=1e-3, scale=1.0)
        done["ours"] += 1

    def theirs() -> None:
        optimizer.step()
        done["theirs"] += 1

    def difference() -> float:
        while done["ours"] != done["theirs"]:
            (ours if done["ours"] < done["theirs"] else theirs)()
        return _difference([parameters], [tensor.detach()])

    return Operation("AdamW (PyTorch: fused)", "4 Mi", ours, theirs, difference)


def _selection(make: Maker) -> Operation:
    n, k = 8_000_000, 8000
    host = np.random.default_rng(1).standard_normal(n).astype(make.dtype)
    tensor = torch.from_numpy(host)
    selector = Selector(make.device, n, make.dtype)

    def difference() -> float:
        """Of the absolute values, smallest first; PyTorch's order of equal ones is not defined."""
        values, _ = selector.select(host, k)
        return _difference([np.sort(np.abs(values))], [torch.topk(tensor.abs(), k)[0].flip(0)])

    return Operation(
        "top-k, exact", "8000 of 8 M", lambda: selector.select(host, k),
        lambda: torch.topk(tensor.abs(), k), difference,
    )  # fmt: skip


def _tensor(host: Array) -> Tensor:
    """The same memory as a tensor; images NHWC become NCHW in the format channels_last."""
    tensor = torch.from_numpy(host)
    return tensor.permute(0, 3, 1, 2) if host.ndim == 4 else tensor


def _array(value: Any) -> Array:
    return value  # type: ignore[no-any-return]


def _difference(ours: Sequence[Array], theirs: Sequence[Tensor]) -> float:
    """The largest difference, in units of each result's largest element."""
    largest = 0.0
    for mine, tensor in zip(ours, theirs, strict=True):
        other = (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).numpy()
        scale = float(np.abs(other).max()) or 1.0
        largest = max(largest, float(np.abs(mine - other).max()) / scale)
    return largest
