"""Event files for TensorBoard: the numbers of metrics.jsonl, no step twice; never the run's end."""

from __future__ import annotations

import struct
import sys
import types

import pytest
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.train.folder import RunFolder
from hpctrain.train.tensorboard import EventFiles


def scalars(folder):
    """Values by tag and step, as TensorBoard shows them: a file's start discards what is later."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found, raw = {}, []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
                raw.append((value.tag, event.step))
    return found, raw


@pytest.mark.slow
def test_the_numbers_of_a_run_that_was_killed_and_goes_on(tmp_path):
    pytest.importorskip("tensorboardX")
    file = run_file(tmp_path / "run.toml", make_digits(tmp_path / "data"))
    more = ("--set", "log.tensorboard=true", "--set", "checkpoint.every_steps=4")
    assert hpctrain(2, "train", file, *more, "--set", "run.epochs=2").returncode == 0
    (tmp_path / "run" / "DONE").unlink()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.rename(tmp_path / "gone")  # so that some steps are done again
    done = hpctrain(2, "train", file, *more, "--resume", "auto")
    assert done.returncode == 0, done.stdout
    found, raw = scalars(tmp_path / "run")
    losses = steps(tmp_path / "run")
    assert len(raw) > len(set(raw)), "nothing was done again"
    told = [found["loss/train", step] for step in range(len(losses))]
    assert told == pytest.approx(losses, rel=1e-6)
    for record in records(tmp_path / "run", "evaluation"):
        assert found["accuracy/test", record["step"]] == pytest.approx(record["accuracy"])
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert hpctrain(1, "train", file, "--overwrite", "--set", "run.steps=1").returncode == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def stand_in(monkeypatch, writer):
    """A package of the same interface."""
    package = types.ModuleType("tensorboardX")
    files = types.ModuleType("tensorboardX.event_file_writer")
    files.EventsWriter = writer
    proto = types.ModuleType("tensorboardX.proto")
    anything = lambda **fields: fields  # noqa: E731
    proto.event_pb2 = types.SimpleNamespace(Event=anything, SessionLog=Log)
    proto.summary_pb2 = types.SimpleNamespace(Summary=Summary)
    for module in (package, files, proto):
        monkeypatch.setitem(sys.modules, module.__name__, module)


class Log(dict):
    START = 1


class Summary(dict):
    Value = dict


class Failing:
    """Writes three events, then the disk is full."""

    def __init__(self, *where):
        self.left = 3

    def write_event(self, event):
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")

    def flush(self):
        pass

    def close(self):
        raise RuntimeError("cannot be closed")


def run_of(folder, count=5):
    """What training does with a run folder."""
    with RunFolder(folder, writes=True, events=True) as run:
        run.open("", resume=False, overwrite=False)
        run.record("start", step=0)
        for step in range(count):
            run.record("step", step=step, loss=1.0, samples=8, step_seconds=0.1)
        run.flush()
    assert len(records(folder, "step")) == count


def test_an_error_of_the_writer_is_one_warning(tmp_path, monkeypatch, caplog):
    stand_in(monkeypatch, Failing)
    run_of(tmp_path / "run")
    [warning] = caplog.messages
    assert "No space left on device" in warning


def test_a_missing_package_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    run_of(tmp_path / "run")
    [warning] = caplog.messages
    assert "pip install 'hpctrain[tensorboard]'" in warning


def test_an_unwritable_folder_is_one_warning(tmp_path, monkeypatch, caplog):
    stand_in(monkeypatch, Failing)
    (tmp_path / "tensorboard").write_text("a file")
    files = EventFiles(tmp_path)
    files.begin(0)
    files.write("step", {"step": 0, "loss": 1.0})
    files.close()
    [warning] = caplog.messages
    assert "FileExistsError" in warning


def test_values_that_are_no_numbers_are_left_out(tmp_path, monkeypatch, caplog):
    seen = []

    class Kept(Failing):
        def write_event(self, event):
            seen.append(event)

    stand_in(monkeypatch, Kept)
    files = EventFiles(tmp_path)
    files.begin(3)
    files.write("step", {"step": 3, "loss": float("nan"), "lr": 0.5, "grad_norm": None})
    files.write("balance", {"step": 3})
    assert [value["tag"] for value in seen[1]["summary"]["value"]] == ["lr"]
    assert len(seen) == 2 and seen[0]["step"] == 3 and not caplog.messages
