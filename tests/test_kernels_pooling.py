"""pooling.cu: maximum and average, forward and backward."""

from __future__ import annotations

import cases_images
import numpy as np
from kernel_cases import CASES
from kernel_checks import device_for, matches_reference, same_on_all_levels

NAMES = (
    *("max_pool_forward", "max_pool_backward"),
    *("average_pool_forward", "average_pool_backward"),
)
test_matches_reference = matches_reference(*NAMES)
test_same_on_all_levels = same_on_all_levels(*NAMES)


def max_pool(x):
    _, height, width, channels = x.shape
    out = np.empty((1, height // 2, width // 2, channels), x.dtype)
    argmax = np.empty(out.shape, np.int32)
    numbers = cases_images.numbers((height, width), channels, cases_images.HALVES)
    lines = out.shape[1]
    device_for().launch("max_pool_forward", x, out, argmax, lines, *numbers, work=lines)
    return out, argmax


def test_the_first_of_equals_is_chosen():
    _, argmax = max_pool(np.zeros((1, 2, 4, 32), np.float32))
    np.testing.assert_array_equal(argmax[0, 0, :, 0], [0, 2])


def test_minus_infinity_everywhere_is_a_maximum():
    y, argmax = max_pool(np.full((1, 2, 2, 5), -np.inf))
    assert (y == -np.inf).all() and (argmax == 0).all()


def test_a_nan_is_passed_on():
    x = np.zeros((1, 2, 4, 32), np.float32)
    x[0, 1, 0, 3] = np.nan
    y, argmax = max_pool(x)
    assert np.isnan(y[0, 0, 0, 3]) and argmax[0, 0, 0, 3] == 4
    assert np.isnan(y).sum() == 1


def test_images_split_over_launches_give_the_same_bits():
    for name in NAMES:
        for parameters in cases_images.GEOMETRIES[2:]:
            whole = CASES[name].build("float32", parameters)
            images, tiles = parameters[0], -(-parameters[2] // 32)
            lines = next(v for v in whole.args if isinstance(v, int)) // images
            index = [i for i, v in enumerate(whole.args) if isinstance(v, int)][0]
            for image in range(images):
                args = [v[image : image + 1] if np.ndim(v) else v for v in whole.args]
                args[index] = lines
                device_for().launch(name, *args, work=lines * tiles)
            output = max(whole.expected) if name != "max_pool_forward" else 1
            found = whole.args[output].copy()
            device_for().launch(name, *whole.args, work=whole.work)
            np.testing.assert_array_equal(found, whole.args[output])
