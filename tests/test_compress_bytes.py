"""The table of bytes of docs/compression.md, against what columns receive."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from launching import ROOT

from hpctrain.collectives.slices import SliceReduction
from hpctrain.compress import Compression, Settings
from hpctrain.device.cpu import CpuDevice
from hpctrain.mpi.topology import topology
from hpctrain.nn.layout import Layout

ROWS, COLS, DENSITY, RANK = 48, 4096, 0.01, 4
METHODS = ("bf16", "int8", "sign", "topk", "oktopk", "powersgd")


def formulas():
    """The table's last column, by method."""
    text = (ROOT / "docs/compression.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (dense|`\w+`) \|[^|]*\| (?:about )?`([^`]*)` \|$", text, re.MULTILINE)
    return {name.strip("`"): formula for name, formula in rows}


def received(comm, settings, steps):
    """Bytes of the last of so many steps, the mean over ranks."""
    layout = Layout([("w", (ROWS, COLS), True)], np.float32)
    device = CpuDevice()
    device.prepare(["float32"], comm)
    with topology(comm, f"{comm.size}x1") as where:
        compression = Compression(settings, layout)
        slices = SliceReduction(where, device, layout.size, np.float32, crossing=compression)
        [column] = compression.columns
        for step in range(steps):
            rng = np.random.default_rng([comm.rank, step])
            slices.gradients[:] = rng.standard_normal(layout.size)
            before = column._transport.received
            slices.reduce()
            slices.gather()
        count = column._transport.received - before
        slices.free()
    return comm.allreduce(count) / comm.size


@pytest.mark.ranks(2, 3, 4)
def test_the_table_is_what_is_received(comm):
    n, nodes = ROWS * COLS, comm.size
    names = {"n": n, "M": nodes, "k": math.ceil(DENSITY * n), "s": 4, "r": RANK}
    names |= {"rows": ROWS, "cols": COLS, "ceil": math.ceil}
    table = formulas()
    assert set(table) == {"dense", *METHODS}
    agree = 8 * (nodes - 1)
    for method in METHODS:
        count = received(comm, Settings(method, DENSITY, least_size=16, rank=RANK), 3)
        promised = eval(table[method], dict(names))
        if method == "oktopk":
            headers = 2 * (nodes - 1) * (64 + 4 * 4) + 6 * nodes
            assert 0.5 * promised < count - agree <= 1.5 * promised + headers
        else:
            assert math.isclose(count, promised + agree), method
    full = Settings("topk", 1.0, least_size=16)  # more than a dense sum: that is made instead
    assert math.isclose(received(comm, full, 1), eval(table["dense"], dict(names)) + agree)
    half = Settings("topk", DENSITY, values="bfloat16", least_size=16)
    assert math.isclose(received(comm, half, 1), eval(table["topk"], names | {"s": 2}) + agree)
