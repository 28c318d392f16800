"""Embedding: rows by number, gradients in the order of the batch, refusal of unknown ids."""

from __future__ import annotations

import numpy as np
import pytest
from gradient_check import check_gradients, gradients
from tested_device import DEVICE

from hpctrain.autograd import Variable
from hpctrain.errors import DataError, UsageError
from hpctrain.nn.embedding import embedding

TABLE = np.random.default_rng(0).standard_normal((7, 5))
IDS = np.array([[3, 0, 3], [6, 3, 0]])


def look_up(ids):
    return lambda tape, table: embedding(tape, Variable(DEVICE.from_host(ids)), table)


def test_rows_are_looked_up():
    y, _, _ = gradients(look_up(IDS), [TABLE])
    np.testing.assert_array_equal(y, TABLE[IDS])


@pytest.mark.parametrize("ids", [IDS, np.zeros((0, 3), np.int64), np.array([2])])
def test_gradients(ids):
    check_gradients(look_up(ids), TABLE)


def test_rows_that_do_not_occur_get_zero():
    _, _, (gradient,) = gradients(look_up(IDS), [TABLE])
    assert not gradient[[1, 2, 4, 5]].any() and gradient[[0, 3, 6]].all()


@pytest.mark.parametrize("bad", [-1, 7])
def test_ids_outside_the_table_are_refused(bad):
    with pytest.raises(DataError, match=rf"id {bad} \(element 1 of .* 7 rows"):
        gradients(look_up(np.array([0, bad, 2])), [TABLE])


def test_ids_of_another_dtype_are_refused():
    with pytest.raises(UsageError, match="int32"):
        gradients(look_up(np.array([0], np.int32)), [TABLE])
