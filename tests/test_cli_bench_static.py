"""`hpctrain bench kernels --static` and `--traffic`: their figures, and what they refuse."""

from __future__ import annotations

import argparse
import json

import pytest

from hpctrain.cli import bench
from hpctrain.device import nvrtc
from hpctrain.errors import KernelError, UsageError


def run(*args):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["bench", "kernels", *args])
    return parsed.run(parsed)


def test_static_figures(capsys):
    try:
        nvrtc.compiler_for("sm_90")
    except KernelError as error:
        pytest.skip(str(error))
    assert run("--static", "--arch", "sm_90", "--only", "sgd,gelu_forward", "--json", "-") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["block"] == 256
    rows = {row["kernel"]: row for row in figures["kernels"]}
    assert list(rows) == ["gelu_forward", "sgd"]
    assert rows["sgd"]["spills"] == 0 and 0.5 <= rows["sgd"]["occupancy"] <= 1
    assert rows["sgd"]["architecture"] == "sm_90" and rows["sgd"]["dtype"] == "float32"


def test_traffic_figures(capsys):
    assert run("--traffic", "--only", "add", "--dtype", "float64") == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["add", "32768", "786,432"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--static", "--arch", "sm_91"], "'sm_91'.*'sm_90'"),
        (["--static", "--only", "gelu_forwards"], "did you mean 'gelu_forward'"),
        (["--traffic", "--only", "gelu_forwards"], "did you mean 'gelu_forward'"),
    ],
)
def test_unknown_names(args, message):
    with pytest.raises(UsageError, match=message):
        run(*args)


def test_one_of_the_two():
    with pytest.raises(SystemExit):
        run("--static", "--traffic")
