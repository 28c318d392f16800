"""Work that was asked for and not yet done, and the orders in which CUDA may do it.

An operation waits for the one before it in its queue (a stream) and for whatever else it was told
to; nothing else is promised. Three policies take every freedom that leaves:

    late    nothing is done until the host waits for it, and then only what it must wait for
    early   everything is done at once
    seeded  whenever work is added or waited for, any operations that may run do, drawn by seed

Layer: device. Knows nothing of what operations do.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable

from hpctrain.errors import DeviceError

__all__ = ["Operation", "Queue", "Scheduler"]

CHANCE = 0.4  # that one more operation runs when work is added, where the order is drawn


class Operation:
    """Work in a queue. `run` is called once, when all operations in `after` are done."""

    __slots__ = ("after", "done", "queue", "run")

    def __init__(self, queue: Queue, run: Callable[[], None], after: list[Operation]) -> None:
        self.queue, self.run, self.after, self.done = queue, run, after, False

    def waiting(self) -> list[Operation]:
        """What must be done before it may run."""
        self.after = [other for other in self.after if not other.done]
        return self.after


class Queue:
    """The operations of one stream that are not done, in order; `last` is the newest of all."""

    def __init__(self, device: int, blocking: bool) -> None:
        """`blocking`: whether it is ordered with the device's default stream."""
        self.device, self.blocking = device, blocking
        self.pending: deque[Operation] = deque()
        self.last: Operation | None = None


class Scheduler:
    """Runs operations of any number of queues, in an order that CUDA allows."""

    def __init__(self, order: str) -> None:
        """`order`: "late", "early", or the seed of an order that is drawn."""
        if order not in ("late", "early") and not order.isdigit():
            raise DeviceError(
                f"no order of simulated work is called {order!r}: use late, early or a number, "
                "the seed of an order"
            )
        self.order = order
        self.random = random.Random(int(order)) if order.isdigit() else None
        self.lock = threading.RLock()
        self._queues: list[Queue] = []

    def queue(self, device: int, blocking: bool) -> Queue:
        """A new, empty queue."""
        queue = Queue(device, blocking)
        with self.lock:
            self._queues.append(queue)
        return queue

    def add(self, queue: Queue, run: Callable[[], None], after: list[Operation]) -> Operation:
        """Put an operation at the end of a queue; it also waits for `after`."""
        with self.lock:
            if queue.last is not None:
                after = [*after, queue.last]
            operation = Operation(queue, run, [other for other in after if not other.done])
            queue.pending.append(operation)
            queue.last = operation
            if self.order == "early":
                self.finish(operation)
            elif self.random is not None:
                while self.random.random() < CHANCE and (ready := self._ready()):
                    self._run(self.random.choice(ready))
            return operation

    def finish(self, operation: Operation) -> None:
        """Do all that must be done for `operation` to be done."""
        with self.lock:
            while self.random is not None and not operation.done:
                self._run(self.random.choice(self._ready()))
            path = [operation]
            while path:
                if path[-1].done:
                    path.pop()
                elif waiting := path[-1].waiting():
                    path.append(waiting[0])
                else:
                    self._run(path[-1])

    def nudge(self, operation: Operation) -> bool:
        """Whether it is done; if not, take one step towards it, so that asking again ends."""
        with self.lock:
            if operation.done:
                return True
            while waiting := operation.waiting():
                operation = waiting[0]
            self._run(operation)
            return False

    def _ready(self) -> list[Operation]:
        heads = [queue.pending[0] for queue in self._queues if queue.pending]
        return [operation for operation in heads if not operation.waiting()]

    def _run(self, operation: Operation) -> None:
        operation.queue.pending.popleft()
        operation.done = True  # also where it fails: the error is raised once
        run, operation.run, operation.after = operation.run, _nothing, []
        run()


def _nothing() -> None:
    """What is left of an operation that is done."""
