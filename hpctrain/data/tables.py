"""Tables in text: CSV with a header to columns of numbers and of categories.

The file is read twice, some rows at a time: once to see which columns are numbers, once to convert
them. Memory is that of the numbers, not of the text.

Layer: data. Knows nothing of shards.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import DataError

__all__ = ["Categories", "read_table"]

ROWS = 8192  # rows converted at a time


@dataclass(frozen=True)
class Categories:
    """Strings as codes: sample i is vocab[codes[i]]; codes int32 (n,), vocab sorted."""

    codes: NDArray[np.int32]
    vocab: tuple[str, ...]

    @classmethod
    def of(cls, strings: NDArray[Any]) -> Categories:
        """From an array of strings (dtype U or S), of any shape."""
        text = np.char.decode(strings, "utf-8") if strings.dtype.kind == "S" else strings
        vocab, codes = np.unique(text, return_inverse=True)
        return cls(codes.reshape(text.shape).astype(np.int32), tuple(str(word) for word in vocab))

    def recoded(self, vocab: tuple[str, ...]) -> NDArray[np.int32]:
        """The codes in another vocabulary that contains this one."""
        place = {word: code for code, word in enumerate(vocab)}
        table = np.array([place[word] for word in self.vocab], np.int32)
        return table[self.codes] if len(table) else self.codes


def read_table(
    path: Path, name: str = "features", apart: Collection[str] = (), drop: Collection[str] = ()
) -> tuple[dict[str, NDArray[Any] | Categories], list[str]]:
    """Read a CSV (or TSV) file with a header line; plain or gzip.

    Returns the fields and the names of the columns of field `name`: float32 (n, columns), all
    columns of numbers but those in `apart`, which become fields of their own: int64 (n,) where all
    values are whole numbers, else float32. Columns of strings become `Categories`, each a field of
    its own. Columns in `drop` are not read. Raises `DataError` naming row and column.
    """
    with _open(path) as file:
        header = next(_reader(path, file), [])
    if not header or len(set(header)) != len(header):
        raise DataError(f"{path} must begin with a line of distinct column names, not {header}")
    used = [c for c in range(len(header)) if header[c] not in drop]
    numeric = _numeric_columns(path, header, used)
    matrix = [c for c in used if c in numeric and header[c] not in apart]
    blocks: list[NDArray[Any]] = []
    numbers: dict[int, list[NDArray[Any]]] = {
        c: [] for c in used if c in numeric and c not in matrix
    }
    texts: dict[int, list[str]] = {c: [] for c in used if c not in numeric}
    for _, rows in _chunks(path, len(header)):
        columns = list(zip(*rows, strict=True))
        if matrix:
            blocks.append(np.stack([_numbers(columns[c]).astype(np.float32) for c in matrix], 1))
        for c, parts in numbers.items():
            parts.append(_numbers(columns[c]))
        for c, words in texts.items():
            words.extend(columns[c])
    fields: dict[str, NDArray[Any] | Categories] = {}
    if matrix:
        fields[name] = np.concatenate(blocks)
    fields |= {header[c]: _categories(words) for c, words in texts.items()}
    fields |= {header[c]: _whole(np.concatenate(parts)) for c, parts in numbers.items()}
    return fields, [header[c] for c in matrix]


def _numeric_columns(path: Path, header: list[str], used: list[int]) -> set[int]:
    """Which columns hold numbers only. A column of numbers with gaps is an error."""
    texts: set[int] = set()  # columns with a cell that is no number
    gaps: dict[int, int] = {}  # column -> first row with an empty cell
    some = False
    for first, rows in _chunks(path, len(header)):
        some = True
        columns = list(zip(*rows, strict=True))
        for c in used:
            if c in texts or _are_numbers(columns[c]):
                continue
            for row, cell in enumerate(columns[c]):
                if not cell.strip():
                    gaps.setdefault(c, first + row)
                elif not _are_numbers((cell,)):
                    texts.add(c)
                    break
    if not some:
        raise DataError(f"{path} has a header but no rows")
    for c, row in gaps.items():
        if c not in texts:
            raise DataError(
                f"{path}: column {header[c]!r} is numeric but empty in row {row}; fill the gap or "
                f"drop the column (--drop) before packing"
            )
    return set(used) - texts


def _numbers(cells: tuple[str, ...]) -> NDArray[np.float64]:
    return np.array([float(cell) for cell in cells], np.float64)


def _are_numbers(cells: tuple[str, ...]) -> bool:
    try:
        for cell in cells:
            float(cell)
    except ValueError:
        return False
    return True


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    whole = np.isfinite(values).all() and (values == np.floor(values)).all()
    return values.astype(np.int64 if whole else np.float32)


def _categories(words: list[str]) -> Categories:
    vocab = tuple(sorted(set(words)))
    place = {word: code for code, word in enumerate(vocab)}
    return Categories(np.array([place[word] for word in words], np.int32), vocab)


def _chunks(path: Path, width: int) -> Iterator[tuple[int, list[list[str]]]]:
    """(number of the first row, rows), the header being row 1; each row has `width` cells."""
    with _open(path) as file:
        reader = _reader(path, file)
        next(reader)
        line = 2
        while rows := list(islice(reader, ROWS)):
            for number, row in enumerate(rows):
                if len(row) != width:
                    raise DataError(
                        f"{path}: row {line + number} has {len(row)} cells, the header {width}"
                    )
            yield line, rows
            line += len(rows)


def _reader(path: Path, file: TextIO) -> Iterator[list[str]]:
    separator = "\t" if ".tsv" in path.suffixes else ","
    return csv.reader(file, delimiter=separator)


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")
