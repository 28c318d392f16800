"""state.json: what makes a folder of files a checkpoint.

It is written last and names every byte of the other files: their sizes, and pieces with their
sha256. Its own first key is the sha256 of all others, so one changed byte anywhere is found.

    format, version   "hpctrain checkpoint", 1
    step              optimizer steps done
    state             the caller's: position in the data, seed, schedule, ...
    dtypes            of all tensors
    files             name -> bytes
    pieces            [{file, start, stop, sha256}], bytes start up to stop; they cover each file

Layer: checkpoint. Knows nothing of ranks and tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hpctrain.errors import CheckpointError

__all__ = [
    "FORMAT",
    "RECORD",
    "REPLACED",
    "VERSION",
    "Piece",
    "Record",
    "checked_state",
    "checkpoint_step",
    "checkpoints",
    "folder_name",
    "parse_record",
    "read_record",
    "sync_folder",
]

FORMAT = "hpctrain checkpoint"
VERSION = 1
RECORD = "state.json"
REPLACED = ".replaced-"
NAME = re.compile(rf"({re.escape(REPLACED)})?step_(\d{{8,}})")


class Piece(msgspec.Struct, frozen=True):
    """Bytes `start` up to `stop` of a file, and their sha256 in hexadecimal."""

    file: str
    start: int
    stop: int
    sha256: str


class Record(msgspec.Struct, frozen=True):
    """What state.json holds; see above."""

    step: int
    state: dict[str, Any]
    dtypes: list[str]
    files: dict[str, int]
    pieces: list[Piece]
    format: str = FORMAT
    version: int = VERSION

    def encode(self) -> bytes:
        """The text of state.json."""
        body = msgspec.to_builtins(self)
        return json.dumps({"sha256": _digest(body)} | body, indent=1, allow_nan=False).encode()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checked_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` as it will be read back; an error where that would differ (tuples, NaN, keys)."""
    again = json.loads(json.dumps(dict(state), allow_nan=False))
    if again != dict(state):
        changed = [key for key in state if key not in again or again[key] != state[key]]
        raise CheckpointError(
            f"the state is not plain JSON: {', '.join(map(repr, changed))} would be read back "
            "changed; use strings as keys, and lists instead of tuples"
        )
    return again  # type: ignore[no-any-return]


def read_record(path: Path) -> Record:
    """The record of a checkpoint whose files are all there, in full length.

    Raises:
        CheckpointError: it is missing, damaged, from another version, or a file is not complete.
    """
    if not path.is_dir():
        raise CheckpointError("there is no such folder")
    try:
        record = parse_record((path / RECORD).read_bytes())
        sizes = {name: (path / name).stat().st_size for name in record.files}
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    for name, size in record.files.items():
        if sizes[name] != size:
            raise CheckpointError(f"{name} has {sizes[name]:,} bytes instead of {size:,}")
    return record


def parse_record(text: bytes) -> Record:
    """The record in the text of state.json, checked in itself."""
    try:
        body = json.loads(text)
        digest = body.pop("sha256")
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CheckpointError(
                f"{RECORD} is {body['format']!r} version {body['version']!r}; "
                f"this hpctrain reads {FORMAT!r} version {VERSION}"
            )
        whole = _digest(body) == digest
        record = msgspec.convert(body, Record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{RECORD} is damaged ({error})") from error
    if not whole:
        raise CheckpointError(f"{RECORD} does not match its own checksum")
    _check_cover(record)
    return record


def _check_cover(record: Record) -> None:
    """Every byte of every file must lie in one piece: else it could change unseen."""
    ends = dict.fromkeys(record.files, 0)
    for piece in sorted(record.pieces, key=lambda piece: (piece.file, piece.start)):
        if "/" in piece.file or ends.get(piece.file) != piece.start:
            raise CheckpointError(f"{RECORD}: the pieces of {piece.file!r} do not join")
        ends[piece.file] = piece.stop
    if ends != record.files:
        raise CheckpointError(f"{RECORD}: the pieces do not cover all files")


def folder_name(step: int) -> str:
    """A checkpoint's folder in the folder of checkpoints."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    match = NAME.fullmatch(path.name)
    if not match:
        raise CheckpointError(f"{path} is not called like a checkpoint: {folder_name(1200)}")
    return int(match[2])


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by name, whole or not, the newest first; a replaced one after its successor."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda p: (checkpoint_step(p), p.name[0] != "."), reverse=True)


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
