"""convolution.cu: columns, the way back, and filters turned round."""

from __future__ import annotations

import cases_images
import numpy as np
from kernel_cases import CASES
from kernel_checks import device_for, matches_reference, same_on_all_levels

NAMES = ("columns", "columns_backward", "weight_columns", "weight_flip", "weight_flip_back")
test_matches_reference = matches_reference(*NAMES)
test_same_on_all_levels = same_on_all_levels(*NAMES)


def test_columns_given_in_pieces_add_up_to_the_same_bits():
    """A tile of columns may end anywhere, in the middle of a line too."""
    for parameters in cases_images.GEOMETRIES[1:]:
        whole = CASES["columns_backward"].build("float32", parameters)
        cols, dx, _, rows, *rest = whole.args
        cols = cols.reshape(rows, -1)
        cuts = sorted({0, rows // 3, rows // 3 + 1, rows})
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            args = [cols[first:last], dx, first, last - first, *rest]
            device_for().launch("columns_backward", *args, work=whole.work)
        np.testing.assert_array_equal(dx, whole.expected[1])


def test_pixels_given_in_pieces_add_up_to_the_same_bits():
    whole = CASES["columns_backward"].build("float32", cases_images.GEOMETRIES[5])
    cols, dx, first, rows, _, pixels, *rest = whole.args
    for begin, end in ((0, 5), (5, pixels - 30), (pixels - 30, pixels)):
        args = [cols, dx, first, rows, begin, end - begin, *rest]
        device_for().launch("columns_backward", *args, work=end - begin)
    np.testing.assert_array_equal(dx, whole.expected[1])
