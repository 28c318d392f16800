"""Which algorithm carries the buckets of a run between nodes: picked, said and named."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from training import hpctrain, make_digits, records, run_file

from hpctrain.collectives.network import COMMON, save_network


@pytest.mark.slow
def test_a_run_picks_by_its_network_and_says_so(tmp_path):
    """Where every message takes a tenth of a second four nodes halve; the losses stay the same."""
    data = make_digits(tmp_path / "data", 320)
    slow = msgspec.structs.replace(COMMON.between, message_seconds=0.1)
    save_network(tmp_path / "slow.toml", msgspec.structs.replace(COMMON, between=slow))
    found = {}
    for name in ("direct", "auto", "halving", "ring"):
        (tmp_path / name).mkdir()
        file = run_file(tmp_path / name / "run.toml", data)
        options = [f"parallel.algorithm={name}", f"parallel.network={tmp_path / 'slow.toml'}"]
        done = hpctrain(
            4, "train", file, "--set", "run.steps=6",
            *(part for option in options for part in ("--set", option)),
            timeout=120, HPCTRAIN_TOPOLOGY="4x1",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        [start] = records(tmp_path / name / "run", "start")
        assert {row["algorithm"] for row in start["between_nodes"]} == {
            "halving" if name == "auto" else name
        }
        assert ("by halving (direct " in done.stdout) == (name == "auto")
        assert f'algorithm = "{name}"' in (tmp_path / name / "run/run.toml").read_text()
        found[name] = [row["loss"] for row in records(tmp_path / name / "run", "step")]
    assert found["auto"] == found["halving"]
    for name in ("halving", "ring"):
        np.testing.assert_allclose(found[name], found["direct"], rtol=1e-9)
