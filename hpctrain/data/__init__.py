"""Data sets in HDF5 shards: packing, checking, and reading in an order that no rank enters.

    pack(fields, out)      arrays -> shards and a manifest        (`hpctrain data pack`)
    open_dataset(path)     a packed data set
    Loader(dataset, ...)   a rank's batches, epoch by epoch
    verify(path)           every checksum, chunk, count and key   (`hpctrain data verify`)

The only package that imports h5py for data. Communicators are passed in.
"""

from hpctrain.data.dataset import Dataset, open_dataset
from hpctrain.data.loader import Batch, Loader, State
from hpctrain.data.pack import pack
from hpctrain.data.ragged import Ragged
from hpctrain.data.verify import verify

__all__ = ["Batch", "Dataset", "Loader", "Ragged", "State", "open_dataset", "pack", "verify"]
