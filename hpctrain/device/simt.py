"""The SIMT simulator: kernels with real blocks and barriers on the CPU, every access checked.

A kernel file is compiled by the host's compiler with one fiber per CUDA thread (cuda/simt.h), and
its launches are watched (cuda/simt_runtime.h). Found are: races between threads that nothing
orders; divergence at barriers and in warp operations; accesses outside the arrays of the launch
or of a declared array; misaligned accesses; writes to const arrays; reads of shared memory that
nobody wrote; divisions by zero; kernels that do not end. Whether a race is found does not depend
on which thread came first.

Not found: what this launch's data do not lead to; reads of arrays that hold nothing yet; a pointer
to a thread's own variable that leaves it; a promise broken by `__restrict__`; an order made by
fences or atomics between blocks is not known and reported as a race.

For tests: a launch takes some hundred times as long as on the host target (15 ns an access, 30 to
70 ns a switch between threads).

Layer: device. Knows nothing of networks; how a launch is watched is written in cuda/simt_*.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from hpctrain.device import build
from hpctrain.device.launch import real_dtype
from hpctrain.device.signatures import Kernel, kernel_folder, kernel_named, kernels_of
from hpctrain.device.simt_library import ORDERS, Counts, Shape, build_library, library, runtime
from hpctrain.device.simt_memory import Memory
from hpctrain.errors import KernelError, nearest

__all__ = ["Counts", "launch", "prepare"]

WARP = 32
BLOCKS = 3  # default of `grid` at most: few, so that grid-stride loops run several times
LIMIT = 1_000_000_000  # accesses and switches after which a launch is endless: about 20 s

Order = Literal["forward", "reverse"] | int


def launch(
    name: str,
    *args: Any,
    work: int,
    block: int = 128,
    grid: int | None = None,
    order: Order = "forward",
    source: Path | None = None,
    limit: int = LIMIT,
    record: int = 0,
) -> Counts:
    """Run the kernel `name` over `work` elements or rows, thread by thread, and watch it.

    `args` as `CpuDevice.launch` takes them; for a table of pointers the list of its arrays.
    `block`: threads per block, a multiple of 32; `grid`: blocks, by default as many as `work` asks
    for, at most 3. `order` in which blocks and threads take turns: "forward", "reverse", or the
    seed of an order that is drawn anew for every turn. `source`: a kernel file of one's own
    instead of cuda/. `record`: that many accesses at most are recorded, for simt_traffic; a
    `KernelError` where there are more.

    Raises `KernelError` as `CpuDevice.launch` does, and with up to eight findings; then the arrays
    are as they were.
    """
    kernel = kernel_named(name) if source is None else _kernel_in(source, name)
    if block % WARP or not 0 < block <= 1024:
        raise KernelError(f"{name}: block={block}; a block has 32, 64, ... or 1024 threads")
    if not isinstance(order, int) and order not in ORDERS:
        raise KernelError(f"{name}: order {order!r}; it is a seed or one of {', '.join(ORDERS)}")
    if len(args) != len(kernel.parameters):
        raise KernelError(
            f"{name} takes {len(kernel.parameters)} arguments "
            f"({', '.join(p.name for p in kernel.parameters)}), not {len(args)}"
        )
    if grid is None:
        threads = work * (WARP if kernel.kind == "ROWS" else 1)
        grid = min(BLOCKS, -(-threads // block))
    if work <= 0 or grid <= 0:
        return Counts(0, 0, 0)
    real = real_dtype(kernel, args)
    memory = Memory(kernel, args, real, runtime().simt_cell_bytes())
    code = library(source or kernel_folder() / f"{kernel.file}.cu", real)
    counts, findings = code.run(kernel, memory, Shape(grid, block, order, limit, record))
    if findings:
        raise KernelError(
            f"kernel {name} ({real}, {grid} x {block} threads, order {order}):\n{findings}"
        )
    memory.copy_back()
    return counts


def prepare(dtypes: Iterable[str]) -> None:
    """Compile every kernel file for the simulator, as many at once as there are cores."""
    runtime()
    folder = kernel_folder()
    build.for_every_file(
        dtypes, lambda library: build_library(folder / f"{library[0]}.cu", library[1])
    )


def _kernel_in(source: Path, name: str) -> Kernel:
    kernels = {kernel.name: kernel for kernel in kernels_of(source)}
    if name not in kernels:
        raise KernelError(f"{source} defines no kernel {name!r}{nearest(name, kernels)}")
    return kernels[name]
