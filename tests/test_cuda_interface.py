"""What device/cuda.py uses of CuPy: listed, and there in CuPy and in the stand-in of `sim`."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap

import pytest
from cupy_names import NAMES
from cupy_uses import uses_of
from launching import ROOT

SOURCE = (ROOT / "hpctrain/device/cuda.py").read_text(encoding="utf-8")
CALLED = [name for name, listed in NAMES.items() if listed.positional or listed.keywords]
EXTRA = {"precision"}  # what the stand-in keeps for itself
HEAD = "class CudaDevice:\n    def __init__(self, cupy):\n        self._cupy = cupy\n"


def test_the_list_holds_what_is_used():
    uses = uses_of(SOURCE)
    assert not uses.unexplained
    assert not [use for use in uses.found if use.name not in NAMES]
    for use in uses.found:
        name = NAMES[use.name]
        assert use.positional <= name.positional, use
        assert set(use.keywords) <= set(name.keywords), use


def test_what_is_listed_is_used():
    uses = uses_of(SOURCE)
    assert sorted(NAMES.keys() - {use.name for use in uses.found}) == []
    for name, listed in NAMES.items():
        calls = [use for use in uses.found if use.name == name and use.call]
        assert max((use.positional for use in calls), default=0) == listed.positional, name
        assert {word for use in calls for word in use.keywords} == set(listed.keywords), name


@pytest.mark.parametrize(
    "line, name",
    [
        ("self._cupy.arange(3)", "cupy.arange"),
        ("self._cupy.empty(3, int).sum()", "cupy.ndarray.sum"),
        ("array = self._cupy.zeros(3, int); array.data.copy_from(1)", ".MemoryPointer.copy_from"),
        ("c = self._cupy.cuda; s = c.get_current_stream(); s.begin_capture()", "begin_capture"),
        ("(self._cupy.cuda or None).nvtx", "cupy.cuda.nvtx"),
        ("[e.nbytes for e in [1]] and self._cupy.cuda.Device(0).mem_info", "Device.mem_info"),
        ("f = lambda: self._cupy.ElementwiseKernel", "cupy.ElementwiseKernel"),
    ],
)
def test_a_use_of_more_is_found(line, name):
    found = [use.name for use in uses_of(f"{HEAD}        {line}\n").found]
    assert [use for use in found if use not in NAMES and use.endswith(name)], found


def test_more_arguments_are_found():
    [*_, use] = uses_of(f"{HEAD}        self._cupy.empty(3, int, order='F')\n").found
    assert (use.positional, use.keywords) == (2, ("order",))
    assert use.keywords[0] not in NAMES["cupy.empty"].keywords


@pytest.mark.parametrize("text", ["def f(thing: Any): pass", "from cupy import empty"])
def test_what_cannot_be_followed_is_an_error(text):
    assert uses_of(text).unexplained


# ---- the real CuPy


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed (extra gpu-test)")


def object_named(root, name):
    """The object of a listed name: an attribute of a class, for attributes of its objects."""
    for word in name.split(".")[1:]:
        root = getattr(root, word)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_cupy_has_it(cupy, name):
    owner, _, word = name.rpartition(".")
    if owner == "cupy._core":
        importlib.import_module(name)
    assert hasattr(object_named(cupy, owner), word)


@pytest.mark.parametrize("name", CALLED)
def test_cupy_takes_the_arguments(cupy, name):
    listed = NAMES[name]
    positional, names = parameters(object_named(cupy, name), listed.kind == "method")
    assert positional >= listed.positional
    assert names >= set(listed.keywords)


def parameters(function, method):
    """How many positional arguments a function of CuPy takes, and the names of all.

    Compiled functions show their signature in the first line of their docstring only, and NumPy's
    way to write one ends the positional arguments with a `/`.
    """
    first = (function.__doc__ or "").strip().partition("\n")[0]
    text = re.search(r"\w\((.*)\)", first)
    if text is None:
        text = re.search(r"\((.*)\)", str(inspect.signature(function)))
    parts = re.sub(r"\[.*?\]|\(.*?\)", "", text[1]).split(",")
    words = [re.split(r"[=:]", part)[0].split()[-1] for part in parts if part.strip()]
    names = [word for word in words if word not in ("*", "/")]
    plain = [word for word in words[: words.index("*")] if "*" in words] if "*" in words else names
    return len([word for word in plain if word != "/"]) - method, set(names)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("f(self, int value, size_t size, stream=None)", (3, {"value", "size", "stream"})),
        ("g(str code=None, *, tuple options=())", (1, {"code", "options"})),
        ("h(x1, x2, /, out=None, **kwargs)", (3, {"x1", "x2", "out"})),
        ("i()", (0, set())),
    ],
)
def test_signatures_in_docstrings(text, expected):
    class Compiled:
        __doc__ = text + "\n\nMore (of it)."

    method = text.startswith("f")
    positional, names = parameters(Compiled, method)
    assert positional >= expected[0] and names >= expected[1]


# ---- the stand-in


@pytest.fixture(scope="module")
def stand_in():
    from hpctrain.device.sim import Machine
    from hpctrain.device.sim.stand_in import StandIn

    return StandIn(Machine())


def classes_of(stand_in):
    """The classes that the stand-in's objects have, by the names of CuPy's."""
    from hpctrain.device.sim import array, kernels, streams
    from hpctrain.device.sim.stand_in import Device

    return {
        "cupy.ndarray": array.ndarray,
        "cupy.RawModule": kernels.RawModule,
        "cupy.RawKernel": kernels.RawKernel,
        "cupy.cuda.Device": Device,
        "cupy.cuda.Stream": streams.Stream,
        "cupy.cuda.Event": streams.Event,
        "cupy.cuda.Memory": stand_in.cuda.Memory,
        "cupy.cuda.MemoryPointer": array.MemoryPointer,
    }


MODULES = ["cupy", *(name for name, listed in NAMES.items() if listed.kind == "module")]


@pytest.mark.parametrize("module", MODULES)
def test_the_stand_in_s_modules_hold_these_names_only(stand_in, module):
    found = {name for name in dir(object_named(stand_in, module)) if not name.startswith("_")}
    listed = {name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == module}
    assert found - EXTRA == {name for name in listed if not name.startswith("_")}
    assert all(hasattr(object_named(stand_in, module), name) for name in listed)


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_has_it(stand_in, name):
    owner, _, word = name.rpartition(".")
    holder = classes_of(stand_in).get(owner)
    if holder is None:
        assert hasattr(object_named(stand_in, owner), word)
    else:
        assert hasattr(holder, word) or word in fields_of(holder)


def fields_of(kind):
    """Names that the objects of a class are given when they are made."""
    text = "\n".join(textwrap.dedent(inspect.getsource(base)) for base in kind.__mro__[:-1])
    return {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("name", CALLED)
def test_the_stand_in_takes_the_arguments(stand_in, name):
    listed = NAMES[name]
    owner, _, word = name.rpartition(".")
    holder = classes_of(stand_in).get(owner)
    called = getattr(holder, word) if holder else object_named(stand_in, name)
    values = [None] * (listed.positional + (listed.kind == "method"))
    inspect.signature(called).bind(*values, **dict.fromkeys(listed.keywords))
