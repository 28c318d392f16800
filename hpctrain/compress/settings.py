"""What is to be compressed and how, as a run says it; and who decides at which step.

`Choice` is what `auto` is made of: it begins dense; after the warm-up the methods that can win, by
their bytes and by a model of the network, take turns for a few steps, and are timed; then the
quickest stays, by the median of its steps, so that one disturbed step decides nothing. All ranks
decide alike, for all columns of a bucket, as they compare the same numbers: of each step the least
time of a column's ranks, which is that of the rank that waited for nobody, and of these the slowest
column's.

Layer: compress. Knows nothing of arrays and messages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.device.dtypes import FLOATS
from hpctrain.errors import UsageError, nearest

__all__ = ["METHODS", "SPARSE", "Choice", "Settings"]

METHODS = ("off", "auto", "topk", "oktopk", "powersgd", "int8", "sign", "bf16")
SPARSE = ("topk", "oktopk")
ROUNDS = 4  # steps in which a method is tried, in turn with the others; the first is not counted
CLOSE = 1.1  # times the best one's time: those are tried again,
MORE = 2  # so many times
HOPELESS = 10  # times a dense sum's time, predicted: not tried. A model may be wrong by as much
MARGIN = 0.95  # of the time of a dense sum: what does not win by so much is not worth an error


@dataclass(frozen=True)
class Settings:
    """How sums between nodes are compressed.

    Attributes:
        method: one of `METHODS`.
        density: fraction of the elements that each node selects: "topk", "oktopk", "auto".
        warmup_steps: steps in which the density falls from 1 to `density`, by equal factors; with
            "auto" they are dense.
        values: type of selected values under way: "float32", "bfloat16" or "float16".
        least_size: smaller tensors are never compressed.
        rank: columns of the factors of "powersgd".
        momentum: of a memory with momentum correction, for "topk", "oktopk" and "auto"; 0: a plain
            residual. What is summed then has it: an update rule must not have it, too.
    """

    method: str = "topk"
    density: float = 0.01
    warmup_steps: int = 0
    values: str = "float32"
    least_size: int = 16384
    rank: int = 4
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"no compression is called {self.method!r}{nearest(self.method, METHODS)}; there "
                f"are {', '.join(METHODS)}"
            )
        if not 0 < self.density <= 1:
            raise UsageError(f"a density of {self.density} is not possible: above 0, and at most 1")
        if self.values not in FLOATS or self.values == "float64":
            raise UsageError(
                f"values cannot travel as {self.values!r}: use float32, bfloat16 or float16"
            )
        if self.rank < 1 or self.warmup_steps < 0 or self.least_size < 0:
            raise UsageError(
                f"rank {self.rank} must be 1 or more, warmup_steps {self.warmup_steps} and "
                f"least_size {self.least_size} 0 or more"
            )
        if not 0 <= self.momentum < 1 or (self.momentum and self.method not in (*SPARSE, "auto")):
            raise UsageError(
                f"a memory with momentum {self.momentum} does not go with {self.method!r}: it is "
                f"from 0 to below 1, and for auto, {' and '.join(SPARSE)}, which send single "
                "elements, whose momentum is then forgotten"
            )

    def density_at(self, step: int) -> float:
        """The density of a step."""
        if step >= self.warmup_steps:
            return self.density
        return float(self.density ** ((step + 1) / (self.warmup_steps + 1)))

    @property
    def names(self) -> tuple[str, ...]:
        """The methods that may be used, "dense" first."""
        if self.method == "auto":
            return ("dense", *SPARSE)
        return ("dense",) if self.method == "off" else ("dense", self.method)


class Choice:
    """The method of each step of one column of a bucket.

    Attributes:
        method: of the step that is next, or under way. reason: why, for people.
        settled: whether it stays. told: whether somebody said so; for the caller.
        times: seconds of each step on trial, by the method whose turn it was.
    """

    def __init__(
        self,
        settings: Settings,
        traffic: Mapping[str, Sequence[int]],
        predicted: Mapping[str, float] | None = None,
    ) -> None:
        """Not collective; columns of a bucket may differ in what they would try.

        Args:
            traffic: bytes received per step, by method, during warm-up steps and afterwards.
            predicted: seconds of a step, by method, of a model; for "auto".
        """
        self._settings, self._traffic = settings, traffic
        self.method, self.reason, self.settled, self.told = "dense", "", False, False
        self.times: dict[str, list[float]] = {}
        self._turn = ""
        self._predicted = dict(predicted or {})
        self._rounds = ROUNDS
        self._tried, self._left_out = self._candidates()

    def _candidates(self) -> tuple[list[str], list[str]]:
        """The methods to try, the one predicted to be quickest first; and why others are not."""
        tried, left_out = [], []
        most = HOPELESS * self._predicted.get("dense", math.inf)
        for name in self._settings.names:
            seconds = self._predicted.get(name, 0.0)
            if name != "dense" and self._traffic[name][-1] >= self._traffic["dense"][-1]:
                left_out.append(f"{name} sends no less than a dense sum")
            elif name != "dense" and seconds > most:
                left_out.append(
                    f"{name} predicted to take {1e3 * seconds:.3g} ms, over {HOPELESS} times a "
                    "dense sum's"
                )
            else:
                tried.append(name)
        return sorted(tried, key=lambda name: self._predicted.get(name, 0.0)), left_out

    def begin(self, step: int) -> str:
        """The method of a step, the number of steps before being `step`."""
        settings = self._settings
        if settings.method != "auto":
            self._follow(step)
        elif self.settled:
            pass
        elif step < settings.warmup_steps:
            self.method, self.reason = "dense", "warm-up"
        elif self._finished:
            self.method, self.reason = "dense", "measured"
        else:
            self._turn = min(self._tried, key=self._count)
            self.method, self.reason = self._turn, "on trial"
        return self.method

    def _count(self, name: str) -> int:
        return len(self.times.get(name, ()))

    @property
    def _finished(self) -> bool:
        """Whether nothing is left to try."""
        alone = len(self._tried) == 1
        return alone or all(self._count(name) >= self._rounds for name in self._tried)

    def _follow(self, step: int) -> None:
        """The method that was asked for, where it sends less than a dense sum."""
        name = self._settings.names[-1]
        steps = self._traffic[name]
        bytes_each = steps[min(step, len(steps) - 1)]
        dense = self._traffic["dense"][-1]
        self.method = name if bytes_each < dense else "dense"
        self.reason = f"asked for: {bytes_each:,} bytes where a dense sum takes {dense:,}"
        if name == "dense":
            self.reason = "asked for"
        elif self.method == "dense":
            self.reason = f"{name} would take {bytes_each:,} bytes, a dense sum {dense:,}"
        self.settled = step >= self._settings.warmup_steps

    @property
    def timing(self) -> bool:
        """Whether `end` wants the time of this step."""
        return self.reason == "on trial"

    def end(self, seconds: Sequence[float]) -> None:
        """After a step on trial: the seconds it took each rank, the same list on all ranks."""
        self.times.setdefault(self._turn, []).append(min(seconds))

    def undo(self) -> None:
        """The last step does not count."""
        if self.timing:
            self.times[self._turn].pop()

    def found(self) -> dict[str, float] | None:
        """Median seconds of each method that was tried here; None while trials go on.

        Where nothing but a dense sum can win it was not timed: 0.
        """
        if not self._finished:
            return None
        medians = {name: statistics.median(times[1:]) for name, times in self.times.items()}
        return medians or dict.fromkeys(self._tried, 0.0)

    def settle(self, found: Sequence[Mapping[str, float]]) -> None:
        """Decide by what all columns of the bucket have found, or try the closest ones again."""
        common = [name for name in self._settings.names if all(name in one for one in found)]
        slowest = {name: max(one[name] for one in found) for name in common}
        best = min(common, key=lambda name: slowest[name])
        close = [name for name in common if slowest[name] <= CLOSE * slowest[best]]
        if len(close) > 1 and self._rounds == ROUNDS:
            self._tried = [name for name in self._tried if name in close] or ["dense"]
            self._rounds = ROUNDS + MORE
            return
        if slowest[best] > MARGIN * slowest["dense"]:
            best = "dense"
        self.method, self.settled = best, True
        self.reason = "measured: " + ", ".join(map(self._shown, slowest.items()))
        if len(common) == 1:
            self.reason = "nothing else can win" if self._left_out else "nothing else was measured"
        if self._left_out:
            self.reason += f"; not tried: {', '.join(self._left_out)}"

    def _shown(self, measured: tuple[str, float]) -> str:
        name, seconds = measured
        told = f"{name} {1e3 * seconds:.3g} ms"
        if name in self._predicted:
            told += f" (predicted {1e3 * self._predicted[name]:.3g})"
        return told

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if self._settings.method != "auto":
            return {}
        return {
            "method": self.method,
            "reason": self.reason,
            "settled": self.settled,
            "times": self.times,
            "tried": self._tried,
            "rounds": self._rounds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        if state:
            self.method, self.reason = state["method"], state["reason"]
            self.settled = state["settled"]
            self.times = {name: list(times) for name, times in state["times"].items()}
            self._tried = list(state.get("tried", self._tried))
            self._rounds = int(state.get("rounds", self._rounds))
