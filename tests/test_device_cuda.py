"""The CUDA device where there is none: clear errors, kernels that compile, the use made of CuPy.

cuda.py runs in the other tests on a stand-in for CuPy (hpctrain/device/sim). `CUPY` below is the
list of what it may use; the stand-in holds that and no more, and the real CuPy, where it is
installed (it needs no GPU for this), must have every name with these parameters.
"""

import ast
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from simulated import open_sim

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


# Everything of CuPy that cuda.py uses, or that it hands to callers: name and parameters.
CUPY = {
    "empty": "shape dtype",
    "zeros": "shape dtype",
    "asarray": "a order",
    "asnumpy": "a order",
    "matmul": "",  # a, b, out: a gufunc without a signature to look at
    "ndarray": "shape dtype memptr",
    "RawModule": "code options",
    "RawModule.compile": "",
    "RawModule.get_function": "name",
    "RawKernel.__call__": "grid block args",
    "cuda.get_current_stream": "",
    "cuda.alloc_pinned_memory": "size",
    "cuda.Device": "device",
    "cuda.Device.id": "",
    "cuda.Device.use": "",
    "cuda.Device.synchronize": "",
    "cuda.Device.attributes": "",
    "cuda.Device.pci_bus_id": "",
    "cuda.Stream": "non_blocking",
    "cuda.Stream.use": "",
    "cuda.Stream.done": "",
    "cuda.Stream.record": "event",
    "cuda.Stream.wait_event": "event",
    "cuda.Stream.synchronize": "",
    "cuda.Event": "disable_timing",
    "cuda.Event.record": "stream",
    "cuda.Event.synchronize": "",
    "cuda.Event.done": "",
    "cuda.Memory": "size",
    "cuda.Memory.ptr": "",
    "cuda.Memory.size": "",
    "cuda.Memory.device_id": "",
    "cuda.UnownedMemory": "ptr size owner device_id",
    "cuda.MemoryPointer": "mem offset",
    "cuda.MemoryPointer.ptr": "",
    "cuda.MemoryPointer.mem": "",
    "cuda.MemoryPointer.device_id": "",
    "cuda.MemoryPointer.copy_to_host_async": "mem size stream",
    "cuda.MemoryPointer.copy_from_host_async": "mem size stream",
    "cuda.MemoryPointer.memset_async": "value size stream",
    "cuda.runtime.getDeviceCount": "",
    "cuda.runtime.getDeviceProperties": "device",
    "cuda.runtime.ipcGetMemHandle": "devPtr",
    "cuda.runtime.ipcOpenMemHandle": "handle",
    "cuda.runtime.ipcCloseMemHandle": "devPtr",
    "cuda.runtime.CUDARuntimeError": "",
    "_core._routines_linalg.set_compute_type": "dtype compute_type",
    **{
        f"ndarray.{name}": ""
        for name in (
            *("shape", "dtype", "size", "ndim", "nbytes", "itemsize", "flags", "data", "T"),
            *("reshape", "transpose", "view", "__array__", "__array_ufunc__", "__dlpack__"),
            *("__array_function__", "__dlpack_device__", "__cuda_array_interface__"),
        )
    },
}
# Attributes in cuda.py that are not CuPy's: of Python, NumPy and this package.
OTHERS = {
    *("name", "kind", "file", "parameters", "pointers", "type", "find", "suppress", "frombuffer"),
    *("uint8", "uint64", "array", "ctypes", "float32", "float64", "values", "read_text", "discard"),
    *("add", "hex", "rank", "bcast", "event", "setter", "perf_counter"),
}
# What the stand-in's objects have beside: for the simulator's own modules, not for cuda.py.
SIMULATORS = {
    *("bytes", "span", "processor", "queue", "mem", "operation", "precision"),
    *("kernel", "kernels", "library", "machine", "options", "path", "real"),
}


def used_attributes(text):
    """(line, name) of every attribute that the text reads of something else than itself."""
    tree = ast.parse(text)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_store(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_store(node):
            of_itself = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not (of_itself and node.attr in own):
                yield node.lineno, node.attr


def is_store(node):
    return isinstance(node.ctx, ast.Store)


def strange(text):
    """What the text uses that neither list holds."""
    known = {part for name in CUPY for part in name.split(".")} | OTHERS
    return [(line, name) for line, name in used_attributes(text) if name not in known]


def test_cuda_uses_only_what_is_listed():
    text = Path(cuda.__file__).read_text(encoding="utf-8")
    assert not strange(text)
    more = text.replace("self._cupy.zeros(", "self._cupy.full(")
    assert [name for _, name in strange(more)] == ["full"]
    keywords = {
        keyword.arg
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        for keyword in node.keywords
        if node.func.attr in {name.split(".")[-1] for name in CUPY}
    }
    assert keywords <= set(" ".join(CUPY.values()).split()) | {"out"}


def stand_ins():
    """One of each of the stand-in's objects, by its name in CuPy."""
    device = open_sim()
    cupy, x, shared = device._cupy, device.zeros(3, "float32"), device.shared(3, "float32")
    module = device._module("elementwise", "float32")
    return {
        "": cupy,
        "_core": cupy._core,
        "_core._routines_linalg": cupy._core._routines_linalg,
        "cuda": cupy.cuda,
        "cuda.runtime": cupy.cuda.runtime,
        "cuda.Device": device._device,
        "cuda.Stream": device._copies,
        "cuda.Event": cupy.cuda.Event(),
        "cuda.Memory": shared.data.mem,
        "cuda.MemoryPointer": x.data,
        "ndarray": x,
        "RawModule": module,
        "RawKernel": module.get_function("fill"),
    }


def test_the_stand_in_holds_what_is_listed_and_no_more():
    for where, instance in stand_ins().items():
        prefix = f"{where}." if where else ""
        below = {name.removeprefix(prefix) for name in CUPY if name.startswith(prefix)}
        wanted = {name.partition(".")[0] for name in below} - {"RawKernel"}
        assert not [name for name in sorted(wanted) if not hasattr(instance, name)], where
        found = {name for name in dir(instance) if not name.startswith("_")}
        assert found <= wanted | SIMULATORS, where


@pytest.mark.parametrize("name", CUPY)
def test_the_real_cupy_has_it(name):
    cupy = pytest.importorskip("cupy")
    found = cupy
    for part in name.split("."):
        found = getattr(found, part)
    try:
        signature = str(inspect.signature(found))
    except (TypeError, ValueError):
        signature = (found.__doc__ or "").strip().partition("\n")[0]
    if name == "ndarray":
        signature = found.__doc__
    missing = [word for word in CUPY[name].split() if not re.search(rf"\b{word}\b", signature)]
    assert not missing, signature
