"""state.json: what it holds, that one changed byte is found, and which folders are checkpoints."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from checkpoint_cases import ALONE, NAMES, Run, save_alone

from hpctrain.checkpoint import describe, save
from hpctrain.checkpoint.record import Record, checkpoints, parse_record, read_record
from hpctrain.errors import CheckpointError


def test_it_names_every_byte(tmp_path):
    path = save_alone(tmp_path, 7)
    assert {file.name for file in path.iterdir()} == NAMES
    written = json.loads((path / "state.json").read_text())
    assert (written["format"], written["version"]) == ("hpctrain checkpoint", 1)
    assert (written["step"], written["state"], written["dtypes"]) == (7, {"at": 7}, ["float32"])
    for name, size in written["files"].items():
        content = (path / name).read_bytes()
        assert len(content) == size
        pieces = [piece for piece in written["pieces"] if piece["file"] == name]
        assert pieces[0]["start"] == 0 and pieces[-1]["stop"] == size
        for piece in pieces:
            block = content[piece["start"] : piece["stop"]]
            assert hashlib.sha256(block).hexdigest() == piece["sha256"]


def test_every_changed_byte_is_found(tmp_path):
    path = save_alone(tmp_path, 7)
    text = (path / "state.json").read_bytes()
    record = read_record(path)
    unnoticed = 0
    for position in range(len(text)):
        changed = bytearray(text)
        changed[position] ^= 0x04
        try:
            assert parse_record(bytes(changed)) == record  # only white space differs
            unnoticed += 1
        except CheckpointError:
            pass
    assert unnoticed == 0  # no white space turns into other white space by this bit
    for length in range(0, len(text), 7):
        with pytest.raises(CheckpointError):
            parse_record(text[:length])


def signed(**changes):
    body = json.loads(Record(1, {}, [], {}, []).encode()) | changes
    body.pop("sha256")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()} | body).encode()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"version": 2}, "version 2; this hpctrain reads 'hpctrain checkpoint' version 1"),
        ({"format": "other"}, "is 'other' version 1"),
        ({"step": "1"}, r"damaged \(Expected `int`"),
        ({"files": {"a": 4}}, "do not cover all files"),
        ({"pieces": [{"file": "a", "start": 0, "stop": 4, "sha256": ""}]}, "'a' do not join"),
    ],
)
def test_contents_that_make_no_sense_are_refused(changes, reason):
    assert parse_record(signed()).step == 1
    with pytest.raises(CheckpointError, match=reason):
        parse_record(signed(**changes))


@pytest.mark.parametrize(
    "state, reason",
    [
        ({"a": (1, 2)}, "'a' would be read back changed"),
        ({1: 2}, "1 would be read back changed"),
        ({"a": {"b": {3: 4}}}, "'a' would be read back changed"),
        ({"a": math.nan}, "Out of range float values"),
        ({"a": np.float32(1)}, "not JSON serializable"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path, state, reason):
    run = Run()
    with pytest.raises(CheckpointError, match=reason):
        save(tmp_path / "new", 1, run.saved(1, run.whole()), state, ALONE)
    assert not (tmp_path / "new").exists()


def test_state_comes_back_exactly(tmp_path):
    run = Run()
    state = {"seed": 2**127 + 1, "lr": 0.1, "text": "é\n", "list": [None, True, -0.0, 1e-310]}
    path = save(tmp_path, 1, run.saved(1, run.whole()), state, ALONE)
    found = describe(path)
    assert found.state == state and repr(found.state) == repr(state)
    assert found.step == 1 and found.files.keys() == NAMES - {"state.json"}
    assert found.tensors["optimizer.safetensors"]["momentum.fc.weight"].kind == "float32 (7, 5)"


def test_newest_first_by_number(tmp_path):
    names = ["step_00000009", "step_00000010", "step_123456789", ".replaced-step_00000010"]
    others = [".tmp-step_00000011", "step_12", "step_0000001x", "latest", "x_step_00000001"]
    for name in names + others:
        (tmp_path / name).mkdir()
    order = ["step_123456789", "step_00000010", ".replaced-step_00000010", "step_00000009"]
    assert [path.name for path in checkpoints(tmp_path)] == order
    assert checkpoints(tmp_path / "none") == []
