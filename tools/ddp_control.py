"""How compare_ddp.py lets two jobs run in turn: ranks wait for orders on a socket.

A rank that waits sleeps in a read, so that it takes no time from the other job. Orders and
answers are lines of text:

    rank -> compare_ddp     SIDE RANK DESCRIPTION       once, when ready
    compare_ddp -> rank     N                           do N steps; an empty line ends
    rank -> compare_ddp     SECONDS LOSS                from a barrier to a barrier
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

ADDRESS = "orders"  # the socket's name in the folder of a comparison


def serve(
    folder: Path,
    side: str,
    rank: int,
    description: str,
    steps: Callable[[int], float],
    barrier: Callable[[], object],
) -> None:
    """Obey orders until the end; `steps(n)` does n steps and returns the last loss."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / ADDRESS))
        lines = connection.makefile("rw")
        tell(lines, f"{side} {rank} {description}")
        while order := lines.readline().strip():
            barrier()
            begun = time.perf_counter()
            loss = steps(int(order))
            barrier()
            tell(lines, f"{time.perf_counter() - begun} {loss}")


def tell(lines: TextIO, text: str) -> None:
    """Send a line."""
    lines.write(f"{text}\n")
    lines.flush()


class Jobs:
    """The other end: all ranks of both sides."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ADDRESS))
        self._listener.listen()
        self._ranks: dict[str, list[TextIO]] = {}
        self.descriptions: dict[str, str] = {}

    def wait_for(self, side: str, size: int, alive: Callable[[], bool]) -> None:
        """Return when all ranks of a side are ready; an error if its job ends before."""
        self._listener.settimeout(1)
        ranks = self._ranks.setdefault(side, [])
        while len(ranks) < size:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                if not alive():
                    raise SystemExit(f"the job of {side} ended before it was ready") from None
                continue
            connection.settimeout(None)
            lines = connection.makefile("rw")
            name, _, self.descriptions[side] = lines.readline().strip().split(" ", 2)
            if name != side:
                raise SystemExit(f"{name} came when {side} was awaited")
            ranks.append(lines)

    def steps(self, side: str, count: int) -> tuple[float, float]:
        """Let a side do `count` steps: seconds of its slowest rank, mean of the ranks' losses."""
        for lines in self._ranks[side]:
            tell(lines, str(count))
        answers = [lines.readline().split() for lines in self._ranks[side]]
        if not all(answers):
            raise SystemExit(f"a rank of {side} ended")
        seconds, losses = zip(*((float(s), float(x)) for s, x in answers), strict=True)
        return max(seconds), sum(losses) / len(losses)

    def end(self) -> None:
        """Tell all ranks to end."""
        for ranks in self._ranks.values():
            for lines in ranks:
                try:
                    tell(lines, "")
                except OSError:
                    continue
        self._listener.close()
