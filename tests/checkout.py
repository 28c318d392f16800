"""A copy of the checkout, for tests that build or install it: they leave nothing behind in ours.

Knows nothing of what is done with the copy.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from launching import ROOT

__all__ = ["copy_checkout"]

EVERYWHERE = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
AT_THE_ROOT = {".git", ".venv", ".hypothesis", "build", "data", "dist", "runs"}


def copy_checkout(target: Path) -> Path:
    """Copy all but what .gitignore names to `target`, a folder that is made; returns it."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        found = set(EVERYWHERE(folder, names))
        return found | AT_THE_ROOT if Path(folder) == ROOT else found

    shutil.copytree(ROOT, target, ignore=ignored)
    return target
