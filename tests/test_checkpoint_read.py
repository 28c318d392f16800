"""Loading on other numbers of ranks, damage and falling back, and checkpoints of other runs."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_cases import (
    ALONE,
    NAMES,
    Run,
    check_alone,
    cut,
    filled,
    layout_of,
    save_alone,
    shared_folder,
)

from hpctrain.checkpoint import Part, describe, latest_valid, load, save, verify
from hpctrain.errors import CheckpointError

FILES = sorted(NAMES)


@pytest.fixture
def folder(comm):
    """A path for checkpoints that all ranks share."""
    with shared_folder(comm) as path:
        yield path


@pytest.mark.ranks(4)
def test_written_by_some_ranks_and_read_by_others(comm, folder):
    rng = np.random.default_rng(comm.size)
    groups = {size: comm.Split(comm.rank < size) for size in range(1, comm.size + 1)}
    for writers, group in groups.items():
        run = Run("float32" if writers % 2 else "float64")
        owned = [cut(rng, stop, writers) for _, stop in run.whole()]
        if comm.rank < writers:
            mine = [ranges[comm.rank] for ranges in owned]
            save(folder, writers, run.saved(writers, mine), {"at": writers}, group)
        comm.barrier()
        for readers, group in groups.items():
            slices = [cut(rng, stop, readers) for _, stop in run.whole()]
            # Parameters as in a node that shares them: all of them by one rank, which may be any.
            reader = int(rng.integers(readers))
            slices[0] = [(0, run.layout.size * (rank == reader)) for rank in range(readers)]
            if comm.rank < readers:
                parts = run.wanted([ranges[comm.rank] for ranges in slices])
                path = latest_valid(folder, group)
                assert load(path, parts, group) == {"at": writers, "step": writers}
                run.check(parts, writers)
        comm.barrier()
    for group in groups.values():
        group.Free()


def truncate(path, length):
    with path.open("r+b") as file:
        file.truncate(length)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: truncate(path, 0),
    "half": lambda path: truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: truncate(path, path.stat().st_size - 1),
    "first byte": lambda path: flip(path, 0),
    "byte 9": lambda path: flip(path, 9),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:-64] + bytes(64)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, file, damage):
    save_alone(tmp_path, 1)
    path = save_alone(tmp_path, 2)
    DAMAGE[damage](path / file)
    with pytest.raises(CheckpointError, match=f"step_00000002 is not whole: .*{file}"):
        verify(path, ALONE)
    assert latest_valid(tmp_path, ALONE) == tmp_path / "step_00000001"
    assert re.search(f"step_00000002 is not whole: .*{file}.*; trying the one before", caplog.text)
    check_alone(tmp_path / "step_00000001", 1)


def test_every_changed_byte_of_the_tensors_is_found(tmp_path):
    path = save_alone(tmp_path, 2) / "parameters.safetensors"
    for position in range(0, path.stat().st_size, 13):
        flip(path, position)
        with pytest.raises(CheckpointError, match="parameters.safetensors was changed"):
            verify(path.parent, ALONE)
        flip(path, position)
    verify(path.parent, ALONE)


def test_no_checkpoint_and_none_that_is_whole_differ(tmp_path, caplog):
    assert latest_valid(tmp_path, ALONE) is None
    assert latest_valid(tmp_path / "none", ALONE) is None
    assert not caplog.text
    (tmp_path / ".tmp-step_00000003").mkdir()
    assert latest_valid(tmp_path, ALONE) is None
    for step in (1, 2):
        truncate(save_alone(tmp_path, step) / "optimizer.safetensors", 100)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints .*; move them away"):
        latest_valid(tmp_path, ALONE)


def test_a_checkpoint_between_two_renames_is_found(tmp_path, caplog):
    """A save that replaces one of the same step was killed after it had put the old one aside."""
    path = save_alone(tmp_path, 2)
    path.rename(tmp_path / ".replaced-step_00000002")
    path.mkdir()
    assert latest_valid(tmp_path, ALONE).name == ".replaced-step_00000002"
    assert "state.json is missing" in caplog.text
    path.rmdir()
    check_alone(latest_valid(tmp_path, ALONE), 2)


def test_a_path_that_is_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match="step_00000009 is not whole: there is no such folder"
    ):
        verify(tmp_path / "step_00000009", ALONE)
    with pytest.raises(CheckpointError, match="cannot be loaded: state.json is missing"):
        load(tmp_path, [], ALONE)
    with pytest.raises(CheckpointError, match="state.json is missing"):
        describe(tmp_path)


def test_evaluation_reads_parameters_only(tmp_path):
    path, run = save_alone(tmp_path, 2), Run()
    parts = run.wanted(run.whole())
    with pytest.raises(CheckpointError, match="the run has nothing like its optimizer.safetensors"):
        load(path, parts[:2], ALONE)
    assert load(path, parts[:2], ALONE, partial=True)["at"] == 2
    run.check([*parts[:2], *run.wanted([(0, 0)] * 4)[2:]], 2)


def test_padding_becomes_zero_and_chunks_join(tmp_path, monkeypatch):
    path, run, filled_parts = save_alone(tmp_path, 2), Run(), []
    monkeypatch.setattr("hpctrain.checkpoint.parts.CHUNK", 128)

    def fill(piece, host):
        assert piece.shape == host.shape and host.nbytes <= 128
        filled_parts.append(host.size)
        piece[:] = host

    parts = run.wanted(run.whole())
    load(path, parts, ALONE, fill=fill)
    run.check(parts, 2)  # expects zeros in the padding
    assert sum(filled_parts) == sum(stop for _, stop in run.whole())


def test_a_model_built_in_another_order_reads_by_name(tmp_path):
    shapes = [("a", (3,)), ("b", (2, 2)), ("c", ())]
    here, there = layout_of("float32", shapes), layout_of("float32", shapes[::-1])
    whole = (0, here.size)
    path = save(tmp_path, 1, [Part("parameters", "", here, filled(here, 1), whole)], {}, ALONE)
    array = np.empty(there.size, "float32")
    load(path, [Part("parameters", "", there, array, whole)], ALONE)
    for name, _ in shapes:
        one, other = here.locate(name), there.locate(name)
        expected = filled(here, 1)[one.offset : one.offset + one.size]
        np.testing.assert_array_equal(array[other.offset : other.offset + other.size], expected)


def part(dtype, shapes, file="parameters", prefix=""):
    layout = layout_of(dtype, shapes)
    return Part(file, prefix, layout, filled(layout, 1), (0, layout.size))


MODEL = [("fc1.weight", (4, 3)), ("fc1.bias", (4,)), ("head.weight", (2, 4))]


@pytest.mark.parametrize(
    "parts, reasons",
    [
        (
            [part("float32", [("fc.weight", (4, 3)), *MODEL[1:]])],
            [
                "parameters.safetensors has no 'fc.weight' (did you mean 'fc1.weight'?)",
                "no 'fc1.weight' (did you mean 'fc.weight'?), which parameters.safetensors holds",
            ],
        ),
        (
            [part("float32", [("fc1.weight", (3, 4)), *MODEL[1:]])],
            ["'fc1.weight' is float32 (4, 3) in parameters.safetensors, float32 (3, 4) in the run"],
        ),
        (
            [part("float64", MODEL)],
            ["'fc1.bias' is float32 (4,) in parameters.safetensors, float64"],
        ),
        (
            [part("float32", MODEL), part("float32", MODEL, "optimizer", "momentum")],
            ["it has no optimizer.safetensors"],
        ),
        ([part("float32", [(f"x{i}", (1,)) for i in range(9)])], ["and 7 more differences"]),
        (
            [part("float32", MODEL[:2])],
            ["the run has no 'head.weight'", "Use the model, optimizer"],
        ),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, parts, reasons):
    path = save(tmp_path, 1, [part("float32", MODEL)], {}, ALONE)
    before = [part.array.copy() for part in parts]
    with pytest.raises(CheckpointError) as caught:
        load(path, parts, ALONE)
    for reason in reasons:
        assert reason in str(caught.value)
    for part_, array in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part_.array, array)


def test_an_empty_layout_is_a_file_too(tmp_path):
    parts = [part("float32", []), part("float64", [("none", (0, 3))], "optimizer")]
    path = save(tmp_path, 1, [replace(parts[0], array=None), parts[1]], {"a": 1}, ALONE)
    verify(path, ALONE)
    assert load(path, parts, ALONE) == {"a": 1, "step": 1}
    found = describe(path)
    assert found.tensors["parameters.safetensors"] == {} and found.dtypes == ["float64"]
    assert found.tensors["optimizer.safetensors"]["none"].shape == (0, 3)


@pytest.mark.ranks(2, 3, 4)
def test_all_ranks_fall_back_alike(comm, folder, caplog):
    run = Run()
    owned = [(0, stop if comm.rank == 0 else 0) for _, stop in run.whole()]
    for step in (1, 2):
        save(folder, step, run.saved(step, owned), {}, comm)
    if comm.rank == 0:
        flip(folder / "step_00000002" / "optimizer.safetensors", -1)
    comm.barrier()
    path = latest_valid(folder, comm)
    assert path.name == "step_00000001"
    assert ("optimizer.safetensors was changed" in caplog.text) == (comm.rank == 0)
    with pytest.raises(CheckpointError) as caught:
        verify(folder / "step_00000002", comm)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)
    comm.barrier()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest_valid(folder, comm)


@pytest.mark.ranks(1, 2, 4)
def test_a_failure_to_load_on_one_rank_fails_on_all(comm, folder):
    run, last = Run(), comm.size - 1
    path = save(folder, 1, run.saved(1, run.whole() if not comm.rank else [(0, 0)] * 4), {}, comm)

    def fill(piece, host):
        if comm.rank == last:
            raise RuntimeError("no device")

    with pytest.raises(CheckpointError, match=f"rank {last}: RuntimeError: no device"):
        load(path, run.wanted(run.whole()), comm, fill=fill)
    parts = run.wanted(run.whole())
    if comm.rank == last:
        parts[0] = replace(parts[0], array=parts[0].array[:8])
    with pytest.raises(
        CheckpointError, match="parameters: an array of elements 0 up to 8 does not"
    ):
        load(path, parts, comm)
    other = run.wanted(run.whole())
    if comm.rank == 0:
        other[0] = replace(other[0], prefix="other")
    with pytest.raises(CheckpointError, match="has no 'other.fc.weight'"):
        load(path, other, comm)
