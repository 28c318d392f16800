"""Slow ranks are named, worst first, and only where it is worth a line."""

from __future__ import annotations

import json

import pytest

from hpctrain.train import balance
from hpctrain.train.balance import Balance, slowest
from hpctrain.train.folder import RunFolder


def test_the_worst_come_first_with_host_and_phase():
    seconds = [[1.0, 0.1, 0.0] for _ in range(8)]
    seconds[5] = [1.0, 0.9, 0.0]
    seconds[2] = [2.5, 0.1, 0.0]
    seconds[7] = [1.0, 0.1, 0.05]
    found = slowest([f"n{rank // 2}" for rank in range(8)], seconds, steps=10)
    assert [(slow.rank, slow.host, slow.phase) for slow in found] == [
        (2, "n1", "compute"),
        (5, "n2", "data"),
    ]
    assert found[0].extra == pytest.approx(0.15) and found[0].ratio == pytest.approx(2.6 / 1.1)


def test_equal_ranks_and_one_rank_are_not_worth_a_line():
    assert not slowest(["a"], [[1.0, 0.0, 0.0]], 1)
    assert not slowest(["a", "b"], [[0.0, 0.0, 0.0]] * 2, 1)
    assert not slowest(["a", "b", "c"], [[1.0, 0.0, 0.0], [1.05, 0.0, 0.0], [0.9, 0.0, 0.0]], 1)


@pytest.mark.ranks(1, 3)
def test_rank_0_asks_and_all_answer(comm, tmp_path, monkeypatch):
    monkeypatch.setattr(balance, "FIRST", 0.0)

    class Shown(list):
        message = list.append

    shown = Shown()
    with RunFolder(tmp_path / "run", writes=comm.rank == 0) as folder:
        folder.open("", resume=False, overwrite=False)
        compare = Balance(comm, comm.rank == 0)
        assert compare.wants() == (comm.rank == 0)
        compare.agree(1.0, 0, folder, shown)  # nothing was counted
        for _ in range(4):
            compare.count(1.0 + comm.rank, 0.5, 0.0)
        compare.agree(0.0, 3, folder, shown)
        compare.agree(comm.allreduce(compare.wants()), 3, folder, shown)
        assert compare.wants() == 0.0
    if comm.rank == 0:
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        [record] = [json.loads(line) for line in lines]
        assert (record["kind"], record["step"], record["steps"]) == ("balance", 3, 4)
        assert record["median"] == {"compute": (comm.size + 1) / 2, "data": 0.5, "saving": 0.0}
        assert [slow["rank"] for slow in record["slowest"]] == [comm.size - 1] * (comm.size > 1)
        assert ("rank 2 (" in "".join(shown)) == (comm.size > 1)
    else:
        assert not shown
