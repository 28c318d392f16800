"""Tests marked `ranks` run under mpirun; all others run in one process.

`pytest` alone runs everything: test_under_mpirun.py starts this suite again with 1, 2, 3 and 4
ranks, and there the tests marked with that number run. By hand:

    mpirun -n 3 python -m pytest tests/test_mpi_topology.py

A failure on one rank is shown and aborts every rank, so none is left waiting in a collective; a
test that hangs shows where, and ends. Ranks must run the same tests with the same parameters:
nothing drawn at random per process.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import tempfile
import time

import mpi4py
import pytest
from launching import has_tests_for_ranks

# Set by the launcher: the first by Open MPI, the second by MPICH and Intel MPI.
SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 0)
ERRORS = pytest.StashKey[int]()  # a copy of standard error, from before output is captured
LIMIT = {False: 60, True: 300}  # seconds a test on ranks may take, without and with --slow

# Open MPI starts no job from a process that has called MPI_Init: the outer pytest must not.
mpi4py.rc.initialize = bool(SIZE)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--each-rank", action="store_true", help="on ranks, run unmarked tests too")


def pytest_configure(config):
    config.stash[ERRORS] = os.dup(2)
    if SIZE:  # ranks that end together would race in clearing the folder that pytest shares
        config.option.basetemp = tempfile.mkdtemp(prefix="hpctrain-rank-")


def pytest_unconfigure(config):
    if SIZE:
        shutil.rmtree(config.option.basetemp, ignore_errors=True)


@pytest.fixture
def comm():
    """The world communicator, for tests marked `ranks`."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


def pytest_ignore_collect(collection_path, config):
    """On ranks, files without tests for ranks are not even imported."""
    every_file = not SIZE or config.option.each_rank
    if not every_file and collection_path.is_file() and collection_path.suffix == ".py":
        return not has_tests_for_ranks(collection_path) or None
    return None


def pytest_collection_modifyitems(config, items):
    def chosen(item):
        mark = item.get_closest_marker("ranks")
        here = SIZE in mark.args if mark and SIZE else not (mark or SIZE)
        here |= config.option.each_rank and not mark
        return here and (config.option.slow or not item.get_closest_marker("slow"))

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = filter(chosen, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A rank that hangs shows its threads' tracebacks and exits; mpirun then ends the others."""
    if not SIZE:
        return (yield)
    limit = LIMIT[item.config.option.slow]
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[ERRORS])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if SIZE > 1 and report.failed:
        abort_every_rank(item.config, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if SIZE > 1 and report.failed:
        abort_every_rank(collector.config, report)
    return report


def abort_every_rank(config, report):
    """Write this rank's failure to the real standard error, then end the job."""
    from mpi4py import MPI

    parts = [f"\nrank {MPI.COMM_WORLD.rank} of {SIZE}, {report.nodeid}", report.longreprtext]
    parts += [f"--- {name} ---\n{text}" for name, text in report.sections]
    os.write(config.stash[ERRORS], ("\n".join(parts) + "\n").encode())
    time.sleep(0.2)  # mpirun passes the text on before it kills
    MPI.COMM_WORLD.Abort(1)
