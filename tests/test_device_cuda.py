"""The CUDA device where there is none: a clear error, kernels that compile.

cuda.py runs in the other tests on a stand-in for CuPy; test_cuda_interface.py compares the two.
"""

import shutil
import subprocess

import pytest

from hpctrain.device import cuda, open_device
from hpctrain.device.signatures import kernel_folder, kernel_table
from hpctrain.errors import DeviceError

FILES = sorted({kernel.file for kernel in kernel_table().values()})
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(cuda.available(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_to_install():
    with pytest.raises(DeviceError, match=r"cuda12x|CUDA_VISIBLE_DEVICES"):
        open_device("cuda")
    assert open_device("auto").name == "cpu"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_for_a_gpu(tmp_path, file):
    """Warnings are errors; float here, the others with --slow."""
    compile_kernel(tmp_path, file, "float", "sm_80")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
@pytest.mark.parametrize("real", ["bfloat16", "float16"])
def test_16_bit_numbers_compile_for_gpus_with_and_without_instructions(
    tmp_path, real, architecture
):
    compile_kernel(tmp_path, "elementwise", real, architecture)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_100"])
@pytest.mark.parametrize("real", ["float", "double", "bfloat16", "float16"])
@pytest.mark.parametrize("file", FILES)
def test_kernels_compile_for_other_gpus(tmp_path, file, real, architecture):
    compile_kernel(tmp_path, file, real, architecture)


def compile_kernel(folder, file, real, architecture):
    source = kernel_folder() / f"{file}.cu"
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-cubin", "-Werror=all-warnings"]
    done = subprocess.run(
        [*command, f"-DREAL={real}", "-o", folder / "kernel.cubin", source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
