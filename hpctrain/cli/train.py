"""`hpctrain train`: train as a run file says.

Layer: cli.
"""

from __future__ import annotations

import argparse

from hpctrain.cli.common import add_run_arguments, begin, resolved

__all__ = ["add_parser"]

EPILOG = """
examples:
  hpctrain train jobs/runs/digits.toml
  mpirun -n 2 hpctrain train jobs/runs/digits.toml --set optimizer.lr=0.05
  srun hpctrain train run.toml --resume auto
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; collective under MPI."""
    configuration, device, comm = begin(lambda: resolved(arguments))

    from hpctrain.log import say
    from hpctrain.mpi.agree import on_first_rank
    from hpctrain.train.folder import RunFolder
    from hpctrain.train.loop import train
    from hpctrain.train.session import open_session

    config = configuration.config
    with (
        open_session(config, device, comm) as session,
        RunFolder(config.run.folder, writes=comm.rank == 0) as folder,
    ):
        on_first_rank(
            comm,
            lambda: folder.open(
                configuration.to_toml(),
                resume=arguments.resume != "never",
                overwrite=arguments.overwrite,
            ),
        )
        train(session, folder, arguments.resume)
    if comm.rank == 0:
        say(f"results are in {config.run.folder}")
    return 0
