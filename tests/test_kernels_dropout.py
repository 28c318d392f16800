"""dropout.cu: Philox, and masks that belong to a sample."""

from __future__ import annotations

import cases_samples  # noqa: F401  (registers the cases)
import numpy as np
import pytest
import reference_images as reference
from kernel_checks import device_for, matches_reference, same_on_all_levels

test_matches_reference = matches_reference("dropout")
test_same_on_all_levels = same_on_all_levels("dropout")


def drop(keys, per_sample, keep=0.75, seed=5, dtype=np.float32):
    """Which of ones stay."""
    x = np.ones((len(keys), per_sample), dtype)
    args = [x, np.asarray(keys, np.int64), len(keys), per_sample, keep, seed]
    device_for().launch("dropout", x, *args, work=len(keys) * -(-per_sample // 128))  # in place
    return x > 0


def test_the_reference_is_philox():
    """Known answers of the generator's authors (Random123, kat_vectors)."""
    assert reference.philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    known = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert reference.philox([ones] * 4, [ones] * 2) == known


def test_a_mask_follows_its_sample():
    one, other = drop([3, 8, 5], 300), drop([5, 11, 3], 300)
    np.testing.assert_array_equal(one[0], other[2])
    np.testing.assert_array_equal(one[2], other[0])
    assert (one[0] != one[1]).any()


def test_float_and_double_drop_the_same():
    np.testing.assert_array_equal(drop([1, 2], 500), drop([1, 2], 500, dtype=np.float64))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_as_many_stay_as_should(keep):
    stay = drop(range(200), 1000, keep)
    deviation = np.sqrt(keep * (1 - keep) / stay.size)
    assert abs(stay.mean() - keep) < 5 * deviation
    assert (drop(range(200), 1000, keep, seed=6) != stay).any()
