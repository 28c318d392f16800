"""tools/scale_study.py: its page is what it prints, and its steps are those of a model by hand."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from launching import ROOT, environment

from hpctrain.collectives.network import load_network

PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
FEW = (1, 2, 4)


@pytest.fixture(scope="module")
def tool():
    """The module; tools/ is no package."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("scale_study")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def cases(tool):
    networks = [load_network(ROOT / f"jobs/networks/{name}.toml") for name in tool.NETWORKS]
    return [(model, network) for model in tool.MODELS for network in networks]


def test_the_page_is_what_the_tool_prints(tool):
    """Of the few nodes that take no time; after a change: tools/scale_study.py --write."""
    args = tool.parser().parse_args(["--nodes", ",".join(map(str, FEW))])
    lines, _ = tool.study(cases(tool), args)
    page = PAGE.split("<!-- study -->\n")[1].split("\n<!-- end -->")[0].split("\n")
    of_few = [line for line in page if not re.match(r"\| [\d,]+ \|", line) or row(line) in FEW]
    assert [line for line in of_few if line] == [line for line in lines if line]


def row(line):
    return int(line.split("|")[1].replace(",", ""))


def test_the_page_goes_to_4096_nodes_and_has_the_plot(tool):
    assert PAGE.count("| 4,096 | 32,768 |") == len(cases(tool))
    svg = (ROOT / "docs/scale.svg").read_text(encoding="utf-8")
    assert svg.count("<polyline") == len(cases(tool)) * len(tool.ALGORITHMS)


def test_a_step_by_hand(tool, monkeypatch):
    """Four buckets; reducing one takes 10 s, gathering one 1 s; passes of 4 and 8 s."""
    _, network = cases(tool)[0]
    monkeypatch.setattr(tool, "halves", lambda *_: (10.0, 1.0))
    monkeypatch.setattr(tool, "suited_bytes", lambda nbytes: 4 << 20)
    model = tool.Model("by hand", 4 << 20, 12.0)
    update = tool.UPDATE * (16 << 20) / 16 * network.rank.copy_seconds_per_byte
    # Forward: 1 to wait for the first parameters, then 4. The first bucket is ready 2 s later.
    found = tool.step_seconds(model, network, 2, 8, "two-level")
    assert found == pytest.approx(1 + 4 + 2 + 4 * 10 + update)
    monkeypatch.setattr(tool, "halves", lambda *_: (0.5, 0.1))
    # Everything is hidden but the first parameters and the last gradients.
    found = tool.step_seconds(model, network, 2, 8, "two-level")
    assert found == pytest.approx(0.1 + 12 + 0.5 + update)


def test_the_tool_as_a_program(tmp_path):
    plot = tmp_path / "plot.svg"
    options = "--network jobs/networks/gh200-slingshot.toml --ranks-per-node 4 --nodes 1,3"
    options += f" --parameters 1e6 --compute-seconds 0.01 --algorithms torus --plot {plot}"
    command = [sys.executable, "tools/scale_study.py", *options.split()]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "| 3 | 12 |" in done.stdout and "assumed" in done.stdout
    assert plot.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--algorithms doubling", "no algorithm in two halves"),
        ("--parameters 1e6", "belong together"),
        ("--network none.toml", "cannot read the network"),
    ],
)
def test_wrong_options(options, says):
    command = [sys.executable, "tools/scale_study.py", *options.split()]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode and says in done.stderr
