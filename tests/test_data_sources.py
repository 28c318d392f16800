"""Reading .npy, .npz, idx-ubyte and CSV files."""

from __future__ import annotations

import gzip
import hashlib
import struct

import numpy as np
import pytest

from hpctrain.data.sources import describe, read_source
from hpctrain.data.tables import Categories, read_table
from hpctrain.errors import DataError


def write_idx(path, array, kind=8, packed=False):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def write(path, text):
    path.write_text(text)
    return path


def test_npy_is_mapped(tmp_path):
    array = np.arange(12).reshape(4, 3)
    np.save(tmp_path / "image.npy", array)
    found = read_source(tmp_path / "image.npy").fields
    assert list(found) == ["image"] and isinstance(found["image"], np.memmap)
    np.testing.assert_array_equal(found["image"], array)
    assert list(read_source(tmp_path / "image.npy", "x").fields) == ["x"]


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), word=np.array(["a", "b", "a"]))
    found = read_source(tmp_path / "a.npz").fields
    assert list(found) == ["x", "word"] and found["word"].tolist() == ["a", "b", "a"]
    with pytest.raises(DataError, match="holds 2 arrays"):
        read_source(tmp_path / "a.npz", "x")
    np.savez(tmp_path / "b.npz", x=np.arange(3))
    assert list(read_source(tmp_path / "b.npz", "y").fields) == ["y"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [(8, "u1"), (11, ">i2"), (14, ">f8")])
def test_idx(tmp_path, kind, dtype, packed):
    array = np.arange(24).reshape(4, 3, 2).astype(dtype)
    name = "train-images-idx3-ubyte" + (".gz" if packed else "")
    found = read_source(write_idx(tmp_path / name, array, kind, packed)).fields
    np.testing.assert_array_equal(found["train-images-idx3-ubyte"], array)
    assert isinstance(found["train-images-idx3-ubyte"], np.memmap) != packed


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jpg", b"\xff\xd8\xff\xe0", "no known kind; known are .npy"),
        ("a", b"", "no known kind"),
        ("a-ubyte", b"\0\0\x08\x01\0\0\0\x05abc", "promises 5 bytes, it has 3"),
        ("a-ubyte", b"\0\0\x08\x03\0\0", "damaged"),
        ("a.gz", b"\x1f\x8b\x08garbage", "cannot read"),
        ("a.npy", b"garbage", "cannot read"),
        ("a.npz", b"garbage", "cannot read"),
        ("a.csv", b"", "distinct column names"),
        ("a.csv", b"x,x\n1,2\n", "distinct column names"),
        ("a.csv", b"x,y\n", "no rows"),
        ("a.csv", b"x,y\n1,2\n3\n", "row 3 has 1 cells, the header 2"),
        ("a.csv", b"x\n\xff\xfe\n", "cannot read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read_source(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read_source(tmp_path / "a.npy")


def test_objects_are_refused(tmp_path):
    """Loading them would run code of the file's author."""
    np.save(tmp_path / "a.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot read"):
        read_source(tmp_path / "a.npy")


TABLE = (
    "id,age,city,income,weight,label\n1,30,Oslo,1e3,1,yes\n2,40.5,Rome,-2,2,no\n3,7,Oslo,0,3,no\n"
)


def test_table(tmp_path):
    path = write(tmp_path / "a.csv", TABLE)
    content = read_source(path, None, {"label", "weight"}, {"id"})
    assert content.columns == {"features": ["age", "income"]}
    features = content.fields["features"]
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, np.float32([[30, 1000], [40.5, -2], [7, 0]]))
    assert content.fields["city"].vocab == ("Oslo", "Rome")
    assert content.fields["city"].codes.tolist() == [0, 1, 0]
    assert content.fields["label"].vocab == ("no", "yes")
    assert content.fields["label"].codes.tolist() == [1, 0, 0]
    assert content.fields["weight"].tolist() == [1, 2, 3]
    assert content.fields["weight"].dtype == np.int64


def test_numeric_label_and_name_of_the_matrix(tmp_path):
    path = write(tmp_path / "a.tsv", "a\ty\n1\t0.5\n2\t1\n")
    fields, columns = read_table(path, "x", {"y"})
    assert columns == ["a"] and fields["x"].tolist() == [[1], [2]]
    assert fields["y"].dtype == np.float32 and fields["y"].tolist() == [0.5, 1]


def test_packed_table_longer_than_one_reading(tmp_path):
    """A column is text if one cell of 20,000 is."""
    lines = [f'{i},{"late" if i == 19_000 else i},"a, b"' for i in range(20_000)]
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress("\n".join(["n,mixed,quoted", *lines]).encode()))
    fields, columns = read_table(path)
    assert columns == ["n"] and fields["features"][:, 0].tolist() == list(range(20_000))
    assert len(fields["mixed"].vocab) == 20_000 and fields["quoted"].vocab == ("a, b",)
    assert fields["mixed"].vocab[fields["mixed"].codes[19_000]] == "late"


def test_missing_numbers_and_money(tmp_path):
    text = """a,paid,state,none,label
1,"$1,234.00",NY,,yes
,-$5,,NA,no
NA,"2,000.5",CA,,yes
4,?,NY,,no
"""
    fields, columns = read_table(write(tmp_path / "a.csv", text))
    assert columns == ["a", "paid"]
    nan = np.nan
    expected = np.float32([[1, 1234], [nan, -5], [nan, 2000.5], [4, nan]])
    np.testing.assert_array_equal(fields["features"], expected)
    assert fields["features_missing"].tolist() == [[0, 0], [1, 0], [1, 0], [0, 1]]
    assert fields["features_missing"].dtype == np.uint8
    assert fields["state"].vocab == ("", "CA", "NY") and fields["none"].vocab == ("", "NA")
    whole = read_table(write(tmp_path / "b.csv", "a\n1\n2\n"))[0]
    assert list(whole) == ["features"]


def test_rows_without_what_is_required_are_left_out(tmp_path):
    path = write(tmp_path / "a.csv", "a,label\n1,x\n2,\nword,\n3,y\n")
    fields, columns = read_table(path, require=["label"])
    assert columns == ["a"] and fields["features"][:, 0].tolist() == [1, 3]
    assert fields["label"].vocab == ("x", "y")
    with pytest.raises(DataError, match="no column 'labl'.*'label'"):
        read_table(path, require=["labl"])
    with pytest.raises(DataError, match="no rows with label"):
        read_table(write(path, "a,label\n1,\n"), require=["label"])


@pytest.mark.parametrize("cell", ["1,23", "$", "1.2.3", "12a", "$-"])
def test_what_is_no_number(tmp_path, cell):
    fields, columns = read_table(write(tmp_path / "a.csv", f'a,b\n"{cell}",1\n7,2\n'))
    assert columns == ["b"] and cell in fields["a"].vocab


def test_categories_in_another_vocabulary():
    found = Categories.of(np.array([b"b", b"a", b"b"]))
    assert found.vocab == ("a", "b") and found.codes.tolist() == [1, 0, 1]
    assert found.recoded(("0", "a", "b")).tolist() == [2, 1, 2]


def test_describe_a_folder(tmp_path):
    (tmp_path / "d/e").mkdir(parents=True)
    write(tmp_path / "d/a", "x")
    write(tmp_path / "d/e/b", "yz")
    first = describe(tmp_path / "d")
    assert (first.name, first.bytes) == ("d", 3)
    write(tmp_path / "d/e/b", "zy")
    assert describe(tmp_path / "d").sha256 != first.sha256


def test_describe(tmp_path):
    path = write(tmp_path / "a.csv", "x\n1\n")
    found = describe(path)
    digest = hashlib.sha256(b"x\n1\n").hexdigest()
    assert (found.name, found.bytes, found.sha256) == ("a.csv", 4, digest)
