"""One thread that prepares items ahead of the loop that uses them.

The queue is bounded. What the thread raises is raised by `next`. The thread ends when the items
do, when the iterator is closed, when it is garbage (a `break` out of its loop) and before the
interpreter exits. It refers to the queue only, never to the iterator, so that the iterator can
become garbage while the thread waits.

Layer: data. Knows nothing of what the items are; makes no MPI call.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from hpctrain.timeline import span

__all__ = ["Prefetch"]

T = TypeVar("T")
PATIENCE = 0.6  # seconds that close() waits for the thread to notice


class Prefetch(Iterator[T], Generic[T]):
    """Iterate over `items`, produced by a thread at most `depth` items ahead.

    Use it in a `for` loop or as a context manager; `close()` returns within a second.
    `waited` is the time, in seconds, that `next` spent waiting for items; `on_wait` is called with
    each part of it. `closed` is set when nobody wants more: for items that wait for something.
    """

    def __init__(
        self,
        items: Iterator[T],
        depth: int,
        on_wait: Callable[[float], None] | None = None,
        closed: threading.Event | None = None,
    ) -> None:
        self.waited = 0.0
        self._on_wait = on_wait
        self._channel: _Channel[T] = _Channel(depth)
        thread = threading.Thread(
            target=_fill, args=(items, self._channel), name="hpctrain-prefetch", daemon=True
        )
        self._finish = weakref.finalize(self, _shut, self._channel, thread, closed)
        thread.start()

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return self._channel.get()
        except BaseException:
            self.close()
            raise
        finally:
            seconds = time.perf_counter() - start
            self.waited += seconds
            if self._on_wait is not None:
                self._on_wait(seconds)

    def close(self) -> None:
        """End the thread and drop what it prepared. May be called more than once."""
        self._finish()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _End:
    """The last thing in a channel."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Channel(Generic[T]):
    """A bounded queue between two threads that either of them may end.

    Two queues of C code, one of items and one of permits to put some: a condition variable costs
    several times as much per batch.
    """

    def __init__(self, depth: int) -> None:
        self._items: SimpleQueue[tuple[T] | _End] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        self._closed = False  # by the consumer
        self._ended = False  # the consumer has seen the end

    def put(self, item: T) -> bool:
        """Append an item, waiting for room; False if the consumer closed the channel."""
        self._room.get()
        if not self._closed:
            self._items.put((item,))
        if self._closed:  # maybe since then
            self._drop()
        return not self._closed

    def get(self) -> T:
        """The next item; StopIteration, or the producer's exception, after the last."""
        if self._ended:
            raise StopIteration
        found = self._items.get()
        if isinstance(found, _End):
            self._ended = True
            raise StopIteration if found.error is None else found.error
        self._room.put(None)
        return found[0]

    def end(self, error: BaseException | None) -> None:
        self._items.put(_End(error))

    def close(self) -> None:
        self._closed = True
        self._drop()
        self._room.put(None)  # for a producer that waits

    def _drop(self) -> None:
        """Drop what was prepared, and let a consumer that waits see the end."""
        with contextlib.suppress(Empty):
            while True:
                self._items.get_nowait()
        self._items.put(_End())


def _fill(items: Iterator[T], channel: _Channel[T]) -> None:
    """The thread: hand over items until they end, fail, or nobody wants them."""
    try:
        while True:
            with span("read"):
                item = next(items)
            if not channel.put(item):
                return
            del item  # the consumer alone decides how long a batch lives
    except StopIteration:
        channel.end(None)
    except BaseException as error:
        channel.end(error)


def _shut(channel: _Channel[T], thread: threading.Thread, closed: threading.Event | None) -> None:
    if closed is not None:
        closed.set()
    channel.close()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(PATIENCE)
