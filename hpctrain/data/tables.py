"""Tables in text: CSV with a header to columns of numbers and of categories.

The file is read twice, some rows at a time: once to see which columns are numbers, once to convert
them. Memory is that of the numbers, not of the text.

Layer: data. Knows nothing of shards.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import DataError, nearest

__all__ = ["Categories", "read_table"]

ROWS = 8192  # rows converted at a time
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
MONEY = re.compile(r"(-?)[$\u20ac\u00a3]?\s*(\d{1,3}(?:,\d{3})*(?:\.\d*)?|\d+(?:\.\d*)?)")


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

    def ordered(self) -> Categories:
        """The same strings with a sorted vocabulary."""
        vocab = tuple(sorted(self.vocab))
        return Categories(self.recoded(vocab), vocab)

    def recoded(self, vocab: tuple[str, ...]) -> NDArray[np.int32]:
        """The codes in another vocabulary that contains this one."""
        place = {word: code for code, word in enumerate(vocab)}
        table = np.array([place[word] for word in self.vocab], np.int32)
        return table[self.codes] if len(table) else self.codes


def read_table(
    path: Path,
    name: str = "features",
    apart: Collection[str] = (),
    drop: Collection[str] = (),
    require: Collection[str] = (),
) -> tuple[dict[str, NDArray[Any] | Categories], list[str]]:
    """Read a CSV (or TSV) file with a header line; plain or gzip.

    Returns the fields and the names of the columns of field `name`: float32 (n, columns), all
    columns of numbers but those in `apart`, which become fields of their own: int64 (n,) where all
    values are whole numbers, else float32. Columns of strings become `Categories`, each a field of
    its own. Columns in `drop` are not read; rows with an empty cell in a column of `require` are
    left out. Missing numbers are NaN; then a field "<name>_missing",
    uint8 (n, columns), is 1 where they are. Raises `DataError` naming row and column.

    Numbers may be written as $1,234.00; missing are empty cells, NA, N/A, NaN, null, None and ?.
    """
    header = _header(path)
    wrong = sorted(set(require) - set(header))
    if wrong:
        raise DataError(f"{path} has no column {wrong[0]!r}{nearest(wrong[0], header)}")
    needed = [header.index(column) for column in require]
    used = [c for c in range(len(header)) if header[c] not in drop]
    numeric = _numeric_columns(path, header, used, needed)
    matrix = [c for c in used if c in numeric and header[c] not in apart]
    blocks: list[NDArray[Any]] = []
    numbers: dict[int, list[NDArray[Any]]] = {
        c: [] for c in used if c in numeric and c not in matrix
    }
    texts = {c: _Words() for c in used if c not in numeric}
    for rows in _chunks(path, len(header), needed):
        columns = list(zip(*rows, strict=True))
        if matrix:
            blocks.append(np.stack([_numbers(columns[c]).astype(np.float32) for c in matrix], 1))
        for c, parts in numbers.items():
            parts.append(_numbers(columns[c]))
        for c, words in texts.items():
            words.add(columns[c])
    fields: dict[str, NDArray[Any] | Categories] = {}
    if matrix:
        table = np.concatenate(blocks)
        fields[name] = table
        missing = np.isnan(table)
        if missing.any():
            fields[f"{name}_missing"] = missing.astype(np.uint8)
    fields |= {header[c]: words.categories() for c, words in texts.items()}
    fields |= {header[c]: _whole(np.concatenate(parts)) for c, parts in numbers.items()}
    return fields, [header[c] for c in matrix]


def _header(path: Path) -> list[str]:
    """The names of the columns."""
    with _open(path) as file:
        header = next(_reader(path, file), [])
    if not header or len(set(header)) != len(header):
        raise DataError(f"{path} must begin with a line of distinct column names, not {header}")
    if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
        raise DataError(
            f"{path}: the only column is called {header[0][:80]!r}, as if cells were separated by "
            f"{other[0]!r}; .csv is read with commas, .tsv with tabs"
        )
    return header


def _numeric_columns(path: Path, header: list[str], used: list[int], needed: list[int]) -> set[int]:
    """Which columns hold numbers: at least one, and nothing that is neither number nor missing."""
    texts: set[int] = set()  # columns with a cell that is no number
    known: set[int] = set()  # columns with a number
    some = False
    for rows in _chunks(path, len(header), needed):
        some = True
        columns = list(zip(*rows, strict=True))
        for c in used:
            if c in texts:
                continue
            values = _try_numbers(columns[c])
            if values is None:
                texts.add(c)
            elif not np.isnan(values).all():
                known.add(c)
    if not some:
        lacking = f" with {' and '.join(header[c] for c in needed)}" if needed else ""
        raise DataError(f"{path} has a header but no rows{lacking}")
    return known - texts


def _numbers(cells: tuple[str, ...]) -> NDArray[np.float64]:
    values = _try_numbers(cells)
    if values is None:
        raise DataError(f"a column of numbers changed while it was read: {cells[:3]}")
    return values


def _try_numbers(cells: tuple[str, ...]) -> NDArray[np.float64] | None:
    """The numbers of a column, NaN where they are missing, or None if a cell is a word."""
    try:
        return np.array([float(cell) for cell in cells], np.float64)
    except ValueError:
        pass
    try:
        return np.array([_number(cell) for cell in cells], np.float64)
    except ValueError:
        return None


def _number(cell: str) -> float:
    cell = cell.strip()
    if cell.lower() in MISSING:
        return math.nan
    match = MONEY.fullmatch(cell)
    return float(match[1] + match[2].replace(",", "") if match else cell)


class _Words:
    """A column of words as codes, in the order in which the words first came."""

    def __init__(self) -> None:
        self._place: dict[str, int] = {}
        self._codes = array("i")

    def add(self, cells: tuple[str, ...]) -> None:
        place = self._place
        self._codes.extend([place.setdefault(cell, len(place)) for cell in cells])

    def categories(self) -> Categories:
        return Categories(np.array(self._codes, np.int32), tuple(self._place)).ordered()


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    whole = np.isfinite(values).all() and (values == np.floor(values)).all()
    return values.astype(np.int64 if whole else np.float32)


def _chunks(path: Path, width: int, needed: list[int]) -> Iterator[list[list[str]]]:
    """Some rows at a time, each of `width` cells, those of `needed` not empty."""
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
            line += len(rows)
            if needed:
                rows = [row for row in rows if all(row[c].strip() for c in needed)]
            if rows:
                yield rows


def _reader(path: Path, file: TextIO) -> Iterator[list[str]]:
    separator = "\t" if ".tsv" in path.suffixes else ","
    return csv.reader(file, delimiter=separator)


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")
