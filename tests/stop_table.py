"""The table of docs/jobs.md that says what ends a run how, under each launcher.

Knows nothing of how it is measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from launching import ROOT

__all__ = ["EVENTS", "documented", "outcome"]

PAGE = ROOT / "docs/jobs.md"
TITLE = "| what happens |"
EVENTS = (
    "USR1 to the launcher",
    "USR2 to the launcher",
    "USR1 to one rank",
    "TERM to the launcher",
    "the file `STOP`",
    "the time limit",
)


def documented(launcher: str) -> dict[str, str]:
    """What the page says for a launcher: event -> cell."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith(TITLE))
    columns = cells(lines[first])
    at = columns.index(launcher)
    rows = [cells(line) for line in lines[first + 2 : first + 2 + len(EVENTS)]]
    return {row[0]: row[at] for row in rows}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def outcome(status: int | str, folder: Path) -> str:
    """The cell for a run that has ended: "75, saved", or "not saved" whatever the status."""
    state = json.loads((folder / "STATUS.json").read_text(encoding="utf-8"))
    newest = folder / "checkpoints" / f"step_{state.get('step', 0):08d}" / "state.json"
    saved = state["state"] in ("resubmit", "stopped") and newest.is_file()
    return f"{status}, saved" if saved else "not saved"
