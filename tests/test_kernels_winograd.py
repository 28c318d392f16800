"""winograd.cu: transforms of taps, patches and tiles, forward and backward."""

from __future__ import annotations

import cases_winograd  # noqa: F401  (registers the cases)
from kernel_checks import matches_reference, same_on_all_levels

NAMES = (
    *("winograd_weights", "winograd_weights_flipped", "winograd_weights_backward"),
    *("winograd_input", "winograd_output", "winograd_output_backward"),
)
test_matches_reference = matches_reference(*NAMES)
test_same_on_all_levels = same_on_all_levels(*NAMES)
