"""The parts of training that need no ranks: tasks, the run folder, progress lines."""

import io
import json

import numpy as np
import pytest
from tested_device import DEVICE, get, variable
from training import make_digits

from hpctrain.autograd import Tape
from hpctrain.data import Batch, Loader, open_dataset, pack
from hpctrain.errors import DataError, UsageError
from hpctrain.sections import DataSection
from hpctrain.train import progress
from hpctrain.train.folder import RunFolder
from hpctrain.train.step import StepResult
from hpctrain.train.task import task_of


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_dataset(make_digits(tmp_path_factory.mktemp("digits") / "data"))


def batch_of(dataset, task, n=50):
    loader = Loader(dataset, "train", n, fields=task.fields)
    with loader.epoch(0) as batches:
        batch = next(batches)
    loader.close()
    return batch


def test_images_are_normalized_by_the_train_split(digits):
    task = task_of(DataSection(path="x"), digits, "float64")
    assert (task.outputs, task.sample_shape, task.classes) == (10, (8, 8), True)
    everything = batch_of(digits, task, digits.splits["train"])
    x = get(task.inputs(DEVICE, everything).value)
    assert abs(x.mean()) < 1e-12
    assert abs(x.std() - 1) < 1e-12


def test_columns_of_a_table_are_normalized_one_by_one(tmp_path):
    rng = np.random.default_rng()
    x = rng.standard_normal((500, 3)) * [1, 100, 0] + [5, 0, 7]
    fields = {"x": x, "y": x[:, :1] * 2}
    pack(fields, tmp_path / "d", roles={"y": "label"}, columns={"x": ["a", "b", "c"]})
    dataset = open_dataset(tmp_path / "d")
    task = task_of(DataSection(path="x", input="x", label="y"), dataset, "float64")
    assert not task.classes
    batch = batch_of(dataset, task, 500)
    found = get(task.inputs(DEVICE, batch).value)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(found.std(0), [1, 1, 0], atol=1e-9)
    losses, sums = task.loss(Tape(DEVICE), variable(np.zeros((500, 1))), batch)
    np.testing.assert_allclose(sums.loss, (batch.fields["y"] ** 2).sum())


def test_missing_numbers_count_as_the_mean(tmp_path):
    x = np.array([[1.0, 5.0], [3.0, np.nan]])
    pack({"x": x, "label": np.arange(2)}, tmp_path / "d", columns={"x": ["a", "b"]})
    dataset = open_dataset(tmp_path / "d")
    task = task_of(DataSection(path="x", input="x"), dataset, "float32")
    batch = batch_of(dataset, task, 2)
    found = get(task.inputs(DEVICE, batch).value)
    assert sorted(found.ravel().tolist()) == [-1, 0, 0, 1]


def test_labels_weights_and_their_sums(tmp_path):
    labels = np.array([0, 2, -100, 1], np.int32)
    weights = np.array([1, 0.5, 7, 2], np.float32)
    batch = Batch(
        0, 0, {"image": np.zeros((4, 2), np.float32), "label": labels, "w": weights},
        np.arange(4), np.array([0, 4]), 4,
    )  # fmt: skip
    fields = {"image": np.zeros((9, 2)), "label": np.arange(9) % 3, "w": np.ones(9)}
    pack(fields, tmp_path / "d", roles={"w": "weight"})
    section = DataSection(path="x", weight="w", normalize="none")
    task = task_of(section, open_dataset(tmp_path / "d"), "float32")
    _, sums = task.loss(Tape(DEVICE), variable(np.zeros((4, 3), np.float32)), batch)
    assert sums.weight == 3.5  # the ignored sample's weight does not count
    np.testing.assert_allclose(sums.loss, 3.5 * np.log(3), rtol=1e-6)
    labels[3] = 3
    with pytest.raises(DataError, match="'label' of sample 3 is 3; classes are 0 to 2"):
        task.loss(Tape(DEVICE), variable(np.zeros((4, 3), np.float32)), batch)


def test_a_field_that_is_not_there(digits):
    with pytest.raises(UsageError, match=r"data.label is 'lable'.*did you mean 'label'"):
        task_of(DataSection(path="x", label="lable"), digits, "float32")


def folder_with_steps(path):
    with RunFolder(path, writes=True) as folder:
        folder.open("a = 1\n", resume=False, overwrite=False)
        folder.record("start", step=0)
        for step in range(6):
            folder.record("step", step=step)
        folder.record("evaluation", step=5)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a run that was killed while it wrote
    return RunFolder(path, writes=True)


def test_resuming_drops_what_will_be_done_again(tmp_path):
    with folder_with_steps(tmp_path / "run") as folder:
        folder.open("a = 2\n", resume=True, overwrite=False)
        folder.forget_after(4)
        folder.record("step", step=4)
    text = (tmp_path / "run/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [0, 1, 2, 3, 4]
    assert "evaluation" not in {line["kind"] for line in lines}
    assert (tmp_path / "run/run.toml").read_text() == "a = 2\n"


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    with folder_with_steps(tmp_path / "run") as folder:
        with pytest.raises(UsageError, match="--resume auto.*--overwrite"):
            folder.open("", resume=False, overwrite=False)
        folder.open("", resume=False, overwrite=True)
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""


def test_a_failure_is_in_the_status(tmp_path):
    with pytest.raises(DataError), RunFolder(tmp_path / "run", writes=True) as folder:
        folder.open("", resume=False, overwrite=False)
        raise DataError("boom")
    status = json.loads((tmp_path / "run/STATUS.json").read_text())
    assert status["state"] == "failed"
    assert "boom" in status["error"]


def test_other_ranks_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", writes=False) as folder:
        folder.open("", resume=False, overwrite=False)
        folder.record("step", step=0)
        folder.status("running")
    assert not (tmp_path / "run").exists()


def test_progress_lines_come_now_and_then_and_at_the_end(monkeypatch):
    clock, out = iter(np.arange(0.0, 1000, 1)), io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stdout", out)
    with progress.Progress(0, 25, every=10, shown=True) as shown:
        for step in range(25):
            shown.step(step, StepResult(1.5, 0.25, 0.1, 1.0, 100), 0.5)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    assert "loss 1.5000  accuracy 25.0%  lr 1.00e-01  100 samples/s  data 50%" in lines[0]
    assert "left 0m15s" in lines[0]


def test_progress_of_other_ranks_is_silent(capsys):
    with progress.Progress(0, 1, every=0, shown=False) as silent:
        silent.step(0, StepResult(1.5, 0.25, 0.1, 1.0, 100), 0.5)
        silent.message("hello")
    assert capsys.readouterr().out == ""
