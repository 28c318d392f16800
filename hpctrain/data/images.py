"""Images to fields: a folder per class, or a table of files and labels.

Images are decoded when their shard is written; to plan, only their headers are read. With one size
(given, or that of all files) a field "image", uint8 (n, height, width, channels); else its values
one after the other, ragged, and "image_shape", int32 (n, 3). Needs Pillow (extra: images).

Layer: data. Knows nothing of shards.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.computed import Computed, ComputedRagged
from hpctrain.data.tables import Categories
from hpctrain.errors import DataError, UsageError

__all__ = ["listed_images", "read_images", "sorted_images"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def sorted_images(folder: Path) -> tuple[list[Path], list[str]]:
    """The images below the folders in `folder`, in the order of their names, and their classes."""
    found = sorted(
        path for path in folder.glob("*/**/*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise DataError(
            f"{folder} holds no images in a folder per class ({', '.join(sorted(SUFFIXES))}); "
            f"a folder of text is read with --as text"
        )
    return found, [path.relative_to(folder).parts[0] for path in found]


def listed_images(table: Path) -> tuple[list[Path], list[str]]:
    """Files and labels of a CSV file with the columns "file" and "label".

    Files are relative to the table's folder.
    """
    with table.open(encoding="utf-8", newline="") as content:
        rows = csv.DictReader(content)
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise DataError(f"{table}: a list of images needs the columns file and label")
        pairs = [(table.parent / row["file"], row["label"]) for row in rows]
    if not pairs:
        raise DataError(f"{table} lists no images")
    return [file for file, _ in pairs], [label for _, label in pairs]


def read_images(
    files: Sequence[Path],
    labels: Sequence[str],
    name: str = "image",
    size: tuple[int, int] | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Fields of images that are decoded when they are taken.

    Args:
        size: (height, width) to which all images are resized; None keeps each one's own.
        channels: 1 (grey), 3 (colour) or 4 (with transparency); default: 3 if any image has colour.

    Raises `DataError` naming a file that is missing or no image.
    """
    if channels not in (None, *MODES):
        raise UsageError(f"images can have 1, 3 or 4 channels, not {channels}")
    library = _library()
    heads = [_head(library, file) for file in files]
    depth = channels or (1 if all(mode in ("1", "L", "I;16") for _, mode in heads) else 3)
    shapes = np.array([(*(size or shape), depth) for shape, _ in heads], np.int64)

    def read(i: int) -> NDArray[Any]:
        return _pixels(library, files[i], MODES[depth], size)

    words = Categories.of(np.array(labels))
    fields: dict[str, Any] = {}
    if (shapes == shapes[0]).all():
        shape = tuple(int(n) for n in shapes[0])
        fields[name] = Computed((len(files), *shape), np.dtype(np.uint8), read)
    else:
        lengths = shapes.prod(axis=1)
        fields[name] = ComputedRagged(lengths, np.dtype(np.uint8), lambda i: read(i).reshape(-1))
        fields[f"{name}_shape"] = shapes.astype(np.int32)
    return fields | {"label": words}


def _head(library: Any, file: Path) -> tuple[tuple[int, int], str]:
    """((height, width), mode) of an image, from its header."""
    try:
        with library.open(file) as image:
            return (image.height, image.width), image.mode
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} is no image that can be read: {error}") from error


def _pixels(library: Any, file: Path, mode: str, size: tuple[int, int] | None) -> NDArray[Any]:
    """uint8 (height, width, channels)."""
    try:
        with library.open(file) as image:
            image = image.convert(mode)
            if size is not None and (image.height, image.width) != size:
                image = image.resize((size[1], size[0]), library.Resampling.BILINEAR)
            pixels = np.asarray(image, np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} cannot be decoded: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _library() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("images need the library Pillow: pip install 'hpctrain[images]'") from None
    return Image
