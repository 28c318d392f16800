"""Simulated GPUs: their streams, memory and counts, and the one way in which work is added.

Layer: device. Knows nothing of arrays, and nothing of CuPy's interface.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from hpctrain.device.sim.counts import Counts
from hpctrain.device.sim.memory import (
    POISON,
    Block,
    CUDARuntimeError,
    Pool,
    Registry,
    Span,
    shared_span,
)
from hpctrain.device.sim.order import Operation, Queue, Scheduler
from hpctrain.errors import DeviceError, nearest

__all__ = ["KERNELS", "Machine", "Processor", "device_count"]

ORDER, KERNEL_TARGET, DEVICES = "HPCTRAIN_SIM_ORDER", "HPCTRAIN_SIM_KERNELS", "HPCTRAIN_SIM_DEVICES"
KERNELS = ("first", "simt", "host")


def device_count() -> int:
    """How many GPUs are simulated by default."""
    count = os.environ.get(DEVICES, "8")
    if not count.isdigit():
        raise DeviceError(f"{DEVICES}={count}: it is the number of simulated GPUs, such as 8")
    return int(count)


class Machine:
    """Everything that is simulated: devices, the order of their work, how kernels are run."""

    def __init__(
        self, order: str | None = None, kernels: str | None = None, devices: int | None = None
    ) -> None:
        """What is not given comes from the environment; see docs/sim.md.

        order: "late" (the default), "early", or a seed. kernels: "first" (the default), "simt" or
        "host". devices: how many; 8 by default.
        """
        kernels = kernels or os.environ.get(KERNEL_TARGET, "first")
        if kernels not in KERNELS:
            raise DeviceError(
                f"{KERNEL_TARGET}={kernels}{nearest(kernels, KERNELS)}: it is one of "
                f"{', '.join(KERNELS)}"
            )
        count = device_count() if devices is None else devices
        self.kernels = kernels
        self.scheduler = Scheduler(order or os.environ.get(ORDER, "late"))
        self.registry = Registry()
        self.pinned = Pool(self.registry, -1)
        self.processors = [Processor(self, index) for index in range(count)]
        self.thread = threading.local()

    def current(self) -> Processor:
        """The device that this thread has chosen."""
        if not self.processors:
            raise CUDARuntimeError(f"cudaErrorNoDevice: there is no simulated GPU ({DEVICES}=0)")
        chosen: Processor = getattr(self.thread, "processor", self.processors[0])
        return chosen

    def pin(self, nbytes: int) -> Block:
        """Pinned host memory."""
        with self.scheduler.lock:
            while self.pinned.returned:
                block = self.pinned.returned.popleft()
                block.bytes().fill(POISON)  # at once: what a pending copy would read is gone
                self.pinned.give(block)
            return self.pinned.take(nbytes, None)


class Processor:
    """One simulated GPU."""

    def __init__(self, machine: Machine, index: int) -> None:
        self.machine, self.index = machine, index
        self.counts = Counts()
        self.default = machine.scheduler.queue(index, blocking=True)
        self.queues = [self.default]
        self.pool = Pool(machine.registry, index)
        self.freed: deque[Span] = deque()  # outside the pool, by the garbage collector
        text = f"{socket.gethostname()} {index}"
        self.uuid = hashlib.sha256(text.encode()).digest()[:16]

    def queue(self, blocking: bool) -> Queue:
        """A new stream; ordered with the default stream if `blocking`."""
        queue = self.machine.scheduler.queue(self.index, blocking)
        self.queues.append(queue)
        return queue

    def add(
        self,
        queue: Queue,
        what: str,
        run: Callable[[], Any],
        spans: Iterable[Span] = (),
        after: Iterable[Operation] = (),
    ) -> Operation:
        """Put work that uses `spans` at the end of a queue of this device.

        The default stream waits for all blocking streams, and they for it.
        """
        self.collect()
        for span in spans:
            if span.device not in (self.index, -1):
                raise CUDARuntimeError(
                    f"cudaErrorInvalidValue: {what} on device {self.index} uses memory of device "
                    f"{span.device}"
                )
        return self._add(queue, what, run, tuple(spans), after)

    def _add(
        self,
        queue: Queue,
        what: str,
        run: Callable[[], Any],
        spans: tuple[Span, ...],
        after: Iterable[Operation] = (),
    ) -> Operation:
        def checked() -> None:
            for span in spans:
                span.check(what)
            run()

        ordered = list(after)
        if queue is self.default:
            ordered += [q.last for q in self.queues if q.blocking and q.last is not None]
        elif queue.blocking and self.default.last is not None:
            ordered.append(self.default.last)
        return self.machine.scheduler.add(queue, checked, ordered)

    def wait(self, operation: Operation | None, kind: str) -> None:
        """The host waits until `operation` is done."""
        self.counts.synchronizations[kind] += 1
        if operation is not None:
            self.machine.scheduler.finish(operation)

    def wait_for_all(self) -> None:
        """The host waits for every stream of this device."""
        self.counts.synchronizations["device"] += 1
        for queue in self.queues:
            if queue.last is not None:
                self.machine.scheduler.finish(queue.last)

    def allocate(self, nbytes: int, queue: Queue) -> Block:
        """Memory of the pool, for work on a stream."""
        self.collect()
        with self.machine.scheduler.lock:
            block = self.pool.take(nbytes, queue)
        self.counts.allocated(block.nbytes)
        return block

    def allocate_alone(self, nbytes: int) -> Span:
        """Memory outside the pool, which other processes can map."""
        self.collect()
        span = self.machine.registry.add(shared_span(nbytes, self.index))
        span.bytes.fill(POISON)
        self.counts.allocated(span.nbytes)
        return span

    def collect(self) -> None:
        """Take back the memory that Python has let go of, in the order of each block's stream."""
        with self.machine.scheduler.lock:
            while self.pool.returned:
                block = self.pool.returned.popleft()
                self._add(block.owner, "the pool", _poison(block), ())
                self.counts.allocated(-block.nbytes)
                self.pool.give(block)
            while self.freed:
                span = self.freed.popleft()
                self.wait_for_all()  # as cudaFree does
                span.bytes.fill(POISON)  # for processes that still map it
                span.close()
                self.counts.allocated(-span.nbytes)


def _poison(block: Block) -> Callable[[], None]:
    return lambda: block.bytes().fill(POISON)
