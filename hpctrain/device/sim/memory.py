"""The memory of simulated GPUs: spans of address space, and the pool that hands out pieces.

MPI and compiled kernels can read and write it, as they can a GPU's; Python gets at it only through
the simulator. Memory that nobody has written, or that was given back, holds the bytes 0xff: NaN in
every float type, and -1.

Layer: device. Knows nothing of streams but that blocks are given back in their order.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["POISON", "Block", "CUDARuntimeError", "Pool", "Registry", "Span", "shared_span"]

POISON = 0xFF
UNIT = 512  # bytes: the pool's granularity, as CuPy's
SLAB = 1 << 20  # bytes: smaller blocks are cut out of one mapping
HANDLE = struct.Struct("<8s5q16x")  # 64 bytes: mark, process, descriptor, device, file, bytes
MARK = b"simulIPC"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
MAP_FIXED = 0x10


class CUDARuntimeError(RuntimeError):
    """What the CUDA runtime would report, now or at the next synchronization."""


class Span:
    """A stretch of mapped memory of one device (-1: pinned host memory)."""

    def __init__(self, nbytes: int, device: int, descriptor: int = -1) -> None:
        """`descriptor`: a file of that many bytes to map; else the memory is of this process."""
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if descriptor < 0 else mmap.MAP_SHARED
        use = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, nbytes, use, kind, descriptor, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise CUDARuntimeError(f"cudaErrorMemoryAllocation: {nbytes:,} bytes cannot be had")
        self.address: int = address
        self.nbytes, self.device, self.descriptor = nbytes, device, descriptor
        self.imported = self.closed = False
        raw: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        self.bytes: NDArray[np.uint8] = np.frombuffer(raw, np.uint8)

    def close(self) -> None:
        """Give the memory back; the addresses are never used again, so that a use is noticed."""
        self.closed = True
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        _libc.mmap(self.address, self.nbytes, 0, kind, -1, 0)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def check(self, what: str) -> None:
        """Refuse a use after `close`."""
        if self.closed:
            raise CUDARuntimeError(
                f"cudaErrorIllegalAddress: {what} uses memory that was "
                + ("closed by ipcCloseMemHandle" if self.imported else "freed")
            )


class Registry:
    """All spans by address."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._addresses: list[int] = []
        self._lock = threading.Lock()

    def add(self, span: Span) -> Span:
        """Register a span, and return it."""
        with self._lock:
            place = bisect.bisect(self._addresses, span.address)
            self._addresses.insert(place, span.address)
            self._spans.insert(place, span)
        return span

    def find(self, address: int) -> Span | None:
        """The span that an address lies in."""
        place = bisect.bisect(self._addresses, address) - 1
        if place < 0:
            return None
        span = self._spans[place]
        return span if address < span.address + span.nbytes else None

    def export(self, address: int) -> bytes:
        """The handle of a span of shared memory that begins there."""
        span = self.find(address)
        if span is None or span.descriptor < 0 or span.address != address:
            raise CUDARuntimeError(
                "cudaErrorInvalidValue: an IPC handle is of a whole allocation outside the pool"
            )
        status = os.fstat(span.descriptor)
        return HANDLE.pack(
            MARK, os.getpid(), span.descriptor, status.st_dev, status.st_ino, span.nbytes
        )

    def open(self, handle: bytes, device: int) -> Span:
        """Map the memory behind another process's handle."""
        mark, pid, descriptor, *file, nbytes = HANDLE.unpack(handle)
        if mark != MARK:
            raise CUDARuntimeError("cudaErrorInvalidValue: not a handle of simulated memory")
        if pid == os.getpid():
            raise CUDARuntimeError(
                "cudaErrorDeviceUninitialized: a process cannot open its own IPC handle"
            )
        try:
            opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise CUDARuntimeError(f"cudaErrorMapBufferObjectFailed: {error}") from None
        try:
            status = os.fstat(opened)
            if [status.st_dev, status.st_ino] != file:
                raise CUDARuntimeError("cudaErrorMapBufferObjectFailed: the memory was freed")
            span = Span(nbytes, device, opened)
        finally:
            os.close(opened)
        span.descriptor, span.imported = -1, True
        return self.add(span)

    def close(self, address: int) -> None:
        """Unmap what `open` mapped there."""
        span = self.find(address)
        if span is None or not span.imported or span.closed or span.address != address:
            raise CUDARuntimeError("cudaErrorInvalidValue: no open IPC memory begins there")
        span.close()


def shared_span(nbytes: int, device: int) -> Span:
    """Memory that other processes can map, zero; its pages are made on first use."""
    descriptor = os.memfd_create("hpctrain-sim", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, nbytes)
    return Span(nbytes, device, descriptor)


class Block:
    """A piece of a span that is in use, or free for `owner` to use again."""

    __slots__ = ("address", "nbytes", "owner", "span")

    def __init__(self, span: Span, address: int, nbytes: int, owner: Any) -> None:
        self.span, self.address, self.nbytes, self.owner = span, address, nbytes, owner

    def bytes(self) -> NDArray[np.uint8]:
        """Its memory."""
        start = self.address - self.span.address
        return self.span.bytes[start : start + self.nbytes]


class Pool:
    """Blocks of one device, each given out again at once to the stream it was made for."""

    def __init__(self, registry: Registry, device: int) -> None:
        self._registry, self._device = registry, device
        self._free: dict[tuple[Hashable, int], list[Block]] = {}
        self._slab: Span | None = None
        self._used = 0  # bytes of the slab
        self.returned: deque[Block] = deque()  # by the garbage collector, at any moment

    def take(self, nbytes: int, owner: Hashable) -> Block:
        """A block for a stream: the one of this size that it gave back last, else a fresh one."""
        size = -(-max(nbytes, 1) // UNIT) * UNIT
        free = self._free.get((owner, size))
        return free.pop() if free else self._fresh(size, owner)

    def give(self, block: Block) -> None:
        """Take a block back."""
        self._free.setdefault((block.owner, block.nbytes), []).append(block)

    def _fresh(self, size: int, owner: Hashable) -> Block:
        if self._slab is None or self._used + size > self._slab.nbytes:
            span = self._registry.add(Span(max(size, SLAB), self._device))
            span.bytes.fill(POISON)
            if size > SLAB // 4:
                return Block(span, span.address, size, owner)
            self._slab, self._used = span, 0
        block = Block(self._slab, self._slab.address + self._used, size, owner)
        self._used += size
        return block
