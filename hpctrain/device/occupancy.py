"""How many threads of a kernel a GPU can keep at once, from what the kernel takes.

A multiprocessor holds as many blocks as its threads, its registers and its shared memory allow;
occupancy is the share of its threads that are then in use. Memory latency is hidden by other
threads: half is enough for kernels that move memory.

Layer: device. Arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpctrain.device.nvrtc import Resources

__all__ = ["LIMITS", "Limits", "occupancy"]

WARP = 32


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has: threads, blocks, bytes of shared memory; 65536 registers."""

    threads: int
    blocks: int
    shared: int
    reserved: int = 1024  # bytes of shared memory that the system takes from every block
    registers: int = 65536


# CUDA C++ Programming Guide, "Technical specifications per compute capability".
LIMITS = {
    "sm_70": Limits(2048, 32, 96 << 10, reserved=0),
    "sm_75": Limits(1024, 16, 64 << 10, reserved=0),
    "sm_80": Limits(2048, 32, 164 << 10),
    "sm_90": Limits(2048, 32, 228 << 10),
    "sm_100": Limits(2048, 32, 228 << 10),
    "sm_120": Limits(1536, 24, 100 << 10),
}


def occupancy(architecture: str, kernel: Resources, block: int) -> float:
    """The share of a multiprocessor's threads that blocks of `block` threads keep in use.

    Registers are given to a warp in units of 256, and to warps in each of four quarters of the
    multiprocessor.
    """
    limits = LIMITS[architecture]
    per_warp = -(-kernel.registers * WARP // 256) * 256
    warps = limits.registers // 4 // max(per_warp, 1) * 4
    blocks = [limits.threads // block, limits.blocks, warps // (block // WARP)]
    if kernel.shared:
        blocks.append(limits.shared // (kernel.shared + limits.reserved))
    return min(blocks) * block / limits.threads
