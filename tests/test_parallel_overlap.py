"""Exchanges behind the computation: the same bits as after it, and faults that end all ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from launching import ROOT, mpirun
from simulated import open_sim
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.autograd import Tape, Variable
from hpctrain.device.cpu import CpuDevice
from hpctrain.models import build
from hpctrain.nn.layout import Store
from hpctrain.nn.losses import softmax_cross_entropy
from hpctrain.optim import AdamW
from hpctrain.sections import Mlp

LAYOUTS = {1: ["1x1"], 2: ["2x1", "1x2"], 3: ["3x1", "2+1"], 4: ["2x2", "3+1"]}
SCRIPT = str(ROOT / "tests" / "lost_bucket.py")


def trained(comm, place, overlap, dtype, device=None, gpu_mpi="auto"):
    """All ranks' bits of the parameters, and the norms, after five steps of a small network."""
    from hpctrain.mpi.topology import topology
    from hpctrain.parallel import DataParallel
    from hpctrain.parallel.buckets import bucket_ranges

    device, rng = device or CpuDevice(), np.random.default_rng(comm.rank)
    model = build(Mlp(hidden=(40, 24, 32), norm="layer"), (20,), 5)
    layouts = model.layouts(dtype)
    layout = layouts.parameters
    with topology(comm, place) as where:
        buckets = bucket_ranges(layout, 1200)
        assert len(buckets) > 3
        options = {"buckets": buckets, "overlap": overlap, "gpu_mpi": gpu_mpi}
        parallel = DataParallel(where, device, layout, AdamW(), **options)
        assert (parallel.slices.waited == 0) and len(parallel.owned) == len(buckets)
        unneeded = [
            Store(x, device.zeros(x.size, x.dtype)) for x in (layouts.averages, layouts.sums)
        ]
        model.bind(parallel.parameters, unneeded[0], parallel.gradients, unneeded[1])
        named = model.parameters()
        parallel.set_parameters(lambda name: named[name].initial(1, name))
        names = {id(parameter): name for name, parameter in named.items()}
        for name, parameter in named.items():
            parameter.arrive = lambda name=name: parallel.arrive(name)
        norms = []
        for step in range(5):
            x = rng.standard_normal((8, 20)).astype(dtype)
            tape = Tape(device, step=step, ready=lambda p: parallel.ready(names[id(p)]))
            output = model(tape, Variable(device.from_host(x)))
            labels = device.from_host(rng.integers(0, 5, 8))
            losses, _ = softmax_cross_entropy(tape, output, labels)
            tape.backward(losses)
            tape.finish(named.values())
            norms.append(parallel.update(step, 1e-2, 8.0 * comm.size, clip_norm=0.1))
        parallel.slices.arrive()
        everywhere = comm.allgather(device.to_host(parallel.parameters.array).tobytes())
        parallel.free()
    return everywhere, norms


def alike(found):
    """Whether all ranks hold the same bits."""
    return len(set(found[0])) == 1


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_is_the_same_bit_for_bit(comm, dtype):
    for place in LAYOUTS[comm.size]:
        expected = trained(comm, place, "off", dtype)
        assert alike(expected) and trained(comm, place, "on", dtype) == expected


def compiled(comm, dtypes):
    """Compile what a simulated GPU needs, once."""
    device = open_sim()
    device.prepare(dtypes, comm)


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("order", ["late", "1"])
def test_it_is_the_same_on_a_gpu_bit_for_bit(comm, order):
    """Whatever a GPU's streams are free to do, MPI given its memory or not."""
    compiled(comm, ["float32"])
    for place in {1: ["1x1"], 2: ["2x1", "1x2"], 4: ["2x2"]}[comm.size]:
        expected = trained(comm, place, "off", "float32", open_sim(order))
        for gpu_mpi in ("on", "off"):
            found = trained(comm, place, "on", "float32", open_sim(order), gpu_mpi)
            assert alike(found) and found == expected, (place, gpu_mpi)


@pytest.mark.slow
@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_it_is_the_same_on_a_gpu_in_every_order(comm, dtype, gpu_mpi):
    compiled(comm, ["float32", "float16"])
    for place in LAYOUTS[comm.size]:
        expected = trained(comm, place, "off", dtype, open_sim())
        for order in ("late", "early", "2", "3", "4"):
            found = trained(comm, place, "on", dtype, open_sim(order), gpu_mpi)
            assert alike(found) and found == expected, (place, order)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
@pytest.mark.parametrize("thread", ["communication", "MainThread"])
def test_a_missing_wait_for_an_event_is_caught(comm, monkeypatch, thread, gpu_mpi):
    """Of the exchanges for the gradients, and of the update for the sums."""
    compiled(comm, ["float32"])
    gpu = open_sim("late")
    expected = trained(comm, "2x1", "off", "float32", open_sim("late"))
    wait_event = gpu.wait_event

    def planted(event):
        if threading.current_thread().name != thread:
            wait_event(event)

    monkeypatch.setattr(gpu, "wait_event", planted)
    with np.errstate(invalid="ignore"):
        assert trained(comm, "2x1", "on", "float32", gpu, gpu_mpi) != expected


@pytest.mark.ranks(2)
def test_without_threads_in_mpi_exchanges_wait_and_it_is_said_once(comm, monkeypatch, caplog):
    from hpctrain.collectives import modes
    from hpctrain.mpi.topology import topology

    monkeypatch.setattr(modes, "threads_may_call", lambda: False)
    with topology(comm, "2x1") as where:
        assert not modes.background_wanted("auto", where)
    with topology(comm, "1x2") as where:
        assert not modes.background_wanted("auto", where)  # nothing to say
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (comm.rank == 0) and all("MPI_THREAD_MULTIPLE" in line for line in lines)


def test_a_fault_in_the_thread_of_one_rank_ends_all_with_its_place(tmp_path):
    done = mpirun(2, SCRIPT, str(tmp_path), "raises", timeout=60)
    assert done.returncode == 1, done.stdout
    assert "in planted_failure" in done.stdout and "ZeroDivisionError" in done.stdout
    assert "rank 1 of 2" in done.stdout and "ended" not in done.stdout


def test_a_rank_whose_bucket_never_comes_is_named(tmp_path):
    left = {"OMPI_MCA_btl_sm_backing_directory": str(tmp_path)}
    done = mpirun(2, SCRIPT, str(tmp_path / "run"), "never", timeout=60, env=left)
    assert done.returncode == 124, done.stdout
    assert "rank 0 in exchange #" in done.stdout and "rank 1 did not enter it" in done.stdout
    assert "in never_comes" in done.stdout


@pytest.mark.parametrize("device", ["cpu", pytest.param("sim", marks=pytest.mark.slow)])
def test_a_run_says_what_was_hidden(tmp_path, device):
    data = make_digits(tmp_path / "data")
    losses = {}
    for overlap in ("off", "auto"):
        (tmp_path / overlap).mkdir()
        text = run_file(tmp_path / overlap / "run.toml", data, "mlp")
        setting = ("--set", f"parallel.overlap={overlap}", "--set", "run.epochs=1")
        setting += ("--set", f"run.device={device}")
        env = {"HPCTRAIN_TOPOLOGY": "2x1", "HPCTRAIN_SIM_KERNELS": "host"}
        done = hpctrain(2, "train", text, *setting, **env)
        assert done.returncode == 0, done.stdout
        losses[overlap] = steps(tmp_path / overlap / "run")
        found = records(tmp_path / overlap / "run", "step")
        assert all(record["message_seconds"] > 0 for record in found)
        if device == "cpu":  # on a GPU the host's times do not tell
            assert any("hidden_seconds" in record for record in found) == (overlap == "auto")
    assert losses["off"] == losses["auto"]
