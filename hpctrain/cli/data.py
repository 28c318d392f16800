"""`hpctrain data`: pack files into shards, show a data set, check a data set.

Layer: cli. Imports NumPy and h5py only when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from hpctrain.data.dataset import Dataset
    from hpctrain.data.manifest import Field, Manifest, Source

__all__ = ["add_parser"]

SOURCE = re.compile(r"(?:(?P<split>[A-Za-z_][\w-]*):)?(?:(?P<field>[A-Za-z_]\w*)=)?(?P<file>.+)")
ROLES = ("input", "label", "mask", "weight")

PACK_HELP = """\
Pack files into a data set: HDF5 shards and a manifest.

A SOURCE is [SPLIT:][FIELD=]FILE, where FILE is one of
  .npz             every array in it is a field, called by its name there
  .npy, idx-ubyte  one field, called FIELD (default: the name of the file); idx may be .gz
  .csv, .tsv       with a header line, may be .gz: the columns of numbers become one field called
                   FIELD (default: features), each column of strings a field of codes; columns
                   named by --label and the like become fields of their own
Files of one split are put side by side; all fields have the same number of samples."""

PACK_EXAMPLES = """\
examples:
  hpctrain data pack digits.npz --out data/digits --label target --split train=0.8,test=0.2
  hpctrain data pack loans.csv --out data/loans --label status --drop id --split train=0.9,test=0.1
  hpctrain data pack --out data/fashion-mnist \\
      train:image=train-images-idx3-ubyte.gz train:label=train-labels-idx1-ubyte.gz \\
      test:image=t10k-images-idx3-ubyte.gz test:label=t10k-labels-idx1-ubyte.gz

The same files and arguments always give the same bytes. A killed packing leaves no manifest;
the same command with --resume keeps the shards that are already right."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` with its commands pack, info and verify."""
    data = subparsers.add_parser("data", help="pack, show and check data sets")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add_pack(commands)
    info = commands.add_parser("info", help="show what is in a data set")
    info.add_argument("directory", type=Path, metavar="DIR")
    info.set_defaults(run=run_info)
    verify = commands.add_parser(
        "verify",
        help="check every file, chunk, count and key of a data set",
        description="Read all of a data set and check it against its manifest. Prints one line "
        "per problem, with file, field and block, and exits with 1 if there is any.",
    )
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(run=run_verify)


def _add_pack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    pack = commands.add_parser(
        "pack",
        help="pack .npy, .npz, idx-ubyte or CSV files into shards",
        description=PACK_HELP,
        epilog=PACK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = pack.add_argument
    add("sources", nargs="+", metavar="SOURCE")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    for role in ROLES:
        default = "everything not named otherwise" if role == "input" else f"a field {role!r}"
        add(f"--{role}", action="append", default=[], metavar="FIELD",
            help=f"a field with the role {role}; may be repeated (default: {default})")  # fmt: skip
    add("--drop", action="append", default=[], metavar="FIELD",
        help="a field, or a column of a table, not to pack; may be repeated")  # fmt: skip
    add("--split", metavar="NAME=F,...", help="divide the samples, e.g. train=0.8,test=0.2 "
        "(default: all are train); decided by each sample's number, stable when rows are "
        "appended")  # fmt: skip
    add("--seed", type=int, default=0, help="of the order in which samples are written (0)")
    add("--no-shuffle", action="store_true", help="keep the samples in their order")
    add("--block-samples", type=int, metavar="N", help="samples per block (about 1 MiB)")
    add("--shard-samples", type=int, metavar="N", help="samples per file (about 128 MiB)")
    add("--gzip", action="store_true", help="compress the blocks: smaller, slower to read")
    add("--licence", metavar="TEXT", help="recorded in the manifest")
    add("--force", action="store_true", help="replace what is in DIR")
    add("--resume", action="store_true", help="go on with a packing that was killed")
    pack.set_defaults(run=run_pack)


def run_pack(args: argparse.Namespace) -> int:
    """`hpctrain data pack`: returns the exit status, or raises an error of hpctrain."""
    from hpctrain.data.pack import pack

    roles = {name: role for role in ROLES for name in getattr(args, role)}
    parts, columns, sources = _read_sources(args.sources, {*roles, *ROLES}, args.drop)
    split = _fractions(args.split)
    if "" not in parts and split:
        raise UsageError("--split cannot divide sources that already name their split")
    parts, left_out = _choose(parts, roles, args.drop, bool(args.input))
    manifest = pack(
        parts.get("", parts),
        args.out,
        roles=roles,
        splits=split,
        seed=args.seed,
        shuffle=not args.no_shuffle,
        block_samples=args.block_samples,
        shard_samples=args.shard_samples,
        gzip=args.gzip,
        force=args.force,
        resume=args.resume,
        columns={name: names for name, names in columns.items() if name not in left_out},
        sources=sources,
        licence=args.licence,
    )
    if left_out:
        print(f"left out: {', '.join(sorted(left_out))}")
    for name, content in manifest.splits.items():
        print(f"{name}: {_count(content.n, 'sample')} in {_count(len(content.shards), 'shard')}")
    print(f"{args.out}: {_fields_line(manifest)}; {manifest.dataset_id[:23]}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """`hpctrain data info`: print what the manifest says."""
    from hpctrain.data.dataset import open_dataset

    dataset = open_dataset(args.directory)
    manifest = dataset.manifest
    version = ".".join(map(str, manifest.format_version))
    print(f"{dataset.path}: {manifest.format} {version}, {manifest.dataset_id}\n")
    _table(
        ["field", "role", "dtype", "shape", "mean", "std", "min", "max"],
        [_field_row(name, field) for name, field in manifest.fields.items()],
    )
    for name, field in manifest.fields.items():
        if field.vocab:
            print(f"{name}: {len(field.vocab)} words: {_brief(list(field.vocab))}")
        if field.columns:
            print(f"{name}: columns {_brief([c.name for c in field.columns])}")
    print()
    _table(["split", "samples", "shards", "blocks", "MB", "classes"], _split_rows(dataset))
    print(f"\nblocks of {manifest.block_samples} samples; packed by {manifest.provenance.packer}")
    for source in manifest.provenance.sources:
        print(f"from {source.name}, {source.bytes} bytes, sha256 {source.sha256[:16]}...")
    if manifest.provenance.licence:
        print(f"licence: {manifest.provenance.licence}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """`hpctrain data verify`: print problems; 1 if there are any."""
    from hpctrain.data.dataset import open_dataset
    from hpctrain.data.verify import verify

    found = 0
    for problem in verify(args.directory):
        print(problem, flush=True)
        found += 1
    if found:
        number = _count(found, "problem")
        print(f"{args.directory}: {number}; restore these files, or pack the data again")
        return 1
    splits = open_dataset(args.directory).manifest.splits.values()
    shards = [shard for split in splits for shard in split.shards]
    print(
        f"{args.directory}: sound; {_count(sum(s.n for s in shards), 'sample')} in "
        f"{_count(len(shards), 'shard')}, "
        f"{sum(s.bytes for s in shards)} bytes read"
    )
    return 0


def _read_sources(
    texts: list[str], apart: set[str], drop: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]], list[Source]]:
    """split ("" where none is named) -> field -> array; columns of tables; the files."""
    from hpctrain.data.sources import describe, read_source

    parts: dict[str, dict[str, Any]] = {}
    columns: dict[str, list[str]] = {}
    sources = []
    for text in texts:
        match = SOURCE.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is not a source: give [SPLIT:][FIELD=]FILE")
        path = Path(match["file"])
        content = read_source(path, match["field"], apart, drop)
        part = parts.setdefault(match["split"] or "", {})
        twice = sorted(part.keys() & content.fields.keys())
        if twice:
            raise UsageError(f"{text}: the field {twice[0]!r} comes from another source already")
        for name, names in content.columns.items():
            if columns.setdefault(name, names) != names:
                raise DataError(f"{path}: its columns {names} are not {columns[name]}")
        part |= content.fields
        sources.append(describe(path))
    if "" in parts and len(parts) > 1:
        raise UsageError("either all sources name their split (SPLIT:FILE), or none does")
    return parts, columns, sources


def _fractions(text: str | None) -> dict[str, float] | None:
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


def _choose(
    parts: dict[str, dict[str, Any]], roles: dict[str, str], drop: list[str], inputs: bool
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
    out = {n for n in known if n in drop or (inputs and n not in roles and n not in ROLES)}
    kept = {p: {n: v for n, v in f.items() if n not in out} for p, f in parts.items()}
    return kept, out


def _fields_line(manifest: Manifest) -> str:
    return ", ".join(
        f"{name} ({field.role}) {field.dtype} {_shape(field)}".rstrip()
        for name, field in manifest.fields.items()
    )


def _shape(field: Field) -> str:
    return "ragged" if field.shape == "ragged" else "x".join(map(str, field.shape))


def _field_row(name: str, field: Field) -> list[str]:
    s = field.stats
    numbers = [f"{v:.6g}" for v in (s.mean, s.std, s.min, s.max)] if s else ["-"] * 4
    return [name, field.role, field.dtype, _shape(field) or "-", *numbers]


def _split_rows(dataset: Dataset) -> list[list[str]]:
    rows = []
    for name, split in dataset.manifest.splits.items():
        counts = [s.class_counts for s in split.shards if s.class_counts is not None]
        totals = [str(sum(column)) for column in zip(*counts, strict=True)]
        size = sum(s.bytes for s in split.shards) / 1e6
        blocks = sum(s.blocks for s in split.shards)
        rows.append([name, str(split.n), str(len(split.shards)), str(blocks), f"{size:.1f}",
                     _brief(totals) or "-"])  # fmt: skip
    return rows


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _brief(words: list[str]) -> str:
    return " ".join(words[:12]) + (f" ... ({len(words)})" if len(words) > 12 else "")


def _table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
