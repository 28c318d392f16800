"""Devices: arrays, memory, matrix products and kernels of the CPU and of CUDA GPUs, real or not.

The only package that imports CuPy or runs a compiler. `open_device` chooses; what it returns has
the interface of `interface.Device`.
"""

from __future__ import annotations

from hpctrain.device.interface import Device
from hpctrain.errors import DeviceError, nearest

__all__ = ["Device", "open_device", "visible_gpus"]

NAMES = ("auto", "cpu", "cuda", "sim")


def open_device(name: str = "auto", level: str | None = None, local_rank: int = 0) -> Device:
    """Open a device: "cpu", "cuda", "sim" for a simulated GPU, or "auto".

    "auto" is CUDA where CuPy finds a GPU, else the CPU.

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
    if name == "sim":
        from hpctrain.device.sim import SimDevice

        return SimDevice(local_rank)
    return cpu.CpuDevice(level)


def visible_gpus(name: str = "auto") -> int:
    """How many GPUs `open_device(name)` chooses from; 0 where it opens the CPU or finds none."""
    from hpctrain.device import cuda

    if name in ("auto", "cuda") and cuda.available():
        import cupy

        return int(cupy.cuda.runtime.getDeviceCount())
    if name == "sim":
        from hpctrain.device.sim import device_count

        return device_count()
    return 0
