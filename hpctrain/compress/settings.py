"""What is to be compressed and how, as a run says it; and who decides at which step.

`Choice` is what `auto` is made of: it begins dense; after the warm-up every method that can win by
its bytes is used for a few steps, and timed; then the quickest stays. All ranks decide alike, for
all columns of a bucket, as they compare the same numbers: of each step the least time of a column's
ranks, which is that of the rank that waited for nobody, and of these the slowest column's.

Layer: compress. Knows nothing of arrays and messages.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.device.dtypes import FLOATS
from hpctrain.errors import UsageError, nearest

__all__ = ["METHODS", "SPARSE", "Choice", "Settings"]

METHODS = ("off", "auto", "topk", "oktopk", "powersgd", "int8", "sign", "bf16")
SPARSE = ("topk", "oktopk")
TRIALS = 4  # steps in which a method is tried; the first one is not counted
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

    def __init__(self, settings: Settings, traffic: Mapping[str, Sequence[int]]) -> None:
        """`traffic`: bytes received per step, by method, during warm-up steps and afterwards."""
        self._settings, self._traffic = settings, traffic
        self.method, self.reason, self.settled, self.told = "dense", "", False, False
        self.times: dict[str, list[float]] = {}
        self._turn = ""
        self._tried = [
            name for name in settings.names
            if name == "dense" or traffic[name][-1] < traffic["dense"][-1]
        ]  # fmt: skip

    def begin(self, step: int) -> str:
        """The method of a step, the number of steps before being `step`."""
        settings = self._settings
        if settings.method != "auto":
            self._follow(step)
        elif self.settled:
            pass
        elif step < settings.warmup_steps:
            self.method, self.reason = "dense", "warm-up"
        else:
            turn = sum(len(times) for times in self.times.values()) // TRIALS
            self._turn = settings.names[turn] if turn < len(settings.names) else ""
            self.method = self._turn if self._turn in self._tried else "dense"
            self.reason = "on trial" if self._turn else "measured"
        return self.method

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
        """Median seconds of each method that may win here; None while not all were on trial."""
        last = self.times.get(self._settings.names[-1], [])
        if len(last) < TRIALS:
            return None
        return {name: statistics.median(self.times[name][1:]) for name in self._tried}

    def settle(self, found: Sequence[Mapping[str, float]]) -> None:
        """Decide by what all columns of the bucket have found."""
        common = [name for name in self._settings.names if all(name in one for one in found)]
        slowest = {name: max(one[name] for one in found) for name in common}
        best = min(common, key=lambda name: slowest[name])
        if slowest[best] > MARGIN * slowest["dense"]:
            best = "dense"
        shown = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in slowest.items())
        self.method, self.reason, self.settled = best, f"measured: {shown}", True
        if len(common) == 1:
            self.reason = "no method sends less than a dense sum"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if self._settings.method != "auto":
            return {}
        return {
            "method": self.method,
            "reason": self.reason,
            "settled": self.settled,
            "times": self.times,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        if state:
            self.method, self.reason = state["method"], state["reason"]
            self.settled = state["settled"]
            self.times = {name: list(times) for name, times in state["times"].items()}
