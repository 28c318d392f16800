"""The house rules that a machine can check: sizes, names, headers, and pages that hold true."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import DEFAULTS

from hpctrain.cli.main import parser as command_line
from hpctrain.config import from_text, resolve

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, FUNCTION_LINES = 330, 45  # about 300 and 40, with room for the exception
HEADER = ["Buffers", "Launch", "Cost", "Exactness", "Source", "Reference", "Test"]

# One word per idea; these are the ones that name nothing.
NAMES = {"fast", "helper", "helpers", "manager", "proc", "util", "utils", "v2", "worker", "workers"}
WORDS = re.compile(r"\b(workers?|helpers?|utils|device id|TODO|FIXME|XXX)\b")


def tracked(*folders, suffixes):
    """Files of the checkout below `folders`, with one of `suffixes` ("" : a script)."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def name_of(path):
    return str(path.relative_to(ROOT))


SOURCES = list(tracked("hpctrain", "cuda", "tools", suffixes={"", ".py", ".sh", ".cu", ".h"}))
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
KERNELS = list(tracked("cuda", suffixes={".cu"}))
SCRIPTS = [path for path in SOURCES if path.suffix == ".sh" or path.read_text()[:2] == "#!"]
TESTS = list(tracked("tests", suffixes={".py"}))
RUNS = list(tracked("jobs/runs", suffixes={".toml"}))


def python_functions(text):
    """(name, lines without the docstring) of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def other_functions(text):
    """(first line, lines) of every C++ or shell function: it ends with a brace in column 0."""
    first, title = 0, ""
    for number, line in enumerate(text.splitlines()):
        if line[:1].isalpha():
            first, title = number, line
        elif line.startswith("}"):
            yield title, number - first + 1


def defined_names(tree):
    """Names that the code itself chooses: of functions, classes, parameters and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def words_of(name):
    return set(re.findall(r"[a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    limit = FILE_LINES if path in SOURCES else 2 * FILE_LINES
    assert text.count("\n") <= limit
    functions = python_functions(text) if path.suffix == ".py" else other_functions(text)
    assert not [found for found in functions if found[1] > FUNCTION_LINES]


def test_long_functions_are_found():
    body = "\n".join(["    x = 1"] * 50)
    assert list(python_functions(f'def f():\n    """Title.\n\n    More."""\n{body}')) == [("f", 51)]
    block = body.replace("= 1", "= 1;")
    assert list(other_functions(f"typedef int a;\nvoid f(int x,\n    int y)\n{{\n{block}\n}}")) == [
        ("void f(int x,", 54)
    ]


@pytest.mark.parametrize("path", PYTHON + TESTS, ids=name_of)
def test_modules_say_why_they_exist(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_names_mean_something(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {path.stem, *defined_names(tree)}
    assert not [name for name in sorted(names) if words_of(name) & NAMES]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_one_word_per_idea(path):
    assert not WORDS.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernel_files_have_the_header(path):
    """Equations first, then the seven lines that say how the kernels are to be used and checked."""
    comment = path.read_text(encoding="utf-8").split("#include")[0]
    assert comment.startswith(f"// {path.name} -- ")
    places = [comment.find(f"{word}  ") for word in HEADER]
    assert min(places) > 0 and places == sorted(places), f"wanted: {', '.join(HEADER)}"
    named = re.findall(r"tests/\w+\.py", comment)
    assert named and all((ROOT / file).is_file() for file in named), named


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_parse(path):
    first = path.read_text().partition("\n")[0]
    if "bash" not in first and "shell=sh" not in first:
        return
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) == first.startswith("#!")


def test_the_environment_of_scripts_and_tests_is_one():
    """tools/env.sh sets what tests/launching.py does, and nothing that is set already."""
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    command = ["bash", "-c", f"source tools/env.sh; {sys.executable} -c '{show}'"]

    def after(**environment):
        path = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=ROOT, env=path | environment, capture_output=True)
        return json.loads(done.stdout)

    assert {name: after().get(name) for name in DEFAULTS} == DEFAULTS
    mine = dict.fromkeys(DEFAULTS, "mine")
    assert mine.items() <= after(**mine).items()
    assert not DEFAULTS.keys() & after(SLURM_JOB_ID="1").keys()


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_run_files_load(path):
    text = path.read_text(encoding="utf-8")
    config = from_text(text, str(path)).config
    assert text.startswith(f"# {path.name} -- ")
    assert config.run.folder == f"runs/{path.stem}" and config.data.path == f"data/{path.stem}"


def test_there_are_run_files():
    assert {"digits.toml", "fashion-mnist.toml"} <= {path.name for path in RUNS}


README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    """Every line of the text's shell blocks, as words."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("words", list(commands(README)), ids=" ".join)
def test_commands_of_the_readme_exist(words):
    """That they work is for tools/demo and the tests of each command."""
    for path in re.findall(r"\b(?:tools|jobs|docs)/[\w./-]+", " ".join(words)):
        assert (ROOT / path).is_file(), path
    if "hpctrain" in words:
        arguments = words[words.index("hpctrain") + 1 :]
        known = command_line_of(arguments)
        assert {word for word in arguments if word.startswith("-")} <= known, known
        settings = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
        [run_file] = [word for word in arguments if word.endswith(".toml")] or [None]
        assert not settings or resolve(ROOT / run_file, settings)


def command_line_of(arguments):
    """The options of the command that the arguments begin with; fails for an unknown one."""
    parser = command_line()
    for word in arguments:
        nested = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        if not nested:
            break
        assert word in nested[0], f"{word}: there are {list(nested[0])}"
        parser = nested[0][word]
    return {option for action in parser._actions for option in action.option_strings}


def test_paths_in_the_readme_exist():
    named = re.findall(r"`((?:hpctrain|cuda|tools|jobs|tests|docs)/[\w./-]*)`", README)
    assert named and all((ROOT / path).exists() for path in named), named
