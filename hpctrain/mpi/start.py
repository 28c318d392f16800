"""Starting under MPI so that a failure on one rank ends the job instead of hanging it.

Without care an exception on one rank leaves the others waiting in a collective until the time
limit, and a launcher of another MPI starts N copies of "rank 0 of 1" that all train and all write
the same files. `start` guards against both.

The order of a start: (1) choose and open the device, by `choose_gpu`, since MPI libraries want the
GPU to be chosen before they start; (2) `start()`, which imports MPI.

Layer: mpi. Is told how many GPUs there are; knows nothing else of devices, networks or files.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hpctrain.errors import DeviceError, HpctrainError, LaunchError, UsageError
from hpctrain.mpi.facts import library

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["check_launcher", "choose_gpu", "local_rank_from_environment", "start"]

# By launcher: Open MPI; Hydra and Intel MPI; PALS; other PMI; MVAPICH; Flux; jsrun; srun. Slurm's
# is the last: under mpirun inside a Slurm job it describes mpirun's daemon, not the rank.
LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PALS_LOCAL_RANKID",
    "PMI_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "FLUX_TASK_LOCAL_ID",
    "JSM_NAMESPACE_LOCAL_RANK",
    "SLURM_LOCALID",
)
SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
# Rank 0 speaks first. When all ranks fail alike it has ended the job before the others speak too.
HOLD = 0.5  # seconds
PASS_ON = 0.2  # seconds for the launcher to pass the message on: MPICH's may kill ranks before


def local_rank_from_environment(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's number on its node, as the launcher tells it; None without a launcher."""
    for name in LOCAL_RANKS:
        value = environment.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def choose_gpu(visible: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of the GPU this process takes, of `visible` ones. Before MPI starts.

    HPCTRAIN_DEVICE=2            that one
    one GPU is visible           that one (the scheduler has chosen)
    HPCTRAIN_GPU_ORDER=3,2,1,0   the local rank's entry, counted round
    else                         the local rank, counted round; 0 without a launcher

    Raises:
        UsageError: a variable that is no number, or names a GPU that is not visible.
        DeviceError: MPI runs already, with several ranks.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.size > 1:
        raise DeviceError(
            "a GPU is chosen after MPI has started: the MPI library may already hold memory on "
            "another one, and then fails or hangs when it is given this one's; open the device "
            "first (hpctrain.open_device), start MPI after it, and hand the device in"
        )
    if device := environment.get("HPCTRAIN_DEVICE", ""):
        return _visible_gpu(device, "HPCTRAIN_DEVICE", device, visible)
    if visible == 1:
        return 0
    local_rank = local_rank_from_environment(environment) or 0
    if order := environment.get("HPCTRAIN_GPU_ORDER", ""):
        entries = order.split(",")
        chosen = entries[local_rank % len(entries)].strip()
        return _visible_gpu(chosen, "HPCTRAIN_GPU_ORDER", order, visible)
    return local_rank % visible


def _visible_gpu(text: str, name: str, value: str, visible: int) -> int:
    if not text.isdigit() or int(text) >= visible:
        raise UsageError(
            f"{name}={value}: {text!r} is not one of the {visible} visible GPUs, whose numbers are "
            f"0 to {visible - 1}; correct it, or look at CUDA_VISIBLE_DEVICES"
        )
    return int(text)


def start(allow_singleton: bool = False) -> MPI.Intracomm:
    """Start MPI and return the world communicator. Not collective; safe to call again.

    When there are several ranks, an exception that nobody catches, in any thread, is written to
    standard error with the rank's number and ends all ranks: `HpctrainError` as its message with
    its exit code, anything else as a traceback with exit code 1. HPCTRAIN_ABORT_ON_EXCEPTION=0
    turns this off (notebooks, debuggers). A single process keeps Python's own behaviour.

    Args:
        allow_singleton: do not check that the launcher started as many ranks as MPI sees.

    Raises:
        LaunchError: MPI and the launcher do not belong together.
    """
    with contextlib.suppress(io.UnsupportedOperation, AttributeError, ValueError):
        if not faulthandler.is_enabled():
            faulthandler.enable()  # a crash shows where; fails where stderr is no real file
    import mpi4py

    # Else the first reduction of objects on a communicator duplicates it while it holds Python's
    # lock: should a rank die meanwhile, no thread could say so, not even the watchdog's.
    mpi4py.rc.fast_reduce = False
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if not allow_singleton:
        check_launcher(world.size, library(), os.environ)
    if world.size > 1 and os.environ.get("HPCTRAIN_ABORT_ON_EXCEPTION", "1") != "0":
        sys.excepthook = _main_thread_failed
        threading.excepthook = _thread_failed
    if world.size == 1:
        _unlink_own_segments()
    return world


def check_launcher(size: int, library: str, environment: Mapping[str, str]) -> None:
    """Compare the world's `size` with the number of ranks the launcher says it started.

    `library`: name and version of the MPI library, for the message.

    Raises:
        LaunchError: the launcher started several, but each sees only itself.
    """
    if size > 1:
        return
    name = next((name for name in SIZES if name in environment), None)
    if name is None and "SLURM_STEP_ID" in environment:  # srun itself, not a batch script
        name = "SLURM_STEP_NUM_TASKS"
    value = environment.get(name, "") if name else ""
    if not value.isdigit() or int(value) <= 1:
        return
    raise LaunchError(
        f"the launcher started {value} ranks ({name}={value}), but this one is rank 0 of 1: the "
        f"launcher does not belong to the MPI library that mpi4py uses ({library}). Start with "
        f"that library's own mpirun ({_mpirun_beside_python()}), or under Slurm with the right "
        "`srun --mpi=...` (see `srun --mpi=list`)"
    )


def _unlink_own_segments() -> None:
    """Open MPI without mpirun leaves 16 MiB of its own in /dev/shm, even when it ends well.

    No other rank will ever look for the file by its name, so the name can go at once.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.parent == Path("/dev/shm") and path.name.startswith("sm_segment."):
                path.unlink(missing_ok=True)


def _mpirun_beside_python() -> str:
    path = Path(sys.executable).parent / "mpirun"
    return str(path) if path.exists() else "mpirun --version tells whose it is"


def _main_thread_failed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """sys.excepthook."""
    _end_job(error, trace, "")


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """threading.excepthook: the main thread may be sitting in an MPI call meanwhile."""
    if args.exc_value is None or isinstance(args.exc_value, SystemExit):
        return
    name = args.thread.name if args.thread else "unknown"
    _end_job(args.exc_value, args.exc_traceback, f", thread {name}")


def _end_job(error: BaseException, trace: TracebackType | None, where: str) -> None:
    """Write what happened in one piece, so that ranks' lines do not mix, and end all ranks."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    if rank:
        time.sleep(HOLD)
    if isinstance(error, HpctrainError):
        code = error.exit_code
        text = f"error: {error}" if rank == 0 else f"error on rank {rank} of {size}: {error}"
    else:
        code = 1
        lines = traceback.format_exception(type(error), error, trace)
        text = f"rank {rank} of {size} ({platform.node()}){where}:\n{''.join(lines)}"
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{text.rstrip()}\n".encode(errors="replace"))
    time.sleep(PASS_ON)
    # Without full thread support only the main thread may call MPI; a launcher also ends the job
    # when one rank exits with an error before MPI_Finalize.
    if where and MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        os._exit(code)
    MPI.COMM_WORLD.Abort(code)
