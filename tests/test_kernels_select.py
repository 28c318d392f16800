"""select.cu: each kernel against NumPy on the host target; test_simt.py runs the cases simulated.

What they make together is tested in test_compress_select.py.
"""

from __future__ import annotations

import cases_select  # noqa: F401  (registers the cases)
import numpy as np
import pytest
from kernel_checks import device_for, matches_reference, same_on_all_levels

CASES = (
    *("select_sample", "select_histogram", "select_histogram_within", "select_digit"),
    *("select_loosen", "select_count", "select_scan", "select_pack", "select_pack_some_ties"),
)
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keys_are_in_the_order_of_sizes(dtype):
    """NaN above infinity above numbers; denormals above zero; the sign does not count."""
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -0.0, tiny, -2 * tiny, 1, -1.5, np.inf, np.nan], dtype)
    found = cases_select.keys(x)
    assert found[0] == found[1] == 0 and (np.diff(found[1:]) > 0).all()
    counts = np.zeros((1, 2), np.int64)
    for rank, key in enumerate(found[1:]):
        limit = np.array([key, 0], np.int64)
        args = [x, np.array([x.size]), limit, counts, np.zeros((1, 128), np.uint16)]
        device_for().launch("select_count", *args, work=1)
        assert counts.tolist() == [[6 - rank, 2 if rank == 0 else 1]]
