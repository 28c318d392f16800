"""`hpctrain data view` and `hpctrain data stage`: look at samples, copy a set to a node's disk.

Layer: cli. Imports NumPy and h5py only when a command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.cli.data_pack import launched
from hpctrain.errors import UsageError

if TYPE_CHECKING:
    from hpctrain.data.dataset import Dataset

__all__ = ["add_parsers"]

VIEW_HELP = """\
Show a few decoded samples, each field in a line. With --png the first field that is an image (of a
volume: the middle plane) of each sample is drawn, side by side."""

STAGE_HELP = """\
Copy a data set to a disk of this node, for example $TMPDIR; prints the folder to train from. Under
mpirun it is copied to every node, by all of its ranks. Files are summed while they are copied; a
copy that is whole is used again."""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `view` and `stage`."""
    view = commands.add_parser("view", help="show a few samples", description=VIEW_HELP)
    add = view.add_argument
    add("directory", type=Path, metavar="DIR")
    add("--split", metavar="NAME", help="which split (default: the first)")
    add("-n", "--samples", type=int, default=9, metavar="N", help="how many samples (9)")
    add("--start", type=int, default=0, metavar="I", help="number of the first one (0)")
    add("--png", type=Path, metavar="FILE", help="write the images of the samples as a grid")
    view.set_defaults(run=run_view)
    stage = commands.add_parser(
        "stage", help="copy a data set to a disk of each node", description=STAGE_HELP
    )
    stage.add_argument("directory", type=Path, metavar="DIR")
    stage.add_argument("--to", type=Path, required=True, metavar="DIR", help="a local directory")
    stage.set_defaults(run=run_stage)


def run_view(args: argparse.Namespace) -> int:
    """`hpctrain data view`: samples in text, and as a PNG if asked for."""
    from hpctrain.data.dataset import open_dataset
    from hpctrain.data.show import decoder, describe_value, sample

    dataset = open_dataset(args.directory)
    split = args.split or next(iter(dataset.splits))
    total = dataset.split(split).n
    last = min(args.start + args.samples, total)
    if not 0 <= args.start < last:
        raise UsageError(
            f"no samples from {args.start} on: split {split!r} has {total}; give --start 0 to "
            f"{total - 1} and -n of 1 or more"
        )
    decoders = {name: decoder(dataset, name) for name in dataset.fields}
    for number in range(args.start, last):
        print(f"{split} {number}")
        values = sample(dataset, split, number)
        for name, field in dataset.fields.items():
            print(f"  {name}: {describe_value(field, values[name], decoders[name])}")
    if args.png is not None:
        _draw(dataset, split, range(args.start, last), args.png)
    return 0


def _draw(dataset: Dataset, split: str, numbers: range, path: Path) -> None:
    from hpctrain.data.show import grid, picture, sample, write_png

    pictures = []
    for number in numbers:
        values = sample(dataset, split, number)
        found = (picture(name, field, values) for name, field in dataset.fields.items())
        one = next((image for image in found if image is not None), None)
        if one is None:
            raise UsageError(f"{dataset.path} has no field of images: leave out --png")
        pictures.append(one)
    write_png(path, grid(pictures))
    print(f"{path}: {len(pictures)} images")


def run_stage(args: argparse.Namespace) -> int:
    """`hpctrain data stage`: print where the copy is."""
    from hpctrain.data.dataset import open_dataset
    from hpctrain.data.stage import stage

    comm = launched()
    dataset = open_dataset(args.directory, comm)
    if comm is None:
        staged = stage(dataset, args.to)
    else:
        from hpctrain.mpi.topology import topology

        where = topology(comm)
        staged = stage(dataset, args.to, where.node)
        where.free()
    if comm is None or comm.rank == 0:
        rate = staged.bytes_copied / 1e6 / max(staged.seconds, 1e-9)
        done = f"{staged.bytes_copied:,} bytes in {staged.seconds:.1f} s, {rate:,.0f} MB/s per node"
        print(f"{staged.path}: {done if staged.bytes_copied else 'there already'}")
    return 0
