"""Sums for programs of any kind, and the examples of the documentation."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
from launching import ROOT, mpirun

from hpctrain.compress import GradientSum, Settings
from hpctrain.errors import HpctrainError, UsageError

SHAPES = [(30, 40), (40,), (11, 7, 3)]
NODES = {1: "1x1", 2: "2x1", 3: "2+1", 4: "2x2"}


@pytest.mark.ranks(1, 2, 3, 4)
def test_everything_kept_is_the_plain_sum(comm):
    total = GradientSum(comm, SHAPES, settings=Settings(density=1.0), nodes=NODES[comm.size])
    for step in range(2):
        for number, tensor in enumerate(total.tensors):
            assert tensor.shape == SHAPES[number]
            tensor[:] = (comm.rank + 1) * (number + 1) + step
        total.sum()
        for number, tensor in enumerate(total.tensors):
            every = sum((rank + 1) * (number + 1) + step for rank in range(comm.size))
            np.testing.assert_array_equal(tensor, np.full(SHAPES[number], every))
    total.free()


@pytest.mark.ranks(2, 4)
def test_a_flat_array_of_another_library(comm):
    """By DLPack, in place; what is not sent comes later."""

    class Foreign:
        """An array that speaks DLPack only."""

        def __init__(self, array):
            self.array = array
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    settings = Settings(density=0.01, least_size=100)
    total = GradientSum(comm, [(50, 40)], settings=settings, nodes=f"{comm.size}x1")
    array = np.zeros(2000, np.float32)
    array[comm.rank * 100 :][:30] = 1 + comm.rank
    came = np.sum(comm.allgather(array), axis=0)
    foreign, seen = Foreign(array), np.zeros(2000)
    for _ in range(2):
        total.add(foreign)
        assert array.any()
        seen += array
        array[:] = 0
    np.testing.assert_array_equal(seen, came)
    with pytest.raises(UsageError, match=r"not \(3,\) of float64"):
        total.add(np.zeros(3))
    total.free()


@pytest.mark.ranks(2, 3)
def test_what_is_not_finite_is_an_error_on_all_ranks_and_changes_nothing(comm):
    total = GradientSum(comm, [(50, 40)], density=0.01, nodes=f"{comm.size}x1")
    total.tensors[0][:] = np.arange(2000).reshape(50, 40)
    total.sum()
    before = [column.memory.residual.copy() for column in total.compression.columns]
    total.tensors[0][:] = np.nan if comm.rank else 1
    with pytest.raises(HpctrainError, match="not finite"):
        total.sum()
    for column, residual in zip(total.compression.columns, before, strict=True):
        np.testing.assert_array_equal(column.memory.residual, residual)
    total.free()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("method", ["topk", "auto"])
def test_a_full_sum_hands_out_all_that_was_kept(comm, method):
    """And a step that was full is not one that `auto` has measured."""
    settings = Settings(method, density=0.01, least_size=100, momentum=0.0)
    total = GradientSum(comm, [(50, 40)], settings=settings, nodes=f"{comm.size}x1")
    came, seen = np.zeros((50, 40)), np.zeros((50, 40))
    for step in range(9):
        total.tensors[0][:] = (comm.rank + step) * np.arange(2000).reshape(50, 40) % 97
        came += np.sum(comm.allgather(total.tensors[0]), axis=0, dtype=float)
        total.sum(full=step in (2, 8))
        seen += total.tensors[0]
        [column] = total.compression.columns
        if step in (2, 8):
            np.testing.assert_array_equal(seen, came)
            assert column.used == "dense" and not column.memory.residual.any()
        elif method == "topk":
            assert column.used == "topk" and (seen != came).any()
    assert sum(map(len, column.choice.times.values())) <= 7
    total.free()


@pytest.mark.ranks(1)
def test_add_wants_one_tensor(comm):
    total = GradientSum(comm, SHAPES)
    with pytest.raises(UsageError, match="there are 3"):
        total.add(np.zeros(1, np.float32))
    total.free()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loop_in_numpy(ranks):
    done = mpirun(ranks, str(ROOT / "docs/compress_numpy.py"))
    assert done.returncode == 0, done.stdout
    error, sent = map(float, re.findall(r"error ([\d.]+), (\d+) bytes", done.stdout)[0])
    assert error < 0.02
    assert sent < 8 * 20000 * 0.05


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_the_model_in_pytorch():
    done = mpirun(2, str(ROOT / "docs/compress_torch.py"))
    assert done.returncode == 0, done.stdout
    assert float(re.findall(r"loss ([\d.]+)", done.stdout)[0]) < 0.3
