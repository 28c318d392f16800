"""DNA sequences as codes: FASTA files (plain or .gz) and BLAST databases of version 4.

    A C G T -> 0 1 2 3, every other letter of the IUPAC code (N, R, Y, ...) -> 4; U is read as T

A sequence is a sample of unequal length, "sequence", uint8; or with `kmers` a vector of counts of
its words of k letters, uint16 (n, 4^k), words with an unknown letter left out. Its label is the
first group of a regular expression in its header line. Of FASTA files the headers are in memory
and the codes in a file without a name in $TMPDIR.

Layer: data. Knows nothing of shards. The BLAST reader is in `blast`.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.blast import BlastDatabase
from hpctrain.data.computed import Computed, ComputedRagged
from hpctrain.data.flat import collect
from hpctrain.data.ragged import Ragged
from hpctrain.data.tables import Categories
from hpctrain.errors import DataError, UsageError

__all__ = ["LETTERS", "count_kmers", "read_sequences"]

LETTERS = ("A", "C", "G", "T", "N")
KMERS_MOST = 8
_CODES = np.full(256, 255, np.uint8)
for _letters, _code in (
    ("Aa", 0),
    ("Cc", 1),
    ("Gg", 2),
    ("TtUu", 3),
    ("NRYSWKMBDHVnryswkmbdhv-", 4),
):
    for _letter in _letters:
        _CODES[ord(_letter)] = _code


def read_sequences(
    paths: Sequence[Path],
    name: str = "sequence",
    pattern: str | None = None,
    kmers: int | None = None,
    least: int = 1,
) -> dict[str, Any]:
    """Fields of all sequences of some files.

    Args:
        pattern: its first group in a header is the label; sequences without it are left out.
        kmers: k, 1 to 8: counts of words in the place of the sequences.
        least: labels with fewer sequences are left out.
    """
    if kmers is not None and not 1 <= kmers <= KMERS_MOST:
        raise UsageError(f"words of k = {kmers} letters: give 1 to {KMERS_MOST}")
    headers, sequences = _open(paths)
    chosen, labels = np.arange(len(headers)), None
    if pattern is not None:
        chosen, labels = _labels(headers, pattern, least)
    fields: dict[str, Any] = {}
    if kmers is None:
        fields[name] = ComputedRagged(
            sequences.lengths[chosen], np.dtype(np.uint8), lambda i: _one(sequences, chosen[i])
        )
    else:
        fields["kmers"] = Computed(
            (len(chosen), 4**kmers),
            np.dtype(np.uint16),
            lambda i: count_kmers(_one(sequences, chosen[i]), kmers),
        )
    return fields if labels is None else fields | {"label": labels}


def count_kmers(sequence: NDArray[np.uint8], k: int) -> NDArray[np.uint16]:
    """How often each word of k letters occurs, uint16 (4^k,), at most 65,535."""
    count = len(sequence) - k + 1
    if count < 1:
        return np.zeros(4**k, np.uint16)
    words = np.zeros(count, np.int64)
    known = np.ones(count, bool)
    for place in range(k):
        letters = sequence[place : place + count]
        words = 4 * words + letters
        known &= letters < 4
    counts = np.bincount(words[known], minlength=4**k)
    return np.minimum(counts, 65535).astype(np.uint16)


def _one(sequences: Ragged | BlastDatabase, i: int) -> NDArray[np.uint8]:
    return sequences[int(i)]


def _open(paths: Sequence[Path]) -> tuple[list[str], Ragged | BlastDatabase]:
    """Headers and sequences of FASTA files, or of one BLAST database."""
    if any(path.suffix in (".nin", ".nhr", ".nsq") for path in paths):
        bases = {path.with_suffix("") for path in paths}
        if len(bases) != 1:
            raise UsageError("give one BLAST database at a time, by its .nin file")
        database = BlastDatabase(bases.pop())
        return database.headers(), database
    headers: list[str] = []

    def codes() -> Iterator[NDArray[np.uint8]]:
        for path in paths:
            for header, letters in _fasta(path):
                headers.append(header)
                yield _coded(path, header, letters)

    sequences = collect(codes(), np.uint8)
    return headers, sequences


def _coded(path: Path, header: str, letters: bytes) -> NDArray[np.uint8]:
    codes: NDArray[np.uint8] = _CODES[np.frombuffer(letters, np.uint8)]
    if (codes == 255).any():
        bad = chr(letters[int(np.flatnonzero(codes == 255)[0])])
        raise DataError(f"{path}: sequence {header[:60]!r} has the letter {bad!r}")
    return codes


def _fasta(path: Path) -> Iterator[tuple[str, bytes]]:
    """(header, letters) of every sequence of a FASTA file."""
    header: str | None = None
    parts: list[bytes] = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                line = line.strip()
                if line.startswith(b">"):
                    if header is not None:
                        yield header, b"".join(parts)
                    header, parts = line[1:].decode("utf-8", "replace").strip(), []
                elif line and header is None:
                    raise DataError(f"{path} is no FASTA file: it does not begin with a > line")
                else:
                    parts.append(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if header is None:
        raise DataError(f"{path} has no sequences")
    yield header, b"".join(parts)


def _labels(
    headers: Sequence[str], pattern: str, least: int
) -> tuple[NDArray[np.int64], Categories]:
    """Which sequences have a label that is frequent enough, and their labels."""
    try:
        compiled = re.compile(pattern)
        if not compiled.groups:
            raise UsageError(f"the pattern {pattern!r} has no group: put ( ) around the label")
    except re.error as error:
        raise UsageError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    matches = [compiled.search(header) for header in headers]
    rows = np.array([i for i, match in enumerate(matches) if match], np.int64)
    if not len(rows):
        raise DataError(f"no header holds the pattern {pattern!r}, such as {headers[0][:80]!r}")
    found = Categories.of(np.array([match[1] for match in matches if match]))
    enough = (np.bincount(found.codes) >= least)[found.codes]
    if not enough.any():
        raise DataError(f"no label of the pattern {pattern!r} has {least} sequences")
    words = np.array(found.vocab)[found.codes[enough]]
    return rows[enough], Categories.of(words)
