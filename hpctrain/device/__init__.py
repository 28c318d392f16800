"""Devices: arrays, memory, matrix products and kernels of the CPU and of CUDA GPUs.

The only package that imports CuPy or runs a compiler. `open_device` chooses; what it returns has
the interface of `interface.Device`.
"""

from __future__ import annotations

from hpctrain.device.interface import Device
from hpctrain.errors import DeviceError, nearest

__all__ = ["Device", "open_device"]

NAMES = ("auto", "cpu", "cuda")


def open_device(name: str = "auto", level: str | None = None, local_rank: int = 0) -> Device:
    """Open a device: "cpu", "cuda", or "auto" for CUDA where CuPy finds a GPU, else the CPU.

    Args:
        level: the x86-64 level that CPU kernels are compiled for (default: this CPU's highest).
        local_rank: this process's number on its node; of several visible GPUs it takes that one,
            counted round. MPI libraries want the GPU to be chosen before they start.

    Raises `DeviceError` for another name, or when "cuda" is asked for and there is none.
    """
    from hpctrain.device import cpu, cuda

    if name not in NAMES:
        raise DeviceError(
            f"no device is called {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}"
        )
    if name == "cuda" or (name == "auto" and cuda.available()):
        return cuda.CudaDevice(local_rank)
    return cpu.CpuDevice(level)
