"""Exchanges behind the computation: the same bits as after it, and faults that end all ranks."""

from __future__ import annotations

import numpy as np
import pytest
from launching import ROOT, mpirun
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


def trained(comm, place, overlap, dtype):
    """The bits of parameters, and the norms, of five steps of a small network."""
    from hpctrain.mpi.topology import topology
    from hpctrain.parallel import DataParallel
    from hpctrain.parallel.buckets import bucket_ranges

    device, rng = CpuDevice(), np.random.default_rng(comm.rank)
    model = build(Mlp(hidden=(40, 24, 32), norm="layer"), (20,), 5)
    layouts = model.layouts(dtype)
    layout = layouts.parameters
    with topology(comm, place) as where:
        buckets = bucket_ranges(layout, 1200)
        assert len(buckets) > 3
        parallel = DataParallel(where, device, layout, AdamW(), buckets=buckets, overlap=overlap)
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
            losses, _ = softmax_cross_entropy(tape, model(tape, Variable(x)), rng.integers(0, 5, 8))
            tape.backward(losses)
            tape.finish(named.values())
            norms.append(parallel.update(step, 1e-2, 8.0 * comm.size, clip_norm=0.1))
        parallel.slices.arrive()
        everywhere = comm.allgather(parallel.parameters.array.tobytes())
        parallel.free()
    assert len(set(everywhere)) == 1
    return everywhere[0], norms


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_is_the_same_bit_for_bit(comm, dtype):
    for place in LAYOUTS[comm.size]:
        assert trained(comm, place, "on", dtype) == trained(comm, place, "off", dtype)


@pytest.mark.ranks(2)
def test_without_threads_in_mpi_exchanges_wait_and_it_is_said_once(comm, monkeypatch, caplog):
    from hpctrain.collectives import modes
    from hpctrain.mpi.topology import topology

    monkeypatch.setattr(modes, "threads_may_call", lambda: False)
    with topology(comm, "2x1") as where:
        assert not modes.background_wanted("auto", where, CpuDevice())
    with topology(comm, "1x2") as where:
        assert not modes.background_wanted("auto", where, CpuDevice())  # nothing to say
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


def test_a_run_says_what_was_hidden(tmp_path):
    data = make_digits(tmp_path / "data")
    losses = {}
    for overlap in ("off", "auto"):
        (tmp_path / overlap).mkdir()
        text = run_file(tmp_path / overlap / "run.toml", data, "mlp")
        setting = ("--set", f"parallel.overlap={overlap}", "--set", "run.epochs=1")
        done = hpctrain(2, "train", text, *setting, HPCTRAIN_TOPOLOGY="2x1")
        assert done.returncode == 0, done.stdout
        losses[overlap] = steps(tmp_path / overlap / "run")
        found = records(tmp_path / overlap / "run", "step")
        assert all(record["message_seconds"] > 0 for record in found)
        assert any("hidden_seconds" in record for record in found) == (overlap == "auto")
    assert losses["off"] == losses["auto"]
