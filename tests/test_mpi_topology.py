"""Topologies: real, overridden in every way of writing, refused on all ranks."""

from __future__ import annotations

import pytest

from hpctrain.errors import UsageError
from hpctrain.mpi.topology import alone, parse_override, topology


@pytest.mark.parametrize(
    "text, nodes",
    [
        ("2x2", [0, 0, 1, 1]),
        ("1x4", [0, 0, 0, 0]),
        ("3+1", [0, 0, 0, 1]),
        ("1+1+2", [0, 1, 2, 2]),
        ("0,1,0,1", [0, 1, 0, 1]),
        ("7,7,3,7", [7, 7, 3, 7]),
    ],
)
def test_ways_to_write_an_override(text, nodes):
    assert parse_override(text, 4) == nodes


@pytest.mark.parametrize("text", ["3x2", "2+1", "0,0,0", "5"])
def test_another_number_of_ranks_is_refused(text):
    with pytest.raises(UsageError, match="describes . ranks, but there are 4"):
        parse_override(text, 4)


@pytest.mark.parametrize(
    "text", ["2x", "x2", "2*2", "0x4", "3+0+1", "0,,1,0", "a,b,c,d", "-1,0,0,0"]
)
def test_nonsense_is_refused(text):
    with pytest.raises(UsageError, match="is not a topology: write NODESxRANKS"):
        parse_override(text, 4)


@pytest.mark.ranks(1, 2, 3, 4)
def test_real_nodes(comm):
    """The tests run on one machine."""
    with topology(comm) as where:
        assert (where.rank, where.size) == (comm.rank, comm.size)
        assert (where.local_rank, where.local_sizes) == (comm.rank, (comm.size,))
        assert where.node.size == comm.size and where.cross.size == 1


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "text, nodes, locals_, sizes",
    [
        ("2x2", [0, 0, 1, 1], [0, 1, 0, 1], (2, 2)),
        ("3+1", [0, 0, 0, 1], [0, 1, 2, 0], (3, 1)),
        ("1,0,0,1", [0, 1, 1, 0], [0, 0, 1, 1], (2, 2)),  # numbered by lowest rank
        ("5,5,9,5", [0, 0, 1, 0], [0, 1, 0, 2], (3, 1)),
        ("4x1", [0, 1, 2, 3], [0, 0, 0, 0], (1, 1, 1, 1)),
    ],
)
def test_overridden_nodes(comm, text, nodes, locals_, sizes):
    with topology(comm, text) as where:
        assert where.node_index == nodes[comm.rank]
        assert where.local_rank == locals_[comm.rank]
        assert where.local_sizes == sizes and where.node_count == len(sizes)
        assert where.local_size == where.node.size == sizes[where.node_index]
        assert where.node.rank == where.local_rank

        members = [rank for rank in range(4) if nodes[rank] == where.node_index]
        assert where.node.allgather(comm.rank) == members
        column = [rank for rank in range(4) if locals_[rank] == where.local_rank]
        column.sort(key=lambda rank: nodes[rank])
        assert where.cross.allgather(comm.rank) == column
        assert (where.leaders is None) == (where.local_rank > 0)


@pytest.mark.ranks(3)
def test_override_from_the_environment(comm, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_TOPOLOGY", "1+2")
    with topology(comm) as where:
        assert where.local_sizes == (1, 2)
    with topology(comm, "3x1") as where:  # the argument comes first
        assert where.node_count == 3


@pytest.mark.ranks(3)
def test_every_rank_alone(comm):
    with topology(comm) as real, alone(real) as where:
        assert where.node_index == comm.rank and where.local_sizes == (1, 1, 1)
        assert where.cross.allgather(comm.rank) == [0, 1, 2] and where.node.size == 1


@pytest.mark.ranks(2, 3)
def test_a_wrong_override_fails_on_all_ranks(comm, monkeypatch):
    with pytest.raises(UsageError, match="describes 4 ranks"):
        topology(comm, "2x2")
    monkeypatch.setenv("HPCTRAIN_TOPOLOGY", f"{comm.size}x1" if comm.rank else f"1x{comm.size}")
    with pytest.raises(UsageError, match=r"is '1x.' on rank 0 but '.x1' on rank 1"):
        topology(comm)


@pytest.mark.ranks(4)
def test_a_node_must_lie_within_one_machine(comm, monkeypatch):
    """Two real nodes are played by a communicator whose Split_type tells them apart."""

    class TwoMachines(type(comm)):
        def Split_type(self, split_type, key=0, info=None):
            return self.Split(self.rank // 2, key)

    with pytest.raises(UsageError, match="puts ranks 0 and 2 on node 0, but they are on different"):
        topology(TwoMachines(comm), "3+1")
    with topology(TwoMachines(comm), "1+1+2") as where:
        assert where.local_sizes == (1, 1, 2)
    with topology(TwoMachines(comm)) as where:
        assert where.local_sizes == (2, 2)
