"""Launch shapes, and 64-bit indices in every kernel."""

from __future__ import annotations

import re
import subprocess

import pytest

from hpctrain.device.build import compiler
from hpctrain.device.launch import BLOCK, BLOCKS_PER_SM, launch_shape
from hpctrain.device.signatures import kernel_folder, kernel_table
from hpctrain.device.simt_library import OPTIONS

UNITS = 132  # multiprocessors of an H100
SOURCES = sorted(kernel_folder().glob("*.cu"))
HEADERS = [kernel_folder() / name for name in ("kernel.h", "channels.h", "compaction.h")]
WORKS = [1, 2, 31, 32, 33, 255, 256, 257, 10**4, 10**6, 2**31 - 1, 2**31, 2**33 + 5, 2**62]


@pytest.mark.parametrize("kind, threads", [("ELEMENTS", 1), ("ROWS", 32)])
@pytest.mark.parametrize("work", WORKS)
def test_launches_keep_the_limits(kind, threads, work):
    for units in (1, 2, 80, UNITS, 1000):
        blocks, block = launch_shape(kind, work, units)
        assert block == BLOCK and block % 32 == 0 and 1 <= blocks <= units * BLOCKS_PER_SM < 2**31
        assert blocks == units * BLOCKS_PER_SM or (blocks - 1) * block < work * threads
        assert blocks == units * BLOCKS_PER_SM or blocks * block >= work * threads


@pytest.mark.parametrize("kind, work", [("ELEMENTS", 1 << 20), ("ROWS", 16384)])
def test_real_sizes_fill_a_large_gpu(kind, work):
    """A million parameters, or the rows of a batch of 16 x 1024 tokens."""
    blocks, block = launch_shape(kind, work, UNITS)
    assert blocks * block == UNITS * 2048


NARROW = re.compile(r"\((?:int|int32|unsigned|uint32|short)\) ?[\w(]")
# Lines that make a number of 64 bits one of 32, by file. Each was looked at; a new one fails.
NARROWED = {
    "dropout.cu": 7,  # words of random numbers
    "quantize.cu": 4,  # bytes and bits, places within a block
    "select.cu": 2,  # a mixed counter of a sample; the digit of a key
    "topk.cu": 1,  # entries of a block of 65,536
    "compaction.h": 1,  # a bit
    "pooling.cu": 5,  # places within an image
    "winograd.cu": 5,  # tiles of an image, and bits
    "kernel.h": 4,  # lanes and columns of a tile
}


@pytest.mark.parametrize("path", [*SOURCES, *HEADERS], ids=lambda path: path.name)
def test_casts_to_32_bits_are_known(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if NARROW.search(line)]
    assert len(lines) == NARROWED.get(path.name, 0), lines


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_narrowed_silently(path):
    """The compiler knows of every place where 64 bits become 32, but for the casts above.

    As the simulator compiles it, which takes the loops of the GPU.
    """
    for real in ("float", "bfloat16"):
        own = [f"{name}:" for name in (path.name, *(header.name for header in HEADERS))]
        assert not [line for line in warnings(path, real) if any(name in line for name in own)]


def warnings(path, real, text=None):
    plain = [word for word in OPTIONS if not word.startswith(("-fsanitize", "-g", "-O1"))]
    command = [compiler(), "-x", "c++", *plain, f"-I{kernel_folder()}", f"-DREAL={real}"]
    command += ["-fsyntax-only", "-Wconversion", "-Wno-float-conversion", "-Wno-sign-conversion"]
    source = f'# 1 "{path.name}"\n' + (text or path.read_text(encoding="utf-8"))
    done = subprocess.run([*command, "-"], input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if re.search(r"warning: .*int", line)]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_narrow_index_is_found():
    path = kernel_folder() / "gelu.cu"
    text = '#include "kernel.h"\nELEMENTS_KERNEL f(real* y, int64 n)\n{\n'
    assert not warnings(path, "float", text + "GRID_STRIDE(i, n) y[i] = 0; }\n")
    assert warnings(path, "float", text + "GRID_STRIDE(i, n) { const int j = i; y[j] = 0; } }\n")


def test_loops_count_in_64_bits():
    """The macros that every kernel loops with, and every parameter that could be a count."""
    text = (kernel_folder() / "kernel.h").read_text(encoding="utf-8")
    for name in ("GRID_STRIDE", "FOR_ROWS", "FOR_LANES"):
        definitions = re.findall(rf"#define {name}\(.*?(?:[^\\]\n)", text, re.DOTALL)
        assert len(definitions) == 2
        assert all(re.search(r"for \(int64 ", definition) for definition in definitions)
    for kernel in kernel_table().values():
        short = {p.name for p in kernel.parameters if p.type.endswith("int32") and not p.pointers}
        assert short <= {"relu", "nesterov", "bits", "shift", "begins"}, kernel.name
