"""Codecs and memories: exact books, payload sizes, headers, flags, convergence."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from kernel_checks import device_for
from launching import ROOT
from simulated import open_sim

from hpctrain.compress.cast import Cast
from hpctrain.compress.entries import Format
from hpctrain.compress.header import HEADER_BYTES, Header
from hpctrain.compress.interface import Extent, Payload, extent_of
from hpctrain.compress.memory import Momentum, Nothing, Residual
from hpctrain.compress.randomk import RandomK
from hpctrain.compress.select import Selector
from hpctrain.compress.topk import TopK, topk_bytes
from hpctrain.device.sim import SimDevice
from hpctrain.errors import DeviceError, HpctrainError, UsageError
from hpctrain.nn.layout import Layout

VALUES = ("float32", "bfloat16", "float16")


def random(n, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp(rng.standard_normal(n))).astype(np.float32)


def topk(n, density=0.01, device=None, **options):
    return TopK(device or device_for(), Extent(1000, 1000 + n, 77), density, **options)


def said(codec, payload):
    """What a payload says, dense."""
    out = np.zeros(codec.extent.n, np.float32)
    codec.add_into(payload, out)
    return out


def inputs(name, n):
    x = random(n)
    if name == "zeros":
        x[:] = 0
    elif name == "equal":
        x[:] = 3
    elif name == "few":
        x[7:] = 0
    elif name == "signed zeros":
        x[::2] = -0.0
    elif name == "denormal":
        x *= np.float32(1e-42)
    elif name == "large":
        x *= np.float32(1e30)
    return x


NAMES = ("plain", "zeros", "equal", "few", "signed zeros", "denormal", "large")


# ---- 1, 2: what is sent and what is kept are the input, exactly


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n, density", [(1, 1.0), (999, 1.0), (999, 1e-9), (70_001, 0.01)])
def test_sent_and_kept_are_the_input(name, values, n, density):
    codec = topk(n, density, values=values)
    memory, x = Residual(device_for(), codec), inputs(name, n)
    payload = codec.compress(memory.compensate(x), 5)
    memory.update(payload)
    sent, kept = said(codec, payload), memory.residual
    if name == "large" and values == "float16":  # beyond 2^29 what is left is rounded
        np.testing.assert_allclose(sent + kept, x, rtol=1e-7)
    else:
        np.testing.assert_array_equal(sent.astype(np.float64) + kept, x.astype(np.float64))
    if values == "float32":
        assert not (kept[sent != 0]).any()
    if density == 1 and values == "float32":
        assert not kept.any()


@pytest.mark.parametrize("values", VALUES)
def test_rejected_entries_come_back(values):
    """All, or a part of them: e = x - sent + rejected."""
    codec, other = topk(5000, values=values), topk(5000, values=values)
    x = random(5000)
    for part in (1.0, 0.5):
        memory = Residual(device_for(), codec)
        sent = codec.compress(memory.compensate(x), 0)
        other.density = codec.k * part / 5000
        rejected = other.compress(said(codec, sent), 0)
        memory.update(sent, rejected)
        applied = said(codec, sent).astype(np.float64) - said(other, rejected)
        np.testing.assert_array_equal(applied + memory.residual, x.astype(np.float64))


def test_mass_is_kept_over_many_steps():
    """sum of what was sent + e = sum of gradients: whole numbers, so every addition is exact."""
    codec = topk(3000, 0.02, values="bfloat16")
    memory = Residual(device_for(), codec)
    total, sent = np.zeros(3000), np.zeros(3000)
    for step in range(60):
        g = np.random.default_rng(step).integers(-99, 99, 3000).astype(np.float32)
        payload = codec.compress(memory.compensate(g), step)
        memory.update(payload)
        total += g
        sent += said(codec, payload)
        np.testing.assert_array_equal(sent + memory.residual, total)


def test_a_residual_that_is_not_cleared_is_seen():
    """The mass test has power: an update that forgets what was sent breaks the sum."""
    codec = topk(300, 0.1)
    memory, g = Residual(device_for(), codec), random(300)
    payload = codec.compress(memory.compensate(g), 0)
    memory.residual, memory._x = memory._x, memory.residual  # the defect
    assert (said(codec, payload) + memory.residual != g).any()


# ---- 3: the same entries as sorting, and the same payload on every device


@pytest.mark.parametrize("values", VALUES)
def test_a_gpu_makes_the_same_bytes(values):
    x, sim = random(70_000), open_sim("late")
    here, there = topk(70_000, values=values), topk(70_000, values=values, device=sim)
    mine = here.compress(x, 3)
    other = there.compress(sim.from_host(x), 3)
    assert sim.to_host(other.data).tobytes() == mine.data.tobytes()
    total = sim.zeros(70_000, np.float32)
    there.add_into(there.received(sim.from_host(mine.data), 3), total)
    np.testing.assert_array_equal(sim.to_host(total), said(here, mine))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("n", [7, 65_537, 200_000])
def test_reducers_make_the_same_payloads_and_read_them(values, n):
    """The format is written by kernels, and by NumPy for parts of a range."""
    codec, form = topk(n, values=values), Format(Extent(1000, 1000 + n, 77), values)
    payload = codec.compress(random(n), 5)
    entries = form.unpack(payload.data, 0, n, 5)
    np.testing.assert_array_equal(entries.indices, np.flatnonzero(said(codec, payload)))
    assert form.pack(entries, 0, n, 5).data.tobytes() == payload.data.tobytes()
    part = form.pack(entries.between(n // 3, n), n // 3, n, 5)
    assert part.header.start == 1000 + n // 3
    again = form.unpack(part.data, n // 3, n, 5)
    np.testing.assert_array_equal(again.indices, entries.between(n // 3, n).indices)
    with pytest.raises(HpctrainError, match="start = "):
        form.unpack(part.data, 0, n, 5)
    with pytest.raises(HpctrainError, match="damaged"):
        form.unpack(part.data[:-2], n // 3, n, 5)
    with pytest.raises(UsageError, match="do not lie in"):
        form.pack(entries, 0, int(entries.indices[-1]), 5)


# ---- 4: contraction


@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
def test_contraction(density):
    codec, x = topk(4000, density), random(4000)
    left = x - said(codec, codec.compress(x, 0))
    assert (left**2).sum(dtype=float) <= (1 - codec.contraction) * (x**2).sum(dtype=float) + 1e-6
    flat = np.where(x > 0, 2, -2).astype(np.float32)  # where the bound is reached
    left = flat - said(codec, codec.compress(flat, 0))
    assert (left**2).sum() == 4 * (4000 - codec.k)


# ---- 5: unbiased


def test_scaled_random_k_is_unbiased():
    n, steps = 200, 3000
    codec = RandomK(device_for(), Extent(0, n), 0.1, seed=3, scaled=True)
    x = random(n)
    samples = np.stack([said(codec, codec.compress(x, step)) for step in range(steps)])
    spread = np.abs(x) * np.sqrt(9 / steps)  # variance of a kept one in ten, scaled: 9 x^2
    assert (np.abs(samples.mean(axis=0) - x) <= 5 * spread + 1e-6).all()


def test_random_k_repeats_itself_and_differs_between_steps():
    codec = RandomK(device_for(), Extent(64, 5064), 0.01, seed=3)
    again = RandomK(device_for(), Extent(64, 5064), 0.01, seed=3)
    np.testing.assert_array_equal(codec.indices(9), again.indices(9))
    assert (codec.indices(9) != codec.indices(10)).any()
    assert (codec.indices(9) != RandomK(device_for(), Extent(0, 5000), 0.01, 3).indices(9)).any()
    for step in range(20):
        indices = codec.indices(step)
        assert (np.diff(indices) > 0).all() and indices[-1] < 5000 and indices.size == 50


# ---- 6: sizes and headers


@pytest.mark.parametrize("values, size", [("float32", 4), ("bfloat16", 2), ("float16", 2)])
@pytest.mark.parametrize("n", [1, 65_535, 65_536, 65_537, 200_000])
def test_payload_bytes_are_the_formula(values, size, n):
    codec = topk(n, 0.003, values=values)
    payload = codec.compress(random(n), 0)
    blocks = (n + 65_535) // 65_536
    assert payload.nbytes == payload.data.nbytes == 64 + 4 * blocks + codec.k * (size + 2)


def test_sizes_beyond_32_bits():
    n = 5 << 32
    assert topk_bytes(n, n // 1000, 4) == 64 + 4 * (5 << 16) + n // 1000 * 6
    header = Header("topk", "float16", 2**40, n, 3 * n, n - 1, 6 * n, 2**32 - 1)
    assert len(header.encode()) == HEADER_BYTES == 64
    assert Header.decode(header.encode()) == header


@pytest.mark.parametrize("at", [65_535, 65_536, 131_071, (1 << 24) + 1])
def test_indices_at_the_edges_of_blocks(at):
    """An index of 2^24 + 1 is no float32: where indices travel as floats, it is lost."""
    n = at + 2
    codec, x = topk(n, 1 / n), np.zeros(n, np.float32)
    x[at] = 7
    assert np.flatnonzero(said(codec, codec.compress(x, 0))).tolist() == [at]


def test_indices_that_were_floats_are_seen(monkeypatch):
    """The planted defect: indices of float32, as in published codes."""
    select = Selector.select

    def rounded(self, x, k):
        values, indices = select(self, x, k)
        return values, indices.astype(np.float32).astype(np.int64)

    monkeypatch.setattr(Selector, "select", rounded)
    test_indices_at_the_edges_of_blocks(131_071)
    with pytest.raises(AssertionError):
        test_indices_at_the_edges_of_blocks((1 << 24) + 1)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"step": 6}, "step = 6 came where step = 5 was expected"),
        ({"start": 0}, "start = 0"),
        ({"stop": 9000}, "stop = 9000"),
        ({"k": 11}, "k = 11"),
        ({"layout": 78}, "layout = 78 came where layout = 77"),
        ({"values": "float16"}, "values = float16"),
        ({"codec": "sign"}, "codec = sign"),
        ({"nbytes": 65}, "nbytes = 65"),
    ],
)
def test_another_payload_is_refused(change, says):
    codec = topk(1000)
    data = codec.compress(random(1000), 5).data.copy()
    assert codec.received(data, 5).header.step == 5
    header = replace(Header.decode(data.tobytes()), **change)
    data[:64] = np.frombuffer(header.encode(), np.uint8)
    with pytest.raises(HpctrainError, match=says):
        codec.received(data, 5)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda data: data[:-1], "payload of 128 bytes was expected"),
        (lambda data: data.view(np.int8), "of int8 came"),
        (lambda data: put(data, 0, 1), "these are other bytes"),
        (lambda data: put(data, 4, 9), "version 9, this hpctrain reads 1"),
        (lambda data: put(data, 6, 99), "codec 99"),
    ],
)
def test_damaged_payloads_are_refused(damage, says):
    codec = topk(1000)
    data = codec.compress(random(1000), 5).data.copy()
    with pytest.raises(HpctrainError, match=says):
        codec.received(damage(data), 5)


def put(data, at, byte):
    data[at] = byte
    return data


def test_the_fingerprint_tells_layouts_apart():
    one = Layout([("a", (3, 4), True), ("b", (5,), False)], np.float32)
    other = Layout([("a", (4, 3), True), ("b", (5,), False)], np.float32)
    assert extent_of(one, 0, 16) == extent_of(one, 0, 16) != extent_of(other, 0, 16)
    assert extent_of(one, 0, 16).n == 16


# ---- 7: linear


def test_payloads_of_a_linear_codec_are_added_as_they_are():
    codec = RandomK(device_for(), Extent(0, 70_000), 0.01, seed=1)
    assert codec.linear and codec.nbytes == 64 + 4 * 700
    payloads = [codec.compress(np.round(random(70_000, r) * 8), 4).data.copy() for r in range(3)]
    data = payloads[0].copy()
    values = sum(payload[64:].view(np.float32) for payload in payloads)
    data[64:] = values.view(np.uint8)
    header = Header.decode(data.tobytes())
    expected = sum(said(codec, Payload(header, payload)) for payload in payloads)
    np.testing.assert_array_equal(said(codec, Payload(header, data)), expected)


# ---- memories


def test_a_step_that_is_given_up_changes_nothing():
    codec = topk(500)
    for memory in (Residual(device_for(), codec), Momentum(device_for(), codec)):
        memory.update(codec.compress(memory.compensate(random(500)), 0))
        before = {name: array.copy() for name, array in memory.arrays().items()}
        g = random(500, 1)
        g[3], g[4] = np.inf, np.nan
        codec.compress(memory.compensate(g), 1)
        for name, array in memory.arrays().items():
            np.testing.assert_array_equal(array, before[name])


def test_what_is_not_finite_never_stays():
    codec = topk(500)
    for memory in (Residual(device_for(), codec), Momentum(device_for(), codec)):
        g = random(500)
        g[:250], g[250:300] = np.nan, -np.inf
        for step in range(3):
            memory.update(codec.compress(memory.compensate(g), step))
        for array in memory.arrays().values():
            assert np.isfinite(array).all()


def test_flush_hands_out_all_that_is_kept():
    codec = topk(500)
    memory, g = Residual(device_for(), codec), random(500)
    memory.update(codec.compress(memory.compensate(g), 0))
    kept, dense = memory.residual.copy(), np.ones(500, np.float32)
    memory.flush(dense)
    np.testing.assert_array_equal(dense, 1 + kept)
    assert not memory.residual.any()


@pytest.mark.parametrize("kind", [Residual, Momentum])
def test_memories_go_on_from_what_they_saved(kind):
    def steps(memory, codec, first, last):
        for step in range(first, last):
            memory.update(codec.compress(memory.compensate(random(800, step)), step))
        return {name: array.copy() for name, array in memory.arrays().items()}

    codec = topk(800)
    whole = steps(kind(device_for(), codec), codec, 0, 9)
    saved = steps(kind(device_for(), codec), codec, 0, 4)
    memory = kind(device_for(), codec)
    memory.load(saved)
    for name, array in steps(memory, codec, 4, 9).items():
        assert array.tobytes() == whole[name].tobytes()
    with pytest.raises(UsageError, match="cannot go on from"):
        memory.load({"residual": np.zeros(3, np.float32)})


def test_pairs_that_cannot_work_are_refused():
    device, codec = device_for(), topk(100)
    scaled = RandomK(device, Extent(0, 100), 0.1, seed=0, scaled=True)
    with pytest.raises(UsageError, match="topk without a memory loses the same elements"):
        Nothing(codec)
    with pytest.raises(UsageError, match="no contraction, its residual would grow"):
        Residual(device, scaled)
    with pytest.raises(UsageError, match="no contraction"):
        Momentum(device, scaled)
    with pytest.raises(UsageError, match="momentum 1"):
        Momentum(device, codec, momentum=1)
    with pytest.raises(UsageError, match="density 0"):
        topk(100, 0)
    Nothing(scaled), Nothing(codec, lossy=True)


def test_a_device_without_a_type_of_values_refuses_it(monkeypatch):
    """As CuPy before 14, which has no bfloat16."""
    sim, extent = open_sim(), Extent(0, 100)
    empty = SimDevice.empty

    def without(self, shape, dtype):
        if np.dtype(dtype).name == "bfloat16":
            raise TypeError("Unsupported dtype bfloat16")
        return empty(self, shape, dtype)

    monkeypatch.setattr(SimDevice, "empty", without)
    for make in (lambda: TopK(sim, extent, 0.1, "bfloat16"), lambda: Cast(sim, extent)):
        with pytest.raises(DeviceError, match="install CuPy 14 or later, or use float16"):
            make()
    TopK(sim, extent, 0.1, "float16")


# ---- 16: momentum


def trained(make_memory, density=1.0, lr=0.05, steps=40, momentum=0.0):
    """Minimizes a quadratic of 50 numbers; every step's numbers. `momentum`: of the update rule."""
    n = 50
    scale, x, v = np.linspace(1, 5, n).astype(np.float32), random(n), np.zeros(n, np.float32)
    codec = topk(n, density)
    memory, path = make_memory(codec), []
    for step in range(steps):
        g = scale * x
        if memory is None:
            out = g
        else:
            payload = codec.compress(memory.compensate(g), step)
            memory.update(payload)
            out = said(codec, payload)
        v = np.float32(momentum) * v + out
        x = x - np.float32(lr) * v
        path.append(x)
    return np.stack(path)


class Unmasked(Momentum):
    """The velocity of what was sent stays."""

    def update(self, sent, rejected=None):
        self._codec.add_into(sent, self._x, -1.0)
        self.keep()


def test_dgc_without_momentum_is_plain_descent():
    plain = trained(lambda codec: None)
    dgc = trained(lambda codec: Momentum(device_for(), codec, momentum=0))
    np.testing.assert_array_equal(dgc, plain)


def test_dgc_that_sends_all_is_descent_with_momentum():
    unmasked = trained(lambda codec: Unmasked(device_for(), codec, 0.9))
    np.testing.assert_allclose(unmasked, trained(lambda codec: None, momentum=0.9), rtol=1e-5,
                               atol=1e-6)  # fmt: skip
    masked = trained(lambda codec: Momentum(device_for(), codec, 0.9))
    np.testing.assert_array_equal(masked, trained(lambda codec: None))


def test_momentum_applied_twice_is_seen():
    """In the memory and in the update rule: another path than either."""
    once = trained(lambda codec: None, momentum=0.9)
    twice = trained(lambda codec: Unmasked(device_for(), codec, 0.9), momentum=0.9)
    assert np.abs(twice - once).max() > 0.1


def test_momentum_of_rejected_elements_stays():
    codec = topk(100, 0.1)
    memory = Momentum(device_for(), codec, 0.5)
    g = random(100)
    sent = codec.compress(memory.compensate(g), 0)
    memory.update(sent, Payload(sent.header, sent.data.copy()))
    np.testing.assert_array_equal(memory.velocity, g)
    np.testing.assert_array_equal(memory.residual, g)
    memory.update(codec.compress(memory.compensate(g), 1))
    assert (memory.velocity == 0).sum() == codec.k


# ---- 15: convergence


def loss_after(make_memory, density, steps=400, lr=0.02):
    """Of 0.5 x'Ax, from ones: A has eigenvectors that are no axes."""
    rng = np.random.default_rng(2)
    n = 60
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    a = (basis * np.linspace(0.5, 3, n)) @ basis.T
    x, codec = np.ones(n), topk(n, density)
    memory = make_memory(codec)
    for step in range(steps):
        payload = codec.compress(memory.compensate((a @ x).astype(np.float32)), step)
        memory.update(payload)
        x = x - lr * said(codec, payload)
    return 0.5 * x @ a @ x


def test_top_k_converges_with_a_residual_and_not_without():
    dense = loss_after(lambda codec: Residual(device_for(), codec), 1.0)
    kept = loss_after(lambda codec: Residual(device_for(), codec), 0.05)
    lost = loss_after(lambda codec: Nothing(codec, lossy=True), 0.05)
    start = 0.5 * 60
    assert dense < 1e-5 * start
    assert kept < 1e-3 * start
    assert lost > 30 * kept and lost > 1e-3 * start


# ---- the page


def test_the_code_of_the_page_runs():
    text = (ROOT / "docs/compression.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:1]:
        exec(code, names)
    np.testing.assert_array_equal(names["total"] + names["memory"].residual, names["gradient"])
