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
    assert checked.counts["svg"] == 7  # losses, test accuracy, speed, norm, rate, and the bars
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
    for values in ([1e-6, 5, 1e3], [-3, 4, 2], [7, 7, 7], [0, 0, 0]):
        text = chart("t", [Line("a", thinned(enumerate(values), 10), 0)], marks=[1, 99])
        [points] = re.findall(r'polyline points="([^"]+)"', text)
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 560 and 0 <= y <= 300
        assert text.count('class="mark"') == 1  # 99 is outside


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
