"""`hpctrain data pack`: files that people have, to shards.

Layer: cli. Imports NumPy and h5py only when the command runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.data_sources import ROLES, choose, fractions_of, read_sources
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.data.manifest import Field, Manifest

__all__ = ["add_parser", "brief", "counted", "launched", "shape_text"]


LOG_EVERY = 10.0  # seconds between two lines of progress in a log

PACK_HELP = """\
Pack files into a data set: HDF5 shards and a manifest. Under mpirun all ranks pack together, and
the bytes are the same as those of one.

A SOURCE is [SPLIT:][FIELD=]FILE, where FILE is one of
  .npz             every array in it is a field, called by its name there
  .npy, idx-ubyte  one field, called FIELD (default: the name of the file); idx may be .gz
  .csv, .tsv       with a header line: the columns of numbers become one field called FIELD
                   (default: features), each column of words a field of codes; columns named by
                   --label and the like become fields of their own. $1,234.00 is a number; where
                   numbers are missing they are NaN, and FIELD_missing is 1
  a folder         of images in a folder per class (needs Pillow); --as text: of text files
  .csv --as images a list of images: the columns file and label
  .txt .md .py ... text: every file a document of bytes, closed by 0 (--lines, --pairs)
  .fa .fasta .fna  DNA sequences, or a BLAST database by its .nin (--kmers)
  .nii             NIfTI volumes
Tables, text, sequences and volumes may be .gz. Files of one split and field are put together if
they are text, images, sequences or volumes; else side by side, with one sample per row of each."""

PACK_EXAMPLES = """\
examples:
  hpctrain data pack digits.npz --out data/digits --label target --split train=0.8,test=0.2
  hpctrain data pack loans.csv --out data/loans --label status --drop id --split train=0.9,test=0.1
  hpctrain data pack photos --out data/photos --size 64x64 --split train=0.9,test=0.1
  hpctrain data pack 16S.nin --out data/rrna --label-pattern '([A-Z][a-z]+) [a-z]+' --kmers 4
  mpirun -n 8 hpctrain data pack scans/*.nii.gz --out data/scans
  hpctrain data pack --out data/fashion-mnist \\
      train:image=train-images-idx3-ubyte.gz train:label=train-labels-idx1-ubyte.gz \\
      test:image=t10k-images-idx3-ubyte.gz test:label=t10k-labels-idx1-ubyte.gz

The same files and arguments always give the same bytes. A killed packing leaves no manifest;
the same command with --resume keeps the shards that are already right."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `pack`."""
    pack = commands.add_parser(
        "pack",
        help="pack arrays, tables, text, images, sequences or volumes into shards",
        description=PACK_HELP,
        epilog=PACK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = pack.add_argument
    add("sources", nargs="+", metavar="SOURCE")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    _add_reading(pack.add_argument_group("reading"))
    _add_samples(pack.add_argument_group("samples"))
    add("--block-samples", type=int, metavar="N", help="samples per block (about 1 MiB)")
    add("--shard-samples", type=int, metavar="N", help="samples per file (about 128 MiB)")
    add("--gzip", action="store_true", help="compress the blocks: smaller, slower to read")
    add("--licence", metavar="TEXT", help="recorded in the manifest")
    add("--force", action="store_true", help="replace what is in DIR")
    add("--resume", action="store_true", help="go on with a packing that was killed")
    add("--dry-run", action="store_true", help="read the sources and say what would be written")
    pack.set_defaults(run=run_pack)


def _add_reading(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--as", dest="kind", choices=("text", "images"), help="how to read folders and tables")
    add("--drop", action="append", default=[], metavar="FIELD",
        help="a field, or a column of a table, not to pack; may be repeated")  # fmt: skip
    add("--require", action="append", default=[], metavar="COLUMN",
        help="leave out rows of a table where this column is empty; may be repeated")  # fmt: skip
    add("--label-pattern", metavar="REGEX", help="its first group is the label: in a sequence's "
        "header, or in the path of a text file")  # fmt: skip
    add("--label-least", type=int, default=1, metavar="N",
        help="leave out sequences of labels with fewer than N")  # fmt: skip
    add("--lines", action="store_true", help="text: every line is a document")
    add("--pairs", type=int, metavar="N", help="text: train a byte-pair vocabulary of N codes")
    add("--size", metavar="HxW", help="images: resize all to height x width")
    add("--channels", type=int, metavar="N", help="images: 1, 3 or 4 (as the files have)")
    add("--kmers", type=int, metavar="K", help="sequences: pack counts of words of K letters")
    add("--slab", type=int, metavar="N", help="volumes: cut each into slabs of N planes along its "
        "last dim, every one a sample; planes that are left over are left out")  # fmt: skip


def _add_samples(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for role in ROLES:
        default = "everything not named otherwise" if role == "input" else f"a field {role!r}"
        add(f"--{role}", action="append", default=[], metavar="FIELD",
            help=f"a field with the role {role}; may be repeated (default: {default})")  # fmt: skip
    add("--split", metavar="NAME=F,...", help="divide the samples, e.g. train=0.8,test=0.2 "
        "(default: all are train); decided by each sample's key, stable when samples are "
        "appended")  # fmt: skip
    add("--key", metavar="FIELD", help="what says who a sample is (default: its number)")
    add("--group", metavar="FIELD", help="samples with equal values are never in two splits")
    add("--stratify", metavar="FIELD", help="deal the classes of this field evenly to the shards")
    add("--seed", type=int, default=0, help="of the order in which samples are written (0)")
    add("--no-shuffle", action="store_true", help="keep the samples in their order")


def run_pack(args: argparse.Namespace) -> int:
    """`hpctrain data pack`: returns the exit status, or raises an error of hpctrain."""
    from hpctrain.data.pack import pack

    comm = launched()
    first = comm is None or comm.rank == 0
    roles = {name: role for role in ROLES for name in getattr(args, role)}
    parts, found, sources = read_sources(args, {*roles, *ROLES})
    split = fractions_of(args.split)
    if "" not in parts and split:
        raise UsageError("--split cannot divide sources that already name their split")
    named = {name for name in (args.key, args.group, args.stratify) if name is not None}
    parts, left_out = choose(parts, roles, args.drop, bool(args.input), named)
    kept = {name for fields in parts.values() for name in fields}
    roles = {n: "mask" for n in kept if n.endswith("_missing")} | roles
    manifest = pack(
        parts.get("", parts),
        args.out,
        roles=roles,
        splits=split,
        key=args.key,
        group=args.group,
        stratify=args.stratify,
        seed=args.seed,
        shuffle=not args.no_shuffle,
        block_samples=args.block_samples,
        shard_samples=args.shard_samples,
        gzip=args.gzip,
        force=args.force,
        resume=args.resume,
        dry_run=args.dry_run,
        columns={name: names for name, names in found.columns.items() if name in kept},
        vocabularies=found.vocabularies,
        tokens=found.tokens,
        files=found.files,
        sources=sources,
        licence=args.licence,
        comm=comm,
        progress=_Progress(),
    )
    if first:
        _report(args, manifest, left_out)
    return 0


def launched() -> MPI.Intracomm | None:
    """The world communicator if a launcher started this process, else None."""
    from hpctrain.mpi.start import local_rank_from_environment, start

    if local_rank_from_environment() is None:
        return None
    return start()


class _Progress:
    """The part that is written: on a terminal in place, in a job's log a line now and then."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        text = f"packing: {done / max(total, 1):4.0%}"
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{text}", end=end, file=sys.stderr, flush=True)
        elif time.monotonic() - self._said >= LOG_EVERY:
            self._said = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _report(args: argparse.Namespace, manifest: Manifest, left_out: set[str]) -> None:
    if left_out:
        print(f"left out: {', '.join(sorted(left_out))}")
    for name, content in manifest.splits.items():
        line = f"{name}: {counted(content.n, 'sample')} in {counted(len(content.shards), 'shard')}"
        counts = [s.class_counts for s in content.shards if s.class_counts is not None]
        totals = [sum(column) for column in zip(*counts, strict=True)]
        rates = brief([f"{total / content.n:.2%}" for total in totals])
        print(f"{line}; classes {rates}" if totals else line)
    fields = ", ".join(
        f"{name} ({field.role}) {field.dtype} {shape_text(field)}".rstrip()
        for name, field in manifest.fields.items()
    )
    if args.dry_run:
        nbytes = sum(s.bytes for split in manifest.splits.values() for s in split.shards)
        size = f"{nbytes:,} bytes" + (" before compression" if args.gzip else "")
        print(f"{args.out} would hold {fields}; {size}; nothing was written")
    else:
        print(f"{args.out}: {fields}; {manifest.dataset_id[:23]}")


def shape_text(field: Field) -> str:
    """A field's shape, such as 28x28."""
    return "ragged" if field.shape == "ragged" else "x".join(map(str, field.shape))


def counted(number: int, what: str) -> str:
    """A number of things, such as "2 shards"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def brief(words: list[str]) -> str:
    """The first of many words."""
    return " ".join(words[:12]) + (f" ... ({len(words)})" if len(words) > 12 else "")
