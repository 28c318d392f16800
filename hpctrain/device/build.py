"""Compiling kernels with the host's C++ compiler, and the cache of what was compiled.

A library is one kernel file for one real type and one target. Its name in the cache holds a hash
of everything that decides its content (sources, options, compiler, level), so it is never stale;
it is written aside and renamed, so it is never half there; a run whose libraries are all cached
needs no compiler.

Layer: device. Knows nothing of arrays and launches.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpctrain.device.signatures import kernel_folder, kernel_table
from hpctrain.errors import KernelError

__all__ = [
    "Library",
    "build",
    "build_all",
    "cache_folder",
    "cached",
    "compiler",
    "for_every_file",
    "gpu_options",
    "host_level",
    "lowest_level",
    "options",
]

# Not -ffast-math: it would set flush-to-zero for the whole process and let results depend on how
# an array was split. No contraction: a multiply and an add stay two roundings on every level.
OPTIONS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
REAL = {"float32": "float", "float64": "double", "bfloat16": "bfloat16", "float16": "float16"}
# What a CPU must have for an x86-64 level, as /proc/cpuinfo spells it.
LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
}

Library = tuple[str, str]  # (kernel file's stem, dtype name)


@functools.cache
def host_level() -> str:
    """The highest x86-64 level of this CPU; "native" on another architecture."""
    if os.uname().machine != "x86_64":
        return "native"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        line = next(line for line in text.splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return "x86-64"
    flags = set(line.split(":", 1)[1].split())
    names = list(LEVELS)
    for index, name in enumerate(names):
        if all(LEVELS[below] <= flags for below in names[index:]):
            return name
    return "x86-64"


def lowest_level(levels: Iterable[str]) -> str:
    """The highest level that all CPUs share, given each one's highest."""
    order = [*LEVELS, "x86-64"]
    return max(set(levels), key=lambda level: order.index(level) if level in order else -1)


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, else g++, clang++ or c++ from PATH; None without one."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept; $HPCTRAIN_CACHE, else the user's cache folder.

    Falls back to a folder of this user's under the system's temporary folder where the first
    choice cannot be written, as on compute nodes whose home is mounted read-only.
    """
    named = os.environ.get("HPCTRAIN_CACHE")
    if named:
        return Path(named)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "hpctrain"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"hpctrain-{os.getuid()}"


def build(library: Library, level: str) -> Path:
    """The host target's library of one kernel file, from the cache or from the compiler.

    Raises `KernelError` when it is not cached and there is no compiler, or it does not compile.
    """
    file, dtype = library
    text = (kernel_folder() / f"{file}.cu").read_text(encoding="utf-8")
    return cached(f"{file}-{REAL[dtype]}-host-{level}", options(dtype, level), text)


def cached(name: str, command: list[str], text: str, simt: bool = False) -> Path:
    """The shared library that the compiler makes of `text` with the options `command`.

    The headers in cuda/ decide its name too, those of the SIMT simulator only with `simt`. Raises
    `KernelError` as `build` does.
    """
    content = hashlib.sha256("\0".join([*command, text, _headers(simt)]).encode()).hexdigest()
    path = cache_folder() / f"{name}-{content[:20]}.so"
    if not path.exists():
        _compile(command, text, path)
    return path


def build_all(dtypes: Iterable[str], level: str) -> None:
    """Compile every kernel file for `dtypes` and the host target."""
    for_every_file(dtypes, lambda library: build(library, level))


def for_every_file(dtypes: Iterable[str], build_one: Callable[[Library], Path]) -> None:
    """Compile every kernel file for `dtypes`, as many at once as this process has cores."""
    files = sorted({kernel.file for kernel in kernel_table().values()})
    wanted = [(file, dtype) for dtype in dtypes for file in files]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for future in [pool.submit(build_one, library) for library in wanted]:
            future.result()


def options(dtype: str, level: str) -> list[str]:
    """The compiler's options for the host target."""
    return [*OPTIONS, f"-march={level}", f"-DREAL={REAL[dtype]}"]


def gpu_options(dtype: str) -> tuple[str, ...]:
    """The options that NVRTC gets for a kernel file on every GPU.

    The last one defines a name that nothing uses: CuPy's cache of compiled kernels goes by source
    and options, and would not notice that a header has changed.
    """
    headers = hashlib.sha256(_headers(False).encode()).hexdigest()[:16]
    return (
        "-std=c++17",
        f"-I{kernel_folder()}",
        f"-DREAL={REAL[dtype]}",
        f"-DHPCTRAIN_HEADERS=0x{headers}",
    )


@functools.cache
def _headers(simt: bool) -> str:
    paths = [
        path
        for path in sorted(kernel_folder().glob("*.h"))
        if simt or not path.name.startswith("simt")
    ]
    return "\0".join(path.read_text(encoding="utf-8") for path in paths)


def _compile(command: list[str], text: str, path: Path) -> None:
    program = compiler()
    if program is None:
        raise KernelError(
            f"the kernel library {path.name} is not in the cache and there is no C++ compiler: "
            "install g++ (or load a compiler module), set CXX to one, or set HPCTRAIN_CACHE to a "
            "cache that was filled elsewhere"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        output = Path(folder) / path.name
        include = f"-I{kernel_folder()}"
        done = subprocess.run(
            [program, include, "-x", "c++", "-", "-o", str(output), *command],
            input=text, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise KernelError(f"{program} cannot compile {path.name}:\n{done.stderr.strip()}")
        output.replace(path)
