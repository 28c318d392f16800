"""The tests of training, as they are, on simulated GPUs: with MPI on GPU memory and without."""

import os
import subprocess
import sys

import pytest
from launching import ROOT

FILES = ["ranks", "resume", "failures", "parts"]


@pytest.mark.slow
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_training_passes_its_tests_on_simulated_gpus(gpu_mpi):
    """The environment overrides every run file; kernels run as on the CPU, copies come late."""
    settings = {
        "HPCTRAIN_RUN_DEVICE": "sim",
        "HPCTRAIN_PARALLEL_GPU_MPI": gpu_mpi,
        "HPCTRAIN_SIM_KERNELS": "host",
    }
    files = [f"tests/test_train_{name}.py" for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
