"""Streams and events of simulated GPUs, with CuPy's names.

Layer: device.
"""

from __future__ import annotations

from typing import Any

from hpctrain.device.sim.machine import Processor
from hpctrain.device.sim.order import Operation, Queue

__all__ = ["Event", "Stream", "current_stream"]


class Stream:
    """A queue of work on a device. The default stream is made by `current_stream`."""

    def __init__(self, processor: Processor, queue: Queue) -> None:
        self.processor, self.queue = processor, queue

    def use(self) -> Stream:
        """Make it this thread's current stream on its device."""
        _chosen(self.processor)[self.processor.index] = self
        return self

    def __enter__(self) -> Stream:
        stack = self.processor.machine.thread.__dict__.setdefault("stack", [])
        stack.append(current_stream(self.processor))
        return self.use()

    def __exit__(self, *_: Any) -> None:
        self.processor.machine.thread.stack.pop().use()

    def record(self, event: Event | None = None) -> Event:
        """Let an event, by default a new one, stand for the work added so far."""
        event = Event(self.processor) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Work added from now on waits for the event's newest record; there may be none."""
        after = [] if event.operation is None else [event.operation]
        self.processor.add(self.queue, "wait for an event", _nothing, after=after)

    def synchronize(self) -> None:
        """The host waits for all work added so far."""
        self.processor.collect()
        self.processor.wait(self.queue.last, "stream")

    @property
    def done(self) -> bool:
        """Whether all work is done. Asking again and again takes it there."""
        last = self.queue.last
        return last is None or self.processor.machine.scheduler.nudge(last)


class Event:
    """A point in a stream."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.operation: Operation | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Stand for the work added so far to `stream`, by default the current one."""
        stream = current_stream(self.processor) if stream is None else stream
        self.processor = stream.processor
        self.operation = self.processor.add(stream.queue, "record of an event", _nothing)

    def synchronize(self) -> None:
        """The host waits for the newest record; for nothing where there is none."""
        self.processor.wait(self.operation, "event")

    @property
    def done(self) -> bool:
        """Whether the newest record is done. Asking again and again takes it there."""
        machine = self.processor.machine
        return self.operation is None or machine.scheduler.nudge(self.operation)


def current_stream(processor: Processor) -> Stream:
    """This thread's current stream on a device: the default stream unless it chose another."""
    chosen = _chosen(processor)
    if processor.index not in chosen:
        chosen[processor.index] = Stream(processor, processor.default)
    return chosen[processor.index]


def _chosen(processor: Processor) -> dict[int, Stream]:
    streams: dict[int, Stream] = processor.machine.thread.__dict__.setdefault("streams", {})
    return streams


def _nothing() -> None:
    """What marks a place in a stream does no work."""
