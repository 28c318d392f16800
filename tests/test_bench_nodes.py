"""tools/bench_nodes.py: what its table says of given times, and a short run on two nodes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from launching import ROOT, environment

TOOL = ROOT / "tools" / "bench_nodes.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_nodes", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(*seconds, payload=0, sent=0):
    return {"seconds": list(seconds), "payload": payload, "sent": sent}


def test_rows_are_medians_beside_the_limit_and_the_quicker_of_ours(tool):
    found = {
        "two-level": record(0.4, 0.5, 0.6, payload=2 << 20, sent=3 << 20),
        "two-level, in 2 pieces": record(0.3, 0.4, 9.0),
        "gloo": record(0.8, 0.7, 0.9),
    }
    assert tool.rows(found, limit=0.25) == [
        ["two-level, in 2 pieces", "400.0", "300.0", "1.60", "1.00", "", "", ""],
        ["two-level", "500.0", "400.0", "2.00", "1.25", "2", "3.00", "1.500"],
        ["gloo", "800.0", "700.0", "3.20", "2.00", "", "", ""],
    ]


def test_tables_replace_those_in_the_page(tool, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tool.BEGIN}\n\nold\n\n{tool.END}\nafter\n")
    monkeypatch.setattr(tool, "PAGE", page)
    tool.put_into_page(["title", *tool.tables("2x2", 1 << 20, 0.25, [["a"] * len(tool.HEAD)])])
    head = "| " + " | ".join(tool.HEAD) + " |"
    assert head in page.read_text() and "1 MiB on 2x2: limit 250.0 ms" in page.read_text()
    assert page.read_text().startswith(f"before\n{tool.BEGIN}\n\ntitle\n")
    assert page.read_text().endswith(f" a |\n\n{tool.END}\nafter\n")
    assert "old" not in page.read_text()
    assert tool.BEGIN in (ROOT / "docs" / "collectives.md").read_text()


def test_sizes(tool):
    assert [tool.number_of_bytes(text) for text in ("5", "2K", "64M")] == [5, 2048, 64 << 20]
    assert (
        subprocess.run([sys.executable, TOOL, "--size", "x"], capture_output=True).returncode == 2
    )


@pytest.mark.slow
def test_payload_and_counters_on_two_nodes(tmp_path):
    """The program checks sums and payloads; counters have headers and acknowledgements more."""
    file = tmp_path / "rounds.json"
    options = ["--shape", "2x2", "--size", "1M", "--repeat", "1", "--cycles", "1"]
    done = subprocess.run(
        [sys.executable, TOOL, *options, "--json", str(file)],
        env=environment({"PRTE_MCA_rmaps_default_mapping_policy": None}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "not possible here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    [measured] = json.loads(file.read_text())
    shares = {name: row["payload"] / (1 << 20) for name, row in measured["found"].items()}
    assert shares.pop("MPI_Allreduce") == shares.pop("MPI_Allreduce (all components)") == 0
    assert shares == {
        "two-level": 1,
        "two-level, in 2 pieces": 1,
        "two-level, bfloat16 between nodes": 0.5,
        "ring in the order of nodes": 1.5,
        "ring placed round-robin": 3,
        "plain sockets": 1,
    }
    for row in measured["found"].values():
        assert row["payload"] <= row["sent"] and (
            not row["payload"] or row["sent"] < 1.07 * row["payload"]
        )
