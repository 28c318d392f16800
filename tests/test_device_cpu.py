"""The CPU device: memory that is used again, products, and launches that refuse wrong arguments."""

import gc

import numpy as np
import pytest

from hpctrain.device import open_device
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.memory import ALIGNMENT, Pool
from hpctrain.errors import DeviceError, KernelError


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_aligned_and_used_again():
    pool = Pool()
    first = pool.empty((300, 100), "float32")
    assert address(first) % ALIGNMENT == 0
    assert first.flags.c_contiguous
    where = address(first)
    del first
    assert address(pool.empty((299, 100), "float32")) == where


def test_memory_in_use_is_not_handed_out():
    """A view of a view of a reshaped array keeps its block, however indirect."""
    pool = Pool()
    made = pool.empty((64, 100), "float32")
    view = made.reshape(100, 64)[3:, ::2].T[1:]
    del made
    others = [pool.empty((64, 100), "float32") for _ in range(5)]
    assert not any(np.shares_memory(view, other) for other in others)
    assert len({address(other) for other in others}) == 5


def test_the_pool_does_not_grow():
    pool = Pool()
    for _ in range(50):
        a, b = pool.empty((5000,), "float64"), pool.empty((7, 1000), "float32")
    assert pool.reserved < 4 * (a.nbytes + b.nbytes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_small_and_empty_arrays(shape):
    device = CpuDevice()
    assert device.empty(shape, "float32").shape == shape
    assert not device.zeros(shape, "int64").any()


def test_matmul_of_views():
    device, rng = CpuDevice(), np.random.default_rng()
    a, b = rng.standard_normal((4, 3)), rng.standard_normal((4, 5))
    out = device.empty((3, 5), "float64")
    device.matmul(a.T, b, out)
    np.testing.assert_allclose(out, a.T @ b)


def test_to_host_is_a_copy():
    device = CpuDevice()
    array = device.zeros(3, "float32")
    host = device.to_host(array)
    device.launch("fill", array, 1.0, 3, work=3)
    assert not host.any()


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("ad", (), r"no kernel is called 'ad' \(did you mean 'add'"),
        ("fill", (np.zeros(3, "float32"), 1.0), r"takes 3 arguments \(y, a, n\), not 2"),
        ("fill", (np.zeros(3, "int16"), 1.0, 3), "int16; kernels exist for float32, float64, bf"),
        ("fill", (np.zeros((3, 3), "float32").T[:2], 1.0, 3), "not C-contiguous"),
        ("add_into", (np.zeros(3), np.zeros(3, "float32"), 3), "x has dtype float32, the kernel"),
        ("fill", (None, 1.0, 3), "no array argument tells"),
    ],
)
def test_wrong_launches_are_refused(name, args, says):
    with pytest.raises(KernelError, match=says):
        CpuDevice().launch(name, *args, work=3)


def test_a_launch_over_nothing_does_nothing():
    CpuDevice().launch("fill", np.zeros(0, "float32"), 1.0, 0, work=0)


def test_a_device_that_is_not_there():
    with pytest.raises(DeviceError, match=r"no device is called 'gpu'.*there are auto, cpu, cuda"):
        open_device("gpu")
    assert open_device("cpu").name == "cpu"
    gc.collect()
