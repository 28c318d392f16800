"""The choice of algorithm, segments and buckets; files of networks and of choices."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hpctrain.collectives.algorithms import ACROSS, PRESETS, all_reduce
from hpctrain.collectives.cost import price
from hpctrain.collectives.cost_choice import (
    CANDIDATES,
    SEGMENTS,
    bucket_bytes,
    choose,
    described,
    load_choices,
    save_choices,
)
from hpctrain.collectives.network import (
    Between,
    Inside,
    Network,
    Node,
    Rank,
    load_network,
    save_network,
)
from hpctrain.errors import UsageError
from hpctrain.mpi.topology import parse_override

ROOT = Path(__file__).resolve().parents[1]
NETWORK = Network(
    "toy",
    "by hand",
    Inside(2e-6, 1e-10, 1e-6, 5e-11, 1e-6),
    Between(2e-5, 1e-9, 2e-6),
    Rank(1e-6, 1e-10, 1e-10),
    Node(8),
)


@pytest.mark.parametrize("nodes", [(0,), (0, 0, 1, 1), (0, 1, 0, 1, 2), tuple(range(6))])
@pytest.mark.parametrize("n", [0, 100, 1 << 14, 1 << 21])
def test_the_choice_is_the_cheapest_of_all(nodes, n):
    """Also of those that were not priced because their formula said enough."""
    choice = choose(nodes, n, 4, NETWORK)
    all_of_them = [
        price(all_reduce(nodes, n, 4, PRESETS[name], segment_bytes=size), NETWORK).seconds
        for name in CANDIDATES
        for size in SEGMENTS
    ]
    assert choice.seconds == pytest.approx(min(all_of_them), rel=1e-12, abs=0)
    assert price(choice.schedule(nodes), NETWORK).seconds == choice.seconds
    assert choice.algorithm in str(choice) and "\n" not in str(choice)


def test_only_candidates_are_chosen_and_some_are_needed():
    nodes = tuple(k // 4 for k in range(16))
    assert choose(nodes, 1 << 20, 4, NETWORK, ("ring",)).algorithm == "ring"
    assert choose(nodes, 1 << 20, 4, NETWORK).algorithm in ("two-level", "torus", "three-level")
    with pytest.raises(UsageError, match="no algorithm to choose from"):
        choose(nodes, 1 << 20, 4, NETWORK, ())
    with pytest.raises(UsageError, match="no algorithm is called 'rings'"):
        choose(nodes, 1 << 20, 4, NETWORK, ("rings",))


def test_latency_decides_for_few_bytes_and_bandwidth_for_many():
    nodes = tuple(range(16))
    assert choose(nodes, 16, 4, NETWORK).algorithm == "doubling"
    assert choose(nodes, 1 << 22, 4, NETWORK).algorithm != "doubling"


def test_32768_ranks_leave_out_what_cannot_win():
    """The ring has 65,534 messages of each rank: its formula is enough."""
    nodes = tuple(k // 8 for k in range(8 * 4096))
    choice = choose(nodes, 1 << 20, 4, NETWORK, ("ring", "torus", "rabenseifner", "direct"))
    assert choice.algorithm in ("torus", "rabenseifner")


def seconds(nodes, network, nbytes):
    return choose(nodes, nbytes // 4, 4, network, ("two-level",)).seconds


def test_buckets_grow_with_latency():
    nodes, sizes = (0, 0, 1, 1), []
    for latency in (1e-6, 1e-4, 1e-2):
        between = msgspec.structs.replace(NETWORK.between, latency_seconds=latency)
        network = msgspec.structs.replace(NETWORK, between=between)
        sizes.append(bucket_bytes(partial(seconds, nodes, network), most=64 << 20))
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[2] <= 64 << 20
    assert bucket_bytes(partial(seconds, nodes, NETWORK), most=1) == 64 << 10


@pytest.mark.parametrize(
    ("text", "size"), [("2x4", 8), ("1x1", 1), ("3+1", 4), ("1+2+3", 6), ("0,1,0,1", 4)]
)
def test_topologies_are_described_as_the_override_has_them(text, size):
    assert described(tuple(parse_override(text, size))) == text


# files


def test_networks_are_saved_and_loaded(tmp_path):
    file = tmp_path / "network.toml"
    save_network(file, NETWORK)
    assert load_network(file) == NETWORK
    assert "latency_seconds" in file.read_text()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("nics = 1", "nics = 0", "nics"),
        ("nics = 1", "nic = 1", "nic"),
        ('duplex = "full"', 'duplex = "fully"', "duplex"),
        ("fence_seconds = 1e-6", "fence_seconds = -1e-6", "fence_seconds"),
        ("fence_seconds = 1e-6\n", "", "fence_seconds"),
        ("[node]", "[node", "not valid TOML"),
    ],
)
def test_wrong_networks_are_refused(tmp_path, old, new, says):
    file = tmp_path / "network.toml"
    save_network(file, NETWORK)
    text = file.read_text().replace("fence_seconds = 1e-06", "fence_seconds = 1e-6")
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=f"network.toml.*{says}"):
        load_network(file)


def test_missing_and_binary_networks(tmp_path):
    with pytest.raises(UsageError, match="cannot read the network"):
        load_network(tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no text"):
        load_network(tmp_path / "binary")


@pytest.mark.parametrize("file", sorted((ROOT / "jobs/networks").glob("*.toml")), ids=str)
def test_shipped_networks_say_that_they_are_assumed(file):
    network = load_network(file)
    assert "assumed" in network.source and file.name in network.source
    assert file.read_text().startswith(f"# {file.name} -- an assumption, not a measurement")
    assert choose((0, 0, 1, 1), 1 << 20, 4, network).algorithm in CANDIDATES


def test_choices_are_saved_and_loaded(tmp_path):
    file = tmp_path / "choices.toml"
    assert load_choices(file) == []
    choices = [choose((0, 0, 1, 1), n, 4, NETWORK) for n in (64, 1 << 20)]
    save_choices(file, choices)
    assert load_choices(file) == choices
    file.write_text(re.sub('algorithm = "[^"]+"', 'algorithm = "rings"', file.read_text()))
    with pytest.raises(UsageError, match="no algorithm is called 'rings'"):
        load_choices(file)
    file.write_text("[[choice]]\nbytes = 1\n")
    with pytest.raises(UsageError, match="no file of choices"):
        load_choices(file)


# in training


@pytest.mark.ranks(2)
def test_buckets_of_a_run_are_suited_to_its_network(comm, tmp_path_factory):
    """The same on all ranks; one bucket where nothing crosses between nodes."""
    from types import SimpleNamespace

    from hpctrain.mpi.topology import topology
    from hpctrain.sections import ParallelSection
    from hpctrain.train.crossing import bucket_bytes as bucket_bytes_of
    from hpctrain.train.crossing import network_of

    folder = Path(comm.bcast(str(tmp_path_factory.mktemp("network"))))
    if comm.rank == 0:
        save_network(folder / "network.toml", NETWORK)
    layout = SimpleNamespace(size=1 << 22, dtype=np.dtype("float32"))
    parallel = ParallelSection(network=str(folder / "network.toml"))
    suited = bucket_bytes(
        lambda size: price(all_reduce((0, 1), size // 4, 4, ACROSS["direct"]), NETWORK).seconds,
        16 << 20,
    )
    for text, size in (("1+1", suited), ("1x2", 16 << 20)):
        with topology(comm, text) as where:
            session = SimpleNamespace(
                config=SimpleNamespace(parallel=parallel),
                layouts=SimpleNamespace(parameters=layout),
                topology=where,
                device=SimpleNamespace(name="cpu"),
            )
            assert bucket_bytes_of(session, network_of(session)) == size
