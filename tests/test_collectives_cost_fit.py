"""Fitting a network to times that a known network gave."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.collectives.algorithms import PRESETS, all_reduce
from hpctrain.collectives.cost import price
from hpctrain.collectives.cost_fit import Observation, fit, predictions
from hpctrain.collectives.cost_probes import probes
from hpctrain.collectives.network import COMMON, Between, Inside, Network, Node, Rank
from hpctrain.collectives.verifier import ScheduleFault, verify
from hpctrain.errors import UsageError

TRUTH = Network(
    "truth",
    "by hand",
    Inside(5e-6, 3e-10, 8e-6, 1.5e-10, 4e-6),
    Between(1e-4, 8e-9, 2e-5),
    Rank(1.2e-5, 3e-10, 2e-10),
    Node(2, 6e-11),
)


def observed(nodes, sizes=(1 << 16, 1 << 20), noise=0.0):
    schedules = probes(nodes, 4)
    schedules += [
        all_reduce(nodes, n, 4, PRESETS[name], name=name) for name in PRESETS for n in sizes
    ]
    generator = np.random.default_rng(0)
    return [
        Observation(one, price(one, TRUTH).seconds * float(np.exp(generator.normal(0, noise))))
        for one in schedules
    ]


def start():
    import msgspec

    return msgspec.structs.replace(COMMON, node=msgspec.structs.replace(COMMON.node, cores=2))


def test_a_known_network_is_found_again():
    nodes = (0, 0, 1, 1)
    network = fit(observed(nodes), start())
    assert network.between.seconds_per_byte == pytest.approx(8e-9, rel=0.05)
    assert network.between.latency_seconds == pytest.approx(1e-4, rel=0.3)
    for n in (1 << 14, 1 << 18, 1 << 22):  # sizes that it was not fitted to
        for name in PRESETS:
            schedule = all_reduce(nodes, n, 4, PRESETS[name])
            expected = price(schedule, TRUTH).seconds
            assert price(schedule, network).seconds == pytest.approx(expected, rel=0.1)


def test_noise_and_an_outlier_do_not_spoil_it():
    found = observed((0, 0, 1, 1), (1 << 18,), noise=0.05)
    found[-1] = Observation(found[-1].schedule, 20 * found[-1].seconds)
    network = fit(found, start())
    assert network.between.seconds_per_byte == pytest.approx(8e-9, rel=0.15)
    ratios = predictions(network, found[:-1]) / [one.seconds for one in found[:-1]]
    assert np.median(np.abs(ratios - 1)) < 0.1


def test_what_no_time_depends_on_stays():
    network = fit(observed((0, 0), (1 << 16,)), start())
    assert network.between.latency_seconds == pytest.approx(COMMON.between.latency_seconds)
    assert (network.between.nics, network.node.cores) == (1, 2)


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_no_times(seconds):
    found = [] if seconds is None else [Observation(probes((0,), 4)[0], seconds)]
    with pytest.raises(UsageError, match="times above 0"):
        fit(found)


@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1), (0, 0, 0, 1), (0, 1, 0, 1, 2)])
def test_probes_fit_the_ranks(nodes):
    """They end, keep to the rules of messages, and cross nodes only where there are some."""
    for one in probes(nodes, 4):
        try:
            verify(one)
        except ScheduleFault as fault:  # they add up nothing, and have no formula
            assert "formula" in str(fault) or "own" in str(fault)
        found = price(one, TRUTH)
        assert found.seconds > 0
        crosses = any(link.sent for link in found.links.values())
        assert crosses == one.name.startswith("between")
    assert any(one.name.startswith("between") for one in probes(nodes, 4)) == (len(set(nodes)) > 1)
