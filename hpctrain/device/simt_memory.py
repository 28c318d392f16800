"""The memory of a simulated launch: arguments in guarded copies, and the cells that watch them.

Layer: device. Is given the cell's size; knows nothing of how accesses are checked.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.device.launch import CTYPES, check_array, resolved
from hpctrain.device.signatures import Kernel, Parameter
from hpctrain.errors import KernelError

__all__ = ["Memory", "Region"]

GAP = 1 << 16  # bytes between the arrays of a launch: one cannot be reached from another by mistake

Array = NDArray[Any]
Entry = tuple[str, bool, Array]  # an array argument: name, writable, array


class Region(ctypes.Structure):
    """struct Region of simt_shadow.h."""

    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("item", ctypes.c_uint64),
        ("granule", ctypes.c_uint64),
        ("cells", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_int32),
        ("shared", ctypes.c_int32),
    ]


class Memory:
    """The arguments of a launch in memory of their own: every array far from every other.

    Arrays that overlap keep doing so: they are copied together.
    """

    def __init__(self, kernel: Kernel, args: Sequence[Any], real: str, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self.slots = (ctypes.c_uint64 * len(args))()
        self.regions: list[Region] = []
        self._keep: list[Array] = []  # what regions and slots point to
        self._outputs: list[tuple[Array, Array]] = []
        entries: list[Entry] = []
        for parameter, value in zip(kernel.parameters, args, strict=True):
            if parameter.pointers and value is not None:
                entries += _arrays_of(kernel, parameter, value, real)
        addresses = self._place(entries)
        for index, (parameter, value) in enumerate(zip(kernel.parameters, args, strict=True)):
            type_name = resolved(parameter.type, real)
            if not parameter.pointers:
                raw = bytes(CTYPES[type_name](value))
                self.slots[index] = int.from_bytes(raw.ljust(8, b"\0"), "little")
            elif value is None:
                self.regions.append(Region(name=parameter.name.encode()))
            elif parameter.pointers == 1:
                self.slots[index] = addresses[parameter.name]
            else:
                names = [f"{parameter.name}[{i}]" for i in range(len(value))]
                table = np.array([addresses[name] for name in names], np.uint64)
                moved = self._place([(parameter.name, False, table)])
                self.slots[index] = moved[parameter.name]

    def _place(self, entries: list[Entry]) -> dict[str, int]:
        """Copy arrays, register them, and return the copies' addresses."""
        addresses: dict[str, int] = {}
        for group in _overlapping(entries):
            first = min(array.ctypes.data for _, _, array in group)
            last = max(array.ctypes.data + array.nbytes for _, _, array in group)
            granule = math.gcd(
                *(array.itemsize for _, _, array in group),
                *(array.ctypes.data - first for _, _, array in group),
            )
            room = np.empty(last - first + 2 * GAP + 64, np.uint8)
            start = GAP + (first - room.ctypes.data - GAP) % 64  # aligned as it was
            cells = np.zeros((last - first) // granule * self._cell_bytes, np.uint8)
            self._keep += [room, cells]
            for name, writable, array in group:
                offset = array.ctypes.data - first
                copy = np.ndarray(array.shape, array.dtype, room, start + offset)
                copy[...] = array
                if writable:
                    self._outputs.append((array, copy))
                addresses[name] = copy.ctypes.data
                at = cells.ctypes.data + offset // granule * self._cell_bytes
                self.regions.append(
                    Region(
                        copy.ctypes.data, copy.nbytes, copy.itemsize, granule, at, name.encode(),
                        writable,
                    )
                )  # fmt: skip
        return addresses

    def copy_back(self) -> None:
        """Give the caller's arrays what the kernel wrote."""
        for array, copy in self._outputs:
            array[...] = copy


def _arrays_of(kernel: Kernel, parameter: Parameter, value: Any, real: str) -> list[Entry]:
    """The arrays that come with one argument, checked: (name, writable, array)."""
    if parameter.pointers == 1:
        check_array(kernel, parameter, value, real)
        return [(parameter.name, not parameter.constant, value)]
    if not isinstance(value, list | tuple):
        raise KernelError(
            f"{kernel.name}: {parameter.name} is a table of pointers; give the simulator the list "
            "of its arrays, so that it knows where they end"
        )
    entries = []
    for index, array in enumerate(value):
        element = replace(parameter, name=f"{parameter.name}[{index}]", pointers=1)
        entries += _arrays_of(kernel, element, array, real)
    return entries


def _overlapping(entries: list[Entry]) -> list[list[Entry]]:
    """The arrays in groups that share memory."""
    groups: list[list[Entry]] = []
    end = 0
    for entry in sorted(entries, key=lambda entry: entry[2].ctypes.data):
        array = entry[2]
        if not groups or array.ctypes.data >= end:
            groups.append([])
        groups[-1].append(entry)
        end = max(end, array.ctypes.data + array.nbytes)
    return groups
