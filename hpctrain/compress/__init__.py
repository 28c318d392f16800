"""Compressed sums of gradients between nodes, with exact books.

For programs of any kind: `GradientSum`. In a run: `Settings` and `Compression`, which a sliced
reduction is given.

Layer 3, beside optim and checkpoint. Is given layouts, arrays and communicators; knows nothing of
networks and update rules.
"""

from __future__ import annotations

from hpctrain.compress.between import CompressedColumn, Compression
from hpctrain.compress.settings import Settings
from hpctrain.compress.summing import GradientSum

__all__ = ["CompressedColumn", "Compression", "GradientSum", "Settings"]
