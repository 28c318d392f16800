"""Compression between nodes in a run: from its section, to the log and through checkpoints.

A checkpoint holds each node's residual as a file of its own, residual_0, residual_1, ..., and
velocities alike, where memories have momentum. On as many nodes a run goes on with the same
residuals. On fewer, a node takes several and adds them up; on more, some begin with zeros. Where
nothing is compressed any more, what residuals hold is added to the next gradient, so that their sum
is never lost, and velocities are left out.

Layer: train. Knows nothing of how sums are compressed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.checkpoint import Part, describe
from hpctrain.collectives.network import COMMON, Network
from hpctrain.compress import CompressedColumn, Compression, Settings
from hpctrain.errors import UsageError
from hpctrain.mpi.agree import on_first_rank
from hpctrain.nn.layout import Layout
from hpctrain.optim import SGD, Rule
from hpctrain.sections import AdamW, RunConfig
from hpctrain.train.session import Session, rule_of

__all__ = [
    "Loading",
    "compression_of",
    "facts_of",
    "residual_parts",
    "rule_beside",
    "state_of",
]

LOG = logging.getLogger(__name__)
NAMES = ("residual", "velocity")  # of arrays that a memory keeps


def compression_of(
    config: RunConfig, session: Session, network: Network | None = None
) -> Compression | None:
    """What a run file's [compress] asks for. None: nothing is compressed.

    `network`: on which "auto" predicts what it is about to measure; None: a common one.

    Raises:
        UsageError: it does not go with the run's other choices.
    """
    section = config.compress
    if section.method == "off":
        return None
    _refuse(config)
    if isinstance(config.optimizer, AdamW) and session.comm.rank == 0:
        LOG.warning(
            "compress.method = %r with AdamW: what a residual holds back comes late into the "
            "second moments too, and may train worse than with SGD",
            section.method,
        )
    if session.device.name != "cpu" and session.comm.rank == 0:
        LOG.info(
            "compression between nodes is done on device %s: only what is sent crosses to the "
            "host%s",
            session.device.name,
            ', where "oktopk" adds up its entries' if section.method in ("oktopk", "auto") else "",
        )
    settings = Settings(
        section.method,
        section.density,
        section.warmup_steps,
        section.values,
        section.min_size,
        section.rank,
        momentum_of(config) if section.memory == "momentum" else 0.0,
    )
    return Compression(settings, session.layouts.parameters, network or COMMON)


def _refuse(config: RunConfig) -> None:
    """Raise `UsageError` where [parallel] asks for what compression leaves no room for."""
    method = config.compress.method
    if config.parallel.reduction == "allreduce":
        raise UsageError(
            f'compress.method = "{method}" compresses what crosses nodes, but '
            'parallel.reduction = "allreduce" leaves all to MPI: use reduction = "auto", or '
            'compress.method = "off"'
        )
    for key, usual in (("wire", "same"), ("algorithm", "auto")):
        if (value := getattr(config.parallel, key)) != usual:
            raise UsageError(
                f'parallel.{key} = "{value}" is for dense sums between nodes, but '
                f'compress.method = "{method}" has exchanges of its own: use {key} = "{usual}", or '
                'compress.method = "off"'
            )


def momentum_of(config: RunConfig) -> float:
    """The update rule's momentum, for memories to gather.

    Raises:
        UsageError: there is none, or of another kind.
    """
    section = config.optimizer
    if isinstance(section, AdamW) or not section.momentum or section.nesterov:
        raise UsageError(
            'compress.memory = "momentum" gathers the momentum of optimizer.name = "sgd" before '
            "the selection: set optimizer.momentum above 0 and nesterov = false, or use "
            'compress.memory = "residual"'
        )
    return section.momentum


def rule_beside(compression: Compression | None, session: Session) -> Rule:
    """The update rule, without the momentum that memories between nodes gather in its place."""
    rule = rule_of(session.config)
    gathered = compression is not None and compression.settings.momentum > 0
    if gathered and session.topology.node_count > 1 and isinstance(rule, SGD):
        return replace(rule, momentum=0.0)
    return rule


def facts_of(compression: Compression | None, session: Session) -> dict[str, Any]:
    """What a step's record says: bytes this rank sent between nodes, density, and methods.

    Once a bucket's method is settled, why ("compress_why"). Collective while `auto` is undecided.
    """
    if compression is None:
        return {}
    compression.settle(session.comm)
    columns = compression.columns
    if not columns:
        return {}
    elements = sum(stop - start for start, stop in (c.span for c in columns)) or 1
    kept = sum(c.density * (c.span[1] - c.span[0]) for c in columns)
    facts: dict[str, Any] = {
        "between_bytes": sum(c.sent for c in columns),
        "density": round(kept / elements, 6),
        "compress": [c.used for c in columns],
    }
    news = [c.choice for c in columns if c.choice.settled and not c.choice.told]
    for choice in news:
        choice.told = True
    if news:
        facts["compress_why"] = [f"{choice.method}: {choice.reason}" for choice in news]
    return facts


def residual_parts(compression: Compression | None, session: Session) -> list[Part]:
    """What each node's memory keeps, to be written. Collective."""
    if compression is None:
        return []
    columns, layout = compression.columns, session.layouts.parameters
    nodes, buckets = max(session.comm.allgather((compression.nodes, len(columns))))
    parts = []
    for name in compression.kept:
        for node in range(nodes):
            for bucket in range(buckets):
                column = columns[bucket] if bucket < len(columns) else None
                if column is None or column.node != node:
                    parts.append(_part(f"{name}_{node}", layout, None, (0, 0)))
                    continue
                array = column.memory.arrays()[name]
                parts.append(_part(f"{name}_{node}", layout, array, column.span))
    return parts


def state_of(compression: Compression | None, session: Session) -> list[dict[str, Any]]:
    """Of all columns what a checkpoint keeps beside residuals. Collective."""
    first = [c.state() for c in compression.columns if c.node == 0] if compression else []
    return [state for states in session.comm.allgather(first) for state in states]


class Loading:
    """Residuals on their way from a checkpoint. Collective to create.

    Attributes:
        parts: to be filled with the rest of the checkpoint; then call `finish`.
    """

    def __init__(self, path: Path, compression: Compression | None, session: Session) -> None:
        self._rank, self._device = session.comm.rank, session.device
        self._layout = session.layouts.parameters.with_dtype(np.float32)
        self._columns = compression.columns if compression else []
        self._temporary: list[tuple[str, CompressedColumn | None, NDArray[np.float32]]] = []
        files = on_first_rank(session.comm, lambda: list(describe(path).tensors))
        here = (compression.nodes, len(self._columns)) if compression else (0, 0)
        nodes, buckets = max(session.comm.allgather(here))
        self.parts: list[Part] = []
        for name in NAMES:
            for node in range(sum(file.startswith(f"{name}_") for file in files)):
                if nodes > 1 and compression is not None and name in compression.kept:
                    self._take(name, node, nodes, buckets)
                else:
                    self._take_all(name, node)

    def _take(self, name: str, node: int, nodes: int, buckets: int) -> None:
        """Node k of the run takes what nodes k, k + `nodes`, ... had."""
        for bucket in range(buckets):
            column = self._columns[bucket] if bucket < len(self._columns) else None
            if column is None or column.node != node % nodes:
                self.parts.append(_part(f"{name}_{node}", self._layout, None, (0, 0)))
                continue
            array = np.zeros(column.span[1] - column.span[0], np.float32)
            self._temporary.append((name, column, array))
            self.parts.append(_part(f"{name}_{node}", self._layout, array, column.span))

    def _take_all(self, name: str, node: int) -> None:
        """One rank takes everything; nobody takes velocities, but all that is there is read."""
        size = self._layout.size
        if self._rank:
            self.parts.append(_part(f"{name}_{node}", self._layout, None, (0, 0)))
            return
        array = np.zeros(size, np.float32)
        self._temporary.append((name, None, array))
        self.parts.append(_part(f"{name}_{node}", self._layout, array, (0, size)))

    def finish(self, states: Sequence[Mapping[str, Any]]) -> NDArray[np.float32] | None:
        """Once `parts` are filled: what is to be added to this rank's next gradient, or None.

        `states`: what `state_of` gave.
        """
        rest: NDArray[np.float32] | None = None
        for name, column, array in self._temporary:
            if column is not None:
                kept, n = column.memory.arrays()[name], array.size
                part = self._device.from_host(array)
                self._device.launch("add_into", kept, part, n, work=n)
            elif name == "residual":
                rest = array if rest is None else rest + array
        for column in self._columns:
            same = [s for s in states if list(s["span"]) == list(column.span)]
            for state in (same or states)[:1]:
                column.restore(state)
        return rest


def _part(file: str, layout: Layout, array: Any, span: tuple[int, int]) -> Part:
    return Part(file, "", layout, array, span, span[0])
