"""The books of every method between nodes, and copies of known defects that they catch.

Whole numbers add exactly in any order, so what was applied, and what each rank kept, must come to
what was brought, with no tolerance.
"""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from launching import mpirun

from hpctrain.collectives.opaque import Exchange
from hpctrain.compress import methods, sparse
from hpctrain.compress.cast import Cast
from hpctrain.compress.int8 import Int8
from hpctrain.compress.interface import Extent
from hpctrain.compress.methods import DenseSum, PowerSgd, Sparse, TwoShot
from hpctrain.compress.powersgd import Matrix, PowerSGD
from hpctrain.compress.sign import Sign
from hpctrain.compress.sparse import AllGather, OkTopk
from hpctrain.compress.topk import TopK
from hpctrain.compress.transport import Transport
from hpctrain.device.cpu import CpuDevice
from hpctrain.errors import UsageError

SPARSE = {"topk": AllGather, "oktopk": OkTopk}
DEVICE = CpuDevice()
NAMES = ["dense", "topk", "oktopk", "int8", "sign", "bf16", "powersgd"]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compiled once, on rank 0, where there are ranks."""
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        from mpi4py import MPI

        DEVICE.prepare(["float32"], MPI.COMM_WORLD)


def make(name, comm, n, values="float32", **more):
    """A method and the transport it sends by."""
    exchange = Transport(DEVICE, comm)
    if name in SPARSE:
        codec = TopK(DEVICE, Extent(0, n, 77), 1.0, values)
        return Sparse(DEVICE, codec, SPARSE[name](exchange, codec, **more)), exchange
    if name == "dense":
        return DenseSum(exchange, n), exchange
    if name == "powersgd":
        rows = max(n // 40, 1)
        codec = PowerSGD(DEVICE, [Matrix(0, rows, n // rows)], 3)
        return PowerSgd(exchange, n, codec), exchange
    codec = partial({"int8": Int8, "sign": Sign, "bf16": Cast}[name], DEVICE)
    return TwoShot(exchange, Extent(0, n, 77), codec), exchange


def run(method, x, out, density):
    """A step, with a residual as memories keep it, in `x`."""
    sent = method.run(x, out, density)
    for payload, factor in zip(sent or (), (-1.0, 1.0), strict=False):
        if payload is not None:
            method._codec.add_into(payload, x, factor)


def whole_numbers(rank, step, n):
    """Few large ones among small ones, moving from step to step, some ranks and steps all zeros."""
    rng = np.random.default_rng([rank, step, n])
    x = rng.integers(-3, 4, n).astype(np.float32)
    center = (n * ((7 * step + 13 * rank) % 17)) // 17
    x[center : center + n // 10] *= 50
    return x * (0 if (rank + step) % 11 == 3 else 1)


def total_of(comm, x):
    """The sum over ranks, in float64."""
    return np.sum(comm.allgather(x.astype(np.float64)), axis=0)


def same_on_all(comm, x):
    return len(set(comm.allgather(x.tobytes()))) == 1


def books(comm, name, n=3000, steps=50, density=0.02, values="float32", tolerance=0.0, **more):
    """Run steps, and compare brought and applied + kept after each of them."""
    method, exchange = make(name, comm, n, values, **more)
    residual, out = np.zeros(n, np.float32), np.empty(n, np.float32)
    for step in range(steps):
        x = residual + whole_numbers(comm.rank, step, n)
        brought = total_of(comm, x)
        out[:] = np.nan
        run(method, x, out, density)
        kept = total_of(comm, x)
        assert same_on_all(comm, out)
        scale = tolerance * max(np.abs(brought).max(), 1)
        np.testing.assert_allclose(kept + out, brought, rtol=0, atol=scale, err_msg=f"step {step}")
        residual = x
    return method, exchange, residual


@pytest.mark.ranks(1, 2, 3, 4, 5, 8)
@pytest.mark.parametrize("name", ["dense", "topk", "oktopk"])
def test_mass_is_conserved_exactly(comm, name):
    """Oracle 8, through steps in which thresholds and regions are found anew."""
    books(comm, name, **({"every": 8, "regions_every": 16} if name == "oktopk" else {}))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", ["int8", "sign", "bf16", "powersgd"])
def test_mass_is_conserved_to_a_rounding(comm, name):
    books(comm, name, steps=10, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.ranks(1, 4, 5, 8)
@pytest.mark.parametrize("name", ["int8", "sign", "bf16", "powersgd"])
def test_mass_is_conserved_to_a_rounding_over_many_steps(comm, name):
    books(comm, name, tolerance=1e-5)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("values", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["topk", "oktopk"])
def test_what_rounding_of_values_takes_away_stays(comm, name, values):
    """On one rank's own numbers exactly; sums of rounded numbers may be rounded once more."""
    books(comm, name, steps=8, values=values, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.ranks(1, 2, 3, 4, 5, 8)
@pytest.mark.parametrize("name", ["topk", "oktopk"])
def test_mass_is_conserved_over_many_steps_and_blocks(comm, name):
    books(comm, name, n=200_001, steps=130, density=0.01)


@pytest.mark.ranks(1, 3, 4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 17, 1000])
def test_small_vectors_zeros_and_everything_kept(comm, name, n):
    """Oracle 10: with density 1 what selects is a plain sum; zeros stay zeros."""
    method, _ = make(name, comm, n)
    x = whole_numbers(comm.rank, 1, n) if comm.rank else np.zeros(n, np.float32)
    brought, out = total_of(comm, x), np.empty(n, np.float32)
    run(method, x, out, 1.0)
    if name in ("dense", "topk", "oktopk"):
        np.testing.assert_array_equal(out, brought)
        assert not x.any()
    zeros = np.zeros(n, np.float32)
    method, _ = make(name, comm, n)
    run(method, zeros, out, 0.1)
    assert not out.any()
    assert not zeros.any()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_on_every_run(comm, name):
    """Oracle 9."""
    found = [books(comm, name, steps=3, tolerance=1e-5)[2].tobytes() for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.ranks(1, 2, 3, 4)
def test_bytes_are_those_of_the_formulas(comm):
    """Oracle 11: what was counted; for Ok-Topk a bound, six words for each entry."""
    n, density = 100_000, 0.01
    k, size = 1000, comm.size
    for name, count in (
        ("topk", (size - 1) * (64 + 4 * 2 + 6 * k)),
        ("int8", None),
        ("sign", None),
        ("bf16", None),
    ):
        method, exchange = make(name, comm, n)
        x = np.random.default_rng(comm.rank).standard_normal(n).astype(np.float32)
        method.run(x, np.empty(n, np.float32), density)
        if count is None:
            spans = methods.chunks(n, size)
            nbytes = [codec.nbytes for codec in method._codecs]
            assert len(spans) == len(nbytes)
            own = nbytes[comm.rank]
            assert exchange.sent == sum(nbytes) - own + (size - 1) * own
            assert exchange.received == (size - 1) * own + sum(nbytes) - own
            assert abs(exchange.received - method.traffic(density)) <= 0.01 * exchange.received
        else:
            assert exchange.sent == exchange.received == count == method.traffic(density)
    method, exchange = make("oktopk", comm, n)
    for step in range(4):
        x = np.random.default_rng([comm.rank, step]).standard_normal(n).astype(np.float32)
        before = exchange.sent
        method.run(x, np.empty(n, np.float32), density)
        if step:
            assert exchange.sent - before <= 6 * 4 * k + 2 * size * (64 + 4 * 2)


@pytest.mark.ranks(3)
def test_long_payloads_go_in_several_messages(comm):
    exchange = Exchange(comm, message_bytes=100)
    payload = np.arange(250, dtype=np.uint8) + np.uint8(comm.rank)
    sizes = [250, 0, 101]
    got = exchange.all_gather(payload[: sizes[comm.rank]], [300, 0, 300])
    for rank, size in enumerate(sizes):
        expected = np.arange(250, dtype=np.uint8) + np.uint8(rank)
        np.testing.assert_array_equal(got[rank], expected[:size])
    assert exchange.messages == (0 if comm.rank == 1 else 6)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", ["oktopk", "powersgd"])
def test_the_state_goes_on_where_it_was(comm, name):
    """Oracle 18, without residuals, which are arrays."""
    one, _, residual = books(comm, name, steps=11, tolerance=1e-5)
    other, _ = make(name, comm, 3000)
    other.restore(one.state())
    outs = []
    for method in (one, other):
        x, out = residual.copy(), np.empty(3000, np.float32)
        run(method, x, out, 0.02)
        outs.append((x.tobytes(), out.tobytes()))
    assert outs[0] == outs[1]


@pytest.mark.ranks(4)
def test_boundaries_of_very_long_vectors_do_not_overflow(comm):
    """P n is above 2^31, and above 2^63 / n in no case that there is."""
    n = 3_000_000_000
    codec = SimpleNamespace(extent=Extent(0, n), values="float32")
    reducer = OkTopk(Transport(DEVICE, comm), codec)
    indices = np.arange(n - 4000, n, 4, dtype=np.int64)
    reducer._cut_regions(sparse.Entries(indices, np.ones(1000, np.float32)))
    assert reducer._bounds == [0, n - 3000, n - 2000, n - 1000, n]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "name, flag, says",
    [
        ("topk", "fixed_size", "topk is not fixed_size: an all-gather makes room"),
        ("int8", "fixed_size", "int8 is not fixed_size: owners of chunks"),
        ("powersgd", "linear", "powersgd is not linear: its payloads are added up"),
    ],
)
def test_pairs_that_cannot_work_are_refused_when_made(comm, monkeypatch, name, flag, says):
    for kind in (TopK, Int8, PowerSGD):
        monkeypatch.setattr(kind, flag, False)
    with pytest.raises(UsageError, match=says):
        make(name, comm, 1000)


# Planted defects: each is one that a published code has.


def unsorted_search(wanted, among):
    """A binary search among entries in the order of their size, as in Ok-Topk's code."""
    shuffled = np.random.default_rng(0).permutation(among)
    places = np.minimum(np.searchsorted(shuffled, wanted), among.size - 1)
    return shuffled[places] == wanted


def everything_accepted(wanted, among):
    """The residual is cleared of all that was sent, and what a merge dropped is lost."""
    return np.ones(wanted.shape, bool)


def nothing_accepted(wanted, among):
    """The residual is not cleared of what was applied."""
    return np.zeros(wanted.shape, bool)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("defect", [unsorted_search, everything_accepted, nothing_accepted])
def test_wrong_books_are_caught(comm, monkeypatch, defect):
    monkeypatch.setattr(sparse, "find", defect)
    with pytest.raises(AssertionError, match="step"):
        books(comm, "oktopk", steps=12)


@pytest.mark.ranks(3)
def test_dropping_more_than_the_share_is_caught(comm, monkeypatch):
    """Of a region with too many entries the rest is cleared, not kept."""

    def cut(self, indices, sums, k):
        kept = passed(self, indices, sums, k)
        self._lost = indices[~np.isin(indices, kept.indices)]
        return kept

    passed = OkTopk._passed
    monkeypatch.setattr(OkTopk, "_passed", cut)
    combine = OkTopk.combine

    def lossy(self, sent, out):
        form, part = self._entries, (0, self._n, sent.header.step)
        rejected = form.unpack(combine(self, sent, out).data, *part)
        return form.pack(rejected.where(~np.isin(rejected.indices, self._lost)), *part)

    monkeypatch.setattr(OkTopk, "combine", lossy)
    with pytest.raises(AssertionError, match="step"):
        books(comm, "oktopk", steps=12)


@pytest.mark.ranks(4)
def test_a_sum_of_boundaries_in_32_bits_is_caught(comm, monkeypatch):
    real = np.sum

    def short(arrays, axis):
        return real(np.asarray(arrays).astype(np.int32), axis=axis, dtype=np.int32)

    monkeypatch.setattr(sparse.np, "sum", short)
    with pytest.raises(AssertionError):
        test_boundaries_of_very_long_vectors_do_not_overflow(comm)


def descend(comm, keeps):
    """How far from the minimum of a quadratic top-k ends, from samples that disagree on a half."""
    n, rng = 1000, np.random.default_rng(5)
    target = rng.standard_normal(n).astype(np.float32)
    apart = np.where(np.arange(n) % 2, 3, 0) * rng.standard_normal(n)
    method, _ = make("topk", comm, n)
    x, residual = np.zeros(n, np.float32), np.zeros(n, np.float32)
    out = np.empty(n, np.float32)
    for step in range(4000):
        sample = (-1) ** step * apart
        residual += x - target + sample.astype(np.float32)
        run(method, residual, out, 0.02)
        x -= 0.02 * out
        if not keeps:
            residual[:] = 0
    return float(np.abs(x - target).mean() / np.abs(target).mean())


@pytest.mark.ranks(1)
def test_top_k_converges_with_a_residual_and_not_without(comm):
    """Oracle 15: the same bound, so that the test is known to have power."""
    bound = 0.1
    assert descend(comm, keeps=True) < bound
    assert descend(comm, keeps=False) > 3 * bound


@pytest.mark.ranks(2)
def test_a_matrix_of_low_rank_is_exact(comm):
    """Oracle 4."""
    rng = np.random.default_rng(comm.rank)
    left = np.random.default_rng(9).standard_normal((30, 3))
    x = (left @ rng.standard_normal((3, 40))).astype(np.float32).reshape(-1)
    codec = PowerSGD(DEVICE, [Matrix(0, 30, 40)], 3)
    method, out = PowerSgd(Transport(DEVICE, comm), 1200, codec), np.empty(1200, np.float32)
    brought = total_of(comm, x)
    method.run(x, out, 1.0)
    np.testing.assert_allclose(out, brought, atol=1e-4)
    np.testing.assert_allclose(x, 0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [5, 8])
def test_more_ranks(ranks):
    """The tests of this file, and those of columns, on more ranks than all others run on."""
    files = ["tests/test_compress_methods.py", "tests/test_compress_between.py"]
    done = mpirun(ranks, "-m", "pytest", "-q", "-x", "--slow", *files, timeout=280)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
