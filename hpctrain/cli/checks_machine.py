"""What `hpctrain doctor` looks at first: Python, compiler, BLAS, GPU.

Each function is one line of the report and may raise whatever it likes: the caller turns that
into a failed line. Nothing stays behind: what is compiled is compiled to a temporary folder.

Given the launcher's local rank, so that a node compiles once. Knows nothing of MPI itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpctrain.cli.findings import Answer, Check, fail, note, ok, warn

__all__ = ["checks"]

# Module, distribution and lowest version of everything that must be installed, as in setup.cfg.
REQUIRED = {
    "numpy": ("numpy", "2.0"),
    "mpi4py": ("mpi4py", "4.1"),
    "h5py": ("h5py", "3.10"),
    "ml_dtypes": ("ml_dtypes", "0.5"),
    "msgspec": ("msgspec", "0.18"),
    "tomli_w": ("tomli_w", "1.0"),
    "rich": ("rich", "13"),
    "threadpoolctl": ("threadpoolctl", "3.2"),
}


def checks(local_rank: int) -> list[Check]:
    """All checks of this file."""
    once = local_rank == 0  # of the node's ranks, one compiles
    return [
        Check("Python", "version", python_version),
        Check("Python", "packages", packages),
        Check("Python", "hpctrain", where),
        Check("C++ compiler", "compiler", compiler),
        Check("C++ compiler", "x86-64 level", level),
        Check("C++ compiler", "kernels", compiles if once else _nothing),
        Check("BLAS and threads", "BLAS", blas),
        Check("BLAS and threads", "OPENBLAS_CORETYPE", coretype),
        Check("GPU", "CuPy", cupy),
    ]


def _nothing() -> None:
    return None


def python_version() -> Answer:
    """Python itself."""
    text = f"{platform.python_version()} ({sys.executable})"
    if _numbers(platform.python_version()) < (3, 11):
        return fail(text, "hpctrain needs Python 3.11 or newer; make the environment with that")
    return ok(text)


def packages() -> Answer:
    """The packages that hpctrain needs, by version."""
    found: list[str] = []
    missing: list[str] = []
    for module, (name, lowest) in REQUIRED.items():
        if importlib.util.find_spec(module) is None:
            missing.append(f"{name} (missing)")
            continue
        version = importlib.metadata.version(name)
        (found if _numbers(version) >= _numbers(lowest) else missing).append(f"{name} {version}")
    if missing:
        wanted = " ".join(f"'{name}>={lowest}'" for name, lowest in REQUIRED.values())
        return fail(", ".join(missing), f"{sys.executable} -m pip install {wanted}")
    return ok(", ".join(found))


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 10) of "3.10rc1": enough to compare with a lowest version."""
    parts = []
    for part in version.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


def where() -> Answer:
    """Which hpctrain this is."""
    from hpctrain import __version__

    return ok(f"{__version__} in {Path(__file__).resolve().parents[1]}")


def compiler() -> Answer:
    """The C++ compiler and its version."""
    from hpctrain.device import build

    program = build.compiler()
    if program is None:
        named = os.environ.get("CXX")
        text = f"CXX={named} is not a program" if named else "none in PATH"
        return warn(
            text, "install g++ (apt install g++, module load gcc) or set CXX to a C++17 compiler"
        )
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=20, check=False
    )
    first = (done.stdout or done.stderr).strip().splitlines()[:1]
    if done.returncode or not first:
        return fail(f"{program} --version fails", "set CXX to a working C++17 compiler")
    return ok(f"{program} ({first[0]})")


def level() -> Answer:
    """The instruction set kernels are compiled for."""
    from hpctrain.device import build

    name = build.host_level()
    if name == "x86-64-v4" or name == "x86-64-v3":
        return ok(name)
    return note(
        name, "kernels are built for x86-64-v3 and v4 first; they are right here, but slower"
    )


def compiles() -> Answer:
    """Whether kernels can be had: compiled here, or all of them from the cache."""
    from hpctrain.device import build
    from hpctrain.errors import KernelError

    if build.compiler() is None:
        try:
            build.build_all(["float32", "float64"], build.host_level())
        except KernelError as error:
            return fail(str(error).splitlines()[0], "install a C++ compiler or fill the cache")
        return note(
            f"no compiler, but all are in {build.cache_folder()}",
            "keep that cache; after an update of hpctrain it must be filled again",
        )
    with _temporary_cache():
        try:
            build.build(("elementwise", "float32"), build.host_level())
        except KernelError as error:
            text = " / ".join(str(error).splitlines()[:2])
            return fail(text, "set CXX to a compiler that knows C++17 and this CPU's level")
    return ok("elementwise.cu compiles")


@contextmanager
def _temporary_cache() -> Iterator[None]:
    """An empty kernel cache, so that something is compiled."""
    before = os.environ.get("HPCTRAIN_CACHE")
    with tempfile.TemporaryDirectory(prefix="hpctrain-doctor-") as folder:
        os.environ["HPCTRAIN_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["HPCTRAIN_CACHE"]
            if before is not None:
                os.environ["HPCTRAIN_CACHE"] = before


def blas() -> Answer:
    """The BLAS library under NumPy, the CPU kernels it chose, and its threads."""
    library = _blas()
    if library is None:
        return warn(
            "threadpoolctl knows none that NumPy uses",
            "set the library's own thread variable, for example OMP_NUM_THREADS",
        )
    text = f"{library['internal_api']} {library['version']}"
    kernels, threads = library.get("architecture"), library["num_threads"]
    return ok(f"{text}, kernels for {kernels}, {threads} thread{'s' * (threads != 1)}")


def _blas() -> dict[str, Any] | None:
    importlib.import_module("numpy")
    import threadpoolctl

    found = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"]
    return found[0] if found else None


def coretype() -> Answer | None:
    """Whether OpenBLAS was told which kernels to use."""
    library = _blas()
    if library is None or library["internal_api"] != "openblas":
        return None
    chosen, asked = library.get("architecture", ""), os.environ.get("OPENBLAS_CORETYPE")
    if not asked:
        return note(
            f"not set; OpenBLAS chose {chosen}",
            "for the same bits on other machines set it to one value everywhere, "
            f"for example OPENBLAS_CORETYPE={chosen}, before Python starts",
        )
    if asked.lower() != chosen.lower():
        return warn(
            f"{asked}, but OpenBLAS uses {chosen}",
            "set it before Python starts, to a name that OpenBLAS knows and this CPU can run",
        )
    return ok(asked)


def cupy() -> Answer:
    """CuPy and the GPUs; neither is needed."""
    gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    if importlib.util.find_spec("cupy") is None:
        if gpu:
            return note(
                "not installed, but there is an NVIDIA GPU: runs use the CPU only",
                "pip install 'hpctrain[cuda13x]', or [cuda12x] for a driver of CUDA 12",
            )
        return ok("not installed and no NVIDIA GPU: CPU only")
    from hpctrain.device import cuda

    version = importlib.metadata.version
    names = [n for n in ("cupy", "cupy-cuda12x", "cupy-cuda13x") if _installed(n)]
    text = ", ".join(f"{n} {version(n)}" for n in names) or "cupy"
    if cuda.available():
        return ok(f"{text} and a GPU")
    if gpu:
        return warn(
            f"{text}, which cannot use the GPU that is there",
            "run `python -c 'import cupy; cupy.show_config()'` and compare driver and CUDA runtime",
        )
    return ok(f"{text}, no GPU: CPU only")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
