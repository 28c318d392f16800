"""Readers of text, images, sequences and volumes, and packing what they read."""

from __future__ import annotations

import gzip
import re
import struct
import sys

import numpy as np
import pytest

from hpctrain.data import open_dataset, pack, verify
from hpctrain.data.blast import BlastDatabase
from hpctrain.data.kinds import ReadOptions, files_of, kind_of, read_kind
from hpctrain.data.sequences import LETTERS, count_kmers, read_sequences
from hpctrain.data.texts import first_group, read_texts
from hpctrain.data.volumes import read_header, read_values, read_volumes
from hpctrain.errors import DataError, UsageError


def packed(tmp_path, content, **more):
    """Pack a reader's fields unshuffled and open the data set."""
    pack(content, tmp_path / "set", shuffle=False, **more)
    assert list(verify(tmp_path / "set")) == []
    return open_dataset(tmp_path / "set")


# ---- text ----


@pytest.fixture
def documents(tmp_path):
    for name, text in {
        "a/one.txt": "hello\nworld\n",
        "b/two.py": "x = 1\n\n",
        "b/no.bin": "?",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a/three.txt.gz").write_bytes(gzip.compress("ünï".encode()))
    return tmp_path


def test_text_as_bytes(documents, tmp_path):
    options = ReadOptions(pattern=r"/([ab])/[a-z.]+$")
    found = read_kind("text", [documents], None, options)
    dataset = packed(tmp_path, found.fields, tokens=found.tokens)
    text = dataset.read("train", "text")
    assert [text[i].tobytes().decode() for i in range(3)] == [
        "hello\nworld\n\0", "ünï\0", "x = 1\n\n\0"
    ]  # fmt: skip
    field = dataset.fields["text"]
    assert (field.dtype, field.shape, field.tokens) == ("uint8", "ragged", 256)
    assert dataset.fields["label"].vocab == ("a", "b")
    assert dataset.read("train", "label").tolist() == [0, 0, 1]


def test_lines_are_documents(documents):
    found = read_texts([documents / "a/one.txt", documents / "b/two.py"], lines=True)
    lines = [found.documents[i].tobytes() for i in range(len(found.documents))]
    assert lines == [b"hello\0", b"world\0", b"x = 1\0"]


def test_what_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\0c")
    with pytest.raises(DataError, match="zero byte: it is not text"):
        packed(tmp_path, {"text": read_texts([tmp_path / "a.txt"]).documents})
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8bgarbage")
    with pytest.raises(DataError, match=r"cannot read .*b.txt.gz"):
        read_texts([tmp_path / "b.txt.gz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files of text"):
        read_kind("text", [tmp_path / "empty"], None, ReadOptions())


def test_a_file_that_changes_while_it_is_packed(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    documents = read_texts([tmp_path / "a.txt"]).documents
    (tmp_path / "a.txt").write_text("abcd")
    with pytest.raises(DataError, match="has 5 values now and had 4"):
        pack({"text": documents}, tmp_path / "set")


def test_patterns():
    assert first_group("([0-9]+)", "ab12", "x") == "12"
    with pytest.raises(DataError, match="x: 'abc' does not hold"):
        first_group("([0-9])", "abc", "x")
    with pytest.raises(UsageError, match="with a group"):
        first_group("[a-z]", "abc", "x")


# ---- images ----


@pytest.fixture
def photos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number, (folder, size) in enumerate([("cat", (5, 4)), ("cat", (5, 4)), ("dog", (5, 4))]):
        (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
        pixels = np.full((*size, 3), 10 * number, np.uint8)
        pixels[0, 0] = [255, 0, 7]
        image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{number}.png")
    return tmp_path / "photos"


def test_images_of_one_size(photos, tmp_path):
    found = read_kind("images", [photos], None, ReadOptions())
    dataset = packed(tmp_path, found.fields)
    image = dataset.read("train", "image")
    assert image.shape == (3, 5, 4, 3) and image[:, 1, 1, 2].tolist() == [0, 10, 20]
    assert image[1, 0, 0].tolist() == [255, 0, 7]
    assert dataset.fields["label"].vocab == ("cat", "dog") and dataset.classes == 2


def test_images_resized_and_grey(photos):
    found = read_kind("images", [photos], "x", ReadOptions(size=(8, 6), channels=1))
    assert found.fields["x"].shape == (3, 8, 6, 1)
    assert found.fields["x"][np.array([2])][0, 7, 5, 0] == 20


def test_images_of_unlike_sizes(photos, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((2, 7), 9, np.uint8)).save(photos / "dog/wide.png")
    dataset = packed(tmp_path, read_kind("images", [photos], None, ReadOptions()).fields)
    image, shape = dataset.read("train", "image"), dataset.read("train", "image_shape")
    assert shape.tolist() == [[5, 4, 3]] * 3 + [[2, 7, 3]]
    np.testing.assert_array_equal(image[3].reshape(2, 7, 3), np.full((2, 7, 3), 9))


def test_a_list_of_images(photos):
    (photos / "list.csv").write_text("file,label\ndog/2.png,woof\ncat/0.png,meow\n")
    found = read_kind("images", [photos / "list.csv"], None, ReadOptions()).fields
    assert found["label"].vocab == ("meow", "woof") and found["label"].codes.tolist() == [1, 0]
    assert found["image"][np.array([0])][0, 1, 1, 0] == 20
    (photos / "list.csv").write_text("file\nx\n")
    with pytest.raises(DataError, match="columns file and label"):
        read_kind("images", [photos / "list.csv"], None, ReadOptions())


def test_what_is_no_image(photos, tmp_path):
    (photos / "cat/bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad.png is no image"):
        read_kind("images", [photos], None, ReadOptions())
    content = (photos / "cat/1.png").read_bytes()
    (photos / "cat/bad.png").write_bytes(content[: len(content) - 30])
    with pytest.raises(DataError, match=r"bad.png cannot be decoded"):
        packed(tmp_path, read_kind("images", [photos], None, ReadOptions()).fields)


def test_images_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.png").touch()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"pip install 'hpctrain\[images\]'"):
        read_kind("images", [tmp_path], None, ReadOptions())


# ---- sequences ----


def letters(codes):
    return "".join(LETTERS[code] for code in codes)


def test_fasta(tmp_path):
    text = ">s1 Bacillus subtilis\nACGT\nacgu\n\n>s2 Vibrio sp\nNNRA\n>s3 none\nT\n"
    (tmp_path / "a.fa.gz").write_bytes(gzip.compress(text.encode()))
    options = ReadOptions(pattern=r" ([A-Z][a-z]+) ")
    found = read_kind("sequences", [tmp_path / "a.fa.gz"], None, options)
    dataset = packed(tmp_path, found.fields, vocabularies=found.vocabularies)
    sequence = dataset.read("train", "sequence")
    assert [letters(sequence[i]) for i in range(2)] == ["ACGTACGT", "NNNA"]
    assert dataset.fields["label"].vocab == ("Bacillus", "Vibrio")
    assert dataset.fields["sequence"].vocab == LETTERS


def test_labels_need_enough_sequences(tmp_path):
    lines = [f">{name} x\nACGT\n" for name in ["A"] * 3 + ["B"] * 2 + ["C"]]
    (tmp_path / "a.fa").write_text("".join(lines))
    found = read_sequences([tmp_path / "a.fa"], pattern="^([A-Z]) ", least=2)
    assert found["label"].vocab == ("A", "B") and len(found["sequence"]) == 5
    with pytest.raises(DataError, match="no label of .* has 9 sequences"):
        read_sequences([tmp_path / "a.fa"], pattern="^([A-Z]) ", least=9)
    with pytest.raises(DataError, match="no header holds"):
        read_sequences([tmp_path / "a.fa"], pattern="^([0-9]) ")
    with pytest.raises(UsageError, match="no group"):
        read_sequences([tmp_path / "a.fa"], pattern="x")


def test_kmers(tmp_path):
    sequence = np.array([LETTERS.index(c) for c in "ACGTNACGA"], np.uint8)
    counts = count_kmers(sequence, 2)
    found = {a + b: counts[4 * i + j] for i, a in enumerate("ACGT") for j, b in enumerate("ACGT")}
    expected = {"AC": 2, "CG": 2, "GT": 1, "GA": 1}
    assert {word: n for word, n in found.items() if n} == expected and counts.dtype == np.uint16
    assert count_kmers(sequence[:1], 2).sum() == 0
    (tmp_path / "a.fa").write_text(">a\nACGT\n>b\nAAAA\n")
    kmers = packed(tmp_path, read_sequences([tmp_path / "a.fa"], kmers=1)).read("train", "kmers")
    assert kmers.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0]]
    with pytest.raises(UsageError, match="k = 9"):
        read_sequences([tmp_path / "a.fa"], kmers=9)


@pytest.mark.parametrize(
    ("text", "says"),
    [("ACGT\n", "does not begin with a >"), ("", "no sequences"), (">a\nAC!T\n", "letter '!'")],
)
def test_what_is_no_fasta(tmp_path, text, says):
    (tmp_path / "a.fa").write_text(text)
    with pytest.raises(DataError, match=says):
        read_sequences([tmp_path / "a.fa"])


def write_blast(base, content, version=4):
    """A BLAST database of (title, letters), unknown letters as runs in the short or long form."""
    nhr, nsq, titles, starts, ends = b"", b"\0", [0], [], []
    for number, (title, text) in enumerate(content):
        size = len(title)
        length = bytes([size]) if size < 128 else b"\x82" + struct.pack(">H", size)
        nhr += b"\x30\x80\x30\x80\xa0\x80\x1a" + length + title.encode() + b"\0" * 8
        titles.append(len(nhr))
        starts.append(len(nsq))
        codes = [max("ACGT".find(c), 0) for c in text]
        full = len(codes) // 4 * 4
        for i in range(0, full, 4):
            a, b, c, d = codes[i : i + 4]
            nsq += bytes([a << 6 | b << 4 | c << 2 | d])
        rest = codes[full:] + [0] * (3 - len(codes[full:]))
        nsq += bytes([rest[0] << 6 | rest[1] << 4 | rest[2] << 2 | len(codes) - full])
        ends.append(len(nsq))
        runs = [(m.start(), m.end() - m.start()) for m in re.finditer("N+", text)]
        if runs and number % 2:
            words = [w for at, n in runs for w in (15 << 28 | n - 1 << 16, at)]
            nsq += struct.pack(f">{1 + len(words)}I", 1 << 31 | len(words), *words)
        elif runs:
            words = [15 << 28 | n - 1 << 24 | at for at, n in runs]
            nsq += struct.pack(f">{1 + len(words)}I", len(words), *words)
    starts.append(len(nsq))
    ends.append(len(nsq))
    nin = struct.pack(">2i", version, 0) + struct.pack(">i", 3) + b"set" + struct.pack(">i", 4)
    nin += b"date" + struct.pack(">i", len(content)) + struct.pack("<q", 1) + struct.pack(">i", 9)
    for table in (titles, starts, ends):
        nin += struct.pack(f">{len(table)}I", *table)
    for suffix, raw in {".nin": nin, ".nhr": nhr, ".nsq": nsq}.items():
        (base.parent / (base.name + suffix)).write_bytes(raw)


def test_blast(tmp_path):
    content = [
        ("first one", "ACGTAC"),
        ("x" * 200 + " Vibrio", "NNACGTNA"),
        ("c", "TTNNG"),
        ("d", "A"),
    ]
    write_blast(tmp_path / "base.fasta", content)
    database = BlastDatabase(tmp_path / "base.fasta")
    assert database.headers() == [title for title, _ in content]
    assert [letters(database[i]) for i in range(4)] == [text for _, text in content]
    assert database.lengths.tolist() == [len(text) for _, text in content]
    found = read_kind("sequences", [tmp_path / "base.fasta.nin"], None, ReadOptions())
    assert letters(packed(tmp_path, found.fields).read("train", "sequence")[1]) == "NNACGTNA"


def test_what_is_no_blast_database(tmp_path):
    write_blast(tmp_path / "a", [("t", "ACGT")], version=5)
    with pytest.raises(DataError, match="version 5"):
        BlastDatabase(tmp_path / "a")
    write_blast(tmp_path / "a", [("t", "ACGT")])
    (tmp_path / "a.nsq").write_bytes(b"\0")
    with pytest.raises(DataError, match="shorter than .nin promises"):
        BlastDatabase(tmp_path / "a")
    (tmp_path / "a.nin").write_bytes((tmp_path / "a.nin").read_bytes()[:30])
    with pytest.raises(DataError, match="a.nin is damaged"):
        BlastDatabase(tmp_path / "a")
    with pytest.raises(DataError, match="cannot read .*b.nin"):
        BlastDatabase(tmp_path / "b")


# ---- volumes ----


def write_nifti(path, values, order="<", slope=0.0, intercept=0.0, kind=None):
    kinds = {"uint8": 2, "int16": 4, "float32": 16}
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, values.ndim, *values.shape, *[1] * (7 - values.ndim))
    struct.pack_into(f"{order}h", header, 70, kinds[values.dtype.name] if kind is None else kind)
    struct.pack_into(f"{order}3f", header, 108, 352, slope, intercept)
    header[344:348] = b"n+1\0"
    raw = bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti(tmp_path, order, name):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4) * 100
    path = write_nifti(tmp_path / name, values, order)
    header = read_header(path)
    assert header.shape == (2, 3, 4) and not header.scaled
    np.testing.assert_array_equal(read_values(path, header), values)
    assert read_values(path, header).dtype == np.int16
    scaled = write_nifti(path, values, order, slope=0.5, intercept=-1)
    found = read_values(scaled, read_header(scaled))
    np.testing.assert_array_equal(found, values * np.float32(0.5) - 1)
    assert found.dtype == np.float32


def test_volumes_are_packed(tmp_path):
    values = [
        np.random.default_rng(i).integers(0, 99, (4, 5, 6)).astype(np.uint8) for i in range(3)
    ]
    paths = [write_nifti(tmp_path / f"{i}.nii.gz", v) for i, v in enumerate(values)]
    field = packed(tmp_path, read_kind("volumes", paths, None, ReadOptions()).fields)
    np.testing.assert_array_equal(field.read("train", "volume"), values)


@pytest.mark.parametrize("order", ["<", ">"])
def test_volumes_in_slabs(tmp_path, order):
    """Planes along the last dim; 2 of 11 are left over, and 1 of 4."""
    rng = np.random.default_rng(2)
    whole = [rng.integers(0, 99, (3, 5, depth)).astype(np.int16) for depth in (11, 4)]
    paths = [tmp_path / "a.nii.gz", tmp_path / "b.nii"]
    for path, values in zip(paths, whole, strict=True):
        write_nifti(path, values, order, slope=0.5, intercept=1.0)
    slabs = [whole[0][..., i : i + 3] for i in (0, 3, 6)] + [whole[1][..., :3]]
    dataset = packed(tmp_path, read_kind("volumes", paths, None, ReadOptions(slab=3)).fields)
    expected = np.stack(slabs) * np.float32(0.5) + 1
    np.testing.assert_array_equal(dataset.read("train", "volume"), expected)
    with pytest.raises(UsageError, match="b.nii has 4 planes: it cannot be cut into slabs of 5"):
        read_volumes(paths, slab=5)


def test_volumes_of_unlike_shapes(tmp_path):
    values = [np.full((2, 3, i + 1), i, np.uint8) for i in range(2)]
    paths = [write_nifti(tmp_path / f"{i}.nii", v) for i, v in enumerate(values)]
    dataset = packed(tmp_path, read_volumes(paths))
    assert dataset.read("train", "volume_shape").tolist() == [[2, 3, 1], [2, 3, 2]]
    assert dataset.read("train", "volume")[1].tolist() == [1] * 12


def test_what_is_no_nifti(tmp_path):
    values = np.zeros((2, 2, 2), np.uint8)
    path = write_nifti(tmp_path / "a.nii", values)
    content = path.read_bytes()
    for changed, says in [
        (content[:-3], "truncated: 5 of 8 bytes"),
        (b"\0" * 400, "no NIfTI-1 file: its header"),
        (content[:344] + b"abc\0" + content[348:], "its magic is"),
        (content[:344] + b"ni1\0" + content[348:], r"\.img"),
        (content[:40] + b"\0" * 16 + content[56:], "has the dims"),
        (content[:20], "truncated"),
    ]:
        path.write_bytes(changed)
        with pytest.raises(DataError, match=says):
            read_values(path, read_header(path))
    with pytest.raises(DataError, match="type 1792"):
        read_header(write_nifti(path, values, kind=1792))
    with pytest.raises(DataError, match="there is no file"):
        read_header(tmp_path / "none.nii")


# ---- which reader ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv.gz", "table"),
        ("a.npy", "array"),
        ("train-images-idx3-ubyte.gz", "array"),
        ("a.nii.gz", "volumes"),
        ("a.fasta.gz", "sequences"),
        ("a.fasta.nin", "sequences"),
        ("a.py", "text"),
    ],
)
def test_kinds_follow_from_names(tmp_path, name, kind):
    assert kind_of(tmp_path / name) == kind


def test_files_of_a_source(tmp_path):
    assert files_of(tmp_path / "a.csv") == [tmp_path / "a.csv"]
    assert [path.name for path in files_of(tmp_path / "a.fasta.nsq")] == [
        "a.fasta.nin", "a.fasta.nhr", "a.fasta.nsq"
    ]  # fmt: skip


def test_kinds_that_are_asked_for(tmp_path):
    assert kind_of(tmp_path) == "images" and kind_of(tmp_path, "text") == "text"
    with pytest.raises(UsageError, match="not as 'word'"):
        kind_of(tmp_path, "word")
    with pytest.raises(DataError, match="there is no file"):
        read_kind("text", [tmp_path / "a.txt"], None, ReadOptions())
