"""The examples of the documentation run, on one rank and on two, with the same result."""

import re

import pytest
from launching import ROOT, mpirun


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_loop(ranks):
    done = mpirun(ranks, str(ROOT / "docs/own_loop.py"))
    assert done.returncode == 0, done.stdout
    offset, loss = map(float, re.findall(r"offset ([\d.]+), .* ([\d.]+),", done.stdout)[0])
    assert abs(offset - 3) < 0.02
    assert loss < 0.02
    assert f"{ranks} ranks" in done.stdout
