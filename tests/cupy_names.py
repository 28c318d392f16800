"""The part of CuPy that hpctrain/device/cuda.py uses: the contract with CuPy, and with `sim`.

`NAMES` maps a name to what it is. Names of modules, classes and functions are as one writes them;
attributes and methods of an object follow the name of its class. A name is used by cuda.py, exists
in CuPy, and exists in the stand-in of device/sim: test_cuda_interface.py holds all three.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """What a name is: "module", "class", "function", "method" or "attribute".

    `gives`: the class (or module) of an attribute's value or a call's result, where cuda.py uses
    something of it. `positional` and `keywords`: the arguments of a call that cuda.py makes.
    """

    kind: str
    gives: str = ""
    positional: int = 0
    keywords: tuple[str, ...] = ()


def _module(name: str) -> Name:
    return Name("module", name)


def _class(name: str, positional: int = 0, *keywords: str) -> Name:
    return Name("class", name, positional, keywords)


NAMES: dict[str, Name] = {
    "cupy.empty": Name("function", "cupy.ndarray", 2),
    "cupy.zeros": Name("function", "cupy.ndarray", 2),
    "cupy.asarray": Name("function", "cupy.ndarray", 1, ("order",)),
    "cupy.asnumpy": Name("function", "", 1, ("order",)),
    "cupy.matmul": Name("function", "cupy.ndarray", 2, ("out",)),
    "cupy.ndarray": _class("cupy.ndarray", 3),
    "cupy.ndarray.shape": Name("attribute"),
    "cupy.ndarray.dtype": Name("attribute"),
    "cupy.ndarray.data": Name("attribute", "cupy.cuda.MemoryPointer"),
    "cupy.ndarray.__setitem__": Name("method", "", 2),
    "cupy.RawModule": _class("cupy.RawModule", 0, "code", "options"),
    "cupy.RawModule.compile": Name("method"),
    "cupy.RawModule.get_function": Name("method", "cupy.RawKernel", 1),
    "cupy.RawKernel.__call__": Name("method", "", 3),
    "cupy._core": _module("cupy._core"),
    "cupy._core._routines_linalg": _module("cupy._core._routines_linalg"),
    "cupy._core._routines_linalg.set_compute_type": Name("function", "", 2),
    "cupy.cuda": _module("cupy.cuda"),
    "cupy.cuda.Device": _class("cupy.cuda.Device", 1),
    "cupy.cuda.Device.use": Name("method"),
    "cupy.cuda.Device.synchronize": Name("method"),
    "cupy.cuda.Device.attributes": Name("attribute"),
    "cupy.cuda.Device.id": Name("attribute"),
    "cupy.cuda.Device.pci_bus_id": Name("attribute"),
    "cupy.cuda.Stream": _class("cupy.cuda.Stream", 0, "non_blocking"),
    "cupy.cuda.Stream.use": Name("method"),
    "cupy.cuda.Stream.record": Name("method", "cupy.cuda.Event", 1),
    "cupy.cuda.Stream.wait_event": Name("method", "", 1),
    "cupy.cuda.Stream.synchronize": Name("method"),
    "cupy.cuda.get_current_stream": Name("function", "cupy.cuda.Stream"),
    "cupy.cuda.Event": _class("cupy.cuda.Event", 0, "disable_timing"),
    "cupy.cuda.Event.synchronize": Name("method"),
    "cupy.cuda.Event.done": Name("attribute"),
    "cupy.cuda.Memory": _class("cupy.cuda.Memory", 1),
    "cupy.cuda.Memory.ptr": Name("attribute"),
    "cupy.cuda.UnownedMemory": _class("cupy.cuda.Memory", 4),
    "cupy.cuda.MemoryPointer": _class("cupy.cuda.MemoryPointer", 2),
    "cupy.cuda.MemoryPointer.mem": Name("attribute", "cupy.cuda.Memory"),
    "cupy.cuda.MemoryPointer.ptr": Name("attribute"),
    "cupy.cuda.MemoryPointer.copy_to_host_async": Name("method", "", 3),
    "cupy.cuda.MemoryPointer.copy_from_host_async": Name("method", "", 3),
    "cupy.cuda.MemoryPointer.memset_async": Name("method", "", 2),
    "cupy.cuda.alloc_pinned_memory": Name("function", "", 1),
    "cupy.cuda.runtime": _module("cupy.cuda.runtime"),
    "cupy.cuda.runtime.CUDARuntimeError": _class(""),
    "cupy.cuda.runtime.getDeviceCount": Name("function"),
    "cupy.cuda.runtime.getDeviceProperties": Name("function", "", 1),
    "cupy.cuda.runtime.ipcGetMemHandle": Name("function", "", 1),
    "cupy.cuda.runtime.ipcOpenMemHandle": Name("function", "", 1),
    "cupy.cuda.runtime.ipcCloseMemHandle": Name("function", "", 1),
}
