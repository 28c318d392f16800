"""mean_squared_error.cu: with and without weights and gradient."""

from __future__ import annotations

import cases_rows  # noqa: F401  (registers the cases)
from kernel_checks import matches_reference, same_on_all_levels, same_when_split

CASES = (
    *("mean_squared_error", "mean_squared_error_weighted"),
    "mean_squared_error_loss_only",
)
test_matches_reference = matches_reference(*CASES)
test_same_on_all_levels = same_on_all_levels(*CASES)
test_same_when_split = same_when_split(*CASES)
