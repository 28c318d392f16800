"""embedding.cu: rows by number, and the sum of what comes back for each."""

from __future__ import annotations

import cases_samples  # noqa: F401  (registers the cases)
from kernel_checks import matches_reference, same_on_all_levels, same_when_split

NAMES = ("embedding_forward", "embedding_backward")
test_matches_reference = matches_reference(*NAMES)
test_same_on_all_levels = same_on_all_levels(*NAMES)
test_same_when_split = same_when_split("embedding_forward")
