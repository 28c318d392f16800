"""GPU memory goes to MPI on evidence only, agreed by all ranks; each rank takes the right GPU."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest
from launching import environment, mpirun

from hpctrain.config import from_text
from hpctrain.errors import DeviceError, UsageError
from hpctrain.mpi import gpu
from hpctrain.mpi.gpu import Facts, decide, evidence, warn_of_shared_gpus
from hpctrain.mpi.start import choose_gpu

OPEN_MPI = "Open MPI v5.0.5, package: Open MPI root@build"
MPICH = "MPICH Version:      4.2.3\nMPICH Release date: ..."
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28.2 (ANL base 3.4a2)"
MVAPICH = "MVAPICH2 Version      :\t2.3.7"
PARASTATION = "MPICH Version: 3.4.3\nParaStationMPI 5.6"
UCX = frozenset({"libmpi.so.40", "libucp.so.0"})
UCX_CUDA = UCX | {"libuct_cuda.so.0"}


@pytest.mark.parametrize(
    "known, on, why",
    [
        # Open MPI
        (Facts(OPEN_MPI, query=True), True, r"MPIX_Query_cuda_support\(\) says yes"),
        (Facts(OPEN_MPI, query=False), False, r"MPIX_Query_cuda_support\(\) says no"),
        (Facts(OPEN_MPI, query=False, built_in=True), False, "says no"),
        (Facts(OPEN_MPI, built_in=True), True, "ompi_info says"),
        (Facts(OPEN_MPI, built_in=False), False, "ompi_info says that CUDA was not built in"),
        (Facts(OPEN_MPI), False, "has no MPIX_Query_cuda_support"),
        (Facts(OPEN_MPI, query=True, loaded=UCX), False, "without its CUDA module libuct_cuda"),
        (Facts(OPEN_MPI, query=True, loaded=UCX_CUDA), True, "says yes"),
        (
            Facts(OPEN_MPI, query=True, environment={"OMPI_MCA_opal_cuda_support": "0"}),
            False,
            "switched off by OMPI_MCA_opal_cuda_support=0",
        ),
        # MPICH
        (Facts(MPICH, gpu_query=True), True, "MPIX_GPU_query_support"),
        (Facts(MPICH, gpu_query=False, query=True), False, "says no by MPIX_GPU_query_support"),
        (Facts(MPICH, query=True), True, "MPIX_Query_cuda_support"),
        (Facts(MPICH), False, "MPICH has no MPIX_GPU_query_support"),
        (
            Facts(MPICH, gpu_query=True, environment={"MPIR_CVAR_ENABLE_GPU": "0"}),
            False,
            "MPIR_CVAR_ENABLE_GPU=0",
        ),
        # those that a variable switches on
        (Facts(CRAY, gpu_query=True), False, "needs MPICH_GPU_SUPPORT_ENABLED=1"),
        (
            Facts(CRAY, environment={"MPICH_GPU_SUPPORT_ENABLED": "1"}),
            True,
            "MPICH_GPU_SUPPORT_ENABLED=1 with Cray MPICH",
        ),
        (Facts(MPICH, environment={"MPICH_GPU_SUPPORT_ENABLED": "1"}), False, "MPICH has no"),
        (Facts(MVAPICH), False, "needs MV2_USE_CUDA=1"),
        (Facts(MVAPICH, environment={"MV2_USE_CUDA": "1"}), True, "MV2_USE_CUDA=1"),
        (Facts(MVAPICH, environment={"MV2_USE_CUDA": "0"}), False, "needs MV2_USE_CUDA=1"),
        (Facts(PARASTATION, environment={"PSP_CUDA": "1"}), True, "PSP_CUDA=1"),
        (Facts(PARASTATION, gpu_query=True), False, "needs PSP_CUDA=1"),
        # MPI-4.1, whoever made it
        (Facts("Some MPI 6", kinds="system,mpi,cuda:device"), True, "cuda:device"),
        (Facts("Some MPI 6", kinds="system,mpi"), False, "no evidence of GPU support in Some MPI"),
        (Facts("", query=True), False, "no evidence of GPU support in an unknown MPI"),
    ],
)
def test_evidence(known, on, why):
    decision = evidence(known)
    assert decision.on == on
    assert re.search(why, decision.reason), decision.reason


@pytest.mark.ranks(1)
def test_the_facts_of_this_library(comm):
    """Whichever MPI runs the tests says what it is; the wheels of PyPI have no GPU support."""
    from mpi4py import MPI

    known = gpu.facts()
    assert known.library == MPI.Get_library_version().replace("\0", "").strip()
    assert any(name.startswith("libmpi") for name in known.loaded)
    if "Open MPI" in known.library:
        assert known.query is not None or known.built_in is not None
    assert evidence(known).reason


@pytest.fixture
def no_order(monkeypatch):
    monkeypatch.delenv("HPCTRAIN_GPU_MPI", raising=False)


@pytest.mark.ranks(1, 2, 3)
def test_orders(comm, monkeypatch, no_order):
    assert decide(comm, "sim").on
    assert decide(comm, "cuda", "on").on and not decide(comm, "sim", "off").on
    for value, on in (("on", True), ("off", False), (" OFF ", False)):
        monkeypatch.setenv("HPCTRAIN_GPU_MPI", value)
        decision = decide(comm, "sim")
        assert decision.on == on and "by order (HPCTRAIN_GPU_MPI=" in decision.reason
    assert decide(comm, "sim", "on").on
    monkeypatch.setenv("HPCTRAIN_GPU_MPI", "1")
    with pytest.raises(UsageError, match="HPCTRAIN_GPU_MPI=1: '1' is no answer.*auto, on, off"):
        decide(comm, "sim")


@pytest.mark.ranks(2, 3)
def test_one_no_is_everybodys_no(comm, monkeypatch, caplog, no_order):
    last = comm.size - 1
    says_no = Facts(OPEN_MPI, query=comm.rank != last)
    monkeypatch.setattr(gpu, "facts", lambda: says_no)
    with caplog.at_level(logging.INFO):
        decision = decide(comm, "cuda")
    assert not decision.on and decision.reason.startswith(f"rank {last}: Open MPI's")
    lines = [record.getMessage() for record in caplog.records]
    wanted = f"GPU buffers are sent to MPI through pinned host memory: rank {last}: "
    assert len(lines) == (comm.rank == 0) and all(line.startswith(wanted) for line in lines)


@pytest.mark.ranks(2)
def test_a_wrong_order_on_one_rank_is_an_error_on_all(comm, monkeypatch, no_order):
    if comm.rank == 1:
        monkeypatch.setenv("HPCTRAIN_GPU_MPI", "yes")
    with pytest.raises(UsageError, match="rank 1: HPCTRAIN_GPU_MPI=yes"):
        decide(comm, "sim")


def test_where_an_order_may_stand():
    """Default, run file, environment, option: the later wins."""
    text = '[data]\npath = "d"\n[model]\nname = "mlp"\n'
    section = '[parallel]\ngpu_mpi = "off"\n'
    variable = {"HPCTRAIN_GPU_MPI": "on"}

    def resolved(*arguments, **more):
        found = from_text(*arguments, **more)
        return found.config.parallel.gpu_mpi, found.origins.get("parallel.gpu_mpi")

    assert resolved(text) == ("auto", None)
    assert resolved(text + section) == ("off", "run file")
    assert resolved(text + section, environment=variable) == ("on", "$HPCTRAIN_GPU_MPI")
    option = ["parallel.gpu_mpi=off"]
    assert resolved(text, overrides=option, environment=variable) == ("off", "--set")
    with pytest.raises(UsageError, match=r"parallel\.gpu_mpi.*'yes'|'yes'.*parallel\.gpu_mpi"):
        from_text(text, environment={"HPCTRAIN_GPU_MPI": "yes"})


@pytest.mark.parametrize(
    "visible, variables, chosen",
    [
        (4, {}, 0),
        (4, {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        (4, {"MPI_LOCALRANKID": "3", "SLURM_LOCALID": "0"}, 3),
        (4, {"SLURM_LOCALID": "1"}, 1),
        (4, {"PALS_LOCAL_RANKID": "5"}, 1),  # more ranks than GPUs: counted round
        (1, {"FLUX_TASK_LOCAL_ID": "3"}, 0),  # the scheduler chose
        (1, {"SLURM_LOCALID": "3", "HPCTRAIN_GPU_ORDER": "3,2,1,0"}, 0),
        (4, {"SLURM_LOCALID": "0", "HPCTRAIN_GPU_ORDER": "3,2,1,0"}, 3),
        (4, {"SLURM_LOCALID": "5", "HPCTRAIN_GPU_ORDER": "3, 2, 1, 0"}, 2),
        (4, {"SLURM_LOCALID": "1", "HPCTRAIN_GPU_ORDER": "3,2,1,0", "HPCTRAIN_DEVICE": "0"}, 0),
        (2, {"HPCTRAIN_DEVICE": "1"}, 1),
    ],
)
def test_which_gpu_a_rank_takes(visible, variables, chosen):
    assert choose_gpu(visible, variables) == chosen


@pytest.mark.parametrize(
    "visible, variables, says",
    [
        (2, {"HPCTRAIN_DEVICE": "2"}, "HPCTRAIN_DEVICE=2: '2' is not one of the 2 visible GPUs"),
        (1, {"HPCTRAIN_DEVICE": "1"}, "not one of the 1 visible"),
        (2, {"HPCTRAIN_DEVICE": "gpu1"}, "'gpu1' is not one of"),
        (2, {"HPCTRAIN_GPU_ORDER": "3,2,1,0"}, "HPCTRAIN_GPU_ORDER=3,2,1,0: '3' is not one"),
        (2, {"HPCTRAIN_GPU_ORDER": "0,,"}, None),
        (2, {"SLURM_LOCALID": "1", "HPCTRAIN_GPU_ORDER": "0,"}, "'' is not one of"),
    ],
)
def test_a_gpu_that_is_not_there(visible, variables, says):
    if says is None:
        assert choose_gpu(visible, variables) == 0
        return
    with pytest.raises(UsageError, match=says):
        choose_gpu(visible, variables)


@pytest.mark.ranks(1, 2)
def test_a_gpu_chosen_after_mpi_started_is_refused(comm):
    from hpctrain.device import open_device
    from hpctrain.parallel import Communicator

    if comm.size == 1:  # nobody else's memory can be touched by mistake
        Communicator(device="sim").free()
        return
    with pytest.raises(DeviceError, match="chosen after MPI has started.*open the device first"):
        Communicator(comm, device="sim")
    device = open_device("sim", local_rank=comm.rank)  # the caller knows which
    communicator = Communicator(comm, device=device)
    assert communicator.device is device
    communicator.free()
    Communicator(comm, device="cpu").free()


def test_commands_choose_before_mpi_starts():
    """Also on the simulated device, of which every local rank takes its own."""
    script = (
        "from hpctrain.parallel.communicator import open_chosen_device; import sys\n"
        "device = open_chosen_device('sim'); assert 'mpi4py.MPI' not in sys.modules\n"
        "from hpctrain.mpi.start import start; comm = start()\n"
        "assert len(set(comm.allgather(device.uuid))) == comm.size\n"
    )
    done = mpirun(2, "-c", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.ranks(1, 3)
def test_shared_gpus_are_named(comm, caplog):
    with caplog.at_level(logging.WARNING):
        assert warn_of_shared_gpus(comm, "") == []
        assert warn_of_shared_gpus(comm, f"GPU-{comm.rank}") == []
        assert not caplog.records
        shared = warn_of_shared_gpus(comm, "GPU-b" if comm.rank == 1 else "GPU-a")
    assert shared == ([[0, 2]] if comm.size == 3 else [])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (comm.rank == 0 and comm.size == 3)
    assert all("ranks 0, 2 share the GPU GPU-a of" in line for line in lines)


def test_training_warns_of_a_shared_gpu_once(tmp_path):
    script = (
        "from hpctrain.cli.common import begin; from hpctrain.config import from_text\n"
        'text = \'[data]\\npath = "d"\\n[model]\\nname = "mlp"\\n[run]\\ndevice = "sim"\\n\'\n'
        "begin(lambda: from_text(text))\n"
    )
    done = mpirun(2, "-c", script, env={"HPCTRAIN_SIM_DEVICES": "1"})
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ranks 0, 1 share the GPU") == 1


def test_the_option_of_train(tmp_path):
    run_file = tmp_path / "run.toml"
    run_file.write_text('[data]\npath = "d"\n[model]\nname = "mlp"\n')
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain", "config", str(run_file), "--gpu-mpi", "off"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "gpu_mpi" in line)
    assert "off" in line
