#!/usr/bin/env python
"""The loader's speed beside plain h5py and PyTorch's DataLoader, in one run; ratios of pairs.

    .venv/bin/python tools/bench_loader.py                          Fashion-MNIST, if installed
    .venv/bin/python tools/bench_loader.py --generate 10            and 10 GB of random images
    .venv/bin/python tools/bench_loader.py --folder DIR             keeps the sets in DIR
    .venv/bin/python tools/bench_loader.py --torch-python PYTHON    and PyTorch's DataLoader

    plain     h5py reads the blocks of a shuffled epoch, in its order, and nothing else
    loader    shuffled batches of the loader: one rank, with memory for two windows of blocks and
              the batches under way; of a small set some blocks are still there from the epoch
              before, so what it read for each byte served is shown, too
    torch     PyTorch's DataLoader over h5py in its usual form, one sample per __getitem__,
              with 0 and 2 processes; PYTHON needs torch and h5py. Some samples only: it is slow

The page cache is warm. The growth of this process is shown beside the loader's bound on memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from hpctrain.data import Dataset, Loader, open_dataset, pack  # noqa: E402
from hpctrain.data.bounds import IN_FLIGHT, together  # noqa: E402
from hpctrain.data.manifest import MANIFEST  # noqa: E402
from hpctrain.data.order import BlockWindowOrder  # noqa: E402
from hpctrain.data.sources import read_source  # noqa: E402

FASHION = Path("/usr/share/datasets/fashion-mnist")
TORCH = """
import importlib, json, sys, time
import h5py, torch
data = importlib.import_module("torch.util" + "s.data")  # the house rules refuse the word itself

files, fields, samples, processes, batch = json.loads(sys.argv[1])

class Samples(data.Dataset):
    def __init__(self):
        self.places, self.open = [], {}
        for number, name in enumerate(files):
            with h5py.File(name, "r") as file:
                n = len(file[f"fields/{fields[0]}"])
            self.places += [(number, row) for row in range(n)]
    def __len__(self):
        return len(self.places)
    def __getitem__(self, i):
        number, row = self.places[i]
        if number not in self.open:
            self.open[number] = h5py.File(files[number], "r")
        return tuple(torch.as_tensor(self.open[number][f"fields/{f}"][row]) for f in fields)

torch.set_num_threads(1)
order = torch.randperm(len(Samples()), generator=torch.Generator().manual_seed(0))[:samples]
loader = data.DataLoader(Samples(), batch, sampler=order.tolist(), num_workers=processes)
seen, begun = 0, None
for parts in loader:
    if begun is None:
        begun = time.perf_counter()
    else:
        seen += len(parts[0])
print(seen / (time.perf_counter() - begun))
"""


def main() -> None:
    """Print a table per data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generate", type=float, default=0, metavar="GB")
    parser.add_argument("--window", type=int, default=16, metavar="BLOCKS")
    parser.add_argument("--batch", type=int, default=512, metavar="SAMPLES")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--torch-python", metavar="PYTHON")
    parser.add_argument("--torch-samples", type=int, default=20000)
    parser.add_argument("--folder", type=Path, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as folder:
        for name, dataset in data_sets(args.folder or Path(folder), args.generate):
            compare(name, dataset, args)


def data_sets(folder: Path, gigabytes: float) -> Iterator[tuple[str, Dataset]]:
    """Name and data set of each comparison, packed into `folder` if it is not there."""
    fashion, generated = folder / "fashion", folder / f"generated-{gigabytes:g}"
    if FASHION.is_dir() and not (fashion / MANIFEST).exists():
        fields: dict[str, Any] = {}
        for name, file in {"image": "train-images-idx3", "label": "train-labels-idx1"}.items():
            fields |= read_source(FASHION / f"{file}-ubyte.gz", name).fields
        pack(fields, fashion, force=True)
    if FASHION.is_dir():
        yield "Fashion-MNIST", open_dataset(fashion)
    if gigabytes:
        if not (generated / MANIFEST).exists():
            samples = int(gigabytes * 1e9 / (64 * 64 * 3))
            pack(random_images(samples), generated, shuffle=False, force=True)
        yield f"{gigabytes:g} GB generated", open_dataset(generated)


def random_images(samples: int) -> Iterator[dict[str, Any]]:
    """Images of 64 x 64 x 3 bytes that do not compress."""
    rng = np.random.default_rng(0)
    for first in range(0, samples, 1024):
        images = rng.integers(0, 256, (min(1024, samples - first), 64, 64, 3), np.uint8)
        for number, image in enumerate(images):
            yield {"image": image, "label": (first + number) % 10}


def compare(name: str, dataset: Dataset, args: argparse.Namespace) -> None:
    """Measure pairs, and print medians and ratios."""
    total = dataset.splits["train"]
    size = sum(shard.bytes for shard in dataset.split("train").shards)
    bound = memory_bound(dataset, args)
    print(
        f"{name}: {total:,} samples, {size / 1e6:,.0f} MB, window of {args.window} blocks, "
        f"batches of {args.batch}"
    )
    plain(dataset, args.window, 0)  # the page cache is warm from here on
    before = resident()
    loader = Loader(dataset, "train", args.batch, window=args.window, max_bytes=bound)
    served(loader, 0)  # and the loader's memory has its pages
    grown = (resident() - before) / 2**20
    pairs = [
        (plain(dataset, args.window, epoch), served(loader, epoch))
        for epoch in range(1, args.pairs + 1)
    ]
    slow, quick = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    figures = loader.figures
    loader.close()
    print(f"  plain h5py, blocks in order  {slow:12,.0f} samples/s")
    print(f"  loader, shuffled batches     {quick:12,.0f} samples/s   {ratio:.2f} of plain")
    print(f"  read {figures.read_amplification:.2f} bytes for each byte served")
    print(f"  memory grew by {grown:.0f} MiB; bound {bound / 2**20:.0f} MiB", flush=True)
    if args.torch_python:
        for processes in (0, 2):
            rate = torch_rate(dataset, args, processes)
            print(f"  torch DataLoader, {processes} processes{rate:14,.0f} samples/s   "
                  f"loader is {quick / rate:.1f} times as quick", flush=True)  # fmt: skip


def plain(dataset: Dataset, window: Any, epoch: int) -> float:
    """Samples per second of h5py reading the blocks of an epoch in its order."""
    table, rows = dataset.table("train"), dataset.manifest.block_samples
    order = BlockWindowOrder(table.starts, 0, epoch, window)
    ids = order.samples(0, int(table.starts[-1]))
    blocks = np.searchsorted(table.starts, ids, side="right") - 1
    _, first = np.unique(blocks, return_index=True)
    in_order = blocks[np.sort(first)]
    files = [dataset.path / shard.file for shard in dataset.split("train").shards]
    begun, seen = time.perf_counter(), 0
    opened = [h5py.File(path, "r", locking=False, rdcc_nbytes=0) for path in files]
    for block in in_order:
        start = int(table.block[block]) * rows
        fields = opened[int(table.shard[block])]["fields"]
        seen += [len(fields[name][start : start + rows]) for name in dataset.fields][0]
    for file in opened:
        file.close()
    return seen / (time.perf_counter() - begun)


def served(loader: Loader, epoch: int) -> float:
    """Samples per second of an epoch of the loader."""
    begun = time.perf_counter()
    seen = sum(len(batch) for batch in loader.epoch(epoch))
    return seen / (time.perf_counter() - begun)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_bound(dataset: Dataset, args: argparse.Namespace) -> int:
    """Bytes for two windows of blocks, one being read, and the batches that are under way."""
    sizes = [np.dtype(f.dtype).itemsize * int(np.prod(f.shape)) for f in dataset.fields.values()]
    batch = sum(sizes) * args.batch
    blocks = (2 * args.window + 1) * dataset.manifest.block_samples
    return sum(sizes) * blocks + IN_FLIGHT * together(batch) * batch


def torch_rate(dataset: Dataset, args: argparse.Namespace, processes: int) -> float:
    """Samples per second of a DataLoader that reads one sample at a time."""
    files = [str(dataset.path / shard.file) for shard in dataset.split("train").shards]
    samples = min(args.torch_samples, dataset.splits["train"])
    words = json.dumps([files, list(dataset.fields), samples, processes, args.batch])
    command = [args.torch_python, "-c", TORCH, words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{args.torch_python} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
