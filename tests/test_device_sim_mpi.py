"""Simulated GPUs and MPI: mpi4py's path for GPU buffers, and what a step asks of the GPU."""

import ctypes
import re

import numpy as np
import pytest
from launching import ROOT
from simulated import open_sim
from training import make_digits, run_file

from hpctrain.config import resolve
from hpctrain.device.launch import DTYPES
from hpctrain.device.sim import Machine, SimDevice
from hpctrain.train.session import open_session
from hpctrain.train.step import Trainer

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class OnlyInterface:
    """An array without DLPack, as older libraries have it."""

    def __init__(self, array):
        self.array = array

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


@pytest.mark.ranks(1)
@pytest.mark.parametrize("show", [lambda x: x, OnlyInterface], ids=["dlpack", "interface"])
def test_mpi4py_takes_it_for_gpu_memory(show):
    from mpi4py import MPI

    device = open_sim()
    x = device.zeros((3, 4), "float32")
    buffer = MPI.buffer.frombuffer(show(x))
    assert (buffer.address, buffer.nbytes) == (x.data.ptr, 48)
    with pytest.raises(BufferError, match="not CPU-accessible"):
        buffer.tobytes()
    with pytest.raises(BufferError, match="not contiguous"):
        MPI.buffer.frombuffer(show(x[:, 1:3]))


@pytest.mark.ranks(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "uint8"])
def test_mpi4py_takes_every_type(dtype):
    """bfloat16 as bytes, which is all that it knows of it; told from another 16-bit type."""
    from mpi4py import MPI

    device = open_sim()
    host = np.arange(5).astype(DTYPES[dtype])
    x, y = device.from_host(host), device.zeros(5, host.dtype)
    device.synchronize()
    try:
        MPI.COMM_SELF.Sendrecv(x, dest=0, recvbuf=y, source=0)
    except MPI.Exception as error:
        if dtype == "float16" and error.Get_error_class() == MPI.ERR_TYPE:
            pytest.skip("this MPI library has no float16 (Open MPI 4); hpctrain sends it as bytes")
        raise
    np.testing.assert_array_equal(device.to_host(y), host)
    capsule = x.__dlpack__()
    address = pointer_of(capsule, b"dltensor")
    code = {"f": 2, "i": 0, "u": 1, "V": 4}[host.dtype.kind]
    assert bytes((ctypes.c_uint8 * 2).from_address(address + 20)) == bytes(
        [code, 8 * host.itemsize]
    )


@pytest.mark.ranks(2)
def test_messages_between_gpus(comm):
    """After a synchronization MPI sends what was computed; before it, what was there."""
    for order in ("late", "early", "1", "2"):
        device = open_sim(order)
        x, y = device.zeros(1000, "float64"), device.zeros(1000, "float64")
        device.synchronize()
        device.launch("fill", x, comm.rank + 1.0, 1000, work=1000)
        comm.Sendrecv(x, dest=1 - comm.rank, recvbuf=y, source=1 - comm.rank)
        early = float(device.to_host(y)[0])
        device.synchronize()
        comm.Sendrecv(x, dest=1 - comm.rank, recvbuf=y, source=1 - comm.rank)
        assert device.to_host(y).tolist() == [2.0 - comm.rank] * 1000
        if order in ("late", "early"):
            assert early == {"late": 0.0, "early": 2.0 - comm.rank}[order]


# What a step does to the GPU, held against the table in docs/sim.md.


def table():
    """The table's rows: title, and a number per column."""
    text = (ROOT / "docs" / "sim.md").read_text(encoding="utf-8")
    section = text.split("## What a training step asks")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| ([\w ,]+?) +\| +([\d,]+) \| +([\d,]+) \| +([\d,]+) \| +([\d,]+) \|", section, re.M
    )
    return {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows}


def counted(comm, folder, **parallel):
    """The counts of the third step on rank 0."""
    data = folder / "data"
    if comm.rank == 0:
        make_digits(data)
    comm.Barrier()
    overrides = [f"parallel.{key}={value}" for key, value in parallel.items()]
    config = resolve(run_file(folder / f"{comm.rank}.toml", data), overrides).config
    device = SimDevice(comm.rank, Machine("late", "host", 8))
    with open_session(config, device, comm) as session:
        loader = session.loader("train")
        trainer = Trainer(session)
        trainer.initialize()
        for step, batch in enumerate(loader.epoch(0)):
            device.reset_counts()
            trainer.step(batch, step)
            if step == 2:
                break
        counts = device.counts()
        loader.close()
        trainer.free()
    return counts


def as_rows(counts):
    """The numbers of a column of the table."""
    return {
        "kernel launches": sum(counts.launches.values()),
        "products": counts.products,
        **{f"copies {way}": counts.copies[way] for way in ("to device", "to host", "on device")},
        **{f"bytes {way}": counts.copied[way] for way in ("to device", "to host", "on device")},
        **{
            f"waits for {what}": counts.synchronizations[kind]
            for what, kind in (
                ("a blocking copy", "copy"),
                ("the stream", "stream"),
                ("an event", "event"),
                ("the device", "device"),
            )
        },
    }


COLUMNS = [
    (1, {}),
    (2, {}),
    (2, {"reduction": "messages", "gpu_mpi": "on", "overlap": "off"}),
    (2, {"reduction": "messages", "gpu_mpi": "off", "overlap": "off"}),
]


@pytest.mark.ranks(1, 2)
def test_a_step_asks_what_the_page_says(comm, tmp_path_factory):
    folder = comm.bcast(tmp_path_factory.mktemp("sim"))
    for column, (ranks, parallel) in enumerate(COLUMNS):
        if ranks == comm.size:
            place = folder / str(column)
            if comm.rank == 0:
                place.mkdir()
            comm.Barrier()
            rows = as_rows(counted(comm, place, **parallel))
            if comm.rank == 0:
                assert rows == {title: cells[column] for title, cells in table().items()}
                assert rows["waits for the device"] == 0
                gradients = np.dtype(np.float64).itemsize * 2410  # of 64 -> 32 -> 10
                if parallel.get("gpu_mpi") != "off":
                    assert rows["bytes to host"] < gradients / 4
