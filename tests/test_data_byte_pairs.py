"""Byte-pair codes: their vocabulary, documents cut where no code is, memory, many ranks."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from hpctrain.data import open_dataset, pack, texts, verify
from hpctrain.data.kinds import ReadOptions, read_kind
from hpctrain.data.show import decoder, describe_value
from hpctrain.data.texts import read_texts
from hpctrain.errors import UsageError


def test_byte_pairs(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("the cat and the dog and the bird " * 20)
    (tmp_path / "b.txt").write_text("the dog")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    found = read_kind("text", paths, None, ReadOptions(pairs=270))
    more = {"tokens": found.tokens, "files": found.files, "shuffle": False}
    pack(found.fields, tmp_path / "set", **more)
    assert list(verify(tmp_path / "set")) == []
    dataset = open_dataset(tmp_path / "set")
    kept = (tmp_path / "set/text.tokenizer.json").read_text()
    tokenizer = tokenizers.Tokenizer.from_str(kept)
    text = dataset.read("train", "text")
    assert text.values.dtype == np.uint16 and text[1][-1] == 0
    assert tokenizer.decode(text[1][:-1].tolist()) == "the dog"
    assert len(text[0]) < 20 * 33 / 2 and dataset.fields["text"].tokens == 270
    assert "text.tokenizer.json" in dataset.manifest.provenance.arguments["files"]
    said = describe_value(dataset.fields["text"], text[1], decoder(dataset, "text"))
    assert said == f"'the dog' ({len(text[1])} codes)"
    said = describe_value(dataset.fields["text"], text[0], decoder(dataset, "text"))
    assert said.startswith("'the cat and the dog") and said.endswith(f"'... ({len(text[0])} codes)")


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(UsageError, match=r"pip install 'hpctrain\[text\]'"):
        read_texts([tmp_path / "a.txt"], pairs=300)


def some_text(seed, length):
    """Words, signs and white space in all mixtures, some of it beyond ASCII, some not UTF-8."""
    parts = ["a", "the", "dog's", "12", ".", "\n", "\n\n", "  ", " ", "\t", "\r\n", "é", "中",
             "\u00a0", "\u2003", "\ufeff", "_", "-->"]  # fmt: skip
    rng = random.Random(seed)
    text = "".join(rng.choices(parts, k=length)).encode()
    return text + b"\xff \xe4\xb8 x" * (seed % 2)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_document(seed, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 1 + seed)
    document = some_text(seed, 200)
    pieces = list(texts._pieces(document))
    assert len(pieces) > 3 and "".join(pieces) == document.decode("utf-8", "replace")
    assert list(texts._pieces(b"")) == []
    assert len(list(texts._pieces(b"x" * 1000))) == 1  # one word is never cut


@pytest.mark.parametrize("seed", range(20))
def test_pieces_give_the_codes_of_the_document(seed, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(some_text(3 * seed + number, 300))
    monkeypatch.setattr(texts, "PIECE", 1 << 30)
    whole = read_texts(paths, pairs=400)
    monkeypatch.setattr(texts, "PIECE", 1 + 3 * seed)
    pieces = read_texts(paths, pairs=400)
    assert pieces.vocabulary == whole.vocabulary and pieces.tokens == whole.tokens
    for i in range(3):
        np.testing.assert_array_equal(pieces.documents[i], whole.documents[i])


GROWTH = """
import random, resource, sys
from pathlib import Path
import tokenizers
from hpctrain.data.texts import read_texts
rng = random.Random(0)
words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(2000)]
paths = [Path(sys.argv[1]) / f"{number}.txt" for number in range(24)]
for path in paths:
    line = " ".join(rng.choices(words, k=1000)) + "\\n"
    path.write_text(line * ((2 << 20) // len(line)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
found = read_texts(paths, pairs=500)
size = sum(path.stat().st_size for path in paths)
print(size >> 20, found.tokens, len(found.documents.lengths), (peak() - before) >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """48 MiB of text in 24 documents, learned from and applied to in less than 12 MiB."""
    pytest.importorskip("tokenizers")
    command = [sys.executable, "-c", GROWTH, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    size, tokens, documents, grown = map(int, done.stdout.split())
    assert (size, tokens, documents) == (47, 500, 24)
    assert grown < 12


@pytest.mark.ranks(4)
def test_all_ranks_learn_the_same_vocabulary(comm, tmp_path):
    pytest.importorskip("tokenizers")
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        for number in range(8):
            (folder / f"{number}.txt").write_bytes(some_text(number, 2000))
    comm.Barrier()
    found = read_texts(sorted(folder.glob("*.txt")), pairs=500)
    ids = [found.documents[i].tolist() for i in range(8)]
    assert comm.bcast(found.vocabulary) == found.vocabulary and comm.bcast(ids) == ids
