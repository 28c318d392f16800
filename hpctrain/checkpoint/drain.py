"""Work of a checkpoint that a thread does, at low priority, while training goes on.

Layer: checkpoint. Knows nothing of ranks; the work must not call MPI.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from hpctrain.timeline import span

__all__ = ["Beat", "Drain"]

T = TypeVar("T")
Beat = Callable[[], None]
NICE = 5  # lower than training's: a rank that computes gets three times as much of a shared core
LOOK = 0.02  # seconds of a nap at most


class Drain(Generic[T]):
    """`work(beat)` in a thread of its own. The work calls `beat` now and then: it gets on.

    Attributes:
        cpu: seconds of a core that it used, once it is done.
    """

    def __init__(self, name: str, work: Callable[[Beat], T]) -> None:
        """`name`: by which a timeline shows it."""
        self._name, self._work = name, work
        self._beats = 0
        self._result: T | None = None
        self._error: Exception | None = None
        self._over = threading.Event()
        self.cpu = 0.0
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether it has come to its end, or failed."""
        return self._over.is_set()

    def nap(self, beat: Beat) -> None:
        """Wait for it for a moment; `beat` is called where the work has got on."""
        seen = self._beats
        if not self._over.wait(LOOK) and self._beats != seen:
            beat()

    def result(self) -> T:
        """What the work returned, or its error, once it is done."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        begun = time.thread_time()
        try:
            with span(f"checkpoint {self._name}"):
                self._result = self._work(self._beat)
        except Exception as error:  # told by `result`, in the thread that may talk to other ranks
            self._error = error
        self.cpu = time.thread_time() - begun
        self._over.set()

    def _beat(self) -> None:
        self._beats += 1
