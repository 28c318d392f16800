"""DistributedOptimizer: any number of ranks gives what one rank would get from all samples."""

import numpy as np
import pytest
from tested_device import DEVICE, get, put

import hpctrain
from hpctrain.errors import DivergedError, UsageError

SHAPES = {"w": (7, 5), "b": (5,), "v": (3, 11)}
PLACES = ["", "messages", "allreduce"]


def make(comm, rule, reduction="", nodes=None):
    communicator = hpctrain.Communicator(comm, DEVICE, nodes)
    rng = np.random.default_rng(3)
    initial = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    if comm.rank:  # only rank 0's values count
        initial = {name: np.full(shape, np.nan) for name, shape in SHAPES.items()}
    optimizer = hpctrain.DistributedOptimizer(
        rule, initial, communicator, reduction=reduction or "auto"
    )
    return communicator, optimizer


def gradients(step, sample):
    rng = np.random.default_rng((step, sample))
    return {name: rng.integers(-4, 5, shape).astype(float) for name, shape in SHAPES.items()}


def on_device(arrays):
    return {name: put(array) for name, array in arrays.items()}


def train(optimizer, rank, size, steps=4, samples=10, **options):
    """Whole-number gradients of 10 samples, dealt out to the ranks; sums are exact."""
    norms = []
    for step in range(steps):
        mine = range(rank, samples, size)
        total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for sample in mine:
            for name, gradient in gradients(step, sample).items():
                total[name] += gradient
        norms.append(optimizer.step(on_device(total), weight=len(mine), **options))
    return norms


def numpy_sgd(steps=4, samples=10, lr=0.1, momentum=0.9, decay=0.01, clip=0.0):
    """The same training written out."""
    rng = np.random.default_rng(3)
    p = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    norms = []
    for step in range(steps):
        g = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for sample in range(samples):
            for name, gradient in gradients(step, sample).items():
                g[name] += gradient / samples
        norms.append(np.sqrt(sum((x**2).sum() for x in g.values())))
        scale = min(1.0, clip / norms[-1]) if clip else 1.0
        for name in p:
            p[name] -= lr * decay * (p[name].ndim > 1) * p[name]
            v[name] = momentum * v[name] + scale * g[name]
            p[name] -= lr * v[name]
    return p, norms


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("reduction", PLACES)
def test_equals_one_rank_with_all_samples(comm, reduction, clip):
    rule = hpctrain.SGD(lr=0.1, momentum=0.9, weight_decay=0.01)
    communicator, optimizer = make(comm, rule, reduction)
    norms = train(optimizer, comm.rank, comm.size, clip_norm=clip)
    expected, expected_norms = numpy_sgd(clip=clip)
    for name, value in expected.items():
        np.testing.assert_allclose(get(optimizer.parameters[name]), value, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-12)
    optimizer.free()
    communicator.free()


@pytest.mark.ranks(4)
@pytest.mark.parametrize("nodes", ["2x2", "3+1", "0,1,0,1"])
def test_any_nodes(comm, nodes):
    communicator, optimizer = make(comm, hpctrain.AdamW(lr=0.1), nodes=nodes)
    train(optimizer, comm.rank, comm.size)
    alone = comm.Split(comm.rank)
    single, reference = make(alone, hpctrain.AdamW(lr=0.1), nodes="1x1")
    if comm.rank == 0:
        train(reference, 0, 1)
        for name in SHAPES:
            np.testing.assert_allclose(
                get(optimizer.parameters[name]), get(reference.parameters[name]), rtol=1e-12
            )
    for part in (optimizer, communicator, reference, single):
        part.free()
    alone.Free()


@pytest.mark.ranks(3)
def test_all_ranks_hold_the_same_bits(comm):
    communicator, optimizer = make(comm, hpctrain.AdamW(lr=0.1))
    train(optimizer, comm.rank, comm.size)
    copies = comm.allgather(b"".join(get(optimizer.parameters[name]).tobytes() for name in SHAPES))
    assert copies == [copies[0]] * comm.size
    optimizer.free()
    communicator.free()


@pytest.mark.ranks(2)
def test_each_rank_holds_its_share_of_the_optimizer_state(comm):
    communicator, optimizer = make(comm, hpctrain.AdamW())
    parallel = optimizer._parallel
    held = comm.allreduce(sum(s.size for states in parallel.states.values() for s in states))
    assert held == 2 * parallel.layout.size
    optimizer.free()
    communicator.free()


@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_finite_is_an_error_on_all_ranks(comm):
    communicator, optimizer = make(comm, hpctrain.SGD(lr=0.1))
    before = {name: get(value) for name, value in optimizer.parameters.items()}
    bad = gradients(0, 0)
    if comm.rank == 1:
        bad["v"][2, 10] = np.inf
    with pytest.raises(DivergedError, match="step 0: the gradient's norm is"):
        optimizer.step(on_device(bad))
    for name, value in before.items():
        np.testing.assert_array_equal(get(optimizer.parameters[name]), value)
    optimizer.free()
    communicator.free()


@pytest.mark.ranks(1)
def test_refused(comm):
    communicator = hpctrain.Communicator(comm, DEVICE)
    with pytest.raises(UsageError, match="float16"):
        hpctrain.DistributedOptimizer(hpctrain.SGD(), {"w": np.zeros(3, np.float16)}, communicator)
    optimizer = hpctrain.DistributedOptimizer(hpctrain.SGD(), {"w": np.zeros(3)}, communicator)
    with pytest.raises(UsageError, match=r"differ in the names \['v', 'w'\]"):
        optimizer.step({"v": DEVICE.zeros(3, "float64")})
    with pytest.raises(UsageError, match=r"the gradient of w is \(2,\)"):
        optimizer.step({"w": DEVICE.zeros(2, "float64")})
    with pytest.raises(UsageError, match="cannot sum dtype float16"):
        communicator.all_reduce(np.zeros(2, np.float16))
    optimizer.free()
    communicator.free()
