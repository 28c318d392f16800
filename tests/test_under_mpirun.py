"""Start the tests marked `ranks`, once for each number of ranks.

When other test files are named on the command line, only those are run on ranks too:

    python -m pytest tests/test_under_mpirun.py tests/test_mpi_topology.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import ROOT, has_tests_for_ranks, mpirun

SECONDS = {False: 240, True: 1200}  # without and with --slow
NOTHING_TO_RUN = 5  # pytest's exit code when no test was selected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])  # 3: neither a power of two nor even
def test_suite_passes_on(ranks, request):
    config = request.config
    limit = SECONDS[config.option.slow]
    done = mpirun(
        ranks,
        *["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "--rootdir", str(ROOT)],
        *(["--slow"] if config.option.slow else []),
        *files_for_ranks(config.args, config.invocation_params.dir),
        timeout=limit + 10,
        env={"MPIEXEC_TIMEOUT": str(limit)},  # Open MPI and MPICH end all ranks themselves
    )
    if done.returncode == NOTHING_TO_RUN:
        pytest.skip(f"no selected test runs on {ranks} ranks")
    if done.returncode:
        pytest.fail(done.stdout, pytrace=False)


def files_for_ranks(args, folder):
    """What the command line names, other than this file, with absolute paths; else all tests."""
    named = []
    for arg in args:
        path, colons, test = arg.partition("::")
        path = Path(folder, path).resolve()
        if path != Path(__file__).resolve():
            named.append((path, f"{path}{colons}{test}"))
    if not named:
        return [str(ROOT / "tests")]
    chosen = [text for path, text in named if path.is_dir() or has_tests_for_ranks(path)]
    if not chosen:
        pytest.skip("no file on the command line has tests for ranks")
    return chosen
