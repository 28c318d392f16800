"""A run does not know how many ranks it has, nor on which nodes they are."""

import json

import numpy as np
import pytest
from launching import ROOT, mpirun
from training import make_digits, run_file

PLACES = [(1, ""), (2, ""), (3, ""), (4, ""), (4, "2x2"), (4, "3+1")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data")


def run(file, ranks, nodes, count, *overrides):
    script = str(ROOT / "tests" / "training_run.py")
    done = mpirun(
        ranks, script, str(file), str(count), *overrides, env={"HPCTRAIN_TOPOLOGY": nodes or None}
    )
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_same_samples_and_losses_on_any_ranks_and_nodes(tmp_path, data, model):
    """float64: the samples exactly, the losses of 50 steps within 1e-9."""
    file = run_file(tmp_path / "run.toml", data, model)
    first, *others = (run(file, ranks, nodes, 50) for ranks, nodes in PLACES)
    assert first["loss"][-1] < 0.97 * first["loss"][0]
    for place, other in zip(PLACES[1:], others, strict=True):
        assert other["samples"] == first["samples"], place
        np.testing.assert_allclose(other["loss"], first["loss"], rtol=1e-9, err_msg=str(place))
        assert other["accuracy"] == first["accuracy"]
        assert other["evaluated"] == first["evaluated"]


def test_float32_begins_the_same_and_ends_as_good(tmp_path):
    """The first losses within 1e-5; the accuracy over 450 images within half a point."""
    data = make_digits(tmp_path / "data", samples=1797)
    file = run_file(tmp_path / "run.toml", data, "mlp")
    settings = ("run.dtype=float32", "optimizer.lr=0.03", "model.dropout=0.1")
    runs = [run(file, ranks, "", 600, *settings) for ranks in (1, 3)]
    losses = np.array([one["loss"][:5] for one in runs])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    accuracies = [one["accuracy"] for one in runs]
    assert min(accuracies) > 0.9
    assert abs(accuracies[0] - accuracies[1]) <= 0.005


@pytest.mark.parametrize("reduction", ["messages", "allreduce"])
def test_every_reduction_gives_the_same_run(tmp_path, data, reduction):
    file = run_file(tmp_path / "run.toml", data, "mlp")
    shared = run(file, 2, "", 20, "parallel.reduction=auto")
    other = run(file, 3, "", 20, f"parallel.reduction={reduction}")
    np.testing.assert_allclose(other["loss"], shared["loss"], rtol=1e-9)


def test_statistics_of_the_whole_step_do_not_depend_on_microbatches(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, "convnet")
    whole = ("model.batch_statistics=step", "model.dropout=0")
    one = run(file, 1, "", 10, *whole, "batch.microbatch=40")
    three = run(file, 3, "", 10, *whole, "batch.microbatch=7")
    np.testing.assert_allclose(three["loss"], one["loss"], rtol=1e-9)


def test_more_ranks_than_microbatches(tmp_path, data):
    """Ranks without samples take part all the same."""
    file = run_file(tmp_path / "run.toml", data, "mlp")
    sizes = ("batch.size=12", "batch.microbatch=6")
    one, four = run(file, 1, "", 30, *sizes), run(file, 4, "", 30, *sizes)
    assert four["samples"] == one["samples"]
    np.testing.assert_allclose(four["loss"], one["loss"], rtol=1e-9)
