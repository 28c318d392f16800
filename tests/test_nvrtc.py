"""Every kernel compiles for every GPU, by NVRTC, without a warning, a spill or too many registers.

NVRTC comes from its PyPI wheels (extra gpu-test) and needs no driver. One GPU is tried always, the
others with --slow.
"""

from __future__ import annotations

import re

import pytest
from kernel_page import section, tool

from hpctrain.cli.bench_static import ENOUGH, LESS, measure
from hpctrain.device import nvrtc
from hpctrain.device.build import REAL
from hpctrain.device.launch import BLOCK
from hpctrain.device.nvrtc import ARCHITECTURES, Resources
from hpctrain.device.occupancy import LIMITS, occupancy
from hpctrain.device.signatures import kernel_table
from hpctrain.errors import KernelError

FIRST = "sm_90"


def need_nvrtc(architecture):
    try:
        return nvrtc.compiler_for(architecture)
    except KernelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "architecture",
    [
        name if name == FIRST else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_all_kernels_compile(architecture):
    need_nvrtc(architecture)
    rows = measure([architecture], REAL)
    assert {(row.resources.kernel, row.dtype) for row in rows} == {
        (name, dtype) for name in kernel_table() for dtype in REAL
    }
    assert not [row for row in rows if row.resources.spills or row.resources.stack]
    for row in rows:
        least, _ = LESS.get(row.resources.kernel, (ENOUGH, ""))
        assert row.occupancy >= least, row
        assert row.resources.shared <= 48 << 10, row  # what a block has without asking for more


@pytest.fixture(scope="module")
def everything():
    for architecture in ARCHITECTURES:
        need_nvrtc(architecture)
    return measure(ARCHITECTURES, REAL)


@pytest.mark.slow
def test_exceptions_are_needed(everything):
    assert {row.resources.kernel for row in everything if row.occupancy < ENOUGH} == set(LESS)


@pytest.mark.slow
def test_the_page_shows_it(everything):
    """After a change of a kernel: tools/kernel_page.py."""
    if section("static")[0] != tool().versions():
        pytest.skip(f"docs/kernels.md was made with other compilers: {section('static')[0]}")
    assert section("static") == tool().static_lines(everything)


def test_the_page_names_all_kernels():
    lines = section("static")[4:]
    assert [re.match(r"\| `(\w+)` \| 0 \|", line)[1] for line in lines] == list(kernel_table())
    assert section("less") == tool().less_lines()


def test_the_cubin_is_for_the_gpu():
    compiler = need_nvrtc(FIRST)
    text = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] = 1; }'
    code, log = compiler.compile(text, "f.cu", [f"-arch={FIRST}"])
    assert code[:4] == b"\x7fELF" and int.from_bytes(code[18:20], "little") == nvrtc.CUBIN
    assert nvrtc.resources(log)["f"].registers > 0


@pytest.mark.parametrize(
    "body, message",
    [
        ("int unused; x[0] = 1;", "never referenced"),
        ("x[0] = undefined;", '"undefined" is undefined'),
    ],
)
def test_warnings_are_errors(body, message):
    compiler = need_nvrtc(FIRST)
    text = f'extern "C" __global__ void f(float* x) {{ {body} }}'
    with pytest.raises(KernelError, match=message):
        compiler.compile(text, "f.cu", [f"-arch={FIRST}"])


def test_spills_and_shared_memory_are_seen():
    """128 sums that do not fit 32 registers, and a block of shared memory."""
    compiler = need_nvrtc(FIRST)
    text = """
    extern "C" __global__ void __launch_bounds__(1024, 2) f(const float* x, float* y, int n) {
        __shared__ float block[256];
        float sum[128];
        for (int k = 0; k < 128; k++) sum[k] = x[k];
        for (int i = 0; i < n; i++)
            for (int k = 0; k < 128; k++) sum[k] = sum[k] * x[i + k] + sum[127 - k];
        block[threadIdx.x % 256] = sum[0];
        __syncthreads();
        for (int k = 0; k < 128; k++) y[k] = sum[k] + block[k];
    }"""
    _, log = compiler.compile(text, "f.cu", [f"-arch={FIRST}"])
    found = nvrtc.resources(log)["f"]
    assert found.spills > 0 and found.stack > 0 and found.registers <= 32
    assert found.shared >= 1024


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "compilers", tuple)
    with pytest.raises(KernelError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.compiler_for("sm_90")


@pytest.mark.parametrize(
    "architecture, registers, shared, block, expected",
    [
        ("sm_90", 32, 0, 256, 1.0),
        ("sm_90", 33, 0, 256, 0.75),  # 40 a thread, 1280 a warp: 12 warps a quarter
        ("sm_90", 64, 0, 256, 0.5),
        ("sm_90", 72, 0, 256, 0.375),  # 7 warps a quarter, 3 blocks of 8 warps
        ("sm_90", 255, 0, 256, 0.125),
        ("sm_75", 64, 0, 256, 1.0),
        ("sm_120", 64, 0, 256, 4 * 256 / 1536),
        ("sm_90", 16, 100 << 10, 256, 0.25),  # 101 KiB a block, of 228
        ("sm_90", 16, 0, 32, 0.5),  # 32 blocks at most
    ],
)
def test_occupancy(architecture, registers, shared, block, expected):
    kernel = Resources("k", registers, 0, 0, shared)
    assert occupancy(architecture, kernel, block) == expected


def test_every_gpu_has_limits():
    assert tuple(LIMITS) == ARCHITECTURES
    for limits in LIMITS.values():
        assert limits.threads % BLOCK == 0 and limits.threads // BLOCK <= limits.blocks
