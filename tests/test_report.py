"""`hpctrain report`: what a run wrote down, as one page that stands alone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from training import hpctrain, make_digits, run_file

from hpctrain.cli.main import main
from hpctrain.errors import UsageError
from hpctrain.train.report import read_run, thinned
from hpctrain.train.report_page import page
from hpctrain.train.report_plot import Line, chart, ticks

TOML = '[run]\nepochs = {epochs}\n[optimizer]\nname = "sgd"\nlr = {lr}\n'


def written(folder, count=300, lr=0.1, restart=None):
    """A run folder with records as training writes them."""
    folder.mkdir()
    lines = []
    for step in range(count):
        if step in (0, restart):
            facts = {"step": step, "total_steps": count, "ranks": 2 + bool(step), "nodes": 1}
            if step:
                facts |= {"again": 7, "again_seconds": 6.5, "last_time": 1e9 + step - 0.9}
            lines.append({"kind": "start", **facts, "device": "cpu", "time": 1e9 + step})
        seconds = {"data_seconds": 0.1, "step_seconds": 0.9, "message_seconds": 0.4}
        values = {"loss": 2.0 / (step + 1), "accuracy": math.nan, "lr": lr, "grad_norm": 1.0}
        lines.append({"kind": "step", "step": step, "samples": 50, **values, **seconds})
        lines[-1]["time"] = 1e9 + step + 0.5
        if restart and step == restart - 1:
            lines.append({"kind": "checkpoint", "step": step, "seconds": 2.0})
            stop = {"kind": "stop", "step": step, "reason": "a signal"}
            lines.append({**stop, "time": 1e9 + step + 0.6})
        if step % 100 == 99:
            result = {"loss": 1 / step, "accuracy": 0.9, "seconds": 3.0}
            lines.append({"kind": "evaluation", "step": step, **result})
    slow = {"rank": 1, "host": "b<2>", "phase": "data", "extra": 0.2, "ratio": 1.4}
    each = {"hosts": ["a", "b<2>"], "seconds": [[30, 5, 1, 14], [30, 15, 1, 4]]}
    if count:
        balance = {"kind": "balance", "step": count - 1, "steps": 50, "slowest": [slow]}
        lines.append(balance | each)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "step", "st')  # was killed
    (folder / "STATUS.json").write_text('{"state": "finished"}')
    (folder / "run.toml").write_text(TOML.format(epochs=3, lr=lr))
    return folder


class Checked(HTMLParser):
    """Fails where elements are not closed in order, or something is to be fetched."""

    VOID = {"meta", "br", "line", "rect", "circle", "polyline", "polygon"}

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.words = [], {}, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href", "srcset"} & {name for name, _ in attributes}
        assert tag not in {"script", "link", "img", "iframe"}
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID or tag in {"rect", "circle"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_about_two_runs(tmp_path, capsys):
    one = written(tmp_path / "one", restart=120)
    two = written(tmp_path / "two & <b>", lr=0.2)
    assert main(["report", str(one), str(two)]) == 0
    text = (one / "report.html").read_text()
    assert "report.html: " in capsys.readouterr().out
    assert "http:" not in text and "https:" not in text and "url(" not in text
    checked = Checked(text)
    words = " ".join(checked.words)
    assert "300 of 300" in words and "two & <b>" in words
    assert "optimizer.lr" in words and "run.epochs" not in words.split("run.toml")[0]
    assert "stopped by a signal" in words and "2 then 3" in words
    # losses, test accuracy, speed, norm, rate; time by phase; share in messages; ranks of two runs
    assert checked.counts["svg"] == 6 + 1 + 1 + 2
    for told in ("rank 1, b<2>", "1.40", "all ranks", "400 ms", "900 ms", "6.5 s"):
        assert told in words, told
    assert 'class="mark"' in text
    out = tmp_path / "two.html"
    assert main(["report", str(two), "--out", str(out)]) == 0
    assert 'class="mark"' not in out.read_text()


def test_what_is_computed_from_the_records(tmp_path):
    run = read_run(written(tmp_path / "run", restart=120))
    assert [len(run.starts), len(run.steps), len(run.evaluations)] == [2, 300, 3]
    phases = run.phases()
    wanted = {"compute": 150, "messages": 120, "data": 30, "checkpoints": 2, "evaluation": 9}
    assert phases == pytest.approx(wanted)
    np.testing.assert_allclose(run.throughput().values, 50)
    assert run.endings() == ["stopped by a signal", "finished"]
    assert len(run.curve("accuracy").steps) == 0  # nan for a regression
    assert run.last(run.evaluations, "loss") == pytest.approx(1 / 299)


def test_restarts_and_ranks(tmp_path):
    run = read_run(written(tmp_path / "run", restart=120))
    [restart] = run.restarts()
    assert (restart.step, restart.again, restart.ending) == (120, 7, "stopped by a signal")
    # The first step ended at 120.5 and took 0.9 s; the last sign of before was at 119.1.
    assert restart.pause == pytest.approx(120.5 - 0.9 - 119.1)
    assert restart.lost == pytest.approx(restart.pause + 6.5)
    assert run.ranks() == [
        (0, "a", {"compute": 0.6, "messages": 0.28, "data": 0.1, "checkpoints": 0.02}),
        (1, "b<2>", {"compute": 0.6, "messages": 0.08, "data": 0.3, "checkpoints": 0.02}),
    ]
    np.testing.assert_allclose(run.share("message_seconds").values, 0.4 / 0.9)


def test_of_many_ranks_the_slowest_are_shown(tmp_path):
    folder = written(tmp_path / "run", 3)
    seconds = [[10 + (rank == 70), 1, 0, 2] for rank in range(100)]
    slow = {"rank": 70, "host": "h", "phase": "compute", "extra": 0.1, "ratio": 1.1}
    record = {"kind": "balance", "step": 2, "steps": 10, "slowest": [slow] * 2000}
    with (folder / "metrics.jsonl").open("a") as file:
        print(file=file)
        print(json.dumps(record | {"hosts": ["h"] * 100, "seconds": seconds}), file=file)
    text = page([read_run(folder)])
    words = " ".join(Checked(text).words)
    assert "the newest 30 of 2001 lines" in words and len(text) < 100_000
    assert "the 16 slowest of 100 ranks" in words and "rank 70, h" in words


def test_thinning_keeps_means_and_extremes():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(1003)
    curve = thinned(enumerate(values), 100)
    assert len(curve.steps) <= 100
    assert curve.low.min() == values.min() and curve.high.max() == values.max()
    np.testing.assert_allclose(curve.values[0], values[:11].mean())
    np.testing.assert_allclose(curve.values[-1], values[1001:].mean())
    whole = thinned(enumerate(values[:100]), 100)
    np.testing.assert_array_equal(whole.values, values[:100])


def test_ten_thousand_steps_are_a_small_page(tmp_path):
    text = page([read_run(written(tmp_path / "run", 10_000))])
    assert len(text) < 1_000_000
    Checked(text)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_that_has_just_begun(tmp_path, count):
    folder = written(tmp_path / "run", count)
    (folder / "STATUS.json").unlink()
    Checked(page([read_run(folder)]))


def test_round_numbers():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.41) == pytest.approx([0.2, 0.3, 0.4])
    assert ticks(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert ticks(3, 3) == [3]


def test_points_lie_inside_the_chart():
    for values in ([1e-6, 5, 1e3], [-3, 4, 2], [7, 7, 7], [0, 0, 0], [0.1, 0.1 + 1e-16, 0.1]):
        text = chart("t", [Line("a", thinned(enumerate(values), 10), 0)], marks=[1, 99])
        [points] = re.findall(r'polyline points="([^"]+)"', text)
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 560 and 0 <= y <= 300
        assert text.count('class="mark"') == 1  # 99 is outside
    heights = {point.split(",")[1] for point in points.split()}
    assert len(heights) == 1, "rounding is not to be seen"


def test_no_run_folder(tmp_path):
    with pytest.raises(UsageError, match="is not a run folder"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 2


def test_a_real_run_has_everything(tmp_path):
    data = make_digits(tmp_path / "data")
    file = run_file(tmp_path / "run.toml", data)
    assert hpctrain(2, "train", file, "--set", "run.epochs=1").returncode == 0
    run = read_run(tmp_path / "run")
    assert all(seconds > 0 for seconds in run.phases().values()), run.phases()
    text = page([run])
    for words in ("samples per second", "test accuracy", run.starts[0]["mpi"]):
        assert words in text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_without_a_network_shows_it(tmp_path):
    """Without the curves the picture is a much smaller file."""
    runs = [read_run(written(tmp_path / name, lr=lr)) for name, lr in (("a", 0.1), ("b", 0.2))]
    text = page(runs)
    sizes = [
        shot(tmp_path, text),
        shot(tmp_path, text.replace("<svg", "<svg style='visibility: hidden'")),
    ]
    assert sizes[0] > 1.3 * sizes[1] > 10_000


def shot(place, text):
    """The size of a screenshot."""
    (place / "page.html").write_text(text)
    picture = place / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
    command += [f"--screenshot={picture}", f"file://{place}/page.html"]
    subprocess.run(["unshare", "-rn", *command], check=True, timeout=60, capture_output=True)
    return picture.stat().st_size
