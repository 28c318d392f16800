"""Whether the MPI library may be given GPU memory, and whether ranks share a GPU.

A library without GPU support does not refuse a GPU's address: it reads it as host memory, which is
a segmentation fault or a hang. So GPU buffers go to MPI by order or on positive evidence only; else
through pinned host memory. The evidence, by library:

    any         MPI-4.1's memory kinds (mpi_memory_alloc_kinds) name cuda
    Open MPI    MPIX_Query_cuda_support() is 1, or where it lacks that function ompi_info says that
                CUDA support was built in; not if switched off (OMPI_MCA_opal_cuda_support=0), and
                not if UCX is loaded without its CUDA module, of which Open MPI knows nothing
    MPICH       MPIX_GPU_query_support(CUDA) or MPIX_Query_cuda_support() says so;
                not if MPIR_CVAR_ENABLE_GPU=0
    Cray MPICH  MPICH_GPU_SUPPORT_ENABLED=1; its functions say what was built, not what is on
    MVAPICH     MV2_USE_CUDA=1 or MVP_USE_CUDA=1
    ParaStation PSP_CUDA=1

The simulated device's memory is the host's, so every MPI library can read it.

Layer: mpi. Is given a device's name and identity; knows nothing of its arrays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpctrain.errors import UsageError
from hpctrain.mpi.gpu_facts import Facts, facts

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ORDERS", "Decision", "decide", "evidence", "warn_of_shared_gpus"]

log = logging.getLogger(__name__)

ORDERS = ("auto", "on", "off")
VARIABLE = "HPCTRAIN_GPU_MPI"


@dataclass(frozen=True)
class Decision:
    """Whether GPU buffers go to MPI, and why."""

    on: bool
    reason: str


_Judge = Callable[[Facts], Decision]


def decide(comm: MPI.Intracomm, device: str, order: str = "auto") -> Decision:
    """Whether arrays of the device called `device` may be given to MPI. Collective.

    The same on all ranks: yes only if every rank says yes; the reason is that of the first rank
    that says no. Rank 0 logs one line.

    Args:
        order: "on" or "off" decide; "auto": what HPCTRAIN_GPU_MPI says, else the evidence.

    Raises:
        UsageError: on all ranks, another order on any of them.
    """
    mine, problem = _own_decision(device, order)
    given: list[tuple[Decision, str]] = comm.allgather((mine, problem))
    for rank, (_, problem) in enumerate(given):
        if problem:
            raise UsageError(problem if problem == given[0][1] else f"rank {rank}: {problem}")
    no = next((rank for rank, (one, _) in enumerate(given) if not one.on), None)
    result = given[no or 0][0]
    if no is not None and given[0][0].on:
        result = Decision(False, f"rank {no}: {result.reason}")
    if comm.rank == 0:
        how = "given to MPI" if result.on else "sent to MPI through pinned host memory"
        log.info("GPU buffers are %s: %s", how, result.reason)
    return result


def _own_decision(device: str, order: str) -> tuple[Decision, str]:
    """This rank's decision, and what is wrong with its order."""
    named, source = order, f"--gpu-mpi {order} or parallel.gpu_mpi"
    if order == "auto" and os.environ.get(VARIABLE, ""):
        named, source = os.environ[VARIABLE].strip().lower(), f"{VARIABLE}={os.environ[VARIABLE]}"
    if named in ("on", "off"):
        return Decision(named == "on", f"by order ({source})"), ""
    if named != "auto":
        return Decision(False, ""), (
            f"{source}: {named!r} is no answer to whether GPU buffers go to MPI; use "
            f"{', '.join(ORDERS)}"
        )
    if device == "sim":
        return Decision(True, "the simulated device's memory is the host's"), ""
    return evidence(facts()), ""


def evidence(known: Facts) -> Decision:
    """What `known` proves: yes on positive evidence only."""
    if "cuda" in known.kinds.lower():
        return Decision(True, f"MPI's memory kinds are {known.kinds}")
    for names, judge in _JUDGES:
        if any(name in known.library for name in names):
            return judge(known)
    return Decision(False, f"no evidence of GPU support in {_first_line(known.library)}")


def _open_mpi(known: Facts) -> Decision:
    names = ("OMPI_MCA_opal_cuda_support", "OMPI_MCA_mpi_cuda_support")
    if off := known.forbidden(*names):
        return Decision(False, f"switched off by {off}")
    if known.query is None and not known.built_in:
        said = "ompi_info says that CUDA was not built in" if known.built_in is False else ""
        return Decision(False, said or "Open MPI has no MPIX_Query_cuda_support")
    if known.query is False:
        return Decision(False, "Open MPI's MPIX_Query_cuda_support() says no")
    if _has(known, "libucp.") and not _has(known, "libuct_cuda."):
        return Decision(False, "UCX is loaded without its CUDA module libuct_cuda")
    if known.query:
        return Decision(True, "Open MPI's MPIX_Query_cuda_support() says yes")
    return Decision(True, "ompi_info says that CUDA support was built in")


def _mpich(known: Facts) -> Decision:
    if off := known.forbidden("MPIR_CVAR_ENABLE_GPU"):
        return Decision(False, f"switched off by {off}")
    if known.gpu_query:
        return Decision(True, "MPICH's MPIX_GPU_query_support() says yes")
    if known.gpu_query is None and known.query:
        return Decision(True, "MPICH's MPIX_Query_cuda_support() says yes")
    says = "has no" if known.gpu_query is None and known.query is None else "says no by"
    return Decision(False, f"MPICH {says} MPIX_GPU_query_support()")


def _by_variable(library: str, *names: str) -> _Judge:
    """A library that a variable switches on, and that works only then."""

    def judge(known: Facts) -> Decision:
        if on := known.ordered(*names):
            return Decision(True, f"{on} with {library}")
        return Decision(False, f"{library} needs {names[0]}=1, which is not set")

    return judge


# By words of the library's own name; those derived from MPICH come before it.
_JUDGES: tuple[tuple[tuple[str, ...], _Judge], ...] = (
    (("Open MPI",), _open_mpi),
    (("CRAY MPICH", "Cray MPICH"), _by_variable("Cray MPICH", "MPICH_GPU_SUPPORT_ENABLED")),
    (("MVAPICH",), _by_variable("MVAPICH", "MV2_USE_CUDA", "MVP_USE_CUDA")),
    (("ParaStation",), _by_variable("ParaStation MPI", "PSP_CUDA")),
    (("MPICH",), _mpich),
)


def _has(known: Facts, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in known.loaded)


def _first_line(text: str) -> str:
    return text.splitlines()[0].split(",")[0] if text else "an unknown MPI library"


def warn_of_shared_gpus(comm: MPI.Intracomm, uuid: str) -> list[list[int]]:
    """The ranks that share a GPU, in groups; rank 0 warns of them in one line. Collective.

    Args:
        uuid: of this rank's GPU; "" where it has none.

    MIG instances and GPUs of several hosts never compare equal: host and UUID both count.
    """
    from mpi4py import MPI

    places: dict[tuple[str, str], list[int]] = {}
    everyone: list[tuple[str, str]] = comm.allgather((MPI.Get_processor_name(), uuid))
    for rank, place in enumerate(everyone):
        if place[1]:
            places.setdefault(place, []).append(rank)
    shared = {place: ranks for place, ranks in places.items() if len(ranks) > 1}
    if shared and comm.rank == 0:
        (host, gpu), ranks = next(iter(shared.items()))
        more = f", and {len(shared) - 1} more GPUs are shared" if len(shared) > 1 else ""
        log.warning(
            "ranks %s share the GPU %s of %s%s: start one rank per GPU, or look at "
            "CUDA_VISIBLE_DEVICES, HPCTRAIN_DEVICE and HPCTRAIN_GPU_ORDER",
            ", ".join(map(str, ranks)), gpu, host, more,
        )  # fmt: skip
    return list(shared.values())
