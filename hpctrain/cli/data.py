"""`hpctrain data`: pack files into shards, show a data set, check a data set.

Layer: cli. Imports NumPy and h5py only when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli import data_pack, data_show
from hpctrain.cli.data_pack import brief, counted, shape_text

if TYPE_CHECKING:
    from hpctrain.data.dataset import Dataset
    from hpctrain.data.manifest import Field, Shard

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` with its commands."""
    data = subparsers.add_parser("data", help="pack, show and check data sets")
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    data_pack.add_parser(commands)
    info = commands.add_parser("info", help="show what is in a data set")
    info.add_argument("directory", type=Path, metavar="DIR")
    info.set_defaults(run=run_info)
    verify = commands.add_parser(
        "verify",
        help="check every file, chunk, count and key of a data set",
        description="Read all of a data set and check it against its manifest. Prints one line "
        "per problem, with file, field and block, and exits with 1 if there is any. Under mpirun "
        "the ranks share the work.",
    )
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.add_argument(
        "--notes",
        type=Path,
        metavar="FILE",
        help="note the sound shards in FILE.<rank>, and leave out those that are noted there: goes "
        "on with a check that was cut short; removed when all is sound",
    )
    verify.set_defaults(run=run_verify)
    data_show.add_parsers(commands)


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
            print(f"{name}: {len(field.vocab)} words: {brief(list(field.vocab))}")
        if field.columns:
            print(f"{name}: columns {brief([c.name for c in field.columns])}")
    print()
    _table(["split", "samples", "shards", "blocks", "MB", "classes"], _split_rows(dataset))
    _print_sizes([s for split in manifest.splits.values() for s in split.shards])
    print(f"\nblocks of {manifest.block_samples} samples; packed by {manifest.provenance.packer}")
    for source in manifest.provenance.sources:
        print(f"from {source.name}, {source.bytes} bytes, sha256 {source.sha256[:16]}...")
    if manifest.provenance.licence:
        print(f"licence: {manifest.provenance.licence}")
    return 0


def _print_sizes(shards: list[Shard]) -> None:
    """A histogram of the shards' sizes, in powers of two of MB."""
    counts: dict[int, int] = {}
    for shard in shards:
        power = max(0, math.ceil(math.log2(max(shard.bytes / 1e6, 1))))
        counts[power] = counts.get(power, 0) + 1
    print("\nshards by size:")
    most = max(counts.values(), default=1)
    for power in range(min(counts, default=0), max(counts, default=-1) + 1):
        count = counts.get(power, 0)
        bar = "#" * -(-40 * count // most)
        print(f"  up to {2**power:6,} MB {count:7,}  {bar}".rstrip())


def run_verify(args: argparse.Namespace) -> int:
    """`hpctrain data verify`: print problems; 1 if there are any."""
    from hpctrain.data.dataset import open_dataset
    from hpctrain.data.verify import verify

    comm = data_pack.launched()
    first, found = comm is None or comm.rank == 0, 0
    for problem in verify(args.directory, comm, args.notes):
        found += 1
        if first:
            print(problem, flush=True)
    if not first:
        return int(found > 0)
    if found:
        number = counted(found, "problem")
        print(f"{args.directory}: {number}; restore these files, or pack the data again")
        return 1
    splits = open_dataset(args.directory).manifest.splits.values()
    shards = [shard for split in splits for shard in split.shards]
    print(
        f"{args.directory}: sound; {counted(sum(s.n for s in shards), 'sample')} in "
        f"{counted(len(shards), 'shard')}, "
        f"{sum(s.bytes for s in shards)} bytes read"
    )
    return 0


def _field_row(name: str, field: Field) -> list[str]:
    s = field.stats
    numbers = [f"{v:.6g}" for v in (s.mean, s.std, s.min, s.max)] if s else ["-"] * 4
    return [name, field.role, field.dtype, shape_text(field) or "-", *numbers]


def _split_rows(dataset: Dataset) -> list[list[str]]:
    rows = []
    for name, split in dataset.manifest.splits.items():
        counts = [s.class_counts for s in split.shards if s.class_counts is not None]
        totals = [sum(column) for column in zip(*counts, strict=True)]
        size = sum(s.bytes for s in split.shards) / 1e6
        blocks = sum(s.blocks for s in split.shards)
        rows.append([name, str(split.n), str(len(split.shards)), str(blocks), f"{size:.1f}",
                     brief([f"{t} ({t / split.n:.1%})" for t in totals]) or "-"])  # fmt: skip
    return rows


def _table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
