"""`hpctrain data pack`: files that people have, to shards.

Layer: cli. Imports NumPy and h5py only when the command runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpctrain.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.data.kinds import ReadOptions
    from hpctrain.data.manifest import Field, Manifest, Source
    from hpctrain.data.sources import SourceData

__all__ = ["add_parser", "brief", "counted", "launched", "shape_text"]

SOURCE = re.compile(r"(?:(?P<split>[A-Za-z_][\w-]*):)?(?:(?P<field>[A-Za-z_]\w*)=)?(?P<file>.+)")
ROLES = ("input", "label", "mask", "weight")

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
    parts, found, sources = _read_sources(args, {*roles, *ROLES})
    split = _fractions(args.split)
    if "" not in parts and split:
        raise UsageError("--split cannot divide sources that already name their split")
    named = {name for name in (args.key, args.group, args.stratify) if name is not None}
    parts, left_out = _choose(parts, roles, args.drop, bool(args.input), named)
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
        progress=_progress if sys.stderr.isatty() else None,
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


def _progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rpacking: {done / max(total, 1):4.0%}", end=end, file=sys.stderr, flush=True)


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
        print(f"{args.out} would hold {fields}; nothing was written")
    else:
        print(f"{args.out}: {fields}; {manifest.dataset_id[:23]}")


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
    )


def _read_sources(
    args: argparse.Namespace, apart: set[str]
) -> tuple[dict[str, dict[str, Any]], SourceData, list[Source]]:
    """split ("" where none is named) -> field -> array; what is known of fields; the files."""
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


def shape_text(field: Field) -> str:
    """A field's shape, such as 28x28."""
    return "ragged" if field.shape == "ragged" else "x".join(map(str, field.shape))


def counted(number: int, what: str) -> str:
    """A number of things, such as "2 shards"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def brief(words: list[str]) -> str:
    """The first of many words."""
    return " ".join(words[:12]) + (f" ... ({len(words)})" if len(words) > 12 else "")
