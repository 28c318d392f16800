"""Data parallelism for loops of one's own: bring gradients, get updated parameters.

Layer: parallel. Knows nothing of networks and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hpctrain.errors import DivergedError, UsageError
from hpctrain.nn.layout import Layout
from hpctrain.optim.rules import Rule
from hpctrain.parallel.communicator import Communicator
from hpctrain.parallel.data import DataParallel

__all__ = ["DistributedOptimizer"]

Array = Any


class DistributedOptimizer:
    """An update rule applied to the gradients of all ranks together.

    Collective to create and to `step`.

    Args:
        rule: `hpctrain.SGD(...)` or `hpctrain.AdamW(...)`.
        parameters: initial values by name, NumPy or device arrays of one dtype (float32 or
            float64), in the order of the forward pass, the same names and shapes on all ranks.
            Rank 0's values are taken. The arrays are copied and stay the caller's.
        comm: a `Communicator`.
        decay: which parameters weight decay applies to, by name; default those of two or more dims.
        reduction: "auto", "messages" or "allreduce"; see `SliceReduction` for all.
        gpu_mpi: whether MPI is given a GPU's memory: "auto", "on" or "off"; docs/gpu-mpi.md.

    Attributes:
        parameters: the live values by name. Read them; they change in `step`.
        gradients: arrays by name to write this rank's gradient into, at no further copy.
    """

    def __init__(
        self,
        rule: Rule,
        parameters: Mapping[str, Array],
        comm: Communicator,
        decay: Callable[[str], bool] | None = None,
        reduction: str = "auto",
        gpu_mpi: str = "auto",
    ) -> None:
        dtypes = {str(array.dtype) for array in parameters.values()}
        if len(dtypes) != 1 or not dtypes <= {"float32", "float64"}:
            raise UsageError(
                f"the parameters have the dtypes {sorted(dtypes)}; give all as float32 or all as "
                "float64"
            )
        tensors = [
            (name, array.shape, array.ndim > 1 if decay is None else decay(name))
            for name, array in parameters.items()
        ]
        self.comm = comm
        self.steps = 0
        layout = Layout(reversed(tensors), dtypes.pop())
        self._parallel = DataParallel(comm.topology, comm.device, layout, rule, reduction, gpu_mpi)
        self.parameters = self._parallel.parameters.views()
        self.gradients = self._parallel.gradients.views()
        self._take(parameters, layout)

    def _take(self, parameters: Mapping[str, Array], layout: Layout) -> None:
        """Copy rank 0's values to every node's parameters."""
        device, comm = self.comm.device, self.comm.mpi_comm
        for entry in layout.entries:
            given = parameters[entry.name]
            value = device.to_host(given) if not isinstance(given, np.ndarray) else given.copy()
            value = np.ascontiguousarray(value)
            comm.Bcast(value, root=0)
            if self._parallel.writes_parameters:
                device.copy(self.parameters[entry.name], device.from_host(value))
        self._parallel.publish()

    def step(
        self,
        gradients: Mapping[str, Array] | None = None,
        weight: float = 1.0,
        lr: float | None = None,
        clip_norm: float = 0.0,
    ) -> float:
        """Sum the gradients of all ranks, divide by the sum of weights, update. Collective.

        Args:
            gradients: this rank's gradients by name, summed (not averaged) over its samples;
                None if they were written into `self.gradients`.
            weight: this rank's share in the average, such as its number of samples; may be 0,
                with gradients of 0.
            lr: learning rate of this step; default the rule's.
            clip_norm: largest global norm of the averaged gradient; 0 for no limit.

        Returns:
            the norm of the averaged gradient, the same on all ranks.

        Raises:
            DivergedError: a gradient is not finite; on all ranks; nothing was updated.
        """
        if gradients is not None:
            self._copy(gradients)
        total = self.comm.all_reduce(np.array([weight], np.float64))[0]
        rate = self._parallel.rule.lr if lr is None else lr
        norm = self._parallel.update(self.steps, rate, float(total), clip_norm)
        if not np.isfinite(norm):
            raise DivergedError(
                f"step {self.steps}: the gradient's norm is {norm}; lower the learning rate, or "
                "look for bad samples"
            )
        self.steps += 1
        return norm

    def _copy(self, gradients: Mapping[str, Array]) -> None:
        if set(gradients) != set(self.gradients):
            odd = set(gradients) ^ set(self.gradients)
            raise UsageError(f"gradients and parameters differ in the names {sorted(odd)}")
        device = self.comm.device
        for name, gradient in gradients.items():
            place = self.gradients[name]
            if gradient.shape != place.shape or gradient.dtype != place.dtype:
                raise UsageError(
                    f"the gradient of {name} is {gradient.shape} of {gradient.dtype}; it must be "
                    f"{place.shape} of {place.dtype}"
                )
            device.copy(place, gradient)

    def free(self) -> None:
        """Give shared memory back. Collective; `parameters` and `gradients` are dead afterwards."""
        self.parameters, self.gradients = {}, {}
        self._parallel.free()
