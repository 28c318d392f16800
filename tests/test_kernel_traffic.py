"""Bytes that kernels move: counted on the simulator, beside the fewest; stated in each header."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_page import section, tool

from hpctrain.cli import bench_traffic
from hpctrain.cli.bench_traffic import ALLOWED, REASONS
from hpctrain.device import simt
from hpctrain.device.signatures import kernel_folder, kernel_table
from hpctrain.device.simt_library import TOUCH
from hpctrain.device.simt_traffic import SECTOR, Traffic, traffic
from hpctrain.errors import KernelError


def touches(*accesses):
    """(thread, place, address, bytes, use) each."""
    order = ["thread", "pc", "address", "bytes", "use"]
    array = np.zeros(len(accesses), TOUCH)
    for index, access in enumerate(accesses):
        for name, value in zip(order, access, strict=True):
            array[index][name] = value
    return array


READ, WRITE, ATOMIC, SHARED = 0, 1, 2, 4


@pytest.mark.parametrize(
    "accesses, asked, requested, moved",
    [
        ([], 0, 0, 0),
        # 32 lanes side by side: four sectors; every other element: eight
        ([(t, 1, 4 * t, 4, READ) for t in range(32)], 128, 4, 4),
        ([(t, 1, 8 * t, 4, READ) for t in range(32)], 128, 8, 8),
        # one address for all lanes, and again: two requests, one from memory
        ([(t, 1, 64, 4, READ) for t in range(32)] * 2, 256, 2, 1),
        # two warps and two blocks of them
        ([(t, 1, 64, 4, READ) for t in (0, 32, 64)], 12, 3, 2),
        # written, then read: the read comes from the cache; the other way both move
        ([(0, 1, 0, 4, WRITE), (0, 2, 0, 4, READ)], 8, 2, 1),
        ([(0, 1, 0, 4, READ), (0, 2, 0, 4, WRITE)], 8, 2, 2),
        ([(0, 1, 0, 4, ATOMIC)], 8, 2, 2),
        ([(0, 1, 0, 4, READ + SHARED)], 0, 0, 0),
        ([(0, 1, 28, 8, READ)], 8, 2, 2),  # across a border
    ],
)
def test_traffic_by_hand(accesses, asked, requested, moved):
    expected = Traffic(asked, SECTOR * requested, SECTOR * moved)
    assert traffic(touches(*accesses), block=64) == expected


def test_the_simulator_records_accesses():
    x, y = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    counts = simt.launch("relu_forward", x, y, 40, work=40, block=32, record=200)
    assert counts.touches is not None and len(counts.touches) == counts.accesses == 80
    assert sorted(counts.touches["thread"][counts.touches["use"] == WRITE]) == list(range(40))
    assert set(counts.touches["bytes"]) == {4}
    assert simt.launch("relu_forward", x, y, 40, work=40).touches is None
    with pytest.raises(KernelError, match="80 accesses"):
        simt.launch("relu_forward", x, y, 40, work=40, record=79)


@pytest.fixture(scope="module")
def measured():
    simt.prepare(["float32"])
    return {row.kernel: row for row in bench_traffic.measure("float32")}


def test_every_kernel_is_measured(measured):
    assert list(measured) == list(kernel_table())


@pytest.mark.parametrize("name", kernel_table())
def test_bytes_are_near_the_fewest(measured, name):
    row = measured[name]
    moved, requested, _ = REASONS.get(name, (ALLOWED, ALLOWED, ""))
    assert row.fewest * 0.9 <= row.moved <= row.fewest * moved
    assert row.requested <= row.fewest * requested
    if name in REASONS:  # or the reason is no longer one
        assert max(row.moved, row.requested) > row.fewest * ALLOWED


def test_the_page_shows_it(measured):
    """After a change of a kernel: tools/kernel_page.py."""
    assert section("traffic") == tool().traffic_lines(measured.values())


@pytest.mark.parametrize("path", sorted(kernel_folder().glob("*.cu")), ids=lambda path: path.name)
def test_headers_state_bytes(path):
    text = path.read_text(encoding="utf-8")
    cost = text[text.index("// Cost  ") : text.index("// Exactness  ")]
    assert "bytes" in cost
