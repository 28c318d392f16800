"""The file format: its bytes, what other tools make of it, and files that are no such files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoint_cases import ALONE, Run, layout_of, save_alone

from hpctrain.checkpoint import Part, read_tensors, save
from hpctrain.checkpoint.tensors import encode_header, read_header
from hpctrain.errors import CheckpointError

F32 = np.dtype("float32")


def test_header_bytes():
    header, tensors = encode_header([("a", (2, 3), F32), ("b", (), np.dtype("float64"))])
    text = (
        b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"F64","shape":[],"data_offsets":[24,32]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert header == len(padded).to_bytes(8, "little") + padded
    assert tensors["b"] == (np.dtype("float64"), (), len(header) + 24, len(header) + 32)
    assert encode_header([]) == (b"\x08\0\0\0\0\0\0\0{}      ", {})


def expected_tensors(run, step):
    found = {}
    for part in run.saved(step, run.whole()):
        for entry in part.layout.entries:
            value = part.array[entry.offset : entry.offset + entry.size].reshape(entry.shape)
            found[part.file, part.name(entry)] = value
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_written_files_are_read_by_name(tmp_path, dtype):
    run = Run(dtype)
    path = save_alone(tmp_path, 3, run=run)
    expected = expected_tensors(run, 3)
    tensors = {("optimizer", n): t for n, t in read_tensors(path / "optimizer.safetensors").items()}
    tensors |= {("parameters", n): t for n, t in read_tensors(path).items()}
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == dtype and not tensor.flags.writeable
        np.testing.assert_array_equal(tensor, expected[key])  # shapes too


def test_the_safetensors_package_reads_them(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    run = Run()
    path = save_alone(tmp_path, 3, run=run)
    expected = expected_tensors(run, 3)
    found = {
        (file, name): tensor
        for file in ("parameters", "optimizer")
        for name, tensor in package.load_file(path / f"{file}.safetensors").items()
    }
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[key])
    empty = layout_of("float32", [])
    path = save(tmp_path, 4, [Part("parameters", "", empty, None, (0, 0))], {}, ALONE)
    assert package.load_file(path / "parameters.safetensors") == {} == read_tensors(path)


def test_files_of_the_safetensors_package_are_read(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = {"x": np.arange(6, dtype="int64").reshape(2, 3), "y": np.array([True, False])}
    tensors["odd"] = np.arange(3, dtype="float16")
    package.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "np"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def text_of(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "ends within its header"),
        (b"\x08\0\0\0\0\0\0\0{}   ", "ends within its header"),
        (b"\x02\0\0\0\0\0\0\0[]", "damaged header"),
        (b"\x02\0\0\0\0\0\0\0{\xff", "damaged header"),
        (text_of({"a": {}}), "damaged header"),
        (text_of({"a": entry(0, 2, dtype="BF16")}) + b"..", "BF16, which NumPy does not have"),
        (text_of({"a": entry(0, 4)}) + b"...", "has .* bytes where its header says"),
        (text_of({"a": entry(0, 4)}) + b".....", "has .* bytes where its header says"),
        (text_of({"a": entry(0, 4, (2,))}) + b"....", "'a' is not where it must be"),
        (text_of({"a": entry(0, 4), "b": entry(8, 12)}) + b"." * 12, "'b' is not where"),
        (text_of({"a": entry(0, 4), "b": entry(2, 6)}) + b"." * 6, "'b' is not where"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, reason):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_header(path)
    with pytest.raises(CheckpointError, match=reason):
        read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="parameters.safetensors cannot be read: No such"):
        read_tensors(tmp_path)
