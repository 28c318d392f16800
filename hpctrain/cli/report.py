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
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="FILE",
        help="instead write what all ranks of one run did when, as hpctrain train --timeline has "
        "recorded it, in Chrome's trace format, for https://ui.perfetto.dev or chrome://tracing",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, write the page, say where it is."""
    if arguments.timeline:
        return timeline(arguments.folders, arguments.timeline)
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


def timeline(folders: list[Path], out: Path) -> int:
    """Write the trace of a run, say what it holds and what it lacks."""
    from hpctrain.errors import UsageError
    from hpctrain.train.timeline_trace import read_parts, write_trace

    if len(folders) != 1:
        raise UsageError(f"a timeline is of one run; {len(folders)} run folders are given")
    told = write_trace(read_parts(folders[0]), out)
    print(f"{out}: {told.events:,} events, {told.arrows:,} arrows, {told.nbytes / 1e6:.1f} MB")
    for start in told.facts["starts"]:
        drift = "" if start["drift_corrected"] else ", their drift unknown: it ended early"
        print(
            f"start from step {start['from_step']}: {start['ranks']} ranks, clocks to within "
            f"{start['clock_error_us']:.1f} us{drift}"
        )
        for rank, lost in start["dropped"].items():
            print(
                f"  rank {rank}: {lost['events']:,} events left out from step {lost['from_step']} "
                "on; record fewer steps (--timeline 100:110), or raise log.timeline_mb"
            )
        if start["missing_ranks"]:
            print(f"  not recorded: ranks {start['missing_ranks']}")
    return 0
