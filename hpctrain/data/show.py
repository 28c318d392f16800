"""A few samples of a split for people: pictures as a PNG grid, text, rows of a table.

Layer: data.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.dataset import Dataset
from hpctrain.data.manifest import Field
from hpctrain.data.shard import ShardReader

__all__ = ["decoder", "describe_value", "grid", "picture", "sample", "write_png"]

GAP = 2  # pixels between pictures
TEXT_MOST = 200  # characters


def sample(dataset: Dataset, split: str, number: int) -> dict[str, NDArray[Any]]:
    """All fields of one sample of a split; only its blocks are read."""
    table = dataset.table(split)
    block = int(np.searchsorted(table.starts, number, side="right")) - 1
    row = number - int(table.starts[block])
    with dataset.shard(split, int(table.shard[block])) as shard:
        place = int(table.block[block])
        return {
            name: _value(shard, name, field, place, row) for name, field in dataset.fields.items()
        }


def _value(shard: ShardReader, name: str, field: Field, block: int, row: int) -> NDArray[Any]:
    if field.shape == "ragged":
        return shard.read_ragged(name, block)[row].copy()
    first, last = shard.header.rows(block)
    out = np.empty((last - first, *field.shape), field.dtype)
    shard.read_block(name, block, out)
    one: NDArray[Any] = np.asarray(out[row])
    return one


def picture(name: str, field: Field, values: dict[str, NDArray[Any]]) -> NDArray[np.uint8] | None:
    """A field as an image, uint8 (height, width, 1 or 3), or None if it is none.

    Bytes are shown as they are, other numbers from the smallest (black) to the largest; of a
    volume the middle plane across its shortest dim.
    """
    value = values[name]
    if field.shape == "ragged":
        shape = values.get(f"{name}_shape")
        if shape is None:
            return None
        value = value.reshape(shape)
    if value.ndim == 3 and value.shape[2] not in (1, 3, 4):
        across = int(np.argmin(value.shape))
        value = value.take(value.shape[across] // 2, axis=across)
    if value.ndim == 2:
        value = value[:, :, None]
    if value.ndim != 3 or min(value.shape[:2]) < 4:
        return None
    return _bytes(value[:, :, : 3 if value.shape[2] >= 3 else 1])


def _bytes(value: NDArray[Any]) -> NDArray[np.uint8]:
    if value.dtype == np.uint8:
        return value
    x = np.nan_to_num(value.astype(np.float64))
    span = float(x.max() - x.min()) or 1.0
    scaled: NDArray[np.uint8] = ((x - x.min()) / span * 255).astype(np.uint8)
    return scaled


def grid(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures side by side in rows, uint8 (height, width, 3), on white."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height = max(p.shape[0] for p in pictures) + GAP
    width = max(p.shape[1] for p in pictures) + GAP
    out = np.full((rows * height + GAP, columns * width + GAP, 3), 255, np.uint8)
    for number, one in enumerate(pictures):
        top = GAP + number // columns * height
        left = GAP + number % columns * width
        out[top : top + one.shape[0], left : left + one.shape[1]] = one
    return out


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image, uint8 (height, width, 3)."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each line begins with its filter, 0
    lines[:, 1:] = image.reshape(height, -1)
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        content += struct.pack(">I", len(body)) + kind + body
        content += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(content)


def decoder(dataset: Dataset, name: str) -> Callable[[list[int]], str] | None:
    """What turns the byte-pair codes of a field into text, if there is such and the library is."""
    path = dataset.path / f"{name}.tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    decode: Callable[[list[int]], str] = Tokenizer.from_file(str(path)).decode
    return decode


def describe_value(
    field: Field, value: NDArray[Any], decode: Callable[[list[int]], str] | None = None
) -> str:
    """One value in one line: a word, text (`decode` turns its codes into it), or numbers."""
    if decode is not None:
        text = decode(value[value != 0][:TEXT_MOST].tolist())
        more = "..." if len(text) > TEXT_MOST or len(value) > TEXT_MOST else ""
        return f"{text[:TEXT_MOST]!r}{more} ({len(value)} codes)"
    if field.tokens == 256 and field.dtype == "uint8":
        text = value[value != 0].tobytes().decode("utf-8", "replace")
        return repr(text[:TEXT_MOST]) + (f"... ({len(text)})" if len(text) > TEXT_MOST else "")
    if field.vocab is not None and value.ndim <= 1:
        words = [field.vocab[int(code)] for code in np.atleast_1d(value)[:TEXT_MOST]]
        letters = all(len(word) == 1 for word in field.vocab)
        return ("" if letters else " ").join(words) + _more(value)
    if value.ndim == 0:
        return f"{value.item():.6g}"
    if field.columns is not None:
        pairs = zip(field.columns, value.tolist(), strict=True)
        return "  ".join(f"{column.name}={number:.6g}" for column, number in pairs)
    shape = "x".join(map(str, value.shape))
    numbers = " ".join(f"{number:.6g}" for number in value.ravel()[:8].tolist())
    return f"{shape}: {numbers}{' ...' if value.size > 8 else ''}"


def _more(value: NDArray[Any]) -> str:
    return f"... ({value.size})" if value.size > TEXT_MOST else ""
