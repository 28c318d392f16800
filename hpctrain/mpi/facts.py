"""What the MPI library says about itself, for reports.

Layer: mpi. Starts MPI when asked anything; knows nothing of ranks and what is sent.
"""

from __future__ import annotations

__all__ = ["library", "thread_level"]


def library() -> str:
    """Name and version of the MPI library, such as "Open MPI v5.0.11". Not collective."""
    from mpi4py import MPI

    text = MPI.Get_library_version().replace("\0", "").strip()
    first = text.split(",")[0].splitlines()[0]
    return " ".join(first.replace("Version:", "").split())


def thread_level() -> str:
    """What MPI allows threads to do: "single", "funneled", "serialized" or "multiple"."""
    from mpi4py import MPI

    names = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return names[MPI.Query_thread()]
