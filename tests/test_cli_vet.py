"""`hpctrain doctor --vet`: the judgement exactly on planted figures, and a planted slow node."""

from __future__ import annotations

import json
import math

import pytest
from launching import mpirun

from hpctrain.cli import vet, vet_figures
from hpctrain.cli.vet_figures import MEASURES, Node, document, lines_of, outliers_of
from hpctrain.errors import UsageError

GOOD = dict.fromkeys(MEASURES, 1e9)


def nodes(*changes):
    return [Node(f"n{k}", 4 * k, 4, GOOD | change) for k, change in enumerate(changes)]


def test_equal_nodes_have_no_outlier():
    assert outliers_of(nodes({}, {}, {})) == []


@pytest.mark.parametrize("measure", MEASURES)
def test_each_measure_has_its_threshold(measure):
    """At the share of the median a node is good, just below it is not."""
    share = MEASURES[measure].share
    assert outliers_of(nodes({}, {measure: share * 1e9}, {})) == []
    (found,) = outliers_of(nodes({}, {measure: share * 0.999e9}, {}))
    assert (found.host, found.rank, found.measure) == ("n1", 4, measure)
    assert (found.median, found.threshold) == (1e9, share * 1e9)


def test_an_outlier_is_named_with_figure_median_and_threshold():
    found = outliers_of(nodes({}, {"copy": 2.5e8}, {}))
    text = "\n".join(lines_of(nodes({}, {"copy": 2.5e8}, {}), found, 3.0))
    told = "n1 (rank 4): memory copy 0.25 GB/s; the median is 1, the least allowed 0.8 (80% of it)"
    assert f"[outlier] {told}" in text
    assert "0.25!" in text and "3 nodes, outliers: 1; 3.0 s" in text


def test_more_good_than_the_median_is_no_fault():
    assert outliers_of(nodes({}, {"read": 9e9}, {})) == []


def test_a_node_without_a_figure():
    """Where nobody has one it was not measured; where others have one, it failed."""
    none = {"inside": math.nan}
    assert outliers_of(nodes(none, none, none)) == []
    (found,) = outliers_of(nodes({}, {"write": math.nan}, {}))
    assert found.host == "n1" and math.isnan(found.rate)
    told = document(nodes({}, {"write": math.nan}, {}), [found], 1.0)
    assert told["nodes"][1]["rates"]["write"] is None and told["outliers"][0]["rate"] is None
    assert told["bad_nodes"] == ["n1"]
    json.dumps(told, allow_nan=False)


def test_one_node_has_nothing_to_be_compared_with():
    alone = nodes({"copy": 1.0})
    assert outliers_of(alone) == []
    assert "one node: nothing to compare it with" in lines_of(alone, [], 1.0)


def test_bad_nodes_are_added_once(tmp_path):
    file = tmp_path / "run" / "bad_nodes.txt"
    vet.add_hosts(file, ["n1", "n2", "n1"])
    vet.add_hosts(file, ["n2", "n3"])
    assert file.read_text() == "n1\nn2\nn3\n"
    with pytest.raises(UsageError, match="/proc/none"):
        vet.add_hosts(vet.Path("/proc/none/bad"), ["n1"])


def test_where_nothing_can_be_written(tmp_path):
    assert all(math.isnan(rate) for rate in vet._file_rates(vet.Path("/proc/none"), True))
    assert all(rate > 0 for rate in vet._file_rates(tmp_path / "new" / "run", True))
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from hpctrain.cli import vet
from hpctrain.cli.main import main
from hpctrain.mpi.start import start
real = vet.copy_seconds
def slowed():
    copy = real()
    return lambda: vet._timed(lambda: (copy(), time.sleep(0.8)))
if start().rank in (2, 3):
    vet.copy_seconds = slowed
sys.exit(main(["doctor", "--vet", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_slow_node_is_found(tmp_path):
    """Five ranks play three nodes. The copy of ranks 2 and 3, the second node, takes 0.8 s more.

    Other figures may be outliers on a busy machine; this one must.
    """
    bad = tmp_path / "bad_nodes.txt"
    env = {"HPCTRAIN_TOPOLOGY": "0,0,1,1,2"}
    options = ["--json", "--folder", str(tmp_path), "--bad-nodes", str(bad)]
    done = mpirun(5, "-c", SLOW, *options, env=env, timeout=90)
    assert done.returncode == vet.EXIT_OUTLIERS, done.stdout
    found, _ = json.JSONDecoder().raw_decode(done.stdout)  # the launcher speaks after it
    assert [(n["rank"], n["ranks"]) for n in found["nodes"]] == [(0, 2), (2, 2), (4, 1)]
    copies = [o for o in found["outliers"] if o["measure"] == "copy" and o["rank"] == 2]
    assert len(copies) == 1 and copies[0]["rate"] < copies[0]["threshold"]
    rates = [n["rates"] for n in found["nodes"]]
    assert rates[2]["inside"] is None and rates[0]["inside"] > 0
    assert all(rate["between"] > 0 and rate["write"] > 0 and rate["read"] > 0 for rate in rates)
    assert bad.read_text().split() == found["bad_nodes"] != []
    assert set(MEASURES) == set(vet_figures.MEASURES) == set(rates[0])


@pytest.mark.slow
def test_one_node_passes(tmp_path):
    done = mpirun(2, "-m", "hpctrain", "doctor", "--vet", "--folder", str(tmp_path), timeout=90)
    assert done.returncode == 0, done.stdout
    assert "memory copy" in done.stdout and "nothing to compare" in done.stdout
    assert list(tmp_path.iterdir()) == []
