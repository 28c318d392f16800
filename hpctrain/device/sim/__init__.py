"""Simulated CUDA GPUs: the device `cuda` without a GPU, to find what a GPU would not forgive.

`device/cuda.py` runs as it is, on a stand-in for the part of CuPy that it uses. Work is done late,
early or in drawn orders, whatever CUDA's rules allow, so that a missing synchronization gives
wrong data here. docs/sim.md is the page for users.

Layer: device.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpctrain.device import build, simt
from hpctrain.device.cuda import CudaDevice
from hpctrain.device.sim.counts import Counts
from hpctrain.device.sim.machine import Machine, Processor, device_count
from hpctrain.device.sim.stand_in import StandIn
from hpctrain.errors import KernelError

__all__ = ["Counts", "Machine", "SimDevice", "device_count"]


class SimDevice(CudaDevice):
    """`CudaDevice` on a simulated machine, with counts of what it was asked to do."""

    def __init__(self, local_rank: int = 0, machine: Machine | None = None) -> None:
        """`machine`: shared by the devices of a process; by default a new one."""
        self.machine = machine or Machine()
        super().__init__(local_rank, StandIn(self.machine), "sim")
        self._processor: Processor = self.machine.processors[self._device.id]

    def _compile(self, dtypes: Iterable[str]) -> Exception | None:
        """As many files at once as there are cores, before `CudaDevice` asks for one by one."""
        try:
            build.build_all(dtypes, build.host_level())
            if self.machine.kernels != "host":
                simt.prepare(dtypes)
        except KernelError as error:
            return error
        return super()._compile(dtypes)

    def counts(self) -> Counts:
        """What was done since the last reset."""
        self._processor.collect()
        return self._processor.counts.taken()

    def reset_counts(self) -> None:
        """Count from zero."""
        self._processor.collect()
        self._processor.counts.reset()
