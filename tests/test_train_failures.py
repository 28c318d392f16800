"""What goes wrong ends in a clear error on all ranks, in seconds, with the right exit status."""

import shutil

import h5py
import pytest
from launching import ROOT, mpirun
from training import hpctrain, make_digits, run_file


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture
def data(tmp_path, digits):
    """A data set of the test's own, to damage."""
    return shutil.copytree(digits, tmp_path / "data")


def refused(done, status, *says):
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout
    for words in says:
        assert words in done.stdout, done.stdout


def test_unknown_key(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, more="[optimizer]\nname = 'sgd'\nlearning = 1\n")
    refused(hpctrain(2, "train", file), 2, "no key optimizer.learning", "lr")


def test_truncated_shard(tmp_path, data):
    shard = sorted((data / "train").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(hpctrain(2, "train", run_file(tmp_path / "run.toml", data)), 1, shard.name)


def test_flipped_byte(tmp_path, data):
    shard = sorted((data / "train").iterdir())[0]
    with h5py.File(shard) as file:
        at = file["fields/image"].id.get_chunk_info(1).byte_offset
    content = bytearray(shard.read_bytes())
    content[at + 7] ^= 4
    shard.write_bytes(content)
    refused(hpctrain(2, "train", run_file(tmp_path / "run.toml", data)), 1, shard.name, "image")


def test_missing_field(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data)
    done = hpctrain(2, "train", file, "--set", "data.input=imag")
    refused(done, 2, "data.input is 'imag'", "did you mean 'image'")


def test_missing_network_even_where_none_is_needed(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data)
    refused(hpctrain(2, "train", file, "--set", "parallel.network=no.toml"), 2, "no.toml")


def test_missing_data_set(tmp_path):
    refused(hpctrain(2, "train", run_file(tmp_path / "run.toml", tmp_path / "no")), 1, "no")


def test_divergence(tmp_path, data):
    file = run_file(tmp_path / "run.toml", data, "convnet")
    sets = ("--set", "optimizer.lr=1e200", "--set", "model.norm=none")
    refused(hpctrain(2, "train", file, *sets), 3, "lower optimizer.lr")


@pytest.mark.parametrize("where", ["main", "thread"])
def test_exception_on_one_rank_ends_all_with_its_traceback(where):
    script = str(ROOT / "tests" / "failing_rank.py")
    done = mpirun(2, script, where, timeout=20)
    assert done.returncode not in (0, 124), done.stdout
    assert "rank 1 of 2" in done.stdout
    assert "planted_failure" in done.stdout
    assert "ZeroDivisionError" in done.stdout
