"""Options that several commands share.

Layer: cli.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from hpctrain.config import Resolved
    from hpctrain.device import Device

__all__ = ["add_run_arguments", "begin", "resolved"]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The run file and its overrides."""
    parser.add_argument("run_file", metavar="RUN.toml", help="what to train; see jobs/runs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="use this value in the place of the run file's; may be repeated",
    )


def resolved(arguments: argparse.Namespace) -> Resolved:
    """The configuration that file, environment and options add up to."""
    from hpctrain.config import resolve

    return resolve(arguments.run_file, arguments.overrides)


def begin(resolve: Callable[[], Resolved]) -> tuple[Resolved, Device, MPI.Intracomm]:
    """Read the run file, open the device, start MPI: in this order, as MPI wants it.

    What goes wrong before MPI runs is raised after, when it can be said once for all ranks.
    """
    from hpctrain.device import open_device
    from hpctrain.errors import HpctrainError
    from hpctrain.log import set_up
    from hpctrain.mpi.start import local_rank_from_environment, start

    failure: HpctrainError | None = None
    try:
        configuration = resolve()
        local_rank = local_rank_from_environment() or 0
        device = open_device(configuration.config.run.device, local_rank=local_rank)
    except HpctrainError as error:
        failure = error
    comm = start()
    set_up(comm.rank, comm.size)
    if failure is not None:
        raise failure
    return configuration, device, comm
