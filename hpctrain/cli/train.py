"""`hpctrain train`: train as a run file says.

Layer: cli.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.common import add_run_arguments, begin, resolved

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.config import Resolved
    from hpctrain.mpi.calls import Log
    from hpctrain.sections import RunConfig
    from hpctrain.train.watchdog import Watchdog

__all__ = ["add_parser"]

EPILOG = """
examples:
  hpctrain train jobs/runs/digits.toml
  mpirun -n 2 hpctrain train jobs/runs/digits.toml --set optimizer.lr=0.05
  srun hpctrain train run.toml --resume auto --stop-after 3h50m

exit status: 0 finished; 75 stopped early with a valid checkpoint, start it again with
--resume auto; 1 error; 2 wrong usage; 3 diverged; 124 a hang was found. docs/stop-resume.md
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train as a run file says",
        description="Train as a run file says. Under mpirun or srun all ranks work together; the "
        "run is the same on any number of them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="auto: go on from the newest valid checkpoint of the run folder, or start; "
        "PATH: go on from that checkpoint (default: never)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in a folder that holds a run: its metrics and checkpoints are deleted",
    )
    add_limits(parser)
    parser.set_defaults(run=run)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """When to stop, and what to record: keys of the run file that are often set here."""
    parser.add_argument(
        "--stop-after",
        metavar="TIME",
        help="stop early with a checkpoint and exit status 75, so as to be gone this long after "
        "the start, such as 3h50m (stop.after)",
    )
    parser.add_argument(
        "--stop-margin",
        metavar="auto|TIME",
        help="how long before that the last step ends; auto: twice the longest step and "
        "checkpoint so far (stop.margin)",
    )
    parser.add_argument(
        "--hang-after",
        metavar="TIME",
        help="end with exit status 124 when no rank gets on for so long; 0: never "
        "(stop.hang_after)",
    )
    parser.add_argument(
        "--timeline",
        metavar="STEPS",
        help="record what every rank does when, in all steps (all) or some (100:110), for "
        "hpctrain report --timeline (log.timeline)",
    )


def with_limits(arguments: argparse.Namespace) -> Resolved:
    """The configuration; the options below count as `--set`, and are checked."""
    from hpctrain.train.stop import limits, seconds_of
    from hpctrain.train.timeline import steps_of

    options = {
        "after": arguments.stop_after,
        "margin": arguments.stop_margin,
        "hang_after": arguments.hang_after,
    }
    given = {key: value for key, value in options.items() if value is not None}
    arguments.overrides += [f'stop.{key}="{value}"' for key, value in given.items()]
    if arguments.timeline is not None:
        arguments.overrides.append(f'log.timeline="{arguments.timeline}"')
    configuration = resolved(arguments)
    limits(configuration.config)
    seconds_of(configuration.config.stop.hang_after, "stop.hang_after")
    steps_of(configuration.config.log.timeline)
    return configuration


def run(arguments: argparse.Namespace) -> int:
    """Train; collective under MPI."""
    from hpctrain.train.stop import listen

    listen()  # before the imports that take time, and before MPI, which a launcher may signal
    configuration, device, comm = begin(lambda: with_limits(arguments))

    from hpctrain.log import say
    from hpctrain.mpi.agree import on_first_rank
    from hpctrain.mpi.calls import Log
    from hpctrain.mpi.watched import watch
    from hpctrain.train.folder import RunFolder
    from hpctrain.train.loop import train
    from hpctrain.train.session import open_session
    from hpctrain.train.stop import EXIT_RESUBMIT, Stopping, at_start, leave, limits

    config, first = configuration.config, comm.rank == 0
    folder_path = Path(config.run.folder)
    if arguments.resume == "auto":
        found = on_first_rank(comm, lambda: at_start(folder_path, config))
        if found:
            if first:
                say(f"nothing to do: {folder_path / found} is there; remove it to go on")
            return 0 if found == "DONE" else leave(comm)
    calls = Log()
    comm = watch(comm, calls)
    with (
        open_session(config, device, comm) as session,
        RunFolder(folder_path, first, config.log.tensorboard) as folder,
    ):
        on_first_rank(
            comm,
            lambda: folder.open(
                configuration.to_toml(),
                resume=arguments.resume != "never",
                overwrite=arguments.overwrite,
            ),
        )
        stopping = Stopping(limits(config), folder_path, first)
        with watchdog(config, comm, calls):
            outcome = train(session, folder, arguments.resume, stopping, calls)
    if first:
        say(f"results are in {config.run.folder}")
    return leave(comm) if outcome.exit_code == EXIT_RESUBMIT else outcome.exit_code


def watchdog(config: RunConfig, comm: MPI.Intracomm, calls: Log) -> Watchdog:
    """The watchdog of this rank. Collective."""
    from hpctrain.mpi.watched import end_all_ranks
    from hpctrain.train.stop import seconds_of
    from hpctrain.train.watchdog import Watchdog

    hosts = comm.allgather(platform.node())
    hang_after = seconds_of(config.stop.hang_after, "stop.hang_after")
    folder = Path(config.run.folder)
    return Watchdog(calls, folder, comm.rank, hosts, hang_after, end_all_ranks)
