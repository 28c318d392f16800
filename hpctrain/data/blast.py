"""Nucleotide databases of BLAST, version 4: NAME.nin (index), .nhr (headers), .nsq (sequences).

    .nin  big-endian: version, type (0), title, date, number of sequences; residues (little-endian
          64 bits), longest; then three tables of n + 1 offsets: headers, sequences, ambiguities
    .nsq  four bases a byte from the highest bits down; the last byte's low two bits say how many
          bases it holds. Then the ambiguities: a count of 32-bit words (high bit: long form), and
          runs of (4-bit set of bases, length - 1, position)
    .nhr  ASN.1 (BER): the title is the first VisibleString of each record

The files are mapped, and a sequence is decoded when it is asked for.

Layer: data.

Reference: NCBI C++ toolkit, objtools/blast/seqdb_reader (format notes in its documentation).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import DataError

__all__ = ["BlastDatabase"]

_ONE_BASE = {1: 0, 2: 1, 4: 2, 8: 3}  # sets of a single base; every other set is unknown
TITLE = b"\xa0\x80\x1a"  # [0] begins, then a VisibleString


class BlastDatabase:
    """The sequences of a database, by number."""

    def __init__(self, base: Path) -> None:
        """`base`: the path without .nin. Raises `DataError` for another kind or version."""
        self._base = base
        index = self._map(".nin")
        self._headers, self._letters = self._map(".nhr"), self._map(".nsq")
        try:
            self._read_index(index.tobytes())
        except (struct.error, ValueError) as error:
            raise DataError(f"{base}.nin is damaged: {error}") from error
        packed = self._ambiguous - self._starts[:-1]
        last = self._letters[self._ambiguous - 1] & 3
        self.lengths: NDArray[np.int64] = (packed - 1) * 4 + last

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        """Codes of sequence i: 0 to 3 for A, C, G, T, and 4 for anything else."""
        packed = self._letters[self._starts[i] : self._ambiguous[i]]
        codes = np.empty((len(packed), 4), np.uint8)
        for place in range(4):
            codes[:, place] = (packed >> (6 - 2 * place)) & 3
        sequence = codes.reshape(-1)[: self.lengths[i]].copy()
        self._mark(i, sequence)
        return sequence

    def headers(self) -> list[str]:
        """The title of every sequence."""
        content, bounds = self._headers.tobytes(), self._titles.tolist()
        return [self._title(content[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def _map(self, suffix: str) -> NDArray[np.uint8]:
        path = self._base.with_name(self._base.name + suffix)
        try:
            return np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path}: {error}") from error

    def _read_index(self, raw: bytes) -> None:
        version, kind = struct.unpack_from(">2i", raw)
        if (version, kind) != (4, 0):
            raise DataError(
                f"{self._base}.nin is of version {version}, type {kind}; only nucleotides (type 0) "
                f"of version 4 are read: convert it with blastdbcmd to FASTA"
            )
        place = 8
        for _ in range(2):  # title and date
            place += 4 + struct.unpack_from(">i", raw, place)[0]
        count = struct.unpack_from(">i", raw, place)[0]
        tables = np.frombuffer(raw, ">u4", 3 * (count + 1), place + 16).astype(np.int64)
        self._titles, self._starts, ambiguous = tables.reshape(3, count + 1)
        self._ambiguous = ambiguous[:-1]  # where each sequence's bases end
        ends = (self._titles[-1], self._starts[-1])
        if ends[0] > len(self._headers) or ends[1] > len(self._letters):
            raise DataError(f"{self._base}: .nhr or .nsq is shorter than .nin promises")

    def _mark(self, i: int, sequence: NDArray[np.uint8]) -> None:
        """Put the unknown bases into a sequence."""
        raw = self._letters[self._ambiguous[i] : self._starts[i + 1]].tobytes()
        if len(raw) < 8:
            return
        words: list[int] = np.frombuffer(raw, ">u4").tolist()
        long, count = words[0] >> 31, words[0] & 0x7FFFFFFF
        step = 2 if long else 1
        for place in range(1, count + 1, step):
            word = words[place]
            if long:
                length, start = (word >> 16) & 0xFFF, words[place + 1]
            else:
                length, start = (word >> 24) & 0xF, word & 0xFFFFFF
            sequence[start : start + length + 1] = _ONE_BASE.get(word >> 28, 4)

    def _title(self, record: bytes) -> str:
        place = record.find(TITLE)
        if place < 0:
            return ""
        place += len(TITLE)
        size: Any = record[place]
        place += 1
        if size > 0x80:
            more = size - 0x80
            size = int.from_bytes(record[place : place + more], "big")
            place += more
        return record[place : place + size].decode("latin-1")
