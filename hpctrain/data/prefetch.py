"""One thread that prepares items ahead of the loop that uses them.

The queue is bounded. What the thread raises is raised by `next`. The thread ends when the items
do, when the iterator is closed, when it is garbage (a `break` out of its loop) and before the
interpreter exits. It refers to the queue only, never to the iterator, so that the iterator can
become garbage while the thread waits.

Layer: data. Knows nothing of what the items are; makes no MPI call.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

__all__ = ["Prefetch"]

T = TypeVar("T")
PATIENCE = 0.6  # seconds that close() waits for the thread to notice


class Prefetch(Iterator[T], Generic[T]):
    """Iterate over `items`, produced by a thread at most `depth` items ahead.

    Use it in a `for` loop or as a context manager; `close()` returns within a second.
    `waited` is the time, in seconds, that `next` spent waiting for items.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self.waited = 0.0
        self._channel: _Channel[T] = _Channel(depth)
        thread = threading.Thread(
            target=_fill, args=(items, self._channel), name="hpctrain-prefetch", daemon=True
        )
        self._finish = weakref.finalize(self, _shut, self._channel, thread)
        thread.start()

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return self._channel.get()
        except BaseException:
            self.close()
            raise
        finally:
            self.waited += time.perf_counter() - start

    def close(self) -> None:
        """End the thread and drop what it prepared. May be called more than once."""
        self._finish()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Channel(Generic[T]):
    """A bounded queue between two threads that either of them may end."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False  # by the consumer
        self._ended = False  # by the producer
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Append an item, waiting for room; False if the consumer closed the channel."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def get(self) -> T:
        """The next item; StopIteration, or the producer's exception, after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ended or bool(self._items))
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None
        raise error if error is not None else StopIteration

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _fill(items: Iterator[T], channel: _Channel[T]) -> None:
    """The thread: hand over items until they end, fail, or nobody wants them."""
    try:
        for item in items:
            if not channel.put(item):
                return
            del item  # the consumer alone decides how long a batch lives
        channel.end(None)
    except BaseException as error:
        channel.end(error)


def _shut(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.close()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(PATIENCE)
