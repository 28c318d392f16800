"""Compressed sums between nodes: mass, finite checks, checkpoints of residuals, choices."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hpctrain import checkpoint
from hpctrain.collectives.slices import SliceReduction
from hpctrain.compress import Compression, Settings
from hpctrain.compress.portions import portions
from hpctrain.compress.powersgd import Matrix
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import HpctrainError, UsageError
from hpctrain.mpi.topology import topology
from hpctrain.nn.layout import Layout
from hpctrain.train.compressing import Loading, residual_parts, state_of

LAYOUT = Layout(
    [
        ("c.w", (20, 30), True),
        ("c.b", (20,), False),
        ("b.w", (7, 11), True),
        ("a.w", (33, 50), True),
    ],
    np.float32,
)
TOPOLOGIES = {
    1: ["1x1"],
    2: ["2x1", "1x2"],
    3: ["3x1", "2+1"],
    4: ["2x2", "3+1", "0,1,0,1", "4x1"],
}
METHODS = ["topk", "oktopk", "int8", "sign", "bf16", "powersgd", "auto"]


@pytest.fixture(scope="module")
def device():
    """A CPU whose kernels are compiled once, on rank 0."""
    from mpi4py import MPI

    device = CpuDevice()
    device.prepare(["float32"], MPI.COMM_WORLD)
    return device


def whole_numbers(rank, step):
    rng = np.random.default_rng([rank, step])
    x = rng.integers(-4, 5, LAYOUT.size).astype(np.float32)
    x[rng.integers(0, LAYOUT.size, 40)] *= 40
    padding = np.ones(LAYOUT.size, bool)
    for entry in LAYOUT.entries:
        padding[entry.offset : entry.offset + entry.size] = False
    x[padding] = 0
    return x


def sliced(where, device, buckets=None, **settings):
    compression = Compression(Settings(density=0.02, least_size=100, **settings), LAYOUT)
    slices = SliceReduction(
        where, device, LAYOUT.size, np.float32, buckets=buckets, crossing=compression
    )
    return compression, slices


def kept(comm, compression):
    """The residuals of all nodes, added up."""
    mine = np.zeros(LAYOUT.size)
    for column in compression.columns:
        mine[slice(*column.span)] += column.memory.residual
    return np.sum(comm.allgather(mine), axis=0)


def applied(comm, slices):
    """The sums, each from the ranks that count; all nodes must have the same bits."""
    mine = np.full(LAYOUT.size, np.nan, np.float32)
    at = 0
    for start, stop in slices.owned:
        mine[start:stop] = slices.sums[at : at + stop - start]
        at += stop - start
    rows = comm.allgather(mine)
    total = rows[0]
    for row in rows[1:]:
        both = ~np.isnan(row) & ~np.isnan(total)
        assert (row[both].view(np.uint32) == total[both].view(np.uint32)).all()
        total = np.where(np.isnan(total), row, total)
    assert not np.isnan(total).any()
    return total


@pytest.mark.ranks(1, 2, 3, 4, 8)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_applied_and_kept_is_what_came(comm, device, method):
    """On every topology: exactly, or to a rounding for methods that round."""
    exact = method in ("topk", "oktopk", "auto")
    texts = TOPOLOGIES.get(comm.size, ["2x4"])
    for number, text in enumerate(texts if method == "topk" else texts[:2]):
        buckets = [(0, 640), (640, LAYOUT.size)] if number % 2 else None
        with topology(comm, text) as where:
            compression, slices = sliced(where, device, buckets, method=method)
            for step in range(3):
                mine = whole_numbers(comm.rank, step)
                came = np.sum(comm.allgather(mine.astype(np.float64)), axis=0)
                before = kept(comm, compression)
                slices.gradients[:] = mine
                slices.reduce()
                sums = applied(comm, slices)
                slices.gather()
                difference = sums + kept(comm, compression) - came - before
                assert np.abs(difference).max() <= (0 if exact else 1e-3)
                small = LAYOUT.locate("c.b")
                span = slice(small.offset, small.offset + small.size)
                np.testing.assert_array_equal(sums[span], came[span])
            slices.free()


@pytest.mark.ranks(2)
def test_a_payload_of_another_layout_is_refused(comm, device):
    """On all ranks: rank 1 has other names for the same shapes."""
    tensors = [(f"{comm.rank}.w", (40, 50), True)]
    layout = Layout(tensors, np.float32)
    with topology(comm, "2x1") as where:
        slices = SliceReduction(
            where, device, layout.size, np.float32, crossing=Compression(Settings(), layout)
        )
        slices.gradients[:] = 1
        with pytest.raises(HpctrainError, match="layout = "):
            slices.reduce()
        slices.free()


@pytest.mark.ranks(2, 4)
def test_momentum_that_is_gathered_before_is_that_of_the_sums(comm, device):
    """Where everything is sent; and what is taken back leaves velocities as they were."""
    with topology(comm, TOPOLOGIES[comm.size][0]) as where:
        compression = Compression(Settings("topk", 1.0, least_size=100, momentum=0.5), LAYOUT)
        slices = SliceReduction(where, device, LAYOUT.size, np.float32, crossing=compression)
        velocity = 0
        for step in range(4):
            mine = 16 * whole_numbers(comm.rank, step)
            for attempt in range(2):
                slices.gradients[:] = mine
                slices.reduce()
                slices.gather()
                if not attempt:
                    compression.undo()
            velocity = 0.5 * velocity + np.sum(comm.allgather(mine), axis=0)
            np.testing.assert_array_equal(applied(comm, slices), velocity)
        assert compression.kept == ("residual", "velocity")
        slices.free()


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_leave_residuals_alone(comm, device, method):
    """Oracle 19: on one rank, in one bucket; then the other bucket's residual is taken back."""
    with topology(comm, TOPOLOGIES[comm.size][0]) as where:
        buckets = [(0, 640), (640, LAYOUT.size)]
        compression, slices = sliced(where, device, buckets, method=method)
        for step in range(2):
            slices.gradients[:] = whole_numbers(comm.rank, step)
            slices.reduce()
            slices.gather()
        before = [column.memory.residual.tobytes() for column in compression.columns]
        slices.gradients[:] = whole_numbers(comm.rank, 3)
        if comm.rank == 1:
            slices.gradients[100] = np.inf
        slices.reduce()
        slices.gather()
        total = np.array([np.square(slices.sums).sum(dtype=np.float64)])
        slices.all_reduce(total)
        assert not np.isfinite(total[0])
        compression.undo()
        assert [column.memory.residual.tobytes() for column in compression.columns] == before
        slices.free()


@pytest.mark.ranks(3, 4)
def test_residuals_reach_other_nodes_with_the_same_sum(comm, device, tmp_path):
    """Oracle 18: a checkpoint of one topology, loaded on every other."""
    folder = comm.bcast(tmp_path)
    session = SimpleNamespace(comm=comm, device=device, layouts=SimpleNamespace(parameters=LAYOUT))
    for number, text in enumerate(TOPOLOGIES[comm.size]):
        with topology(comm, text) as where:
            compression, slices = sliced(where, device, [(0, 640), (640, LAYOUT.size)])
            for step in range(3):
                slices.gradients[:] = whole_numbers(comm.rank, step)
                slices.reduce()
                slices.gather()
            parts = residual_parts(compression, session)
            state = {"compression": state_of(compression, session)}
            checkpoint.save(folder, number, parts, state, comm)
            before = kept(comm, compression)
            exact = [column.memory.residual.tobytes() for column in compression.columns]
            slices.free()
        path = folder / f"step_{number:08}"
        for other in [*TOPOLOGIES[comm.size], f"1x{comm.size}"]:
            with topology(comm, other) as where:
                compression, slices = sliced(where, device, [(0, 640), (640, LAYOUT.size)])
                loading = Loading(path, compression, session)
                loaded = checkpoint.load(path, loading.parts, comm)
                rest = loading.finish(loaded["compression"])
                total = kept(comm, compression)
                total += np.sum(
                    comm.allgather(np.zeros(LAYOUT.size) if rest is None else rest), axis=0
                )
                np.testing.assert_array_equal(total, before)
                if other == text:
                    assert [c.memory.residual.tobytes() for c in compression.columns] == exact
                    assert all(column.steps == 3 for column in compression.columns)
                slices.free()


def test_portions_of_a_column():
    cut = portions(LAYOUT, 0, LAYOUT.size, 100)
    offsets = {entry.name: entry.offset for entry in LAYOUT.entries}
    assert cut.matrices == (Matrix(0, 20, 30), Matrix(offsets["a.w"], 33, 50))
    assert cut.small[0][0] == offsets["c.b"]
    assert cut.small[-1][1] == offsets["b.w"] + 77
    assert cut.edges == ()
    inside = np.zeros(LAYOUT.size, bool)
    for entry in LAYOUT.entries:
        inside[entry.offset : entry.offset + entry.size] = True
    for first, last in cut.gaps:
        assert not inside[first:last].any()
        inside[first:last] = True
    assert cut.gaps and inside.all()
    cut = portions(LAYOUT, 48, 320, 100)  # rows 1.6 to 10.67 of c.w
    assert cut.matrices == (Matrix(12, 8, 30),)
    assert cut.edges == ((0, 12), (252, 272))
    assert cut.small == ()


def test_the_density_falls_by_equal_factors():
    settings = Settings("topk", density=0.001, warmup_steps=2)
    np.testing.assert_allclose([settings.density_at(s) for s in range(4)], [0.1, 0.01, 1e-3, 1e-3])


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"method": "topc"}, "did you mean"),
        ({"density": 0.0}, "density"),
        ({"values": "float64"}, "float64"),
        ({"rank": 0}, "rank 0"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"momentum": 0.9, "method": "int8"}, "does not go with 'int8'"),
    ],
)
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        Settings(**wrong)


def test_gradients_of_another_type_are_refused():
    with pytest.raises(UsageError, match="float64"):
        Compression(Settings(), LAYOUT.with_dtype(np.float64))
