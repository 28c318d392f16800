"""The command line as a user meets it."""

import subprocess
import sys

import pytest
from training import hpctrain

from hpctrain.cli.main import main

RUN = '[data]\npath = "d"\n[model]\nname = "mlp"\n'


def test_config_shows_values_with_their_origin(tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text(RUN + "[run]\nseed = 3\n")
    monkeypatch.setenv("HPCTRAIN_BATCH_SIZE", "128")
    assert main(["config", str(file), "--set", "optimizer.name=adamw"]) == 0
    lines = {line.split(" = ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["run.seed"].endswith(f"# {file}")
    assert lines["batch.size"].split()[2:] == ["128", "#", "$HPCTRAIN_BATCH_SIZE"]
    assert lines["optimizer.name"].endswith("# --set")
    assert lines["optimizer.lr"].split()[2:] == ["0.001", "#", "default"]
    assert main(["config", str(file), "--toml"]) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    assert main(["config", str(tmp_path / "again.toml")]) == 0


def test_user_errors_are_one_line_and_status_2(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(RUN + "[batch]\nsiz = 3\n")
    assert main(["config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hpctrain: error: ")
    assert "did you mean 'size'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_eval_of_something_else_says_once_what_it_needs(tmp_path, ranks):
    done = hpctrain(ranks, "eval", tmp_path)
    assert done.returncode == 2
    assert done.stdout.count("is not a run folder") == 1


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], *([c, "--help"] for c in ("train", "eval", "data", "config"))],
    ids=" ".join,
)
def test_help_needs_neither_mpi_nor_numpy(words):
    code = (
        "import sys; from hpctrain.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'mpi4py', 'numpy', 'h5py', 'cupy', 'msgspec', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hpctrain" in done.stdout
