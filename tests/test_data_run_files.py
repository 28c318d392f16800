"""[data] of a run file: orders, views, changes, node cache and staging, as a run uses them."""

from __future__ import annotations

import numpy as np
import pytest
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.data import Loader, Patches, Ragged, Windows, open_dataset, pack
from hpctrain.device import open_device
from hpctrain.errors import UsageError
from hpctrain.sections import DataSection
from hpctrain.train.task import task_of


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "set", 200)


def trained(folder, digits, ranks, *settings):
    """The losses of a run's steps, and its records about the loader."""
    folder.mkdir()
    file = run_file(folder / "run.toml", digits)
    options = [word for setting in settings for word in ("--set", setting)]
    done = hpctrain(ranks, "train", file, *options, timeout=180)
    assert done.returncode == 0, done.stdout
    return steps(folder / "run"), records(folder / "run", "data")


def test_caches_and_staging_change_nothing_but_who_reads(digits, tmp_path):
    """Blocks of 1 KiB: 1 MiB keeps all; a cache of the node too; windows are the order's."""
    alone, data = trained(tmp_path / "alone", digits, 1, "data.window=3", "data.flip=true")
    more = ["data.window=3", "data.flip=true", "data.node_cache_mib=1", f"data.stage={tmp_path}"]
    shared, cached = trained(tmp_path / "shared", digits, 2, *more)
    np.testing.assert_allclose(shared, alone, rtol=1e-6)
    assert len(data) == len(cached) == 3
    assert data[0]["bytes_read"] > 0 and data[0]["read_amplification"] > 0
    assert cached[0]["bytes_read"] == 0 and cached[0]["hit_rate"] == 1  # it was all read before
    assert 0 <= data[0]["wait_fraction"] <= 1
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1  # the copy


@pytest.mark.slow
def test_orders_of_run_files(digits, tmp_path):
    found = [
        trained(tmp_path / order, digits, 1, f"data.order={order}-v1", "run.epochs=1")[0]
        for order in ("blockwin", "stratified", "balanced")
    ]
    assert len({tuple(losses) for losses in found}) == 3


def section(**values):
    return DataSection(path="set", **values)


def batch_and_task(dataset, wanted):
    task = task_of(wanted, dataset, "float64")
    loader = Loader(dataset, "train", 8, fields=task.fields, view=task.view)
    return next(iter(loader.epoch(0))), task


def test_text_is_given_as_zeros_and_ones(tmp_path):
    text = [np.arange(1, 200, dtype=np.uint8) for _ in range(3)]
    pack({"text": Ragged.of(text)}, tmp_path, tokens={"text": 256})
    dataset = open_dataset(tmp_path)
    batch, task = batch_and_task(dataset, section(input="text", text_window=5))
    assert task.view == Windows("text", 5) and task.outputs == 256 and task.sample_shape == (5, 256)
    device = open_device("cpu")
    x = device.to_host(task.inputs(device, batch).value)
    assert x.shape == (8, 5, 256) and (x.sum(2) == 1).all()
    np.testing.assert_array_equal(x.argmax(2), batch.fields["text"][:, :5])
    np.testing.assert_array_equal(task._labels(batch), batch.fields["text"][:, 5])


def test_patches_have_the_label_of_their_middle(tmp_path):
    grid = np.arange(2 * 6 * 7, dtype=np.uint8).reshape(2, 6, 7)
    pack({"v": grid, "region": grid}, tmp_path, roles={"region": "label"}, shuffle=False)
    dataset = open_dataset(tmp_path)
    wanted = section(input="v", label="region", patch=(3, 3), patch_stride=(1, 1), normalize="none")
    batch, task = batch_and_task(dataset, wanted)
    assert task.view == Patches((3, 3), (1, 1)) and task.outputs == 84
    assert task.sample_shape == (3, 3)
    np.testing.assert_array_equal(task._labels(batch), batch.fields["v"][:, 1, 1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"input": "x", "text_window": 4}, "one ragged field"),
        ({"input": "text", "text_window": 1000}, "256,000 inputs, more than 65,536"),
        ({"input": "text"}, "text_window"),
        ({"input": "x", "patch": (2, 2)}, "label of 2 dims"),
        ({"input": "x", "flip": True}, "for images"),
        ({"input": "texts", "text_window": 4}, "did you mean"),
    ],
)
def test_refuses(tmp_path, values, says):
    fields = {
        "text": Ragged.of([np.ones(9, np.uint8)] * 4),
        "x": np.ones((4, 3)),
        "label": [0, 1] * 2,
    }
    pack(fields, tmp_path, tokens={"text": 256})
    with pytest.raises(UsageError, match=says):
        task_of(section(**values), open_dataset(tmp_path), "float32")
