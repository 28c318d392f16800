"""What `auto` decides, by planted clocks: no step is timed here."""

from __future__ import annotations

import numpy as np
import pytest

from hpctrain.collectives.network import COMMON
from hpctrain.collectives.verifier import verify
from hpctrain.compress.prior import predicted, schedule
from hpctrain.compress.settings import CLOSE, HOPELESS, MARGIN, MORE, ROUNDS, Choice, Settings

TRAFFIC = {"dense": [100], "topk": [40], "oktopk": [30]}


def run(choice, clock, others=(), limit=60):
    """Steps until it is settled; the methods in order. `clock(name, step)`: seconds of a step.

    `others`: what other columns of the bucket have found.
    """
    seen = []
    while not choice.settled:
        assert len(seen) < limit
        name = choice.begin(len(seen))
        seen.append(name)
        if choice.timing:
            choice.end([clock(name, len(seen) - 1) + 5, clock(name, len(seen) - 1)])
        found = choice.found()
        if found is not None:
            choice.settle([found, *others])
    assert choice.begin(99) == choice.method
    return seen


def steady(times):
    return lambda name, step: times[name]


@pytest.mark.parametrize("best", TRAFFIC)
def test_the_quickest_stays_after_few_steps_in_turn(best):
    choice = Choice(Settings("auto", warmup_steps=3), TRAFFIC)
    seen = run(choice, steady({name: 1.0 if name == best else 2.0 for name in TRAFFIC}))
    assert seen == ["dense"] * 3 + ["dense", "topk", "oktopk"] * ROUNDS
    assert choice.method == best
    assert all(f"{name} " in choice.reason for name in TRAFFIC)


@pytest.mark.parametrize("disturbed", range(3 * ROUNDS))
def test_one_disturbed_step_decides_nothing(disturbed):
    """Whichever step takes a hundred times as long, or none of its time."""
    for factor in (100, 0.01):
        choice, times = (
            Choice(Settings("auto"), TRAFFIC),
            {"dense": 1.0, "topk": 0.8, "oktopk": 1.5},
        )
        run(choice, lambda name, step, t=times, f=factor: t[name] * (f if step == disturbed else 1))
        assert choice.method == "topk"


def test_what_is_close_is_tried_again():
    times = {"dense": 2.0, "topk": 1.0, "oktopk": CLOSE - 0.01}
    choice = Choice(Settings("auto"), TRAFFIC)
    seen = run(choice, steady(times))
    assert seen[3 * ROUNDS :] == ["topk", "oktopk"] * MORE
    assert choice.method == "topk"


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_a_few_per_cent_costs_a_few_per_cent(seed):
    rng = np.random.default_rng(seed)
    times = dict(zip(TRAFFIC, rng.uniform(0.5, 2, 3), strict=True))
    choice = Choice(Settings("auto"), TRAFFIC)
    run(choice, lambda name, step: times[name] * rng.uniform(1, 1.04))
    assert times[choice.method] <= 1.1 * min(times.values())


def test_the_slowest_column_decides_for_all():
    for others, best in ([], "topk"), ([{"dense": 1.0, "topk": 0.9, "oktopk": 0.75}], "oktopk"):
        choice = Choice(Settings("auto"), TRAFFIC)
        run(choice, steady({"dense": 1.0, "topk": 0.5, "oktopk": 0.7}), others)
        assert choice.method == best


def test_it_stays_dense_where_little_is_won():
    choice = Choice(Settings("auto"), TRAFFIC)
    run(choice, steady({"dense": 1.0, "topk": MARGIN + 0.01, "oktopk": 3.0}))
    assert choice.method == "dense"


def test_a_step_that_is_taken_back_is_tried_again():
    choice = Choice(Settings("auto"), TRAFFIC)
    for _ in range(2 * ROUNDS):
        assert choice.begin(0) == "dense"
        choice.end([1.0])
        choice.undo()
        assert choice.times == {"dense": []}


# the prior


def test_the_quickest_by_the_model_begins_and_both_times_are_told():
    choice = Choice(Settings("auto"), TRAFFIC, {"dense": 3e-3, "topk": 2e-3, "oktopk": 1e-3})
    seen = run(choice, steady({"dense": 4e-3, "topk": 5e-3, "oktopk": 2e-3}))
    assert seen[:4] == ["oktopk", "topk", "dense", "oktopk"]
    assert choice.reason == (
        "measured: dense 4 ms (predicted 3), topk 5 ms (predicted 2), oktopk 2 ms (predicted 1)"
    )


def test_what_is_hopeless_by_the_model_is_not_tried():
    choice = Choice(Settings("auto"), TRAFFIC, {"dense": 1e-3, "topk": 0.011, "oktopk": 1e-3})
    seen = run(choice, steady({"dense": 1.0, "oktopk": 0.5}))
    assert "topk" not in seen and len(seen) == 2 * ROUNDS
    assert choice.reason.endswith(
        f"; not tried: topk predicted to take 11 ms, over {HOPELESS} times a dense sum's"
    )
    choice = Choice(Settings("auto"), TRAFFIC, {"dense": 1e-3, "topk": 0.011, "oktopk": 0.012})
    assert run(choice, steady({})) == ["dense"]
    assert choice.reason.startswith("nothing else can win; not tried: topk")


@pytest.mark.parametrize("best", TRAFFIC)
@pytest.mark.parametrize("wrong", TRAFFIC)
@pytest.mark.parametrize("factor", [0.1, 1, 10])
def test_a_model_that_is_wrong_by_ten_still_ends_with_the_best_measured(best, wrong, factor):
    truth = {name: 1.0 if name == best else 1.3 for name in TRAFFIC}
    if best != "dense":
        truth["dense"] = 1.4
    told = {name: t * (0.98 * factor if name == wrong else 1) for name, t in truth.items()}
    choice = Choice(Settings("auto"), TRAFFIC, told)
    run(choice, steady(truth))
    assert choice.method == best


def test_what_sends_more_is_not_used_and_not_tried():
    choice = Choice(Settings("auto"), {"dense": [100], "topk": [100], "oktopk": [30]})
    assert run(choice, steady({"dense": 1.0, "oktopk": 3.0})) == ["dense", "oktopk"] * ROUNDS
    assert choice.method == "dense" and "topk sends no less than a dense sum" in choice.reason
    choice = Choice(Settings("topk", warmup_steps=1), {"dense": [100, 100], "topk": [150, 40]})
    assert [choice.begin(step) for step in range(3)] == ["dense", "topk", "topk"]
    assert "topk" not in choice.reason
    assert "40 bytes" in choice.reason


@pytest.mark.parametrize("cut", range(1, 3 * ROUNDS + 2 * MORE))
def test_trials_go_on_from_a_checkpoint(cut):
    clock = steady({"dense": 2.0, "topk": 1.0, "oktopk": 1.05})
    whole = Choice(Settings("auto"), TRAFFIC)
    expected, seen = run(whole, clock), []
    first, second = Choice(Settings("auto"), TRAFFIC), Choice(Settings("auto"), TRAFFIC)
    for step in range(cut):
        seen.append(first.begin(step))
        first.end([clock(seen[-1], step)])
        if first.found() is not None:
            first.settle([first.found()])
    second.restore(first.state())
    assert seen + run(second, clock) == expected
    assert (second.method, second.reason) == (whole.method, whole.reason)


def test_predictions_are_prices_of_verified_schedules_and_grow_with_bytes():
    traffic = {"dense": 8 * 9000 * 4 // 5, "topk": 4 * 700, "oktopk": 4 * 300}
    for name, received in traffic.items():
        made = schedule(name, 5, 9000, received)
        moved = verify(made)[0]
        assert moved.received == pytest.approx(received, rel=0.01)
    n, traffic = 1 << 20, {name: 100 * received for name, received in traffic.items()}
    found = predicted(COMMON, 5, n, 1, traffic)
    assert found.keys() == traffic.keys() and min(found.values()) > 0
    shared = predicted(COMMON, 5, n, 4, traffic)
    more = predicted(COMMON, 5, n, 1, {name: 4 * count for name, count in traffic.items()})
    for name in ("topk", "oktopk"):
        assert shared[name] > found[name] and more[name] > found[name]
    slow = 1 << 22
    assert (
        predicted(COMMON, 8, slow, 8, {"dense": 7 * slow, "topk": 7 * slow // 20})["topk"]
        < (predicted(COMMON, 8, slow, 8, {"dense": 7 * slow})["dense"])
    )
