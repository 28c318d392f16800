"""What `hpctrain doctor` looks at on disk and in memory: HDF5, memory, /dev/shm, folders.

Each function is one line of the report and may raise whatever it likes: the caller turns that
into a failed line. Nothing stays behind: what is written is written to temporary files.

Given the folder that runs go to. Knows nothing of MPI.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import tempfile
from pathlib import Path

from hpctrain.cli.findings import Answer, Check, fail, note, ok, warn

__all__ = ["checks"]

GIB = 2**30


def checks(folder: Path) -> list[Check]:
    """All checks of this file. `folder`: where runs are to be written."""
    return [
        Check("HDF5", "versions", hdf5_versions),
        Check("HDF5", "filters", hdf5_filters),
        Check("HDF5", "file locking", functools.partial(hdf5_file, folder)),
        Check("Memory and folders", "memory", memory),
        Check("Memory and folders", "home", home),
        Check("Memory and folders", "kernel cache", cache),
        Check("Memory and folders", "run directory", functools.partial(run_folder, folder)),
    ]


def hdf5_versions() -> Answer:
    """h5py and the HDF5 library."""
    import h5py

    return ok(f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}")


def hdf5_filters() -> Answer:
    """The filters that shards may use: checksums must be there, compression should."""
    import h5py

    known = {
        "fletcher32": h5py.h5z.FILTER_FLETCHER32,
        "shuffle": h5py.h5z.FILTER_SHUFFLE,
        "gzip": h5py.h5z.FILTER_DEFLATE,
        "lzf": h5py.h5z.FILTER_LZF,
    }
    there = [name for name, number in known.items() if h5py.h5z.filter_avail(number)]
    missing = [name for name in known if name not in there]
    if importlib.util.find_spec("hdf5plugin"):
        there.append("hdf5plugin")
    text = ", ".join(there) + (f"; missing: {', '.join(missing)}" if missing else "")
    if "fletcher32" in missing:
        return fail(text, "shards carry fletcher32 checksums: install h5py from PyPI or conda")
    if missing:
        return note(
            text,
            "shards packed with a missing filter cannot be read here: install h5py from PyPI, or "
            "pack them without it (of `hpctrain data pack`: without --gzip)",
        )
    return ok(text)


def hdf5_file(folder: Path) -> Answer:
    """Write and read an HDF5 file where the runs go: some file systems refuse HDF5's locks."""
    import h5py
    import numpy as np

    setting = os.environ.get("HDF5_USE_FILE_LOCKING", "not set")
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=_existing(folder)) as place:
            path = Path(place, "locking.h5")
            with h5py.File(path, "w") as file:
                file.create_dataset("x", data=np.arange(64), chunks=(16,), fletcher32=True)
            with h5py.File(path) as file:
                right = bool((file["x"][:] == np.arange(64)).all())
    except OSError as error:
        return fail(
            f"HDF5_USE_FILE_LOCKING is {setting}; no HDF5 file in {folder}: {error}",
            "set HDF5_USE_FILE_LOCKING=FALSE if the message speaks of locks, "
            "else name a writable folder with --folder",
        )
    if not right:
        return fail("a file reads back wrongly", "use another file system for data and runs")
    return ok(f"works (HDF5_USE_FILE_LOCKING {setting})")


def memory() -> Answer:
    """Main memory that is free for a run: the machine's, or the job's where that is limited."""
    from hpctrain.mpi.memory import available_memory

    text = Path("/proc/meminfo").read_text(encoding="ascii")
    total = next(int(s.split()[1]) * 1024 for s in text.splitlines() if s.startswith("MemTotal"))
    free = available_memory()
    value = f"{free / GIB:.1f} GiB available to this job, the machine has {total / GIB:.1f} GiB"
    limit = _address_limit()
    if limit is not None and limit < total:
        value += f", ulimit -v allows a process {limit / GIB:.1f} GiB"
        free = min(free, limit)
    if free < GIB:
        return warn(value, "ask the scheduler for more memory (--mem), or use fewer ranks", True)
    return ok(value, varies=True)


def _address_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def home() -> Answer:
    """The home folder: compute nodes may have it read-only, or have none."""
    from hpctrain.device import build

    folder = Path.home()
    text = f"{folder}{_file_system(folder)}"
    if problem := "there is none" if not folder.is_dir() else _unwritable(folder):
        return note(
            f"{text}: {problem}; compiled kernels are kept in {build.cache_folder()}",
            "set HPCTRAIN_CACHE (and with a GPU CUPY_CACHE_DIR) to a folder that outlives the job",
        )
    return ok(text)


def cache() -> Answer:
    """The folder of compiled kernels: there, or can be made, and writable."""
    from hpctrain.device import build

    folder = build.cache_folder()
    text = f"{folder}{_file_system(folder)}"
    problem = _unwritable(folder)
    if problem:
        return fail(f"{text}: {problem}", "set HPCTRAIN_CACHE to a folder that you can write to")
    if _file_system_type(folder).startswith("nfs"):
        return note(text, "with many nodes set HPCTRAIN_CACHE to a local or parallel file system")
    return ok(text)


def run_folder(folder: Path) -> Answer:
    """Whether runs can be written here, and how much."""
    text = f"{folder.absolute()}{_file_system(folder)}"
    problem = _unwritable(folder)
    if problem:
        return fail(f"{text}: {problem}", "set run.folder in the run file to a writable place")
    space = os.statvfs(_existing(folder))
    free = space.f_bavail * space.f_frsize
    text += f", {free / GIB:.1f} GiB free"
    if free < GIB or (space.f_files and space.f_favail < 1000):
        return warn(
            f"{text}, {space.f_favail} files", "make room, or set run.folder elsewhere", True
        )
    return ok(text, varies=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _unwritable(folder: Path) -> str:
    """Why no file can be made in the folder (or, before it exists, above it); "" if one can."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"hpctrain")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _file_system_type(folder: Path) -> str:
    """ext4, nfs4, lustre, ...: the type of the mount that holds the folder; "" if unknown."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    path = str(_existing(folder).resolve())
    for line in mounts.splitlines():
        _, point, name = line.split()[:3]
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def _file_system(folder: Path) -> str:
    kind = _file_system_type(folder)
    return f" ({kind})" if kind else ""
