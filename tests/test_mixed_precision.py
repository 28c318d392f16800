"""Training in 16 bits: gradients against float32, sums on ranks, master weights, loss scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
from kernel_checks import DTYPES16
from launching import ROOT
from tested_device import DEVICE, get, put, set_values, variable
from training import hpctrain, make_digits, records, run_file, steps

from hpctrain.autograd import Tape
from hpctrain.checkpoint import read_tensors
from hpctrain.config import resolve
from hpctrain.device.dtypes import FLOATS, wide_dtype
from hpctrain.errors import DeviceError
from hpctrain.models import build
from hpctrain.nn.layout import Layout, Store
from hpctrain.nn.losses import softmax_cross_entropy
from hpctrain.sections import Convnet, Mlp
from hpctrain.train.scaling import PERIOD, START, LossScale, loss_scale_of

EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # largest relative error of a rounding


# ---- gradients of whole networks

# a network, and how many roundings its gradient may be away from that of float32. Rectifiers and
# maxima choose, and a choice that falls otherwise changes a gradient by all of its size.
MODELS = {
    "layer": (Mlp(hidden=(48, 32), activation="gelu", norm="layer"), 4),
    "batch": (Mlp(hidden=(48, 32), activation="gelu", norm="batch"), 4),
    "convnet": (Convnet(widths=(8, 16)), 64),
}


def gradient(config, dtype, scale=1.0):
    """(losses, flat gradient / scale, layout) of a network whose values bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    model = build(config, (8, 8), 10)
    layouts = model.layouts(FLOATS[dtype])
    stores = [
        Store(layout, DEVICE.zeros(layout.size, layout.dtype))
        for layout in (layouts.parameters, layouts.averages, layouts.parameters, layouts.sums)
    ]
    model.bind(*stores)
    model.initialize(DEVICE, 1, parameters=False)
    for name, parameter in model.parameters().items():
        exact = parameter.initial(1, name).astype(FLOATS["bfloat16"])
        set_values(parameter.value, 1 if name.endswith("gamma") else exact)
    x = rng.standard_normal((60, 8, 8)).astype(FLOATS["bfloat16"]).astype(FLOATS[dtype])
    groups = np.array([0, 20, 40, 60])
    tape = Tape(DEVICE, groups=groups, samples=np.arange(60), loss_scale=scale)
    losses, _ = softmax_cross_entropy(tape, model(tape, variable(x)), put(rng.integers(0, 10, 60)))
    tape.backward(losses)
    tape.finish(model.parameters().values())
    return get(losses.value), get(stores[2].array).astype(np.float64) / scale, layouts


def apart(found, expected):
    """Norm of the difference, relative."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def weight_of(gradient_and_layouts, name):
    """The part of a flat gradient that belongs to one parameter."""
    _, flat, layouts = gradient_and_layouts
    entry = layouts.parameters.locate(name)
    return flat[entry.offset : entry.offset + entry.size]


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_float32(name, dtype):
    """Every parameter's, as a vector."""
    config, roundings = MODELS[name]
    single, short = gradient(config, "float32"), gradient(config, dtype)
    assert short[0].dtype == np.float32
    assert apart(short[0], single[0]) < EPSILON[dtype]
    for entry in single[2].parameters.entries:
        distance = apart(weight_of(short, entry.name), weight_of(single, entry.name))
        assert distance < roundings * EPSILON[dtype], entry.name


def test_a_scaled_loss_keeps_small_gradients():
    """Scaled by 2^-18 most gradients fall below what float16 holds; float32 does not mind."""
    config, name = MODELS["layer"][0], "layers.0.linear.weight"
    exact = weight_of(gradient(config, "float32"), name)
    errors = {}
    for scale in (2.0**-18, 1.0, 64.0):
        same = weight_of(gradient(config, "float32", scale), name)
        np.testing.assert_allclose(same, exact, rtol=1e-6)
        errors[scale] = apart(weight_of(gradient(config, "float16", scale), name), exact)
    assert errors[1.0] < 4 * EPSILON["float16"] and errors[64.0] < 4 * EPSILON["float16"]
    assert errors[2.0**-18] > 10 * errors[1.0]


# ---- products


@pytest.mark.parametrize("precision, bits", [("tf32", 10), ("bf16", 7)])
def test_products_in_lower_precision_round_their_inputs(precision, bits, monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 33), (70, 20)))

    def product(a, b):
        return get(DEVICE.matmul(put(a).T, put(b), DEVICE.empty((a.shape[1], b.shape[1]), a.dtype)))

    plain = product(a, b)
    np.testing.assert_array_equal(plain, np.matmul(a.T, b))
    monkeypatch.setattr(DEVICE, "matmul_precision", precision)
    found = product(a, b)

    def rounded(x):
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)

    expected = np.matmul(rounded(a).T, rounded(b))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # BLAS may add otherwise
    assert 2.0 ** -(bits + 4) < np.abs(found - plain).max() < 70 * 2.0**-bits
    wide = rng.standard_normal((3, 3))
    np.testing.assert_array_equal(product(wide, wide), wide.T @ wide)


def test_an_unknown_precision_is_refused():
    with pytest.raises(DeviceError, match="no matmul precision is called 'tf23' .did you mean"):
        DEVICE.matmul_precision = "tf23"


@pytest.mark.parametrize("dtype", DTYPES16)
@pytest.mark.parametrize("batched", [False, True])
def test_16_bit_products_add_in_float32(dtype, batched):
    rng = np.random.default_rng(0)
    lead = (5,) if batched else ()
    a = rng.standard_normal((*lead, 400, 30)).astype(FLOATS[dtype])
    b = rng.standard_normal((*lead, 400, 20)).astype(FLOATS[dtype])
    out = DEVICE.empty((*lead, 30, 20), FLOATS[dtype])
    DEVICE.matmul(put(a).transpose(*((0, 2, 1) if batched else (1, 0))), put(b), out)
    exact = a.astype(np.float64).swapaxes(-1, -2) @ b.astype(np.float64)
    allowed = EPSILON[dtype] * np.abs(exact) + 1e-4
    assert (np.abs(get(out).astype(np.float64) - exact) <= allowed).all()


# ---- sums and updates on ranks

PLACES = {1: ["1x1"], 2: ["1x2", "2x1"], 3: ["1x3", "2+1"], 4: ["2x2", "1x4"]}


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("mode", ["auto", "messages", "allreduce"])
@pytest.mark.parametrize("dtype", DTYPES16)
def test_16_bit_gradients_are_added_in_float32(comm, dtype, mode):
    """Rank 0 holds a number next to which the others' are lost in 16 bits."""
    from hpctrain.collectives.slices import SliceReduction
    from hpctrain.mpi.topology import topology

    large, n = 2 / EPSILON[dtype], 1000
    for place in PLACES[comm.size] if mode == "auto" else PLACES[comm.size][:1]:
        ranks = topology(comm, place)
        slices = SliceReduction(ranks, DEVICE, n, FLOATS[dtype], mode)
        slices.gradients[:] = large if comm.rank == 0 else 0.5
        slices.reduce()
        assert slices.sums.dtype == np.float32
        if ranks.node_count == 1 or ranks.local_sizes == (1,) * comm.size:
            np.testing.assert_array_equal(get(slices.sums), large + 0.5 * (comm.size - 1))
        else:  # what goes between nodes is rounded
            np.testing.assert_allclose(get(slices.sums), large + 0.5, atol=1.1)
        slices.free()
        ranks.free()


def trainer_of(comm, layout, dtype):
    """A DataParallel in 16 bits with SGD, its parameters all 1."""
    from hpctrain.mpi.topology import topology
    from hpctrain.optim import SGD
    from hpctrain.parallel import DataParallel

    layout = Layout(layout, FLOATS[dtype])
    parallel = DataParallel(topology(comm), DEVICE, layout, SGD(momentum=0.0))
    parallel.set_parameters(lambda name: np.ones(layout.locate(name).shape))
    return parallel


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("dtype", DTYPES16)
def test_updates_too_small_for_16_bits_add_up_in_the_master_weights(comm, dtype):
    parallel = trainer_of(comm, [("w", (100,), True), ("b", (3,), False)], dtype)
    tiny = EPSILON[dtype] / 8
    for step in range(40):
        parallel.gradients.array[:] = 1 / comm.size
        parallel.update(step, lr=tiny, weight=1.0)
        if step == 0:
            assert (get(parallel.parameters.view("w")).astype(np.float64) == 1).all()
    expected = np.float32(1 - 40 * tiny).astype(FLOATS[dtype])
    np.testing.assert_array_equal(
        get(parallel.parameters.view("w")).astype(np.float32), np.float32(expected)
    )
    parallel.free()


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_the_update_on_all(comm, bad):
    parallel = trainer_of(comm, [("w", (700,), True)], "float16")
    parallel.gradients.array[:] = 0.5
    if comm.rank == comm.size - 1:
        parallel.gradients.array[123] = bad
    norms = comm.allgather(parallel.update(0, lr=0.1, weight=1.0))
    assert not any(np.isfinite(norms))
    assert (get(parallel.parameters.view("w")) == 1).all()
    parallel.free()


# ---- the scale of the loss


def test_the_scale_doubles_after_good_steps_and_halves_after_a_bad_one():
    scaling = loss_scale_of("float16")
    start = scaling.scale
    for _ in range(PERIOD - 1):
        scaling.keep()
    assert scaling.scale == start
    scaling.keep()
    assert (scaling.scale, scaling.good) == (2 * start, 0)
    scaling.keep()
    assert scaling.skip()
    assert (scaling.scale, scaling.good, scaling.skipped) == (start, 0, 1)


def test_a_scale_of_one_cannot_be_halved():
    assert not LossScale(1.0, dynamic=True).skip()
    for dtype in ("float32", "float64", "bfloat16"):
        scaling = loss_scale_of(dtype)
        scaling.keep()
        assert scaling.scale == 1 and not scaling.skip() and scaling.state() == {}


def test_the_scale_is_kept_in_the_state():
    one, other = loss_scale_of("float16"), loss_scale_of("float16")
    one.skip()
    one.keep()
    other.restore(json.loads(json.dumps(one.state())))
    assert other == one
    loss_scale_of("float32").restore(one.state())  # another dtype than before: no matter
    other.restore({})


@pytest.mark.ranks(1, 2)
def test_skipped_steps_are_the_same_on_all_ranks(comm, tmp_path):
    """From a scale that is much too large training finds one that works."""
    from hpctrain.config import from_text
    from hpctrain.train.session import open_session
    from hpctrain.train.step import Trainer

    folder = comm.bcast(str(tmp_path))
    data = tmp_path.__class__(folder) / "data"
    if comm.rank == 0:
        make_digits(data)
        run_file(data.parent / "run.toml", data)
    comm.Barrier()
    text = (data.parent / "run.toml").read_text()
    config = from_text(text, overrides=["run.dtype=float16"]).config
    with open_session(config, DEVICE, comm) as session:
        trainer = Trainer(session)
        trainer.initialize()
        trainer.scaling.scale = 2.0**17
        loader = session.loader("train")
        results = [trainer.step(batch, step) for step, batch in enumerate(loader.epoch(0))]
        loader.close()
        trainer.free()
    skipped = [result.skipped for result in results]
    assert any(skipped) and not all(skipped)
    assert trainer.scaling.scale == 2.0 ** (17 - sum(skipped))
    assert len(set(comm.allgather(str((skipped, trainer.scaling))))) == 1


# ---- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data", 1797)


TRAINING = """[optimizer]
name = "adamw"
lr = 2e-3
[schedule]
name = "cosine"
warmup_steps = 50
[checkpoint]
every_epochs = 5
"""


def digits(folder, data, *overrides):
    """The run file of a run of 12 epochs that gets about 97 of 100 digits right."""
    folder.mkdir()
    text = run_file(folder / "run.toml", data, more=TRAINING)
    return ["train", text, "--set", "model.hidden=[128]", "--set", "run.epochs=12", *overrides]


def accuracy(folder):
    return records(folder / "run", "evaluation")[-1]["accuracy"]


def test_16_bit_runs_are_as_good_as_float32(tmp_path, data):
    """Within one point, of 450 digits; on one rank and on two."""
    found = {}
    for dtype in ("float32", *DTYPES16):
        for ranks in (1,) if dtype == "float32" else (1, 2):
            folder = tmp_path / f"{dtype}-{ranks}"
            done = hpctrain(ranks, *digits(folder, data, "--set", f"run.dtype={dtype}"))
            assert done.returncode == 0, done.stdout
            found[dtype, ranks] = accuracy(folder)
    assert found["float32", 1] > 0.95
    for key, value in found.items():
        assert abs(value - found["float32", 1]) < 0.01, (key, found)
    recorded = records(tmp_path / "float16-2" / "run", "step")
    assert all(record["loss_scale"] > 1 for record in recorded)
    assert all((record["grad_norm"] is None) == record["skipped"] for record in recorded)
    assert "loss_scale" not in records(tmp_path / "bfloat16-1" / "run", "step")[0]


@pytest.mark.parametrize("dtype", DTYPES16)
def test_a_16_bit_run_goes_on_as_if_it_had_not_stopped(tmp_path, data, dtype):
    """The checkpoint holds float32 weights, and the scale; another dtype reads them too."""
    setting = ("--set", f"run.dtype={dtype}", "--set", "run.steps=40")
    assert hpctrain(1, *digits(tmp_path / "whole", data, *setting)).returncode == 0
    parted = digits(tmp_path / "parted", data, *setting)
    stop = ("--set", "run.steps=25")
    assert hpctrain(1, *parted, *stop).returncode == 0
    done = hpctrain(1, *parted, "--resume", "auto")
    assert done.returncode == 0, done.stdout
    assert steps(tmp_path / "parted" / "run") == steps(tmp_path / "whole" / "run")

    newest = max((tmp_path / "whole" / "run" / "checkpoints").iterdir())
    assert {str(t.dtype) for t in read_tensors(newest).values()} == {"float32"}
    saved = json.loads((newest / "state.json").read_text())["state"]["scaling"]
    assert ("scale" in saved) == (dtype == "float16")
    done = hpctrain(2, "eval", tmp_path / "whole" / "run", "--json")
    assert done.returncode == 0, done.stdout
    assert f'"accuracy": {accuracy(tmp_path / "whole")}' in done.stdout
    other = ("--set", "run.dtype=float32", "--set", "run.steps=45", "--resume", "auto")
    done = hpctrain(2, *parted, *other)
    assert done.returncode == 0, done.stdout
    assert len(steps(tmp_path / "parted" / "run")) == 45


def test_matmul_precision_is_a_setting_of_a_run(tmp_path, data):
    losses = {}
    for precision in ("float32", "tf32", "bf16"):
        setting = ("--set", "run.steps=5", "--set", "run.dtype=float32")
        folder = tmp_path / precision
        command = digits(folder, data, *setting, "--set", f"run.matmul_precision={precision}")
        assert hpctrain(1, *command).returncode == 0
        losses[precision] = np.array(steps(folder / "run"))
    tf32, bf16 = (np.abs(losses[p] - losses["float32"]).max() for p in ("tf32", "bf16"))
    assert 0 < tf32 < 1e-3 < 10 * bf16 < 0.5


def test_the_page_on_precision_says_what_is_so():
    page = (ROOT / "docs" / "precision.md").read_text()
    assert f"starts at {START:.0f} and doubles after {PERIOD}" in page
    commands = [line.split() for line in page.split("```")[1].splitlines() if "hpctrain" in line]
    assert len(commands) == 3
    for command in commands:
        assert resolve(ROOT / command[2], [command[4]]).config


def test_the_wide_type():
    assert wide_dtype("float64") == np.float64
    assert {str(wide_dtype(FLOATS[name])) for name in ("float32", *DTYPES16)} == {"float32"}
