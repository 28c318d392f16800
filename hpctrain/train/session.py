"""What a run consists of: ranks, device, data, network, stores. Built once, from a run file.

Layer: train. The order matters: threads and kernels before the first product, data before the
network (it gives shapes), the network before the stores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from hpctrain.autograd import Tape, Variable
from hpctrain.data import Batch, Dataset, Loader, open_dataset
from hpctrain.data.stage import stage
from hpctrain.device import Device, open_device
from hpctrain.device.build import lowest_level
from hpctrain.device.dtypes import dtype_named, wide_dtype
from hpctrain.models import build
from hpctrain.mpi.messages import allreduce_sum
from hpctrain.mpi.topology import Topology, topology
from hpctrain.nn.layout import Store
from hpctrain.nn.module import Layouts, Module
from hpctrain.optim import SGD, AdamW, Rule
from hpctrain.sections import AdamW as AdamWConfig
from hpctrain.sections import RunConfig
from hpctrain.train.task import Task, task_of

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Session", "open_session", "rule_of"]


@dataclass
class Session:
    """The parts of a run that training and evaluation share."""

    config: RunConfig
    comm: MPI.Intracomm
    topology: Topology
    device: Device
    dataset: Dataset
    task: Task
    model: Module
    layouts: Layouts
    threads: int  # BLAS threads of this rank
    exchange_seconds: float = 0.0  # what `all_reduce` has taken so far

    def loader(self, split: str, order: str = "") -> Loader:
        """This rank's loader of a split: as [data] says, or "sequential" for evaluation.

        Collective where the ranks of a node share a cache: in training, with data.node_cache_mib.
        """
        config, data = self.config, self.config.data
        training = order != "sequential"
        share = training and data.node_cache_mib > 0
        return Loader(
            self.dataset,
            split,
            batch_size=config.batch.size,
            microbatch=config.batch.microbatch,
            rank=self.comm.rank,
            size=self.comm.size,
            seed=config.run.seed,
            window=data.window or "all",
            fields=self.task.fields,
            max_bytes=data.memory_mib << 20,
            order=order or data.order,
            weights=(data.order_weights or None) if training else None,
            view=self.task.view,
            transform=self.task.transform if training else None,
            node=self.topology if share else None,
            node_bytes=data.node_cache_mib << 20,
            staging=None if self.device.name == "cpu" else self.device.staging,
        )

    def tape(
        self,
        batch: Batch,
        step: int,
        training: bool,
        loss_scale: float = 1.0,
        ready: Callable[[Variable], None] | None = None,
    ) -> Tape:
        """A tape for one pass over a batch; see `Tape` for the arguments."""
        return Tape(
            self.device,
            training=training,
            seed=self.config.run.seed,
            step=step,
            samples=batch.samples,
            groups=batch.groups,
            all_reduce=self.all_reduce,
            ready=ready,
            loss_scale=loss_scale,
        )

    def all_reduce(self, array: NDArray[np.float64]) -> None:
        """Sum a small host array over all ranks, in place. Collective."""
        begun = time.perf_counter()
        allreduce_sum(self.comm, array)
        self.exchange_seconds += time.perf_counter() - begun

    def fill(self, target: Any, host: NDArray[Any]) -> None:
        """Copy a host array into a piece of an array, of the device or of the host."""
        if isinstance(target, np.ndarray):
            np.copyto(target, host)
        else:
            self.device.copy(target, self.device.from_host(host))

    def averages(self) -> Store:
        """A store for the model's running statistics."""
        layout = self.layouts.averages
        return Store(layout, self.device.zeros(layout.size, layout.dtype))


@contextmanager
def open_session(config: RunConfig, device: Device, comm: MPI.Intracomm) -> Iterator[Session]:
    """Build the session of a run. Collective over `comm`; everything is given back at the end.

    `device` was opened before MPI started; a CPU is opened again for the level all ranks share.
    """
    levels = comm.allgather(device.level)
    if device.name == "cpu":
        device = open_device("cpu", lowest_level(levels))
    ranks = topology(comm)
    threads = config.parallel.threads or _threads(ranks)
    with threadpoolctl.threadpool_limits(threads, "blas"):
        dataset = open_dataset(config.data.path, comm)
        if config.data.stage:
            dataset = Dataset(stage(dataset, config.data.stage, ranks.node).path, dataset.manifest)
        task = task_of(config.data, dataset, config.run.dtype)
        model = build(config.model, task.sample_shape, task.outputs)
        dtype = dtype_named(config.run.dtype)
        device.matmul_precision = config.run.matmul_precision
        device.prepare(sorted({dtype.name, wide_dtype(dtype).name}), ranks.node)
        layouts = model.layouts(dtype)
        try:
            yield Session(config, comm, ranks, device, dataset, task, model, layouts, threads)
        finally:
            ranks.free()


def rule_of(config: RunConfig) -> Rule:
    """The update rule of a run file's [optimizer]."""
    section: Any = config.optimizer
    if isinstance(section, AdamWConfig):
        return AdamW(section.lr, section.betas, section.epsilon, section.weight_decay)
    return SGD(section.lr, section.momentum, section.nesterov, section.weight_decay)


def _threads(ranks: Topology) -> int:
    """BLAS threads per rank: cores that the node's ranks may use together, over the ranks."""
    masks: list[set[int]] = ranks.node.allgather(os.sched_getaffinity(0))
    return max(len(set().union(*masks)) // ranks.local_size, 1)
