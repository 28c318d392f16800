"""A thread that exchanges buckets while its rank computes.

It does what it is given in that order, one call after the other. While it waits for messages it
sleeps between two looks at them, so that the rank's core is left to the computation; where the rank
has nothing to compute but waits for the thread itself, it looks more often.

Layer: collectives. Knows nothing of buckets and messages.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Background"]

Call = Callable[[], None]
NAP = 2e-4  # seconds between two looks at messages; a link of 10 Gbit/s carries 250 KB meanwhile
SHORT_NAP = 2e-5  # where nobody computes


class Background:
    """Calls done in order by a thread of their own, until one fails.

    Attributes:
        waited: seconds that other threads have spent in `wait`.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._calls: deque[Call | None] = deque()
        self._given = self._done = 0
        self._awaited = 0  # threads in `wait`
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="communication", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> int:
        """Do `call` after all that was given before; its number, for `wait`.

        Raises what an earlier call has raised: then no further one is done.
        """
        with self._changed:
            self._raise()
            self._calls.append(call)
            self._given += 1
            self._changed.notify_all()
            return self._given

    def wait(self, number: int) -> None:
        """Return when the call of this number, and all before it, are done.

        Raises what one of them has raised, with the traceback of the thread.
        """
        if self._done >= number:
            return
        begun = time.perf_counter()
        with self._changed:
            self._awaited += 1
            try:
                while self._done < number and self._error is None:
                    self._changed.wait()
            finally:
                self._awaited -= 1
                self.waited += time.perf_counter() - begun
            if self._done < number:
                self._raise()

    def idle(self) -> None:
        """For the calls: sleep a little before the next look at messages."""
        time.sleep(SHORT_NAP if self._awaited else NAP)

    def close(self) -> None:
        """Do what is left and end the thread; raises what a call has raised."""
        with self._changed:
            self._raise()
            self._calls.append(None)
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except BaseException as error:  # whatever it is, the thread that waits must be told
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._done += 1
                self._changed.notify_all()

    def _next(self) -> Call | None:
        with self._changed:
            while not self._calls:
                self._changed.wait()
            return self._calls.popleft()
