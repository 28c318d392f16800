"""The tests of operations and of training, as they are, on simulated GPUs.

Training with MPI on GPU memory and without.
"""

import os
import subprocess
import sys

import pytest
from launching import ROOT

NN = [f"nn_{name}" for name in ("batch_norm", "convolution", "dropout", "embedding", "pooling")]
TRAIN = [f"train_{name}" for name in ("ranks", "resume", "failures")]


def test_operations_pass_their_tests_on_a_simulated_gpu():
    """What goes through `gradient_check` is on the device; tests that open a CPU stay there."""
    run([*NN, "nn_operations"], HPCTRAIN_SIM_ORDER="late")


@pytest.mark.slow
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_training_passes_its_tests_on_simulated_gpus(gpu_mpi):
    """The environment overrides every run file."""
    run(TRAIN, HPCTRAIN_PARALLEL_GPU_MPI=gpu_mpi)


def run(files, **settings):
    """These tests with device "sim": kernels run as on the CPU, all work comes late."""
    settings |= {"HPCTRAIN_RUN_DEVICE": "sim", "HPCTRAIN_SIM_KERNELS": "host"}
    files = [f"tests/test_{name}.py" for name in files]
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
