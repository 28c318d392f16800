"""Text to tokens: every document a sample of unequal length, closed by the code 0.

    bytes      uint8, the document's UTF-8 as it is; 0 ends it (text holds no zero byte)
    pairs      byte-pair codes of the `tokenizers` library (extra: text), uint16 or uint32;
               0 is the code of "<|end|>"

A file is a document, or each of its lines is one. Windows of a fixed length are cut by the loader,
so a data set does not fix the length it is trained with.

Layer: data. Knows nothing of shards.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.computed import ComputedRagged
from hpctrain.data.flat import collect
from hpctrain.data.ragged import Ragged
from hpctrain.data.tables import Categories
from hpctrain.errors import DataError, UsageError

__all__ = ["END", "Tokens", "read_texts", "text_files"]

END = "<|end|>"
PIECE = 1 << 13  # bytes encoded at once
WORD_END = re.compile(rb"[!-~](?=[ \t\n\r])")  # ASCII only: no character is cut
SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".tex", ".json", ".c", ".h", ".cu")


@dataclass(frozen=True)
class Tokens:
    """Documents as codes; `tokens` is the number of codes, `vocabulary` the tokenizer's file."""

    documents: Ragged | ComputedRagged
    labels: Categories | None
    tokens: int
    vocabulary: str | None = None


def text_files(folder: Path) -> list[Path]:
    """The files of text below a folder, in the order of their names; plain or .gz."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and Path(path.name.removesuffix(".gz")).suffix in SUFFIXES
    )
    if not found:
        raise DataError(f"{folder} has no files of text ({', '.join(SUFFIXES)}, also with .gz)")
    return found


def read_texts(
    paths: Sequence[Path],
    lines: bool = False,
    pairs: int | None = None,
    pattern: str | None = None,
) -> Tokens:
    """Read files of text.

    Args:
        lines: every line that is not empty is a document, not every file.
        pairs: the size of a byte-pair vocabulary to be trained on these documents; None: bytes.
        pattern: a regular expression whose first group, found in a document's path, is its label.

    Bytes of whole files are read when they are packed; all else is made now, and kept in a file
    without a name in $TMPDIR. Memory is that of one file and its codes, and where byte pairs are
    learned, of all different words.
    """
    labels = _labels(paths, pattern) if pattern else None
    if pairs is not None:
        return _paired(paths, lines, pairs, labels)
    if not lines:
        lengths = np.array([len(_content(path)) + 1 for path in paths], np.int64)
        documents = ComputedRagged(
            lengths, np.dtype(np.uint8), lambda i: _codes(_content(paths[i]))
        )
        return Tokens(documents, labels, 256)
    if labels is not None:
        raise UsageError("labels come from the paths of files: lines have none")
    content = (_codes(line) for path in paths for line in _lines(path))
    return Tokens(collect(content, np.uint8), None, 256)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _lines(path: Path) -> Iterator[bytes]:
    return (line for line in _content(path).splitlines() if line)


def _codes(document: bytes) -> NDArray[np.uint8]:
    codes = np.frombuffer(document + b"\0", np.uint8)
    if (codes[:-1] == 0).any():
        raise DataError(
            f"a document that begins with {document[:40]!r} holds a zero byte: it is not text"
        )
    return codes


def _labels(paths: Sequence[Path], pattern: str) -> Categories:
    words = [first_group(pattern, path.as_posix(), str(path)) for path in paths]
    return Categories.of(np.array(words))


def first_group(pattern: str, text: str, where: str) -> str:
    """The first group of a regular expression in `text`. Raises `DataError` where it is not."""
    try:
        match = re.search(pattern, text)
        found = match[1] if match else None
    except (re.error, IndexError) as error:
        raise UsageError(
            f"the pattern {pattern!r} is not a regular expression with a group: {error}"
        ) from error
    if found is None:
        raise DataError(f"{where}: {text[:80]!r} does not hold the pattern {pattern!r}")
    return found


def _paired(paths: Sequence[Path], lines: bool, size: int, labels: Categories | None) -> Tokens:
    tokenizers = _library()
    if lines and labels is not None:
        raise UsageError("labels come from the paths of files: lines have none")
    documents: Callable[[], Iterator[bytes]] = lambda: (  # noqa: E731
        document for path in paths for document in (_lines(path) if lines else (_content(path),))
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for text in documents() for p in _pieces(text)), trainer)
    count = tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint16 if count <= 1 << 16 else np.uint32)
    codes = (_encoded(tokenizer, text, dtype) for text in documents())
    return Tokens(collect(codes, dtype), labels, count, tokenizer.to_str())


def _encoded(tokenizer: Any, document: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A document's codes, and the one that closes it."""
    codes = bytearray()  # grows in place
    for piece in _pieces(document):
        codes += np.array(tokenizer.encode(piece, add_special_tokens=False).ids, dtype).tobytes()
    codes += bytes(dtype.itemsize)
    return np.frombuffer(codes, dtype)


def _pieces(document: bytes) -> Iterator[str]:
    """A document in pieces of 8 KiB or a little more, cut where no code is.

    The library takes 80 bytes of memory for each byte that it encodes at once, and learns from 256
    texts at once (measured, 0.23: 12 MiB as one text grow the process by 970 MiB, in pieces by 7).
    White space is only at the begin of its words, so that the place before white space that
    follows a letter or sign is between two words, whatever comes after it.
    """
    begin = 0
    while begin < len(document):
        found = WORD_END.search(document, begin + PIECE)
        end = found.end() if found else len(document)
        yield document[begin:end].decode("utf-8", "replace")
        begin = end


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UsageError(
            "byte pairs need the library `tokenizers`: pip install 'hpctrain[text]'; or pack bytes"
        ) from None
    return tokenizers
