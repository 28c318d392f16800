"""Compression on a simulated GPU: the bits of the CPU, whatever the order of the GPU's work.

Work is done late, early or in drawn orders, so a missing synchronization gives other numbers here.
Whole numbers add exactly, so books are compared without a tolerance.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from simulated import ORDERS

from hpctrain import checkpoint
from hpctrain.collectives.slices import SliceReduction
from hpctrain.compress import Compression, GradientSum, Settings, transport
from hpctrain.compress.methods import DenseSum
from hpctrain.compress.topk import topk_bytes
from hpctrain.device.cpu import CpuDevice
from hpctrain.device.sim import Machine, SimDevice
from hpctrain.errors import HpctrainError
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
TOPOLOGIES = {1: ["1x1"], 2: ["2x1"], 3: ["2+1", "3x1"], 4: ["2x2", "3+1"]}
SETTINGS = {
    "topk": {},
    "topk momentum": {"momentum": 0.5},
    "topk bfloat16": {"values": "bfloat16"},
    "topk float16 momentum": {"values": "float16", "momentum": 0.5},
    "topk warm-up": {"warmup_steps": 2},
    "oktopk": {},
    "int8": {},
    "sign": {},
    "bf16": {},
    "powersgd": {"rank": 2},
}
QUICK = [
    ("topk momentum", "off"),
    ("topk bfloat16", "on"),
    ("oktopk", "off"),
    ("int8", "on"),
    ("powersgd", "off"),
]


@pytest.fixture(scope="module")
def cpu():
    """A CPU whose kernels are compiled once, on rank 0; simulated GPUs use the same."""
    from mpi4py import MPI

    device = CpuDevice()
    device.prepare(["float32"], MPI.COMM_WORLD)
    return device


def simulated(comm, order="late"):
    return SimDevice(comm.rank, Machine(order, "host"))


def settings_of(name, **more):
    wanted = {"density": 0.02, "least_size": 100, **SETTINGS[name], **more}
    return Settings(name.split()[0], **wanted)


def numbers(rank, step, layout=LAYOUT):
    """A gradient whose sums round, without numbers in the padding."""
    rng = np.random.default_rng([rank, step])
    x = np.zeros(layout.size, np.float32)
    for entry in layout.entries:
        part = rng.standard_normal(entry.size) * np.exp(2 * rng.standard_normal(entry.size))
        x[entry.offset : entry.offset + entry.size] = part
    return x


def whole_numbers(rank, step, layout=LAYOUT):
    x = np.round(numbers(rank, step, layout) * 8)
    return np.clip(x, -4000, 4000).astype(np.float32)


class Sums:
    """Compressed sums on a device, step by step."""

    def __init__(self, where, device, settings, gpu_mpi="off", buckets=None, overlap="off"):
        self.device, self.compression = device, Compression(settings, LAYOUT)
        self.slices = SliceReduction(
            where, device, LAYOUT.size, np.float32, gpu_mpi=gpu_mpi, buckets=buckets,
            crossing=self.compression, overlap=overlap,
        )  # fmt: skip

    def step(self, gradient):
        """This rank's part of the sums."""
        self.device.copy(self.slices.gradients, self.device.from_host(gradient))
        self.slices.reduce()
        sums = self.device.to_host(self.slices.sums)
        self.slices.gather()
        return sums

    def kept(self):
        """What the memories keep, by column and name."""
        return [
            (name, self.device.to_host(array))
            for column in self.compression.columns
            for name, array in column.memory.arrays().items()
        ]


def check_same_bits(comm, cpu, name, order, gpu_mpi, steps=4, overlap="off"):
    for number, text in enumerate(TOPOLOGIES[comm.size]):
        buckets = [(0, 640), (640, LAYOUT.size)] if number else None
        with topology(comm, text) as where:
            sim = simulated(comm, order)
            both = [
                Sums(where, device, settings_of(name), gpu_mpi, buckets, overlap)
                for device in (cpu, sim)
            ]
            for step in range(steps):
                gradient = numbers(comm.rank, step)
                if step == 2 and comm.rank == comm.size - 1:
                    gradient[7] = np.inf  # refused on all, and taken back
                here, there = [sums.step(gradient).tobytes() for sums in both]
                assert here == there, (text, step)
                if step == 2:
                    for sums in both:
                        sums.compression.undo()
                for (what, mine), (_, other) in zip(both[0].kept(), both[1].kept(), strict=True):
                    assert mine.tobytes() == other.tobytes(), (text, step, what)
            columns = [sums.compression.columns for sums in both]
            assert [c.sent for c in columns[0]] == [c.sent for c in columns[1]]
            if comm.size > 1 and columns[0]:
                assert columns[0][0].used == name.split()[0]
            for sums in both:
                sums.slices.free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name, gpu_mpi", QUICK)
def test_the_bits_are_those_of_the_cpu(comm, cpu, name, gpu_mpi):
    check_same_bits(comm, cpu, name, "late", gpu_mpi)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("gpu_mpi, order", [("off", "late"), ("on", "2")])
def test_the_bits_are_those_of_the_cpu_beside_the_computation(comm, cpu, gpu_mpi, order):
    """In a thread of its own, on a stream of its own."""
    check_same_bits(comm, cpu, "topk momentum", order, gpu_mpi, 3, "on")


@pytest.mark.ranks(3, 4)
def test_the_bits_are_those_of_the_cpu_on_unequal_nodes(comm, cpu):
    check_same_bits(comm, cpu, "topk momentum", "late", "off", steps=3)


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_bits_are_those_of_the_cpu_in_every_order(comm, cpu, name, gpu_mpi):
    for order in ORDERS if name == "topk momentum" else ORDERS[1:3]:
        check_same_bits(comm, cpu, name, order, gpu_mpi)


@pytest.mark.slow
@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("name, gpu_mpi", QUICK)
def test_the_bits_are_those_of_the_cpu_on_more_ranks(comm, cpu, name, gpu_mpi):
    check_same_bits(comm, cpu, name, "1", gpu_mpi)


def check_books(comm, order, name, gpu_mpi, steps):
    """What is applied and kept is what came, step by step, over all ranks and nodes."""
    with topology(comm, TOPOLOGIES[comm.size][-1]) as where:
        sums = Sums(where, simulated(comm, order), settings_of(name), gpu_mpi)
        total = np.zeros(LAYOUT.size)
        for step in range(steps):
            gradient = whole_numbers(comm.rank, step)
            total += np.sum(comm.allgather(gradient.astype(np.float64)), axis=0)
            mine, applied = sums.step(gradient), np.zeros(LAYOUT.size)
            applied[slice(*sums.slices.owned[0])] = mine
            rows = comm.allgather((where.node_index, applied))
            total -= np.sum([row for node, row in rows if node == 0], axis=0)
            np.testing.assert_array_equal(residuals(comm, sums), total, err_msg=f"step {step}")
        sums.slices.free()


@pytest.mark.ranks(2)
def test_books_on_a_gpu_balance_over_many_steps(comm, cpu):
    check_books(comm, "late", "topk", "off", 50)


@pytest.mark.slow
@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("name", ["topk", "oktopk"])
def test_books_on_a_gpu_balance_in_another_order(comm, cpu, name):
    """Through 70 steps Ok-Topk finds its threshold and its regions anew."""
    for gpu_mpi in ("on", "off") if comm.size == 2 else ("off",):
        check_books(comm, "1", name, gpu_mpi, 70)


# ---- what crosses, and what is waited for


def moved_by_a_step(comm, settings, gpu_mpi):
    """Counts of a simulated GPU over one step, of two nodes of one rank."""
    with topology(comm, "2x1") as where:
        sums = Sums(where, simulated(comm), settings, gpu_mpi)
        for step in range(3):
            gradients = sums.device.from_host(numbers(comm.rank, step))
            sums.device.copy(sums.slices.gradients, gradients)
            sums.device.reset_counts()
            sums.slices.reduce()
            counts = sums.device.counts()
        sums.device.synchronize()
        [column] = sums.compression.columns
        small = 4 * column._small.size
        sums.slices.free()
        return counts, small, column.span[1] - column.span[0]


@pytest.mark.ranks(2)
def test_only_what_is_sent_crosses_to_the_host(comm, cpu):
    """Through pinned memory: sums of squares, the payload, and small tensors with their sums."""
    counts, small, n = moved_by_a_step(comm, settings_of("topk"), "off")
    payload = topk_bytes(n, -(-2 * n // 100), 4)
    assert counts.copied["to host"] == 4 * -(-n // 4096) + payload + small
    assert counts.copied["to device"] == 64 + payload + small  # a header is written by the host
    assert counts.synchronizations["device"] == counts.synchronizations["copy"] == 0
    # Copies: squares, payload; half of the small tensors and half of their sums; uploads of those.
    assert counts.synchronizations["event"] <= 8
    assert counts.synchronizations["stream"] == 0


@pytest.mark.ranks(2)
def test_mpi_is_given_payloads_where_it_may_be(comm, cpu):
    """Headers and sums of squares alone cross to the host."""
    counts, _, n = moved_by_a_step(comm, settings_of("topk"), "on")
    assert counts.copied["to host"] == 4 * -(-n // 4096) + 64
    assert counts.copied["to device"] == 64
    assert counts.synchronizations["stream"] == 3  # payload, small tensors, their sums
    assert counts.synchronizations["device"] == counts.synchronizations["copy"] == 0


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("kind", [transport.Staged, transport.Direct])
def test_dense_sums_in_many_rounds_are_those_of_the_cpu(comm, cpu, monkeypatch, kind):
    """Their memory is bounded; the last rounds have nothing of some chunks."""
    monkeypatch.setattr(kind, "round_bytes", 2 * 4 * 16 * comm.size)
    device, totals = simulated(comm, "1"), []
    x = np.random.default_rng(comm.rank).standard_normal(1003).astype(np.float32)
    for way in (transport.Transport(cpu, comm), kind(device, comm)):
        mine, out = way.device.from_host(x), way.device.empty(x.size, np.float32)
        DenseSum(way, x.size).run(mine, out, 1.0)
        totals.append(way.device.to_host(out).tobytes())
        assert not way.device.to_host(mine).any()
    assert totals[0] == totals[1]
    assert way._wire.messages > 4 * (comm.size - 1)


# ---- planted defects


class Impatient:
    """A ticket that nobody waits for."""

    def wait(self, idle=None):
        pass


def differs(comm, cpu, gpu_mpi, order="late"):
    """Whether any rank sees other sums than the CPU's, or a payload that is none."""
    wrong = 0
    with topology(comm, "2x1") as where:
        both = [
            Sums(where, device, settings_of("topk"), gpu_mpi)
            for device in (cpu, simulated(comm, order))
        ]
        for step in range(4):
            here = both[0].step(numbers(comm.rank, step)).tobytes()
            try:
                wrong += both[1].step(numbers(comm.rank, step)).tobytes() != here
            except HpctrainError:
                wrong += 1
            if comm.allreduce(wrong):
                break
        both[1].device.synchronize()
        for sums in both:
            sums.slices.free()
    return comm.allreduce(wrong) > 0


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way, caught", [("download", True), ("none", False)])
def test_payloads_that_mpi_reads_too_early_are_seen(comm, cpu, monkeypatch, way, caught):
    kept = []
    with monkeypatch.context() as patch:
        if way == "download":
            download = SimDevice.download

            def begun(self, array, host):
                kept.append(download(self, array, host))
                return Impatient()

            patch.setattr(SimDevice, "download", begun)
        assert differs(comm, cpu, "off") == caught
        for ticket in kept:
            ticket.wait()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("waits", [True, False])
def test_arrived_bytes_that_are_overwritten_are_seen(comm, monkeypatch, waits):
    """By the next exchange, of a rank that sends nothing: no download comes between."""
    upload, device = SimDevice.upload, simulated(comm)

    def begun(self, host, array):
        ticket = upload(self, host, array)
        return ticket if waits else Impatient()

    with monkeypatch.context() as patch:
        patch.setattr(SimDevice, "upload", begun)
        staged = transport.Staged(device, comm)
        seen = []
        for turn in range(2):
            mine = device.from_host(np.full(100 * comm.rank, 7 + turn, np.uint8))
            rows = staged.all_gather(mine, [0, 100])
            seen.append(device.from_host(np.zeros(100, np.uint8)))
            device.copy(seen[-1], rows[1])
        found = [device.to_host(one)[0] for one in seen]
        assert (found == [7, 8]) == (waits or comm.rank == 1)


@pytest.mark.ranks(2)
def test_no_synchronization_before_mpi_is_seen(comm, cpu, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transport, "settle", lambda device, idle: None)
        assert differs(comm, cpu, "on")


# ---- for users, and checkpoints


@pytest.mark.ranks(2)
@pytest.mark.parametrize("gpu_mpi", ["on", "off"])
def test_sums_for_programs_of_any_kind(comm, cpu, monkeypatch, gpu_mpi):
    monkeypatch.setenv("HPCTRAIN_GPU_MPI", gpu_mpi)
    settings = Settings(density=0.05, least_size=100)
    total = GradientSum(
        comm, [(30, 40), (40,)], settings=settings, device=simulated(comm),
        nodes=TOPOLOGIES[comm.size][0],
    )  # fmt: skip
    came, seen = np.zeros(1200), np.zeros(1200)
    device = total._device
    for step in range(25):
        mine = np.random.default_rng([comm.rank, step]).integers(-9, 9, 1200).astype(np.float32)
        mine *= step < 3  # then what was kept comes out, a twentieth in each step
        came += np.sum(comm.allgather(mine), axis=0)
        device.copy(total.tensors[0], device.from_host(mine.reshape(30, 40)))
        device.copy(total.tensors[1], device.from_host(np.ones(40, np.float32)))
        total.sum()
        seen += device.to_host(total.tensors[0]).reshape(-1)
        np.testing.assert_array_equal(device.to_host(total.tensors[1]), np.full(40, comm.size))
    np.testing.assert_array_equal(seen, came)
    bad = np.full((30, 40), np.nan if comm.rank else 1, np.float32)
    device.copy(total.tensors[0], device.from_host(bad))
    with pytest.raises(HpctrainError, match="not finite"):
        total.sum()
    total.free()


@pytest.mark.ranks(2)
def test_a_flat_array_of_the_device_is_added_in_place(comm, cpu):
    device = simulated(comm)
    settings = Settings(density=0.1, least_size=100)
    total = GradientSum(comm, [(30, 40)], settings=settings, device=device, nodes="2x1")
    array = device.from_host(whole_numbers(comm.rank, 0)[:1200])
    came = np.sum(comm.allgather(device.to_host(array)), axis=0)
    total.add(array)
    first = device.to_host(array)
    assert 0 < np.count_nonzero(first) <= 240
    device.copy(array, device.zeros(1200, np.float32))
    device.copy(total.tensors[0], array.reshape(30, 40))
    total.sum(full=True)
    second = device.to_host(total.tensors[0]).reshape(-1)
    np.testing.assert_array_equal(first + second, came)
    total.free()


@pytest.mark.ranks(2, 4)
def test_residuals_go_on_on_another_kind_of_device(comm, cpu, tmp_path):
    """Saved on a GPU and loaded on the CPU, or the other way: on the same nodes the same bits, on
    other nodes the same sum."""
    folder, gpu = comm.bcast(tmp_path), simulated(comm)
    text, other = TOPOLOGIES[comm.size][-1], f"{comm.size}x1"
    for number, (first, second) in enumerate([(gpu, cpu), (cpu, gpu)]):
        with topology(comm, text) as where:
            sums = Sums(where, first, settings_of("topk momentum"))
            for step in range(3):
                sums.step(whole_numbers(comm.rank, step))
            parts = residual_parts(sums.compression, session(comm, first))
            states = state_of(sums.compression, session(comm, first))
            checkpoint.save(
                folder, number, parts, {"compression": states}, comm, to_host=first.to_host
            )
            kept, total = sums.kept(), residuals(comm, sums)
            expected = sums.step(whole_numbers(comm.rank, 9)).tobytes()
            sums.slices.free()
        for nodes in (text, other):
            with topology(comm, nodes) as where:
                again = Sums(where, second, settings_of("topk momentum"))
                loading = Loading(
                    folder / f"step_{number:08}", again.compression, session(comm, second)
                )
                loaded = checkpoint.load(folder / f"step_{number:08}", loading.parts, comm)
                assert loading.finish(loaded["compression"]) is None
                np.testing.assert_array_equal(residuals(comm, again), total)
                if nodes == text:
                    for (name, mine), (_, theirs) in zip(kept, again.kept(), strict=True):
                        assert mine.tobytes() == theirs.tobytes(), name
                    assert again.step(whole_numbers(comm.rank, 9)).tobytes() == expected
                again.slices.free()


def session(comm, device):
    """As much of a run's session as checkpoints of residuals look at."""
    return SimpleNamespace(comm=comm, device=device, layouts=SimpleNamespace(parameters=LAYOUT))


def residuals(comm, sums):
    """Those of all nodes, added up."""
    kept = np.zeros(LAYOUT.size)
    for column in sums.compression.columns:
        kept[slice(*column.span)] = sums.device.to_host(column.memory.residual)
    return np.sum(comm.allgather(kept), axis=0)
