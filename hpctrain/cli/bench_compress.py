"""Launches of the kernels of gradient compression, for `hpctrain bench kernels`.

They work on one array of the size of `Sizes.n`, of which a thousandth is selected.

Layer: cli. Continues bench_launches; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.cli.bench_launches import Launch, Maker
from hpctrain.compress.select import BINS, DIGITS, SLOTS, TILE

__all__ = ["compress_launches"]

Array = NDArray[Any]
SECTOR = 32  # bytes that reading one element moves


def _k(m: Maker) -> int:
    return m.n // 1000


def _ints(m: Maker, *numbers: int) -> Array:
    return m.device.from_host(np.array(numbers, np.int64))


def _size(m: Maker) -> str:
    return f"{m.n >> 20} Mi" if m.n >= 1 << 20 else str(m.n)


def _tiles(m: Maker) -> int:
    return -(-m.n // TILE)


def _threshold(m: Maker, x: Array) -> Array:
    """The state of a search for the k largest."""
    largest = np.partition(np.abs(m.device.to_host(x)), m.n - _k(m))[m.n - _k(m)]
    return _ints(m, int(largest.view(f"u{largest.itemsize}")), _k(m))


def _counted(m: Maker) -> tuple[Array, Array, Array, Array]:
    """x, the state of its search, counts and slots."""
    x = m.real(m.n)
    state = _threshold(m, x)
    counts = m.empty(_tiles(m), 2, dtype=np.int64)
    slots = m.empty(_tiles(m), SLOTS, dtype=np.uint16)
    m.device.launch("select_count", x, _ints(m, m.n), state, counts, slots, work=_tiles(m))
    return x, state, counts, slots


def _sample(m: Maker) -> Launch:
    count = m.n // 512
    part = {"x": count * SECTOR}
    return Launch(_size(m), [m.real(m.n), m.empty(count), m.n, count], count, part=part)


def _histogram(m: Maker) -> Launch:
    shift, bits = DIGITS[m.dtype.name][0]
    args = [m.real(m.n), _ints(m, m.n), _ints(m, 0, 0), m.empty(BINS, dtype=np.uint32)]
    used = {"histogram": 64 * SECTOR // 8}  # bins that have counts
    return Launch(_size(m), [*args, shift, bits], _tiles(m), ("histogram",), used)


def _digit(m: Maker) -> Launch:
    args = [_ints(m, 1), _ints(m, 0, 0), m.empty(BINS, dtype=np.uint32), 1, 20, 11, 1]
    return Launch(str(BINS), args, 1, updated=("histogram",))


def _loosen(m: Maker) -> Launch:
    return Launch("1", [_ints(m, 9, 9), _ints(m, 0, 0), 3], 1)


def _count(m: Maker) -> Launch:
    x, state, counts, slots = _counted(m)
    taken = {"slots": 2 * _k(m)}
    return Launch(_size(m), [x, _ints(m, m.n), state, counts, slots], _tiles(m), part=taken)


def _scan(m: Maker) -> Launch:
    _, state, counts, _ = _counted(m)
    starts, found = m.empty(*counts.shape, dtype=np.int64), _ints(m, 0)
    args = [_ints(m, m.n), state, counts, starts, found, _ints(m, 0), 0, m.n]
    return Launch(str(_tiles(m)), args, 1)


def _pack(m: Maker) -> Launch:
    x, state, counts, slots = _counted(m)
    host = m.device.to_host(counts)
    starts = m.device.from_host(np.cumsum(host, axis=0) - host)
    k = min(int(host.sum()), int(host[:, 0].sum()) + _k(m))
    values, indices = m.empty(k), m.empty(k, dtype=np.int64)
    size = _ints(m, m.n)
    args = [x, None, size, state, counts, starts, slots, _ints(m, k), k, values, indices]
    part = {"x": k * SECTOR, "slots": 2 * k}
    return Launch(f"{k} of {_size(m)}", args, _tiles(m), part=part)


def _entries(m: Maker) -> tuple[Array, Array, Array, Array]:
    """Indices, offsets, counts and starts of k entries, evenly spread."""
    indices = np.arange(_k(m), dtype=np.int64) * 1000 + 7
    counts = np.bincount(indices >> 16, minlength=-(-m.n >> 16)).astype(np.uint32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    put = m.device.from_host
    return put(indices), put((indices & 0xFFFF).astype(np.uint16)), put(counts), put(starts)


def _encode(m: Maker) -> Launch:
    indices, offsets, _, _ = _entries(m)
    k = _k(m)
    return Launch(str(k), [m.real(k), indices, m.empty(k), offsets, k], k)


def _counts(m: Maker) -> Launch:
    indices, _, counts, _ = _entries(m)
    probes = {"indices": min(indices.nbytes, 2 * counts.size * SECTOR)}
    args = [indices, counts, _k(m), counts.size]
    return Launch(str(counts.size), args, counts.size, part=probes)


def _starts(m: Maker) -> Launch:
    _, _, counts, starts = _entries(m)
    return Launch(str(counts.size), [counts, starts, counts.size], 1)


def _add(m: Maker) -> Launch:
    _, offsets, counts, starts = _entries(m)
    k = _k(m)
    args = [m.real(k), offsets, starts, m.real(m.n), 1.0, k, counts.size, m.n]
    part = {"y": k * SECTOR}
    return Launch(f"{k} of {_size(m)}", args, k, ("y",), part)


def _mask(m: Maker) -> Launch:
    _, offsets, counts, starts = _entries(m)
    k = _k(m)
    args = [m.real(k), offsets, starts, m.empty(m.n), m.real(m.n), k, counts.size, m.n]
    part = {"u": k * SECTOR, "left": k * SECTOR}
    return Launch(f"{k} of {_size(m)}", args, k, part=part)


def _residual(m: Maker) -> Launch:
    return Launch(_size(m), [m.real(m.n), m.real(m.n), m.empty(m.n), m.n], m.n)


def _momentum(m: Maker) -> Launch:
    arrays = [m.real(m.n), m.real(m.n), m.real(m.n), m.empty(m.n)]
    return Launch(_size(m), [*arrays, 0.9, m.n], m.n, updated=("u",))


def _pieces(m: Maker) -> tuple[Array, Array, int, int]:
    """Begins, starts, how many, and elements in all of them: half of n, in pieces of 1024."""
    count = max(m.n // 2048, 1)
    places = np.arange(count + 1, dtype=np.int64)
    begins, starts = m.device.from_host(2048 * places[:-1]), m.device.from_host(1024 * places)
    return begins, starts, count, 1024 * count


def _take(m: Maker) -> Launch:
    begins, starts, count, size = _pieces(m)
    x = m.real(max(m.n, 2048))
    args = [x, begins, starts, m.empty(size), count]
    return Launch(f"{count} x 1024", args, count, ("x",), {"x": 4 * size})


def _put(m: Maker) -> Launch:
    begins, starts, count, size = _pieces(m)
    x = m.real(max(m.n, 2048))
    args = [m.real(size), begins, starts, x, count]
    return Launch(f"{count} x 1024", args, count, part={"x": 4 * size})


def _blocks(m: Maker, size: int) -> int:
    return -(-m.n // size)


def _cast(m: Maker) -> Launch:
    return Launch(_size(m), [m.real(m.n), m.empty(m.n), m.n], m.n)


def _cast_add(m: Maker) -> Launch:
    return Launch(_size(m), [m.real(m.n), m.real(m.n), 1.0, m.n], m.n, ("y",))


def _int8(m: Maker) -> tuple[Array, Array]:
    return m.real(_blocks(m, 512)), m.empty(m.n, dtype=np.uint8)


def _int8_encode(m: Maker) -> Launch:
    return Launch(_size(m), [m.real(m.n), *_int8(m), m.n], _blocks(m, 512))


def _int8_add(m: Maker) -> Launch:
    return Launch(_size(m), [*_int8(m), m.real(m.n), 1.0, m.n], _blocks(m, 512), ("y",))


def _sign(m: Maker) -> tuple[Array, Array]:
    return m.real(_blocks(m, 2048)), m.empty(_blocks(m, 8), dtype=np.uint8)


def _sign_encode(m: Maker) -> Launch:
    return Launch(_size(m), [m.real(m.n), *_sign(m), m.n], _blocks(m, 2048))


def _sign_add(m: Maker) -> Launch:
    return Launch(_size(m), [*_sign(m), m.real(m.n), 1.0, m.n], _blocks(m, 2048), ("y",))


def _orthonormalize(m: Maker) -> Launch:
    """Two columns of 16 matrices."""
    count, rows = 16, m.cols
    begins = np.arange(count, dtype=np.int64) * rows * 2
    tables = [begins, np.full(count, rows), np.full(count, 2)]
    args = [m.real(count * rows * 2), *map(m.device.from_host, tables), count]
    return Launch(f"{count} x {rows} x 2", args, count, ("p",))


def compress_launches() -> dict[str, Callable[[Maker], Launch]]:
    """A launch for every kernel of select.cu, topk.cu and quantize.cu."""
    return {
        "select_sample": _sample,
        "select_histogram": _histogram,
        "select_digit": _digit,
        "select_loosen": _loosen,
        "select_count": _count,
        "select_scan": _scan,
        "select_pack": _pack,
        "topk_encode": _encode,
        "topk_counts": _counts,
        "topk_starts": _starts,
        "topk_add": _add,
        "topk_mask": _mask,
        "keep_residual": _residual,
        "keep_momentum": _momentum,
        "pieces_take": _take,
        "pieces_put": _put,
        "cast_encode": _cast,
        "cast_add": _cast_add,
        "int8_encode": _int8_encode,
        "int8_add": _int8_add,
        "sign_encode": _sign_encode,
        "sign_add": _sign_add,
        "orthonormalize": _orthonormalize,
    }
