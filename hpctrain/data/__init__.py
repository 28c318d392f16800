"""Data sets in HDF5 shards: packing, checking, and reading in an order that no rank enters.

    pack(samples, out)     arrays, or any iterable -> shards and a manifest  (`hpctrain data pack`)
    open_dataset(path)     a packed data set
    Loader(dataset, ...)   a rank's batches, epoch by epoch
    verify(path)           every checksum, chunk, count and key   (`hpctrain data verify`)

The only package that imports h5py for data. Communicators are passed in.
"""

from hpctrain.data.computed import Computed, ComputedRagged
from hpctrain.data.dataset import Dataset, open_dataset
from hpctrain.data.loader import Batch, Loader, State
from hpctrain.data.pack import pack
from hpctrain.data.ragged import Ragged
from hpctrain.data.verify import verify
from hpctrain.data.views import Patches, Windows

__all__ = [
    "Batch",
    "Computed",
    "ComputedRagged",
    "Dataset",
    "Loader",
    "Patches",
    "Ragged",
    "State",
    "Windows",
    "open_dataset",
    "pack",
    "verify",
]
