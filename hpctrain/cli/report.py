"""`hpctrain report`: runs as one HTML page that needs no network.

Layer: cli.
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "report",
        help="show runs as one HTML page",
        description="Write one HTML page about a run, or about several to compare them: loss, "
        "accuracy, throughput, time by phase, starts, environment. Runs may be going on.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the first run folder"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, write the page, say where it is."""
    from hpctrain.errors import UsageError
    from hpctrain.train.report import read_run
    from hpctrain.train.report_page import page

    text = page([read_run(folder) for folder in arguments.folders])
    out: Path = arguments.out or arguments.folders[0] / "report.html"
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from None
    print(f"{out}: {len(text) / 1000:,.0f} kB")
    return 0
