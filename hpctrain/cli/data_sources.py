"""The SOURCEs of `hpctrain data pack`: what they name, and which of their fields are packed.

Layer: cli. Imports NumPy and h5py only when a command runs.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from hpctrain.data.kinds import ReadOptions
    from hpctrain.data.manifest import Source
    from hpctrain.data.sources import SourceData

__all__ = ["ROLES", "choose", "fractions_of", "read_sources"]

SOURCE = re.compile(r"(?:(?P<split>[A-Za-z_][\w-]*):)?(?:(?P<field>[A-Za-z_]\w*)=)?(?P<file>.+)")
ROLES = ("input", "label", "mask", "weight")


def _options(args: argparse.Namespace, apart: set[str]) -> ReadOptions:
    from hpctrain.data.kinds import ReadOptions

    size = None
    if args.size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", args.size)
        if match is None or "0" in match.groups():
            raise UsageError(f"--size {args.size!r}: give HEIGHTxWIDTH, such as 64x64")
        size = (int(match[1]), int(match[2]))
    return ReadOptions(
        apart | {n for n in (args.key, args.group, args.stratify) if n},
        args.drop,
        args.require,
        args.label_pattern,
        args.label_least,
        args.lines,
        args.pairs,
        size,
        args.channels,
        args.kmers,
        args.slab,
    )


def read_sources(
    args: argparse.Namespace, apart: set[str]
) -> tuple[dict[str, dict[str, Any]], SourceData, list[Source]]:
    """split ("" where none is named) -> field -> array; what is known of fields; the files.

    `apart`: names of columns of tables that become fields of their own.
    """
    from hpctrain.data.kinds import ALONE, files_of, kind_of, read_kind
    from hpctrain.data.sources import SourceData, describe

    groups: dict[tuple[str, ...], list[Path]] = {}
    for number, text in enumerate(args.sources):
        match = SOURCE.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is not a source: give [SPLIT:][FIELD=]FILE")
        path = Path(match["file"])
        kind = kind_of(path, args.kind)
        together = str(number) if kind in ALONE else ""
        split, name = match["split"] or "", match["field"] or ""
        groups.setdefault((split, name, kind, together), []).append(path)
    parts: dict[str, dict[str, Any]] = {}
    found = SourceData({})
    options = _options(args, apart)
    for (split, name, kind, _), paths in groups.items():
        content = read_kind(kind, paths, name or None, options)
        part = parts.setdefault(split, {})
        twice = sorted(part.keys() & content.fields.keys())
        if twice:
            raise UsageError(f"{paths[0]}: the field {twice[0]!r} comes from another source too")
        part |= content.fields
        _add_known(found, content, paths[0])
    if "" in parts and len(parts) > 1:
        raise UsageError("either all sources name their split (SPLIT:FILE), or none does")
    files = [file for paths in groups.values() for path in paths for file in files_of(path)]
    return parts, found, [describe(file) for file in files]


def _add_known(found: SourceData, content: SourceData, path: Path) -> None:
    """Add what is known of a source's fields; splits must agree."""
    for name, names in content.columns.items():
        if found.columns.setdefault(name, names) != names:
            raise DataError(f"{path}: its columns {names} are not {found.columns[name]}")
    for name, text in content.files.items():
        if found.files.setdefault(name, text) != text:
            raise UsageError("--pairs takes all text together: let --split divide it")
    found.vocabularies.update(content.vocabularies)
    found.tokens.update(content.tokens)


def fractions_of(text: str | None) -> dict[str, float] | None:
    """The fractions that --split names, if it was given."""
    if text is None:
        return None
    try:
        pairs = [item.split("=") for item in text.split(",")]
        fractions = {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise UsageError(f"--split {text!r}: give fractions such as train=0.8,test=0.2") from None
    if len(fractions) != len(pairs):
        raise UsageError(f"--split {text!r} names a split twice")
    return fractions


def choose(
    parts: dict[str, dict[str, Any]],
    roles: dict[str, str],
    drop: list[str],
    inputs: bool,
    named: set[str],
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The fields to pack, and those left out: dropped, or with --input named by no option."""
    known = {name for fields in parts.values() for name in fields}
    for name in roles:
        if name in drop:
            raise UsageError(f"the field {name!r} is to be both packed and dropped")
        if name not in known:
            raise UsageError(
                f"no source has a field {name!r}{nearest(name, known)}; "
                f"there are {', '.join(sorted(known))}"
            )
    asked = {*roles, *ROLES, *(f"{name}_shape" for name in roles), *named}
    out = {n for n in known if n in drop or (inputs and n not in asked)}
    kept = {p: {n: v for n, v in f.items() if n not in out} for p, f in parts.items()}
    return kept, out
