"""Gradient accumulation: a step in several passes is the step in one, for less memory."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tested_device import DEVICE
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.config import resolve
from hpctrain.data import Batch, pack
from hpctrain.device.dtypes import FLOATS
from hpctrain.errors import UsageError
from hpctrain.mpi.calls import Log
from hpctrain.train.session import open_session
from hpctrain.train.step import Trainer

MORE = ["float64", "float16"]
STEPS = 8  # an epoch of 300 samples in steps of 40: the last one is short


@pytest.fixture
def digits(comm, tmp_path):
    """A run file, the same on all ranks, for ten patterns in noise."""
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 10, 340).astype(np.int32)
        images = rng.integers(0, 9, (10, 8, 8))[labels] + rng.integers(0, 9, (340, 8, 8))
        fields = {"image": images.astype(np.uint8), "label": labels}
        splits = {"train": 300 / 340, "test": 40 / 340}
        pack(fields, folder / "data", splits=splits, block_samples=16, shard_samples=112)
        run_file(folder / "run.toml", folder / "data")
    comm.Barrier()
    yield folder / "run.toml"
    comm.Barrier()


class Trained:
    """`steps` steps of a run file: what they reported, and what they left."""

    def __init__(self, file, comm, count, *settings, steps=STEPS, calls=None):
        from hpctrain.mpi.watched import watch

        config = resolve(file, [f"batch.accumulate={count}", *settings], {}).config
        self.events = []  # "pass", and names of parameters that are ready
        with open_session(config, DEVICE, watch(comm, calls or Log())) as session:
            loader, trainer = session.loader("train"), Trainer(session)
            trainer.initialize()
            self.listen(session, trainer)
            with loader.epoch(0) as batches:
                done = [trainer.step(next(batches), step) for step in range(steps)]
            trainer.parallel.slices.arrive()
            self.losses = [result.loss for result in done]
            self.norms = [result.grad_norm for result in done]
            self.parameters = session.device.to_host(trainer.parallel.parameters.array).copy()
            self.averages = session.device.to_host(trainer.averages.array).copy()
            self.skipped = trainer.scaling.skipped
            loader.close()
            trainer.free()

    def listen(self, session, trainer):
        tape, ready = session.tape, trainer.parallel.ready
        session.tape = lambda *a, **k: (self.events.append("pass"), tape(*a, **k))[1]
        trainer.parallel.ready = lambda name: (self.events.append(name), ready(name))[1]


def alike(one, other, rtol):
    for what in ("losses", "norms", "parameters", "averages"):
        found, expected = np.asarray(getattr(one, what)), np.asarray(getattr(other, what))
        np.testing.assert_allclose(found, expected, rtol, rtol, err_msg=what)


def test_a_batch_is_split_at_microbatches_without_a_copy():
    """All samples once and in order; parts at most one microbatch apart; none is empty."""
    rng = np.random.default_rng()
    for _ in range(200):
        groups = np.append(0, np.cumsum(rng.integers(1, 5, rng.integers(0, 9))))
        n, count = int(groups[-1]), int(rng.integers(1, 12))
        fields = {"x": rng.random((n, 3)), "y": rng.integers(0, 9, n)}
        whole = Batch(4, 70, fields, rng.integers(0, 999, n), groups, 200)
        parts = whole.split(count)
        assert len(parts) == max(min(count, len(groups) - 1), 1)
        sizes = [len(part.groups) - 1 for part in parts]
        assert max(sizes) - min(sizes) <= 1 and (min(sizes) or not n)
        limits = np.cumsum([0, *map(len, parts)])
        cuts = [part.groups[:-1] + limit for part, limit in zip(parts, limits, strict=False)]
        np.testing.assert_array_equal(np.append(np.concatenate(cuts), n), groups)
        np.testing.assert_array_equal(np.concatenate([p.samples for p in parts]), whole.samples)
        for name, array in fields.items():
            pieces = [part.fields[name] for part in parts]
            np.testing.assert_array_equal(np.concatenate(pieces), array)
            assert all(np.shares_memory(piece, array) for piece in pieces if piece.size)
            assert all(piece.flags.c_contiguous for piece in pieces)
        assert {(p.step, p.position, p.global_samples) for p in parts} == {(4, 70, 200)}


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("rule", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_any_number_of_passes_on_any_ranks_gives_the_same_run(comm, digits, rule):
    """Batch norm, dropout, a short last batch, ranks with fewer microbatches than passes."""
    from mpi4py import MPI

    settings = (f"optimizer.name={rule}", "optimizer.lr=0.01", "optimizer.clip_norm=0.5")
    reference = Trained(digits, MPI.COMM_SELF, 1, *settings)
    assert reference.losses[-1] < reference.losses[0]
    for count in (1, 2, 3, 7):
        alike(Trained(digits, comm, count, *settings), reference, 1e-8)


@pytest.mark.ranks(2, 4)
def test_what_crosses_nodes_in_the_background_is_the_same(comm, digits, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_TOPOLOGY", {2: "2x1", 4: "3+1"}[comm.size])
    on, off = (Trained(digits, comm, 2, f"parallel.overlap={overlap}") for overlap in ("on", "off"))
    assert on.losses == off.losses
    assert on.parameters.tobytes() == off.parameters.tobytes()
    alike(on, Trained(digits, comm, 1, "parallel.overlap=on"), 1e-8)


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("reduction", ["auto", pytest.param("messages", marks=pytest.mark.slow)])
def test_a_step_is_exchanged_once_and_not_before_the_last_pass(comm, digits, reduction):
    """As many calls of MPI as in one pass; a rank without samples has one pass all the same."""
    notes = []
    for count in (1, 2, 5):
        calls = Log()
        run = Trained(digits, comm, count, f"parallel.reduction={reduction}", calls=calls)
        notes.append((calls.counts, calls.events))
        names = set(run.events) - {"pass"}
        order = "".join("P" if event == "pass" else "r" for event in run.events)
        assert re.fullmatch(rf"(P{{1,{count}}}r{{{len(names)}}}){{{STEPS}}}", order)
        if comm.size == 1:  # steps of 5 microbatches, the last one of 3
            assert order.count("P") == {1: 8, 2: 16, 5: 7 * 5 + 3}[count]
    assert notes[0] == notes[1] == notes[2]


def whole_numbers(folder, high):
    """A run file for a linear regression in which all numbers are whole, and its targets."""
    rng = np.random.default_rng(3)
    fields = {
        "image": rng.integers(-2, 3, (24, 4)).astype(np.float32),
        "label": rng.integers(-2, 3, (24, 1)).astype(np.float32),
    }
    fields["image"][:1], fields["label"][:1] = 0, high  # one gradient of the bias is large
    pack(fields, folder / "whole", splits={"train": 1.0}, block_samples=24)
    file = folder / "whole.toml"
    file.write_text(
        f'[data]\npath = "{folder / "whole"}"\ntest = ""\nnormalize = "none"\n'
        '[model]\nname = "mlp"\nhidden = []\n[batch]\nsize = 24\nmicrobatch = 2\n'
        f'[run]\nfolder = "{folder / "run"}"\n'
    )
    return file


def gradient_of(file, comm, dtype, count):
    """The bits of gradient and losses, summed over ranks."""
    config = resolve(file, [f"batch.accumulate={count}", f"run.dtype={dtype}"], {}).config
    with open_session(config, DEVICE, comm) as session:
        loader, trainer = session.loader("train"), Trainer(session)
        shapes = {e.name: e.shape for e in session.layouts.parameters.entries}
        trainer.parallel.set_parameters(
            lambda name: np.zeros(shapes[name]) + (name == "head.weight")
        )
        with loader.epoch(0) as batches:
            called = []
            sums = trainer.passes.run(next(batches), 0, 1.0, None, lambda: called.append(1))
        assert called == [1]
        views = trainer.parallel.gradients.views().values()
        gradient = [session.device.to_host(view).astype(np.float64).reshape(-1) for view in views]
        loader.close()
        trainer.free()
    total = np.concatenate([*gradient, sums])
    comm.Allreduce(total.copy(), total)
    return total.tobytes()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in MORE)]
)
def test_whole_numbers_add_up_exactly(comm, tmp_path, dtype):
    folder = comm.bcast(tmp_path)
    file = comm.bcast(whole_numbers(folder, high=3) if comm.rank == 0 else None)
    found = {gradient_of(file, comm, dtype, count) for count in (1, 2, 3, 7, 40)}
    assert len(found) == 1
    comm.Barrier()


@pytest.mark.ranks(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_gradients_are_not_lost_beside_large_ones(comm, tmp_path, dtype):
    """Added in 16 bits one after the other, most of them would leave no trace."""
    large = {"bfloat16": 256, "float16": 2048}[dtype]
    file = whole_numbers(tmp_path, high=-large)
    exact = np.frombuffer(gradient_of(file, comm, "float64", 1))
    assert np.abs(exact).max() > large
    found = np.frombuffer(gradient_of(file, comm, dtype, 12))
    gradient, sums = slice(0, -3), slice(-3, None)
    rounded = exact[gradient].astype(FLOATS[dtype]).astype(np.float64)
    np.testing.assert_array_equal(found[gradient], rounded)
    np.testing.assert_array_equal(found[sums], exact[sums])


@pytest.mark.ranks(1)
def test_memory_of_activations_falls_with_the_passes(comm, digits):
    """What the pool has ever held: 160 samples at once, or 16 at a time."""
    if DEVICE.name != "cpu":
        pytest.skip("the pool of a GPU is CuPy's")
    text = digits.read_text()
    model = text[text.index("[model]") : text.index("[run]")]
    file, held = digits.with_name("net.toml"), {}
    file.write_text(text.replace(model, '[model]\nname = "convnet"\nwidths = [16]\n'))
    for count in (1, 2, 10):
        settings = [f"batch.accumulate={count}", "batch.size=160", "batch.microbatch=16"]
        config = resolve(file, settings, {}).config
        with open_session(config, DEVICE, comm) as session:
            loader, trainer = session.loader("train"), Trainer(session)
            trainer.initialize()
            before = session.device._pool.reserved
            with loader.epoch(0) as batches:
                for step, batch in enumerate(batches):
                    trainer.step(batch, step)
            held[count] = session.device._pool.reserved - before
            loader.close()
            trainer.free()
    assert held[2] < 0.6 * held[1] and held[10] < 0.2 * held[1], held


def test_statistics_of_a_whole_step_are_refused(tmp_path):
    file = run_file(tmp_path / "run.toml", tmp_path, "convnet")
    whole = "model.batch_statistics=step"
    assert resolve(file, [whole], {}).config.batch.accumulate == 1
    with pytest.raises(UsageError) as raised:
        resolve(file, [whole, "batch.accumulate=2"], {})
    text = str(raised.value)
    for part in ("run.toml", "batch.accumulate is 2", "one pass", "batch.accumulate = 1"):
        assert part in text
    with pytest.raises(UsageError, match=r"batch.accumulate"):
        resolve(file, ["batch.accumulate=0"], {})


@pytest.mark.ranks(1, 2)
def test_in_float16_a_scale_that_is_too_large_is_halved_in_any_pass(comm, digits, monkeypatch):
    """Nothing of the passes before is left in the gradient of the step after."""
    from hpctrain.train import scaling

    monkeypatch.setattr(scaling, "START", 2.0**20)
    runs = [
        Trained(digits, comm, count, "run.dtype=float16", "optimizer.lr=0.01") for count in (1, 3)
    ]
    assert runs[0].skipped == runs[1].skipped > 0
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_with_another_number_of_passes(tmp_path, ranks):
    """The losses of a run in one piece, and what it says of itself."""
    file = run_file(tmp_path / "run.toml", make_digits(tmp_path / "data"))
    whole = hpctrain(1, "train", file, "--set", "run.steps=20")
    assert whole.returncode == 0 and "passes" not in whole.stdout, whole.stdout
    expected = steps(tmp_path / "run")
    for count, last in ((2, 7), (4, 20)):
        sets = ("--set", f"batch.accumulate={count}", "--set", f"run.steps={last}")
        resume = ("--resume", "auto", "--set", f"run.folder={tmp_path / 'parts'}")
        done = hpctrain(ranks, "train", file, *sets, *resume)
        assert done.returncode == 0, done.stdout
        assert f"each step in {count} passes" in done.stdout
    np.testing.assert_allclose(steps(tmp_path / "parts"), expected, rtol=1e-8)
    assert [start["accumulate"] for start in records(tmp_path / "parts", "start")] == [2, 4]


@pytest.mark.slow
def test_what_was_not_sent_comes_after_the_last_pass(tmp_path):
    """A compressed run that goes on without compression: its residuals join one gradient, once."""
    data = make_digits(tmp_path / "data")
    sets = {
        "sent": ("compress.method=topk", "compress.density=0.05", "compress.min_size=64"),
        "rest": ("compress.method=off",),
    }
    losses = []
    for count in (1, 3):
        (tmp_path / str(count)).mkdir()
        file = run_file(tmp_path / str(count) / "run.toml", data)
        for last, settings in ((6, sets["sent"]), (12, sets["rest"])):
            more = (
                *settings,
                "run.dtype=float32",
                f"batch.accumulate={count}",
                f"run.steps={last}",
            )
            options = [word for setting in more for word in ("--set", setting)]
            env = {"HPCTRAIN_TOPOLOGY": "2x1"}
            done = hpctrain(2, "train", file, "--resume", "auto", *options, **env)
            assert done.returncode == 0, done.stdout
        losses.append(steps(tmp_path / str(count) / "run"))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
