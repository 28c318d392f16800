"""Timelines: what is recorded, that the trace is one, and that the ranks' clocks agree in it."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict

import pytest
from launching import ROOT, mpirun
from shifted_run import AHEAD, RANK
from training import hpctrain, make_digits, run_file

from hpctrain import timeline
from hpctrain.cli.main import main
from hpctrain.errors import UsageError
from hpctrain.timeline import EVENT_BYTES, Recorder, mark, record, span
from hpctrain.train.timeline import steps_of
from hpctrain.train.timeline_arrows import matches
from hpctrain.train.timeline_trace import placed, read_parts, write_trace

FIELDS = {
    "X": {"pid", "tid", "ts", "dur", "name"},
    "M": {"pid", "tid", "name", "args"},
    "s": {"pid", "tid", "ts", "id", "name", "cat"},
    "f": {"pid", "tid", "ts", "id", "name", "cat", "bp"},
    "i": {"pid", "tid", "ts", "s", "name"},
}


def checked(path):
    """The trace, of which every rule of the format holds that a viewer relies on."""
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] in ("ms", "ns") and trace["otherData"]["note"]
    events = trace["traceEvents"]
    for event in events:
        assert FIELDS[event["ph"]] <= set(event), event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    hosts = {event["pid"] for event in events if event["name"] == "process_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xsf"} <= named
    assert {pid for pid, _ in named} <= hosts
    nested(events)
    flows(events)
    return trace


def nested(events):
    """Spans of a track lie inside one another or apart."""
    open_until = defaultdict(list)
    for event in (event for event in events if event["ph"] == "X"):
        track = open_until[event["pid"], event["tid"]]
        begin, end = (round(t * 1000) for t in (event["ts"], event["ts"] + event["dur"]))
        while track and track[-1] <= begin:
            track.pop()
        assert not track or end <= track[-1], event
        track.append(end)


def flows(events):
    """Every arrow has its two ends, in order, each inside a span of its track."""
    ends = {"s": {}, "f": {}}
    spans = defaultdict(list)
    for event in events:
        if event["ph"] in ends:
            assert ends[event["ph"]].setdefault(event["id"], event) is event
        elif event["ph"] == "X":
            spans[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert ends["s"].keys() == ends["f"].keys()
    for number, begin in ends["s"].items():
        assert begin["ts"] <= ends["f"][number]["ts"]
        for end in (begin, ends["f"][number]):
            inside = spans[end["pid"], end["tid"]]
            assert any(a - 1e-3 <= end["ts"] <= b + 1e-3 for a, b in inside), end


def test_four_ranks_on_one_clock_though_one_of_them_is_ahead(tmp_path):
    data = make_digits(tmp_path / "data")
    file = run_file(tmp_path / "run.toml", data, more="[checkpoint]\nevery_steps = 3\n")
    more = ("--set", "parallel.reduction=messages", "--set", "parallel.overlap=on")
    script = str(ROOT / "tests" / "shifted_run.py")
    command = ("train", str(file), "--timeline", "all", "--set", "run.steps=6", *more)
    done = mpirun(4, script, *command, timeout=60)
    assert done.returncode == 0, done.stdout
    out = tmp_path / "trace.json"
    assert main(["report", str(tmp_path / "run"), "--timeline", str(out)]) == 0
    trace = checked(out)
    [facts] = trace["otherData"]["starts"]
    assert facts["drift_corrected"] and not facts["dropped"] and not facts["missing_ranks"]
    assert facts["clock_ahead_us"][str(RANK)] > AHEAD * 1e6
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert out.stat().st_size < EVENT_BYTES * len(spans)

    names = Counter(event["name"] for event in spans)
    for name in ("step", "forward", "backward", "update", "reduce bucket", "gather bucket"):
        assert names[name] == 4 * 6, name
    for name in ("wait for data", "read", "evaluate", "checkpoint stage", "checkpoint write"):
        assert names[name], name
    exchanges = Counter(
        json.dumps(event["args"], sort_keys=True) for event in spans if "bucket" in event["name"]
    )
    assert len(exchanges) == 6 and set(exchanges.values()) == {2 * 4}, exchanges
    tracks = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    kinds = ("compute", "communication", "data", "checkpoint")
    assert {f"rank {rank} {kind}" for rank in range(4) for kind in kinds} <= tracks

    [parts] = read_parts(tmp_path / "run")
    slack = 2e9 * max(part.error for part in parts)
    pairs = matches(placed(parts, 0, []))
    assert sum(pair.name == "message" for pair in pairs) == names["Isend"] > 0
    assert min(pair.end - pair.begin for pair in pairs) >= -slack
    for part in parts:  # as they would be without
        part.header["clock"][1], part.trailer = 0.0, {}
    pairs = matches(placed(parts, 0, []))
    assert min(pair.end - pair.begin for pair in pairs) < -0.8 * AHEAD * 1e9


@pytest.mark.slow
def test_a_part_of_a_run_two_starts_and_the_cap(tmp_path, capsys):
    """Every start stays; what is beyond the cap is counted, and said."""
    file = run_file(tmp_path / "run.toml", make_digits(tmp_path / "data"))
    run = tmp_path / "run"
    assert hpctrain(2, "train", file, "--set", "run.steps=8", "--timeline", "2:4").returncode == 0
    [parts] = read_parts(run)
    steps = [e.facts["step"] for part in parts for e in part.events if e.name == "step"]
    assert steps == [2, 3, 2, 3]
    go_on = ("--resume", "auto", "--set", "run.steps=300")
    more = ("--timeline", "all", "--set", "log.timeline_mb=1")
    done = hpctrain(2, "train", file, *go_on, *more)
    assert done.returncode == 0, done.stdout
    out = tmp_path / "trace.json"
    assert main(["report", str(run), "--timeline", str(out)]) == 0
    trace = checked(out)
    _, second = trace["otherData"]["starts"]
    assert set(second["dropped"]) == {"0", "1"} and second["dropped"]["0"]["from_step"] > 8
    assert "events left out from step" in capsys.readouterr().out
    assert out.stat().st_size < 1.2e6
    shutil.rmtree(run / "timeline")
    with pytest.raises(UsageError, match="holds no timeline"):
        read_parts(run)


def part(folder, rank=0, limit=100, ranks=2):
    """A recorder of a start at step 0, whose clock is as rank 0's."""
    header = {"rank": rank, "ranks": ranks, "host": "a", "version": "1", "from_step": 0}
    header |= {"device": "cpu", "steps": "all", "wall": 1e9, "clock": [0.0, 0.0, 0.0]}
    return Recorder(folder / "timeline/step_00000000" / f"rank_{rank:05d}.jsonl", header, limit)


def test_what_is_beyond_the_limit_is_counted(tmp_path):
    recorder = part(tmp_path, limit=5, ranks=1)
    record(recorder)
    try:
        for step in range(4):
            recorder.at_step(step, inside=True)
            with span("step", step=step), span("forward"):
                pass
        mark("stop", by="me")
    finally:
        record(None)
    with span("after"):
        pass
    recorder.close({"clock": [1.0, 0.0, 0.0]})
    told = write_trace(read_parts(tmp_path), tmp_path / "trace.json")
    checked(tmp_path / "trace.json")
    assert told.events == 5
    assert told.facts["starts"][0]["dropped"] == {0: {"events": 4, "from_step": 2}}


def test_a_killed_rank_leaves_what_it_has_written(tmp_path):
    for rank in range(2):
        recorder = part(tmp_path, rank, ranks=3)
        recorder.call("Allgather", "0-1 (1)", 7, {"bytes": 8}, 1.0 + rank, 3.0)
        recorder.flush()
    file = tmp_path / "timeline/step_00000000/rank_00001.jsonl"
    file.write_text(file.read_text() + '["MainThread",1,"st')
    told = write_trace(read_parts(tmp_path), tmp_path / "trace.json")
    trace = checked(tmp_path / "trace.json")
    [facts] = told.facts["starts"]
    assert facts["missing_ranks"] == [2] and facts["ended_early"] == [0, 1]
    assert not facts["drift_corrected"]
    [arrow] = [event for event in trace["traceEvents"] if event["ph"] == "s"]
    assert (arrow["name"], arrow["tid"], arrow["ts"]) == ("last to come", 64, 1e6)


def test_threads_at_work_at_the_same_time_have_tracks_of_their_own(tmp_path):
    recorder = part(tmp_path, ranks=1)
    lines = [
        ["checkpoint", ident, "write", at, at + 10, {}] for ident, at in ((1, 0), (2, 5), (3, 20))
    ]
    recorder._write(lines, "a")
    write_trace(read_parts(tmp_path), tmp_path / "trace.json")
    trace = checked(tmp_path / "trace.json")
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert names == ["rank 0 checkpoint", "rank 0 checkpoint 2"]


def test_a_file_that_cannot_be_written_ends_the_recording_only(tmp_path, caplog):
    (tmp_path / "timeline").write_text("a file")
    recorder = part(tmp_path)
    for step in range(3):
        recorder.at_step(step, inside=True)
        recorder.add("x", 0.0, 1.0, {})
    recorder.close({})
    assert caplog.text.count("the timeline ends here") == 1 and not recorder.active


def test_nothing_is_kept_where_nothing_records():
    assert timeline._recorder is None
    assert span("a") is span("b", bucket=1)


@pytest.mark.parametrize("text", ["5", "7:7", "9:3", "a:b", "1:2:3", "all:"])
def test_steps_that_cannot_be(text):
    with pytest.raises(UsageError, match="FIRST:STOP"):
        steps_of(text)


def test_steps_that_can_be():
    assert not steps_of("") and 10**9 in steps_of("all")
    assert list(steps_of("3:6")) == [3, 4, 5] and 2 in steps_of(":3") and 3 not in steps_of(":3")
