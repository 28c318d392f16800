"""Codecs of 16, 8 and 1 bits, PowerSGD, and sums in two shots with local and server errors."""

from __future__ import annotations

import numpy as np
import plain_codecs as plain
import pytest
from kernel_checks import device_for
from simulated import open_sim

from hpctrain.compress.cast import Cast
from hpctrain.compress.int8 import Int8
from hpctrain.compress.interface import Extent
from hpctrain.compress.memory import Momentum, Nothing, Residual
from hpctrain.compress.powersgd import Matrix, PowerSGD
from hpctrain.compress.sign import Sign
from hpctrain.errors import HpctrainError, UsageError

SIZES = (0, 1, 7, 512, 513, 2049, 10_000)
MAKE = {
    "bf16": lambda n, device: Cast(device, Extent(0, n), "bfloat16"),
    "fp16": lambda n, device: Cast(device, Extent(0, n), "float16"),
    "int8": lambda n, device: Int8(device, Extent(0, n)),
    "sign": lambda n, device: Sign(device, Extent(0, n)),
}
PLAIN = {
    "bf16": plain.Cast("bfloat16"),
    "fp16": plain.Cast("float16"),
    "int8": plain.Int8(),
    "sign": plain.Sign(),
}
every_codec = pytest.mark.parametrize("name", MAKE)


def make(name, n, device=None):
    return MAKE[name](n, device or device_for())


def random(n, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp(rng.standard_normal(n))).astype(np.float32)


def said(codec, payload):
    out = np.zeros(codec.extent.n, np.float32)
    codec.add_into(payload, out)
    return out


@every_codec
@pytest.mark.parametrize("n", SIZES)
def test_they_say_what_the_plain_ones_do(name, n):
    codec, x = make(name, n), random(n)
    payload = codec.compress(x, 0)
    expected = np.zeros(n, np.float32)
    PLAIN[name].decode(PLAIN[name].encode(x), expected)
    np.testing.assert_allclose(said(codec, payload), expected, rtol=1e-6)
    assert payload.nbytes == payload.data.nbytes == 64 + PLAIN[name].nbytes(n)


@every_codec
def test_payload_bytes_are_the_formula(name):
    for n in (1, 4096, 100_001):
        formula = {
            "bf16": 2 * n,
            "fp16": 2 * n,
            "int8": n + 4 * -(-n // 512),
            "sign": -(-n // 8) + 4 * -(-n // 2048),
        }
        assert make(name, n).nbytes == 64 + formula[name]


@every_codec
@pytest.mark.parametrize("n", SIZES)
def test_said_and_kept_are_the_input(name, n):
    codec, x = make(name, n), random(n)
    memory = Residual(device_for(), codec)
    payload = codec.compress(memory.compensate(x), 0)
    memory.update(payload)
    total = said(codec, payload).astype(np.float64) + memory.residual
    if name == "sign":  # what is kept is rounded as any sum is
        np.testing.assert_allclose(total, x, rtol=0, atol=1e-6 * np.abs(x).max(initial=1))
    else:
        np.testing.assert_array_equal(total, x.astype(np.float64))


@every_codec
def test_contraction(name):
    for seed in range(5):
        codec, x = make(name, 3000), random(3000, seed)
        left = (x - said(codec, codec.compress(x, 0))).astype(float)
        assert (left**2).sum() <= (1 - codec.contraction) * (x.astype(float) ** 2).sum()


def test_the_contraction_of_signs():
    """|x|_1^2 / (n |x|_2^2) of a block."""
    codec, x = make("sign", 2000), random(2000).astype(float)
    left = x - said(codec, codec.compress(x.astype(np.float32), 0))
    share = np.abs(x).sum() ** 2 / (2000 * (x**2).sum())
    assert (left**2).sum() == pytest.approx((1 - share) * (x**2).sum(), rel=1e-4)


@every_codec
def test_a_gpu_makes_the_same_bytes(name):
    x, sim = random(5000), open_sim("late")
    mine = make(name, 5000).compress(x, 3)
    there = make(name, 5000, sim)
    assert sim.to_host(there.compress(sim.from_host(x), 3).data).tobytes() == mine.data.tobytes()


@every_codec
def test_another_payload_is_refused(name):
    codec = make(name, 1000)
    data = codec.compress(random(1000), 5).data.copy()
    assert codec.received(data, 5).nbytes == codec.nbytes
    with pytest.raises(HpctrainError, match="step = 5 came where step = 6"):
        codec.received(data, 6)
    with pytest.raises(HpctrainError, match="bytes was expected"):
        make(name, 992).received(data, 5)


@every_codec
def test_they_need_a_residual_and_nothing_more(name):
    codec = make(name, 10)
    with pytest.raises(UsageError, match="without a memory"):
        Nothing(codec)
    with pytest.raises(UsageError, match="sends no single elements"):
        Momentum(device_for(), codec)


def test_zeros_have_the_sign_plus():
    codec, x = make("sign", 4), np.array([0.0, -0.0, -4, 4], np.float32)
    assert said(codec, codec.compress(x, 0)).tolist() == [2, 2, -2, 2]


# ---- two shots: to the owner of a slice, and its sum to everyone


@pytest.mark.parametrize("name", ["int8", "sign"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_two_shots_keep_all_mass_in_local_and_server_errors(name, size):
    """Over 50 steps: sum of results + all errors = sum of gradients."""
    n, device = 700, device_for()
    ends = [n * k // size for k in range(size + 1)]
    codecs = [Extent(ends[k], ends[k + 1]) for k in range(size)]
    codecs = [(Int8 if name == "int8" else Sign)(device, extent) for extent in codecs]
    local = [[Residual(device, codec) for codec in codecs] for _ in range(size)]
    server = [Residual(device, codec) for codec in codecs]
    came, applied = np.zeros(n), np.zeros(n)
    for step in range(50):
        sums = [np.zeros(codec.extent.n, np.float32) for codec in codecs]
        for rank in range(size):
            g = random(n, 97 * step + rank)
            came += g
            for k, codec in enumerate(codecs):
                memory = local[rank][k]
                x = memory.compensate(np.ascontiguousarray(g[ends[k] : ends[k + 1]]))
                payload = codec.compress(x, step)
                codec.add_into(payload, sums[k])
                memory.update(payload)
        for k, codec in enumerate(codecs):
            payload = codec.compress(server[k].compensate(sums[k]), step)
            applied[ends[k] : ends[k + 1]] += said(codec, payload)
            server[k].update(payload)
    kept = np.concatenate([memory.residual for memory in server]).astype(float)
    for memories in local:
        kept += np.concatenate([memory.residual for memory in memories])
    np.testing.assert_allclose(applied + kept, came, atol=2e-3)


def test_signs_converge_with_a_residual_and_not_without():
    """Karimireddy et al., ICML 2019, section 3.3: steps along the sign increase the loss."""

    def end(memory_of):
        codec = Sign(device_for(), Extent(0, 2))
        memory, x = memory_of(codec), np.array([1.0, 1.0])
        rng = np.random.default_rng(0)
        directions = np.array([[1, -1], [-1, 1]]) + 0.5 * np.array([[1, 1], [1, 1]])
        for step in range(3000):
            a = directions[rng.integers(2)]
            g = (2 * (a @ x) * a).astype(np.float32)
            payload = codec.compress(memory.compensate(g), step)
            memory.update(payload)
            x = x - 0.01 * said(codec, payload)
        return np.abs(x).max()

    assert end(lambda codec: Residual(device_for(), codec)) < 0.05
    assert end(lambda codec: Nothing(codec, lossy=True)) > 0.5


# ---- PowerSGD

MATRICES = (Matrix(3, 40, 30), Matrix(1210, 8, 90), Matrix(1940, 1, 20))


def summed(codecs, method, *rows):
    parts = [getattr(codec, method)(*args) for codec, *args in zip(codecs, *rows, strict=True)]
    return [sum(parts).astype(np.float32) for _ in codecs]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_powersgd_keeps_all_mass(size):
    codecs = [PowerSGD(device_for(), MATRICES, 2) for _ in range(size)]
    rows = [np.random.default_rng(r).standard_normal(2000).astype(np.float32) for r in range(size)]
    before = sum(row.astype(float) for row in rows)
    outs = [np.zeros(2000, np.float32) for _ in range(size)]
    p = summed(codecs, "left", rows)
    q = summed(codecs, "right", rows, p)
    for codec, row, total, out in zip(codecs, rows, q, outs, strict=True):
        codec.finish(row, total, out)
        np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_allclose(outs[0] + sum(row.astype(float) for row in rows), before, atol=1e-4)
    assert not outs[0][:3].any()


def test_powersgd_is_exact_for_matrices_of_its_rank():
    rng = np.random.default_rng(4)
    row = np.zeros(2000, np.float32)
    for m in MATRICES:
        matrix = rng.standard_normal((m.rows, 2)) @ rng.standard_normal((2, m.cols))
        row[m.start : m.start + m.rows * m.cols] = matrix.ravel()
    codec, out, x = PowerSGD(device_for(), MATRICES, 2), np.zeros_like(row), row.copy()
    p = codec.left(x)
    q = codec.right(x, p)
    gram = p[:80].reshape(40, 2).T @ p[:80].reshape(40, 2)
    np.testing.assert_allclose(gram, np.eye(2), atol=1e-5)
    codec.finish(x, q, out)
    np.testing.assert_allclose(out, row, atol=1e-4)
    assert codec.nbytes == 4 * (2 * (70 + 98) + 21)


def test_powersgd_gets_nearer_from_step_to_step():
    row, errors = random(2000, 5), []
    codec = PowerSGD(device_for(), MATRICES, 2)
    for _ in range(6):
        x, out = row.copy(), np.zeros(2000, np.float32)
        codec.finish(x, codec.right(x, codec.left(x)), out)
        errors.append(np.linalg.norm(x))
    assert errors[-1] < errors[0] and (np.diff(errors) < 1e-3).all()


def test_powersgd_of_zeros_and_on_a_gpu():
    codec, x, out = PowerSGD(device_for(), MATRICES, 2), np.zeros(2000, np.float32), random(2000)
    codec.finish(x, codec.right(x, codec.left(x)), out)
    assert not out[3:1203].any() and not x.any()
    sim, row = open_sim("late"), random(2000, 7)
    here, there = PowerSGD(device_for(), MATRICES, 2), PowerSGD(sim, MATRICES, 2)
    x, y, out = row.copy(), sim.from_host(row), sim.zeros(2000, np.float32)
    here.finish(x, here.right(x, here.left(x)), np.zeros(2000, np.float32))
    there.finish(y, there.right(y, there.left(y)), out)
    np.testing.assert_allclose(sim.to_host(y), x, atol=1e-5)
    with pytest.raises(UsageError, match="rank 0"):
        PowerSGD(sim, MATRICES, 0)
