"""The tests of operations, update rules and training, as they are, on simulated GPUs.

What runs there is told by what a test file imports, so that a new one is not forgotten: files that
take their device from `tested_device`, and files that train. A file that opens a CPU by itself has
its reason here. Training and reductions are run with GPU memory given to MPI, and without.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import subprocess
import sys

import pytest
from launching import ROOT, has_tests_for_ranks, mpirun

FILES = {path.stem: path for path in sorted((ROOT / "tests").glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# Files that open a CPU themselves, and why they do not take the device of the tests.
CPU_ONLY = {
    "kernel_checks": "the host target against the others, level by level",
    "lost_bucket": "an exchange of host memory that fails",
    "test_checkpoint_background": "memory is written to files by the host",
    "test_cli_bench": "`bench` measures the CPU",
    "test_collectives_*": "shared windows; test_collectives_gpu.py has all ways of simulated GPUs",
    "test_compress_*": "test_compress_device.py holds simulated GPUs against the CPU",
    "test_data_run_files": "what is read, not what is computed",
    "test_device_*": "the device itself",
    "test_mpi_gpu": "a device that needs no choice of a GPU",
    "test_netns_cluster": "messages between network namespaces",
    "test_parallel_overlap": "exchanges of host memory, and on simulated GPUs already",
}
# Files that train but are not run once more.
TRAINS_ELSEWHERE = {
    "test_cli": "usage and exit codes: no array",
    "test_cli_bench_scaling": "`bench` measures the CPU; what it runs is the command",
    "test_data_run_files": "what is read, not what is computed",
    "test_device_sim_mpi": "simulated GPUs already",
    "test_device_sim_train": "simulated GPUs already",
    "test_full_disk": "a file system that is full",
    "test_parallel_overlap": "exchanges of host memory, and on simulated GPUs already",
    "test_report": "reads what a run wrote",
    "test_slurm": "job scripts and what a scheduler does",
    "test_tensorboard": "numbers that were recorded, in other files",
    "test_timeline": "clocks of the host",
    "test_train_crossing": "what is picked; test_collectives_gpu.py has messages of GPUs",
    "test_train_faults": "files and processes that fail",
    "test_train_signals": "launchers and their signals",
    "test_train_watchdog": "processes that hang",
}


def imports(name):
    """Modules that a test file imports, and those that its own modules do."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found.union(*(imports(module) for module in found & FILES.keys()))


TESTS = [name for name in FILES if name.startswith("test_")]
ON_DEVICE = [name for name in TESTS if "tested_device" in imports(name)]
TRAINING = [name for name in TESTS if "training" in imports(name) or name == "test_runs"]
PLAIN = [name for name in ON_DEVICE if name not in TRAINING]
RANKS = [name for name in ON_DEVICE if has_tests_for_ranks(FILES[name])]
TRAINS = [name for name in TRAINING if name not in TRAINS_ELSEWHERE and name not in RANKS]
SENDS = ["test_train_failures", "test_train_ranks", "test_train_resume"]


def opens_a_cpu(node):
    """Whether this part of a syntax tree asks for the CPU by name."""
    if isinstance(node, ast.Name | ast.Attribute):
        return "CpuDevice" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return "CpuDevice()" in node.value  # a program of its own
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    values = [*node.args, *(keyword.value for keyword in node.keywords)]
    return name in ("open_device", "open_chosen_device", "Communicator") and any(
        isinstance(value, ast.Constant) and value.value == "cpu" for value in values
    )


def reasons_for(name):
    return [pattern for pattern in CPU_ONLY if fnmatch.fnmatch(name, pattern)]


@pytest.mark.parametrize(
    ("text", "opens"),
    [
        ("from x import CpuDevice as C\nDEVICE = CpuDevice()", True),
        ("cpu.CpuDevice()", True),
        ("PROGRAM = '''device = CpuDevice()'''", True),
        ("hpctrain.Communicator(comm, device='cpu')", True),
        ("open_device('cpu')", True),
        ("open_device(name)\nCommunicator(comm, DEVICE)\ntiles.TILE_BYTES['cpu']", False),
    ],
)
def test_an_opened_cpu_is_found(text, opens):
    assert any(map(opens_a_cpu, ast.walk(ast.parse(text)))) == opens


def test_no_other_file_opens_a_cpu():
    """Take the device from tests/tested_device.py, or give a reason above."""
    open_one = [
        name
        for name, tree in TREES.items()
        if name != "test_device_sim_suite" and any(map(opens_a_cpu, ast.walk(tree)))
    ]
    assert [name for name in open_one if not reasons_for(name)] == []
    used = {pattern for name in open_one for pattern in reasons_for(name)}
    assert used == CPU_ONLY.keys()


def test_the_files_that_are_run_are_there():
    names = {f"test_nn_{name}" for name in ("batch_norm", "convolution", "module", "operations")}
    assert names | {"test_autograd", "test_optim"} <= set(PLAIN)
    assert {"test_parallel_optimizer", "test_nn_batch_norm", "test_mixed_precision"} <= set(RANKS)
    assert set(SENDS) <= set(TRAINS) and TRAINS_ELSEWHERE.keys() <= set(TRAINING)


def test_operations_and_updates_pass_their_tests_on_a_simulated_gpu():
    run(PLAIN, HPCTRAIN_SIM_ORDER="late")


@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_reductions_pass_their_tests_on_two_simulated_gpus(gpu_mpi):
    run([name for name in RANKS if name in PLAIN], ranks=2, HPCTRAIN_GPU_MPI=gpu_mpi)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_all_tests_on_ranks_pass_on_simulated_gpus(gpu_mpi, ranks):
    run(RANKS, ranks=ranks, HPCTRAIN_GPU_MPI=gpu_mpi)


@pytest.mark.slow
def test_operations_and_updates_pass_their_tests_on_each_of_two_ranks():
    """On the second GPU too, in another order, under MPI."""
    run(PLAIN, "--each-rank", ranks=2, HPCTRAIN_SIM_ORDER="3")


@pytest.mark.slow
def test_mixed_precision_passes_its_tests_on_simulated_gpus():
    run([name for name in RANKS if name in TRAINING])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "gpu_mpi"), [(TRAINS, "on"), (SENDS, "off")], ids=["gpu-mpi on", "gpu-mpi off"]
)
def test_training_passes_its_tests_on_simulated_gpus(names, gpu_mpi):
    """The environment overrides every run file."""
    run(names, HPCTRAIN_PARALLEL_GPU_MPI=gpu_mpi)


def run(names, *options, ranks=0, **settings):
    """These tests with device "sim": kernels run as on the CPU, all work comes late."""
    settings = {"HPCTRAIN_RUN_DEVICE": "sim", "HPCTRAIN_SIM_KERNELS": "host"} | settings
    files = [f"tests/{name}.py" for name in names]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *files]
    if ranks:
        done = mpirun(ranks, *command, timeout=600, env=settings)
    else:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
