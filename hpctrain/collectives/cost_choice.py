"""Which algorithm, in which segments, and how much in one bucket: what a network makes cheapest.

All is a pure function of its arguments, so ranks that give the same ones need not agree on it.

Layer: collectives. Knows nothing of MPI and training.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from hpctrain.collectives.algorithms import PRESETS, all_reduce, preset
from hpctrain.collectives.cost import floor_seconds, price
from hpctrain.collectives.network import Network
from hpctrain.collectives.schedule import Schedule
from hpctrain.errors import UsageError

__all__ = [
    "CANDIDATES",
    "SEGMENTS",
    "Choice",
    "bucket_bytes",
    "choose",
    "described",
    "load_choices",
    "save_choices",
]

CANDIDATES = tuple(PRESETS)
SEGMENTS = (4 << 20, 1 << 20, 256 << 10)  # bytes of a message, at most
LEAST_BUCKET, MOST_BUCKET = 64 << 10, 64 << 20  # bytes
WASTE = 1.1  # of a bucket's time per byte, against that of the best one


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An all-reduce that was picked.

    Attributes:
        topology, nbytes, itemsize: what it is for; topology as in HPCTRAIN_TOPOLOGY.
        algorithm: a name in `PRESETS`.
        segment_bytes: of a message, at most.
        seconds: predicted.
        network: the name of the network it is for.
    """

    topology: str
    nbytes: int
    itemsize: int
    algorithm: str
    segment_bytes: int
    seconds: float
    network: str

    def schedule(self, nodes: tuple[int, ...]) -> Schedule:
        """The collective. `nodes`: the node of every rank, as the choice was made for."""
        return all_reduce(
            nodes,
            self.nbytes // self.itemsize,
            self.itemsize,
            preset(self.algorithm),
            name=self.algorithm,
            segment_bytes=self.segment_bytes,
        )

    def __str__(self) -> str:
        return (
            f"all-reduce of {self.nbytes:,} bytes on {self.topology}: {self.algorithm}, messages "
            f"of at most {self.segment_bytes:,} bytes, {self.seconds * 1e3:.3f} ms on "
            f"{self.network!r}"
        )


def choose(
    nodes: tuple[int, ...],
    n: int,
    itemsize: int,
    network: Network,
    candidates: Sequence[str] = CANDIDATES,
) -> Choice:
    """The cheapest all-reduce of `n` elements on a network; its text is a line for the log.

    Args:
        nodes: the node of every rank.
        candidates: names in `PRESETS`, in order of preference where they cost the same. Without
            peer reads (GPUs that cannot map each other's memory) leave out those with a "peer"
            level.

    Each is priced with messages of at most 4 MiB, 1 MiB and 256 KiB; one that cannot win by its
    formula alone is not.
    """
    best: Choice | None = None
    topology = described(nodes)
    options = []
    for order, (name, segment) in enumerate((c, s) for c in candidates for s in SEGMENTS):
        if segment > SEGMENTS[-1] and segment // 4 >= n * itemsize > 0:
            continue  # the same messages as with smaller segments
        choice = Choice(topology, n * itemsize, itemsize, name, segment, 0.0, network.name)
        schedule = choice.schedule(nodes)
        options.append((floor_seconds(schedule, network), order, choice, schedule))
    for floor, _, choice, schedule in sorted(options, key=lambda option: option[:2]):
        if best is not None and floor >= best.seconds:
            continue
        seconds = price(schedule, network).seconds
        if best is None or seconds < best.seconds:
            best = msgspec.structs.replace(choice, seconds=seconds)
    if best is None:
        raise UsageError(f"no algorithm to choose from: give some of {', '.join(CANDIDATES)}")
    return best


def bucket_bytes(seconds: Callable[[int], float], most: int = MOST_BUCKET) -> int:
    """Bytes of a bucket: small, so that it leaves early, but not so small that latency shows.

    Of the powers of two from 64 KiB to 64 MiB, or `most` (bytes, of all gradients): the smallest
    that takes at most 1.1 times as long per byte as the best one. `seconds`: of a bucket of so many
    bytes.
    """
    sizes = [LEAST_BUCKET]
    while 2 * sizes[-1] <= min(most, MOST_BUCKET):
        sizes.append(2 * sizes[-1])
    each = [seconds(size) / size for size in sizes]
    return next(size for size, cost in zip(sizes, each, strict=True) if cost <= WASTE * min(each))


def described(nodes: tuple[int, ...]) -> str:
    """The topology as HPCTRAIN_TOPOLOGY has it: "2x4", "3+1" or "0,1,0,1"."""
    if list(nodes) != sorted(nodes):
        return ",".join(map(str, nodes))
    sizes = list(Counter(nodes).values())
    if len(set(sizes)) == 1:
        return f"{len(sizes)}x{sizes[0]}"
    return "+".join(map(str, sizes))


def save_choices(path: str | Path, choices: Sequence[Choice]) -> None:
    """Write what `load_choices` reads. Raises `OSError`."""
    tables = {"choice": [msgspec.to_builtins(choice) for choice in choices]}
    Path(path).write_text(tomli_w.dumps(tables), encoding="utf-8")


def load_choices(path: str | Path) -> list[Choice]:
    """The choices in a file; none where there is no file.

    Raises:
        UsageError: a file that holds something else, or names an unknown algorithm.
    """
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        choices = msgspec.convert(values.get("choice", ()), list[Choice])
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read the choices {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"{path} is no file of choices: {error}; remove it, or name another one"
        ) from None
    for choice in choices:
        preset(choice.algorithm)
    return choices
