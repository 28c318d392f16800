"""Imports go down: each layer can be read, and run, without those above it.

The table is that of the README. Imports under `if TYPE_CHECKING:` only name types and are free.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hpctrain"

LEVELS = [
    {"errors", "config", "log", "sections", "timeline"},
    {"device", "mpi"},
    {"collectives", "autograd", "nn", "data"},
    {"compress", "optim", "checkpoint"},
    {"parallel"},
    {"models", "train"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Who may import whom within a level: no cycles.
BESIDE = {
    ("config", "errors"),
    ("config", "sections"),
    ("log", "errors"),
    ("nn", "autograd"),
    ("train", "models"),
}
# Packages from outside that one part of this one imports, and no other.
ONLY = {"mpi4py": "mpi", "cupy": "device"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    """The top-level module or package a file belongs to: `nn` for hpctrain/nn/layout.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def run_time_nodes(tree: ast.AST):
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node = ast.Module(node.orelse, [])
        yield node
        yield from run_time_nodes(node)


def imported(text: str):
    """(line, dotted name) of everything the text imports at run time, absolute."""
    for node in run_time_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write absolute imports"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def complaints(part: str, text: str):
    """What is wrong with the imports of a file that belongs to `part`."""
    for line, name in imported(text):
        package, _, rest = name.partition(".")
        if package in ONLY and part != ONLY[package]:
            yield f"line {line}: only hpctrain/{ONLY[package]} imports {package}"
        if package != "hpctrain":
            continue
        target = rest.partition(".")[0]
        if target == "__version__":
            continue
        if target not in LEVEL:
            yield f"line {line}: import {target} from its own module, not from hpctrain"
        elif target != part and not (LEVEL[target] < LEVEL[part] or (part, target) in BESIDE):
            yield f"line {line}: {part} (level {LEVEL[part]}) imports {target} ({LEVEL[target]})"


def test_every_module_has_a_level():
    assert {part_of(path) for path in FILES} == set(LEVEL)


def test_the_readme_shows_the_levels():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`hpctrain/.*?`) \|", text, re.MULTILINE)
    named = [re.findall(r"`hpctrain/(\w+)", row) for row in rows]
    levels = [LEVEL[name] for names in named for name in names]
    assert levels == sorted(levels, reverse=True)
    assert {name for names in named for name in names} == set(LEVEL) - {"__main__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    found = list(complaints(part_of(path), path.read_text(encoding="utf-8")))
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "part, text, says",
    [
        ("nn", "from hpctrain.train import loop", "nn (level 2) imports train (5)"),
        ("nn", "def f():\n    import hpctrain.data.order", "line 2: nn (level 2) imports data (2)"),
        ("device", "from hpctrain import mpi", "device (level 1) imports mpi (1)"),
        ("cli", "from hpctrain import Communicator", "import Communicator from its own module"),
        ("nn", "from mpi4py import MPI", "only hpctrain/mpi imports mpi4py"),
        ("nn", "if TYPE_CHECKING:\n    pass\nelse:\n    import cupy.cuda", "imports cupy"),
    ],
)
def test_a_wrong_import_is_found(part, text, says):
    assert says in " ".join(complaints(part, text))


@pytest.mark.parametrize(
    "part, text",
    [
        ("nn", "if TYPE_CHECKING:\n    from mpi4py import MPI\n    from hpctrain.cli import main"),
        ("nn", "from hpctrain.autograd import Tape\nfrom hpctrain.nn.layout import Layout"),
        ("cli", "from hpctrain import __version__, errors"),
    ],
)
def test_a_right_import_is_not(part, text):
    assert not list(complaints(part, text))
