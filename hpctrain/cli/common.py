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

__all__ = ["add_gpu_mpi", "add_run_arguments", "add_run_file", "begin", "resolved"]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The run file, its overrides, and --gpu-mpi."""
    add_run_file(parser)
    add_gpu_mpi(parser, None)


def add_run_file(parser: argparse.ArgumentParser) -> None:
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


def add_gpu_mpi(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """The option --gpu-mpi; see docs/gpu-mpi.md."""
    parser.add_argument(
        "--gpu-mpi",
        choices=("auto", "on", "off"),
        default=default,
        help="whether MPI is given GPU memory: on, off, or (auto) where there is evidence that it "
        "may (default: auto, or what the run file says)",
    )


def resolved(arguments: argparse.Namespace) -> Resolved:
    """The configuration that file, environment and options add up to."""
    from hpctrain.config import resolve

    overrides = list(arguments.overrides)
    if arguments.gpu_mpi is not None:
        overrides.append(f"parallel.gpu_mpi={arguments.gpu_mpi}")
    return resolve(arguments.run_file, overrides)


def begin(resolve: Callable[[], Resolved]) -> tuple[Resolved, Device, MPI.Intracomm]:
    """Read the run file, open the device, start MPI: in this order, as MPI wants it.

    What goes wrong before MPI runs is raised after, when it can be said once for all ranks.
    """
    from hpctrain.errors import HpctrainError
    from hpctrain.log import set_up
    from hpctrain.mpi.gpu import warn_of_shared_gpus
    from hpctrain.mpi.start import start
    from hpctrain.parallel.communicator import open_chosen_device

    failure: HpctrainError | None = None
    try:
        configuration = resolve()
        device = open_chosen_device(configuration.config.run.device)
    except HpctrainError as error:
        failure = error
    comm = start()
    set_up(comm.rank, comm.size)
    if failure is not None:
        raise failure
    warn_of_shared_gpus(comm, device.uuid)
    return configuration, device, comm
