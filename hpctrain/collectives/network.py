"""A network as the cost model sees it: seconds per message, per byte and per addition.

Everything is a plain number with its unit in its name, kept in a TOML file that people can read,
write by hand for a cluster they do not have yet, or get from `hpctrain bench allreduce --fit`.

    time of a message     message_seconds at each end, then latency_seconds + bytes x
                          seconds_per_byte; what shares a port goes one after the other
    time of an addition   launch_seconds + bytes added x add_seconds_per_byte

Layer: collectives. Knows nothing of schedules.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w

from hpctrain.errors import UsageError

__all__ = ["COMMON", "Between", "Inside", "Network", "Node", "Rank", "load_network", "save_network"]

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class Inside(Section, frozen=True):
    """Between ranks of a node.

    Attributes:
        latency_seconds, seconds_per_byte: of a message; a rank sends one at a time, and receives
            one at a time.
        message_seconds: that a rank is busy with posting a send or a receive.
        read_seconds_per_byte: of a peer's memory, by a copy; a sum takes this or
            `add_seconds_per_byte`, whichever is more.
        fence_seconds: of one of the ceil(lg n) steps of a fence of n ranks.
    """

    latency_seconds: Seconds
    seconds_per_byte: Seconds
    message_seconds: Seconds
    read_seconds_per_byte: Seconds
    fence_seconds: Seconds


class Between(Section, frozen=True):
    """Between nodes.

    Attributes:
        latency_seconds, message_seconds: as inside a node.
        seconds_per_byte: of one NIC, in each direction.
        nics: of a node. Its ranks use them in turn; those that use the same one share it.
        burst_bytes: that pass at once after a pause, as those of a shaped link do (the burst of
            tc's token bucket, a cloud's credits); 0: none.
        duplex: "full": a NIC sends and receives at the same time; "half": one after the other.
    """

    latency_seconds: Seconds
    seconds_per_byte: Seconds
    message_seconds: Seconds
    nics: Positive = 1
    burst_bytes: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    duplex: Literal["full", "half"] = "full"


class Rank(Section, frozen=True):
    """What a rank does alone.

    Attributes:
        launch_seconds: of any operation, besides its bytes.
        add_seconds_per_byte: gamma; for every byte of every operand but the first.
        copy_seconds_per_byte: of a copy, and of a conversion to what a message carries and back.
    """

    launch_seconds: Seconds
    add_seconds_per_byte: Seconds
    copy_seconds_per_byte: Seconds


class Node(Section, frozen=True):
    """What the ranks of a node share.

    Attributes:
        cores: more ranks than these take turns. GPUs count as cores.
        memory_seconds_per_byte: for every byte that is copied, added, read or received by any of
            them; 0 where each has a memory of its own.
    """

    cores: Positive
    memory_seconds_per_byte: Seconds = 0.0


class Network(Section, frozen=True):
    """All of it. `source` says where the numbers come from, for people."""

    name: str
    source: str
    inside: Inside
    between: Between
    rank: Rank
    node: Node


# What is assumed where nobody says: where a fit begins, and by what `auto` orders what it tries.
COMMON = Network(
    name="10 Gbit/s",
    source="assumed: a common Linux machine with Ethernet of 10 Gbit/s",
    inside=Inside(2e-6, 2e-10, 5e-6, 2e-10, 2e-6),
    between=Between(3e-5, 8e-10, 1e-5, burst_bytes=1 << 15),
    rank=Rank(1e-5, 2e-10, 2e-10),
    node=Node(1, 5e-11),
)


def load_network(path: str | Path) -> Network:
    """The network in a TOML file. Raises `UsageError` naming file, key and rule."""
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return msgspec.convert(values, Network)
    except OSError as error:
        raise UsageError(f"cannot read the network {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the network {path} is no text: wanted a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the network {path} is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise UsageError(
            f"the network {path}: {error}; `hpctrain bench allreduce --fit FILE` writes a whole one"
        ) from None


def save_network(path: str | Path, network: Network) -> None:
    """Write the file that `load_network` reads. Raises `OSError`."""
    Path(path).write_text(tomli_w.dumps(msgspec.to_builtins(network)), encoding="utf-8")
