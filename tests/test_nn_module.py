"""Modules: names, initial values, ties, layouts; the models built from run files."""

import numpy as np
import pytest
from tested_device import DEVICE, get, put, set_values, variable

from hpctrain.autograd import Tape
from hpctrain.errors import UsageError
from hpctrain.models import build
from hpctrain.nn.initialize import uniform
from hpctrain.nn.layers import Embedding, LayerNorm, Linear
from hpctrain.nn.layout import Store
from hpctrain.nn.losses import softmax_cross_entropy
from hpctrain.nn.module import Module
from hpctrain.sections import Convnet, Mlp


def placed(module, seed=1, dtype="float64"):
    """The module with stores of its own, initialized; and the stores."""
    layouts = module.layouts(dtype)
    made = (layouts.parameters, layouts.averages, layouts.parameters, layouts.sums)
    stores = [Store(layout, DEVICE.zeros(layout.size, dtype)) for layout in made]
    module.bind(*stores)
    module.initialize(DEVICE, seed)
    return stores


class Tied(Module):
    """An embedding whose table is also the output layer."""

    def __init__(self):
        self.embedding = Embedding(5, 4)
        self.norm = LayerNorm(4)
        self.head = Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def __call__(self, tape, x):
        return self.head(tape, self.norm(tape, self.embedding(tape, x)))


def test_names_are_attribute_paths_and_a_tie_is_one_entry():
    assert list(Tied().parameters()) == ["embedding.weight", "norm.gamma", "norm.beta"]
    entries = Tied().layouts("float32").parameters.entries
    # ready after its last use in the backward pass, which is the first in the forward pass
    assert [entry.name for entry in entries] == ["norm.beta", "norm.gamma", "embedding.weight"]
    assert [entry.decay for entry in entries] == [False, False, True]


def test_tied_weight_gets_both_gradients():
    module = Tied()
    values, _, gradients, _ = placed(module)

    def loss():
        tape = Tape(DEVICE)
        logits = module(tape, variable(np.array([0, 3, 3])))
        losses, _ = softmax_cross_entropy(tape, logits, put(np.array([1, 2, 0])))
        total = get(losses.value).sum()
        tape.backward(losses)
        tape.finish(module.parameters().values())
        return total

    loss()
    gradient, table = get(gradients.view("embedding.weight")), values.view("embedding.weight")
    start = get(table)
    for index in np.ndindex(table.shape):
        totals = []
        for step in (1e-6, -1e-6):
            moved = start.copy()
            moved[index] += step
            set_values(table, moved)
            totals.append(loss())
        set_values(table, start)
        np.testing.assert_allclose(gradient[index], (totals[0] - totals[1]) / 2e-6, atol=1e-7)


def test_initial_values_depend_on_seed_and_name_only():
    first, again, other = (placed(build(Mlp(hidden=(8,)), (6,), 3), s)[0] for s in (1, 1, 2))
    assert (get(first.array) == get(again.array)).all()
    assert (get(first.view("head.weight")) != get(other.view("head.weight"))).all()
    deeper = placed(build(Mlp(hidden=(8, 8)), (6,), 3), 1)[0]
    name = "layers.0.linear.weight"
    assert (get(first.view(name)) == get(deeper.view(name))).all()


def test_uniform_is_what_it_was():
    """Golden bits: a checkpoint-free run of an older version starts from these numbers."""
    values = uniform(7, "fc.weight", (3,), 1.0)
    assert values.tolist() == GOLDEN
    many = uniform(7, "fc.weight", (100_000,), 2.0)
    assert abs(many.mean()) < 0.02
    assert abs(many.var() - 4 / 3) < 0.02
    assert np.abs(many).max() <= 2


GOLDEN = [0.708455008211277, -0.2480245256653537, -0.8229302426622949]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "config",
    [
        Mlp(hidden=(7, 9), norm="layer", activation="gelu", dropout=0.2),
        Mlp(hidden=(), norm="none"),
        Convnet(widths=(3, 5), blocks=2, dropout=0.1),
        Convnet(widths=(4,), norm="none", activation="gelu"),
        Convnet(widths=(4, 4), activation="gelu", batch_statistics="step"),
    ],
    ids=str,
)
def test_models_run_forward_and_backward(config, dtype):
    model = build(config, (8, 8), 10)
    _, _, gradients, _ = placed(model, dtype=dtype)
    for images in (6, 0):
        tape = Tape(DEVICE, samples=np.arange(images), groups=np.array([0, images // 2, images]))
        x = np.random.default_rng(0).standard_normal((images, 8, 8)).astype(dtype)
        logits = model(tape, variable(x))
        assert logits.shape == (images, 10)
        losses, _ = softmax_cross_entropy(tape, logits, put(np.arange(images)))
        tape.backward(losses)
        tape.finish(model.parameters().values())
        assert np.isfinite(get(gradients.array)).all()
        moved = [name for name, view in gradients.views().items() if get(view).any()]
        assert bool(moved) == (images > 0)


@pytest.mark.parametrize(
    ("config", "shape", "says"),
    [
        (Convnet(), (64,), "convnet needs images"),
        (Convnet(widths=(4, 4, 4, 4, 4)), (8, 8), "fewer stages"),
    ],
)
def test_models_refuse_what_they_cannot_take(config, shape, says):
    with pytest.raises(UsageError, match=says):
        build(config, shape, 10)
