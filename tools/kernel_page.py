#!/usr/bin/env python3
"""kernel_page.py -- writes the tables of docs/kernels.md: registers, occupancy, bytes of kernels.

    .venv/bin/python tools/kernel_page.py

Needs the extra gpu-test (NVRTC of CUDA 12 and 13) and a C++ compiler, and no GPU. Only the lines
between the page's markers are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpctrain.cli import bench_static, bench_traffic
from hpctrain.cli.bench_static import LESS, Static
from hpctrain.device import simt
from hpctrain.device.build import REAL
from hpctrain.device.nvrtc import ARCHITECTURES, compiler_for

PAGE = Path(__file__).resolve().parents[1] / "docs/kernels.md"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(row).rstrip() + " |" for row in [head, *rows]]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def versions() -> str:
    """Which NVRTC compiles for which GPU."""
    found: dict[str, list[str]] = {}
    for name in ARCHITECTURES:
        found.setdefault("{}.{}".format(*compiler_for(name).version), []).append(name)
    return "; ".join(f"NVRTC {version}: {', '.join(names)}" for version, names in found.items())


def static_lines(rows: Iterable[Static]) -> list[str]:
    """A line for each kernel: float32 on every GPU, then the least of the other types."""
    found = {(r.resources.kernel, r.dtype, r.architecture): r for r in rows}
    names = dict.fromkeys(kernel for kernel, _, _ in found)
    others = [dtype for dtype in REAL if dtype != "float32"]
    lines = []
    for name in names:
        mine = [found[name, "float32", a] for a in ARCHITECTURES]
        cells = [f"{r.resources.registers}, {r.occupancy:.0%}" for r in mine]
        for dtype in others:
            every = [found[name, dtype, a] for a in ARCHITECTURES]
            most = max(r.resources.registers for r in every)
            cells.append(f"{most}, {min(r.occupancy for r in every):.0%}")
        spills = sum(r.resources.spills for key, r in found.items() if key[0] == name)
        shared = max(r.resources.shared for key, r in found.items() if key[0] == name)
        lines.append([f"`{name}`", str(spills), str(shared), *cells])
    head = ["kernel", "spills", "shared", *ARCHITECTURES, *others]
    return [versions(), "", *markdown(head, lines)]


def less_lines() -> list[str]:
    """The kernels with less occupancy, and why."""
    rows = [[f"`{name}`", f"{least:.0%}", why] for name, (least, why) in LESS.items()]
    return markdown(["kernel", "at least", "where, and what for"], rows)


def traffic_lines(rows: Iterable[bench_traffic.Moved]) -> list[str]:
    """A line for each kernel."""
    head, cells = bench_traffic.cells(rows)
    return markdown(head, [[f"`{name}`", *more] for name, *more in cells])


def replaced(page: str, section: str, lines: Sequence[str]) -> str:
    """The page with other lines between the markers of a section."""
    pattern = rf"(<!-- {section} -->\n).*?(\n<!-- end -->)"
    text, count = re.subn(
        pattern, lambda found: "\n".join([found[1], *lines, found[2]]), page, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE.name} has {count} sections {section!r}, there must be one")
    return text


def main() -> None:
    simt.prepare(["float32"])
    page = PAGE.read_text(encoding="utf-8")
    page = replaced(page, "static", static_lines(bench_static.measure(ARCHITECTURES, REAL)))
    page = replaced(page, "less", less_lines())
    page = replaced(page, "traffic", traffic_lines(bench_traffic.measure("float32")))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
