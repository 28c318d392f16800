"""The command line: `hpctrain <command>`.

Each command lives in a module of its own, which is imported only when it runs, so that `--help`
and `--version` need neither MPI nor NumPy.

Layer: cli.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hpctrain import __version__
from hpctrain.cli import bench, config, data, doctor, evaluate, report, submit, train
from hpctrain.errors import HpctrainError

__all__ = ["main", "parser"]

COMMANDS = (train, evaluate, report, submit, data, config, doctor, bench)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="hpctrain",
        description="Train neural networks on MPI clusters. Start the commands train, eval and "
        "bench under mpirun or srun to use several ranks.",
    )
    top.add_argument("--version", action="version", version=f"hpctrain {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except HpctrainError as error:
        if _other_ranks():
            raise  # the hook of hpctrain.mpi.start prints it and ends all ranks
        print(f"hpctrain: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _other_ranks() -> bool:
    """Whether MPI was started and this process is one of several."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.size > 1
