"""A thread that exchanges buckets while its rank computes.

It does what it is given in that order, one call after the other. While it waits for messages it
sleeps between two looks at them, so that the rank's core is left to the computation; where the rank
has nothing to compute but waits for the thread itself, it looks more often.

On a GPU its work is on a stream of its own, beside the rank's:

    the rank's stream    | backward ... *a          ... |        b* norm, update
    the thread's stream  |              a* copies, sums | ... *b

    *a   an event, recorded where a call is given; the thread's stream waits for it before the call
    *b   an event after the call; the stream of whoever waits for the call waits for it

The host waits for neither of them.

Layer: collectives. Knows nothing of buckets and messages.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from hpctrain.timeline import span

if TYPE_CHECKING:
    from hpctrain.device import Device
    from hpctrain.device.interface import Event

__all__ = ["Background"]

Call = Callable[[], None]
NAP = 2e-4  # seconds between two looks at messages; a link of 10 Gbit/s carries 250 KB meanwhile
SHORT_NAP = 2e-5  # where nobody computes
LONG_NAP = 1e-3  # at most: a sixteenth of the time that was waited


class Background:
    """Calls done in order by a thread of their own, until one fails. One thread waits for them.

    Attributes:
        waited: seconds that other threads have spent in `wait`.
    """

    def __init__(self, device: Device) -> None:
        self.waited = 0.0
        self._device = device
        self._calls: deque[tuple[Call, Event] | None] = deque()
        self._after: deque[tuple[int, Event]] = deque()  # calls that were done and not waited for
        self._given = self._done = 0
        self._awaited = 0  # threads in `wait`
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="communication", daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> int:
        """Do `call` after all that was given before; its number, for `wait`.

        It comes after the work that the calling thread has launched on the device.

        Raises what an earlier call has raised: then no further one is done.
        """
        event = self._device.record()
        with self._changed:
            self._raise()
            self._calls.append((call, event))
            self._given += 1
            self._changed.notify_all()
            return self._given

    def wait(self, number: int) -> None:
        """Return when the call of this number, and all before it, are done.

        What the calling thread launches afterwards comes after the work that they launched.

        Raises what one of them has raised, with the traceback of the thread.
        """
        if self._done < number:
            self._block(number)
        after = None
        while self._after and self._after[0][0] <= number:
            _, after = self._after.popleft()
        if after is not None:
            self._device.wait_event(after)

    def _block(self, number: int) -> None:
        begun = time.perf_counter()
        with span("wait for exchange"), self._changed:
            self._awaited += 1
            try:
                while self._done < number and self._error is None:
                    self._changed.wait()
            finally:
                self._awaited -= 1
                self.waited += time.perf_counter() - begun
            if self._done < number:
                self._raise()

    def idle(self, waited: float) -> None:
        """For the calls: sleep a little before the next look; longer, where one waits long."""
        shortest = SHORT_NAP if self._awaited else NAP
        time.sleep(min(max(waited / 16, shortest), LONG_NAP))

    def close(self) -> None:
        """Do what is left and end the thread; raises what a call has raised."""
        with self._changed:
            self._raise()
            self._calls.append(None)
            self._changed.notify_all()
        self._thread.join()
        self._raise()
        self.wait(self._given)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._device.use_own_stream()
            while (given := self._next()) is not None:
                call, event = given
                self._device.wait_event(event)
                call()
                after = self._device.record()
                with self._changed:
                    self._after.append((self._done + 1, after))  # before `wait` can miss it
                    self._done += 1
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the thread that waits must be told
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> tuple[Call, Event] | None:
        with self._changed:
            while not self._calls:
                self._changed.wait()
            return self._calls.popleft()
