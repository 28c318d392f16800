"""Run files: where values come from, and what is refused with which words."""

from pathlib import Path

import pytest

from hpctrain.config import from_text, resolve
from hpctrain.errors import UsageError
from hpctrain.sections import Mlp, Sgd

MINIMAL = '[data]\npath = "d"\n[model]\nname = "mlp"\n'


def test_defaults_file_environment_and_set_in_this_order():
    resolved = from_text(
        MINIMAL + "[batch]\nsize = 8\nmicrobatch = 2\n[run]\nseed = 2\n",
        overrides=["batch.size=32", "optimizer.name=adamw", "optimizer.lr=0.5"],
        environment={"HPCTRAIN_BATCH_SIZE": "16", "HPCTRAIN_RUN_SEED": "7", "HPCTRAIN_CACHE": "x"},
    )
    config = resolved.config
    assert (config.batch.size, config.batch.microbatch, config.run.seed) == (32, 2, 7)
    assert config.optimizer.lr == 0.5
    origins = {key: origin for key, _, origin in resolved.items()}
    assert origins["batch.size"] == "--set"
    assert origins["run.seed"] == "$HPCTRAIN_RUN_SEED"
    assert origins["batch.microbatch"] == "run file"
    assert origins["data.window"] == "default"


def test_what_is_written_reads_back_the_same():
    resolved = from_text(MINIMAL + '[schedule]\nname = "step"\nmilestones = [3, 5]\n')
    assert from_text(resolved.to_toml()).config == resolved.config


def test_text_that_is_no_toml_value_is_a_string():
    assert from_text(MINIMAL, overrides=["run.folder=runs/a"]).config.run.folder == "runs/a"


def test_tags_choose_the_struct():
    config = from_text(MINIMAL).config
    assert isinstance(config.model, Mlp)
    assert isinstance(config.optimizer, Sgd)


def test_a_section_without_a_name_has_the_default_one():
    assert isinstance(from_text(MINIMAL, overrides=["optimizer.lr=0.5"]).config.optimizer, Sgd)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "[optimiser]\nlr = 1\n", r"\[optimiser\] \(did you mean 'optimizer'\?\)"),
        (MINIMAL + "[batch]\nsizes = 1\n", r"batch.sizes \(did you mean 'size'\?\)"),
        (MINIMAL.replace("mlp", "mpl"), "model.name is 'mpl'"),
        ('[data]\npath = "d"\n[model]\nhidden = [3]\n', "model.name is None"),
        (MINIMAL + "[batch]\nsize = 0\n", "batch.size: .*>= 1"),
        (MINIMAL + '[batch]\nsize = "x"\n', "batch.size: Expected `int`, got `str`, not 'x'"),
        (
            MINIMAL + '[run]\ndtype = "float23"\n',
            r"run.dtype is 'float23' \(did you mean 'float32'\?\); .*one of float32, float64, bfl",
        ),
        (MINIMAL + "[model]\n", "not valid TOML"),
        ('[model]\nname = "mlp"\n', "missing required field `data`"),
        (MINIMAL + "run = 3\n", "no key model.run"),
        ("data = 3\n" + MINIMAL.replace("[data]\npath", "#"), r"must be a section, \[data\]"),
        (MINIMAL + "hidden = [0]\n", r"model.hidden\[0\]"),
    ],
)
def test_refused(text, says):
    with pytest.raises(UsageError, match=says):
        from_text(text)


@pytest.mark.parametrize("override", ["batch.size", "size=3", "a.b.c=1"])
def test_malformed_override_shows_the_form(override):
    with pytest.raises(UsageError, match="section.key=value"):
        from_text(MINIMAL, overrides=[override])


def test_a_wrong_value_is_said_to_come_from_where_it_does():
    with pytest.raises(UsageError, match=r"^--set: batch.size: Expected `int` >= 1, not 0$"):
        from_text(MINIMAL, overrides=["batch.size=0"])


def test_wrong_environment_variable_is_named():
    with pytest.raises(UsageError, match=r"\$HPCTRAIN_BATCH_SIZES: .*did you mean 'size'"):
        from_text(MINIMAL, environment={"HPCTRAIN_BATCH_SIZES": "1"})


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the run file .*none.toml: No such file"):
        resolve(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "jobs/runs").glob("*.toml")), ids=lambda p: p.stem
)
def test_run_files_of_the_project_resolve(path):
    assert resolve(path, environment={}).config.data.path
