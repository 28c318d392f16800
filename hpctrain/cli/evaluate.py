"""`hpctrain eval`: evaluate a run's checkpoint on a split.

Layer: cli.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.common import begin

if TYPE_CHECKING:
    from hpctrain.config import Resolved

__all__ = ["add_parser"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a run's checkpoint on a split",
        description="Evaluate a run's checkpoint on a split: every sample exactly once, on any "
        "number of ranks.",
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="what `hpctrain train` wrote")
    parser.add_argument("--split", help="default: data.test of the run")
    parser.add_argument("--checkpoint", metavar="PATH", help="default: the newest valid one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; collective under MPI."""
    configuration, device, comm = begin(lambda: recorded(Path(arguments.folder)))

    from hpctrain.log import say
    from hpctrain.train.evaluate import evaluate
    from hpctrain.train.records import as_dict
    from hpctrain.train.restoring import load_model
    from hpctrain.train.session import open_session

    config = configuration.config
    split = arguments.split or config.data.test or config.data.train
    with open_session(config, device, comm) as session:
        path = load_model(session, Path(arguments.folder), arguments.checkpoint)
        result = evaluate(session, split)
    if comm.rank == 0:
        if arguments.json:
            say(json.dumps({"checkpoint": str(path), **as_dict(result)}))
        else:
            say(f"{path.name}  {result}")
    return 0


def recorded(folder: Path) -> Resolved:
    """The configuration that a run folder holds."""
    from hpctrain.config import resolve
    from hpctrain.errors import UsageError

    run_file = folder / "run.toml"
    if not run_file.is_file():
        raise UsageError(
            f"{folder} is not a run folder: it holds no run.toml; give the folder that "
            "`hpctrain train` printed"
        )
    return resolve(run_file)
