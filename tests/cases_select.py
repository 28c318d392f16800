"""Cases for select.cu."""

from __future__ import annotations

import numpy as np
from kernel_cases import Case, case, normal

TILE, SLOTS, BINS = 4096, 128, 2048
ALL = np.iinfo(np.int64).max
SIZES = (0, 1, 33, 4096, 4097, 9000)
DIGITS = {4: (20, 11), 8: (52, 11)}  # of the highest bits, by the bytes of a number


def keys(x):
    """The bits of absolute values, as whole numbers."""
    bits = x.view(f"u{x.dtype.itemsize}")
    return (bits & bits.dtype.type(np.iinfo(f"i{x.dtype.itemsize}").max)).astype(np.int64)


def tiles(n):
    return -(-n // TILE)


def state(threshold, ties=ALL):
    return np.array([int(threshold), ties], np.int64)


def whole(*numbers):
    return np.array(numbers, np.int64)


def coarse(rng, dtype, n):
    """Numbers many of which are equal, some in tiles of which much is taken."""
    x = np.round(normal(rng, dtype, n) * 4) / 4
    x[: n // 3] *= 100
    return x


def passing(x, limit):
    """Which elements are taken, as a mask."""
    found = keys(x)
    ties = np.flatnonzero(found == limit[0])[: limit[1]]
    mask = found > limit[0]
    mask[ties] = True
    return mask


def tile_counts(x, limit):
    """counts and slots of select_count."""
    counts, slots = np.zeros((tiles(x.size), 2), np.int64), np.zeros((tiles(x.size), SLOTS), "u2")
    for tile in range(tiles(x.size)):
        found = keys(x[tile * TILE : (tile + 1) * TILE])
        counts[tile] = (found > limit[0]).sum(), (found == limit[0]).sum()
        where = np.flatnonzero(found >= limit[0])[:SLOTS]
        slots[tile, : where.size] = where
    return counts, slots


def starts_of(counts):
    return (np.cumsum(counts, axis=0) - counts).astype(np.int64)


@case(1, 2, 33, 1000, 20_000)
def select_sample(rng, dtype, n):
    x, count = normal(rng, dtype, n), min(n, 700)
    firsts = [j * n // count for j in range(count + 1)]
    at = [a + ((j * 2654435761 % 2**32 >> 8) % (b - a))
          for j, (a, b) in enumerate(zip(firsts, firsts[1:], strict=False))]  # fmt: skip
    return Case("select_sample", [x, np.zeros(count, dtype), n, count], count, {1: x[at]}, 0, None)


@case(*SIZES)
def select_histogram(rng, dtype, n):
    x = coarse(rng, dtype, n)
    shift, bits = DIGITS[x.itemsize]
    expected = np.bincount(keys(x) >> shift, minlength=BINS).astype(np.uint32)
    args = [x, whole(n), state(0), np.zeros(BINS, np.uint32), shift, bits]
    return Case("select_histogram", args, tiles(n), {3: expected}, 0, None)


@case(*SIZES)
def select_histogram_within(rng, dtype, n):
    """The second digit, of those that begin as 1.0 does."""
    x = coarse(rng, dtype, n) + dtype.type(1 / 512)
    shift, bits = {4: (10, 10), 8: (41, 11)}[x.itemsize]
    begin = keys(np.ones(1, dtype))[0]
    found = keys(x)
    mine = found[found >> (shift + bits) == begin >> (shift + bits)] >> shift & (1 << bits) - 1
    expected = np.bincount(mine, minlength=BINS).astype(np.uint32)
    args = [x, whole(n), state(begin), np.zeros(BINS, np.uint32), shift, bits]
    return Case("select_histogram", args, tiles(n), {3: expected}, 0, None)


@case((1, 1), (500, 1), (500, 500), (9000, 77), (0, 0))
def select_digit(rng, dtype, size):
    n, need = size
    digits = rng.integers(BINS, size=n)
    histogram = np.bincount(digits, minlength=BINS).astype(np.uint32)
    before = state(5, 6)
    after = before.copy()
    if n:
        digit = np.sort(digits)[n - need]
        after[:] = digit << 20, need - (digits > digit).sum()
    args = [whole(n), before, histogram, need, 20, 11, 1]
    expected = {1: after, 2: np.zeros_like(histogram) if n else histogram}
    return Case("select_digit", args, 1, expected, 0, None)


@case(0, 100, 10**12)
def select_loosen(rng, dtype, slack):
    before = state(10**9, 3)
    expected = {1: state(max(10**9 - slack, 0))}
    return Case("select_loosen", [before, state(0, 0), slack], 1, expected, 0, None)


@case(*SIZES)
def select_count(rng, dtype, n):
    x = coarse(rng, dtype, n)
    limit = state(keys(np.full(1, 1.5, dtype))[0], 3)
    counts, slots = tile_counts(x, limit)
    args = [x, whole(n), limit, np.zeros_like(counts), np.zeros_like(slots)]
    return Case("select_count", args, tiles(n), {3: counts, 4: slots}, 0, None)


@case((0, 0), (1, 5), (31, ALL), (33, 100), (500, 4))
def select_scan(rng, dtype, size):
    count, ties = size
    counts = rng.integers(0, 30, (count, 2))
    above, equal = counts.sum(axis=0)
    taken, n = above + min(equal, ties), count * TILE - 7 if count else 0
    most = taken - 1 if count == 33 else taken  # once too many
    expected = {
        4: starts_of(counts),
        5: whole(taken) if count else whole(-1),
        6: whole(n if taken > most else 0) if count else whole(-1),
    }
    args = [whole(n), state(9, ties), counts, np.zeros_like(counts), whole(-1), whole(-1), 0, most]
    expected = {3: expected[4], 4: expected[5], 5: expected[6]}
    return Case("select_scan", args, 1, expected, 0, None)


def _pack(rng, dtype, n, ties, places):
    x = coarse(rng, dtype, n)
    limit = state(keys(np.full(1, 1.5, dtype))[0], ties)
    counts, slots = tile_counts(x, limit)
    mask = passing(x, limit)
    found = int(mask.sum())
    names = np.cumsum(rng.integers(1, 9, n)) if places else None
    indices = names[mask] if places else np.flatnonzero(mask)
    args = [
        x, names, whole(n), limit, counts, starts_of(counts), slots, whole(found), found,
        np.zeros(found, dtype), np.zeros(found, np.int64),
    ]  # fmt: skip
    return Case("select_pack", args, tiles(n), {9: x[mask], 10: indices}, 0, None)


@case(*SIZES)
def select_pack(rng, dtype, n):
    return _pack(rng, dtype, n, ALL, False)


@case(*SIZES)
def select_pack_some_ties(rng, dtype, n):
    return _pack(rng, dtype, n, n // 9, True)
