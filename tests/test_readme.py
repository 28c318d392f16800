"""A newcomer's first minutes: a fresh copy, tools/demo, and the README's commands in order."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
from checkout import copy_checkout
from launching import ROOT

# Nothing of the environment that the tests run in may reach the copy.
KEPT = {"PATH", "HOME", "LANG", "VIRTUAL_ENV", "SSL_CERT_FILE", "http_proxy", "https_proxy"}


def bash(script, folder):
    environment = {
        name: value for name, value in os.environ.items() if name in KEPT or name[:4] == "PIP_"
    }
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_newcomers_first_minutes(tmp_path):
    """Needs PyPI, as the demo does. One of the 364 test images is 0.27 points."""
    clone = copy_checkout(tmp_path / "hpctrain")

    first = bash("tools/demo", clone)
    again = bash("tools/demo", clone)

    accuracy = float(re.search(r"test accuracy: ([\d.]+)%", first)[1])
    assert accuracy >= 98
    assert "making the virtual environment" in first and "packing" in first
    assert "making" not in again and "installing" not in again and "packing" not in again

    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [commands] = [block for block in blocks if "tools/demo" not in block]
    text = bash(f"set -x\n{commands}", clone)
    assert "resuming at step 500 of 1380" in text and "test: 364 samples" in text
