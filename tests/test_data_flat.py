"""Samples collected in a file without a name: the values, bounded memory, a full disk."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import numpy as np
import pytest

from hpctrain.data.flat import collect
from hpctrain.errors import DataError


def test_values_and_offsets():
    samples = [np.arange(n) for n in (3, 0, 5)]
    ragged = collect(iter(samples), np.uint16)
    assert ragged.dtype == np.uint16 and ragged.offsets.tolist() == [0, 3, 3, 8]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(ragged[i], sample)
    assert len(collect([], np.uint8)) == 0
    assert collect([np.empty(0)], np.uint8).lengths.tolist() == [0]


GROWTH = """
import gzip, resource, sys
from pathlib import Path
from hpctrain.data.sequences import read_sequences
path = Path(sys.argv[1])
with gzip.open(path, "wb", 1) as file:
    for i in range(48):
        file.write(b">s%d\\n" % i + (b"ACGT" * (1 << 18) + b"\\n"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
fields = read_sequences([path])
print(len(fields["sequence"].lengths), (peak() - before) // 1024)
"""


def test_memory_does_not_grow_with_packed_sequences(tmp_path):
    """48 MiB of letters, one MiB each."""
    command = [sys.executable, "-c", GROWTH, tmp_path / "a.fa.gz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 48 and grown < 24


def test_a_full_disk_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb"))  # noqa: SIM115, PTH123
    with pytest.raises(DataError, match="No space left.*TMPDIR"):
        collect([np.ones(100)], np.uint8)
