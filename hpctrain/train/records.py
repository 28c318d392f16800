"""What a training run says of itself: lines on the screen, records in metrics.jsonl.

Layer: train. Knows nothing of how a step is done.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain import __version__
from hpctrain.mpi.facts import library

if TYPE_CHECKING:
    from hpctrain.data.figures import Figures
    from hpctrain.train.evaluate import Evaluation
    from hpctrain.train.folder import RunFolder
    from hpctrain.train.progress import Progress
    from hpctrain.train.session import Session
    from hpctrain.train.step import StepResult, Trainer

__all__ = ["Position", "Times", "as_dict", "facts", "headline", "report", "report_data"]


@dataclass
class Position:
    """Where a run is: `step` optimizer steps done, and `offset` samples of epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Times:
    """Seconds of a step on this rank: waiting for data before it; all of it; waiting for MPI, and
    for the thread that exchanges; launching; what that thread did behind the computation; adding up
    gradients and gathering parameters, with the waiting for others; norm and update.

    `launches` is what the host spends on launching kernels on a GPU: where it comes near `step`,
    the GPU waits for the host, and larger microbatches help. 0 on the CPU.
    """

    data: float
    step: float
    messages: float
    launches: float
    hidden: float
    exchange: float
    update: float


def report(
    folder: RunFolder, progress: Progress, position: Position, result: StepResult, times: Times
) -> None:
    """One step into metrics.jsonl and onto the screen."""
    folder.record(
        "step",
        step=position.step,
        epoch=position.epoch,
        loss=result.loss,
        accuracy=result.accuracy,
        lr=result.lr,
        grad_norm=None if result.skipped else result.grad_norm,
        samples=result.samples,
        **result.scaling(),
        **result.between,
        data_seconds=round(times.data, 6),
        step_seconds=round(times.step, 6),
        message_seconds=round(times.messages, 6),
        exchange_seconds=round(times.exchange, 6),
        update_seconds=round(times.update, 6),
        **({"hidden_seconds": round(times.hidden, 6)} if times.hidden > 0 else {}),
        **({"launch_seconds": round(times.launches, 6)} if times.launches else {}),
        time=time.time(),
    )
    progress.step(position.step, result, times.data)
    whys = result.between.get("compress_why", ())
    if whys:
        progress.message(f"compression of {len(whys)} buckets: {'; '.join(dict.fromkeys(whys))}")


def report_data(folder: RunFolder, position: Position, figures: Figures, seconds: float) -> None:
    """What the first rank's loader did in an epoch of `seconds`, or in a part of it."""
    folder.record(
        "data",
        step=position.step - 1,
        wait_fraction=round(figures.wait_fraction(seconds), 6),
        megabytes_per_second=round(figures.megabytes_per_second, 3),
        hit_rate=round(figures.hit_rate, 6),
        read_amplification=round(figures.read_amplification, 4),
        bytes_read=figures.bytes_read,
        seconds=round(seconds, 6),
    )


def headline(session: Session, trainer: Trainer, position: Position, total: int) -> str:
    """What is run on what, in one line."""
    ranks = session.topology
    n = sum(entry.size for entry in session.layouts.parameters.entries)
    passes = session.config.batch.accumulate
    start = f"resuming at step {position.step} of" if position.step else "training"
    return (
        f"{start} {total} steps: {n:,} parameters, {session.config.run.dtype}, {ranks.size} "
        f"rank{'s' * (ranks.size > 1)} on {ranks.node_count} node{'s' * (ranks.node_count > 1)}, "
        f"{session.device.name}, {session.threads} BLAS thread{'s' * (session.threads > 1)} each, "
        f"gradients by {trainer.parallel.slices.mode}"
        f"{f', each step in {passes} passes' if passes > 1 else ''}"
        f"{carried(trainer)}"
    )


def carried(trainer: Trainer) -> str:
    """How buckets cross nodes, where there was a choice; for the headline."""
    counts = Counter(str(found) for found in trainer.picks.values())
    shown = [f"{count} bucket{'s' * (count > 1)} by {text}" for text, count in counts.items()]
    chosen = trainer.parallel.slices.between and any(text != "direct" for text in counts)
    return f", between nodes {', '.join(shown)}" if chosen else ""


def facts(session: Session, trainer: Trainer) -> dict[str, Any]:
    """What the header record of metrics.jsonl says about this start.

    "between_nodes": for each bucket its bytes, the algorithm that carries it between nodes, and the
    seconds predicted of those that were looked at.
    """
    itemsize = session.layouts.parameters.dtype.itemsize
    crossing = [
        {"bytes": (stop - start) * itemsize, "algorithm": p.algorithm, "predicted": p.seconds}
        for (start, stop), p in trainer.picks.items()
    ]
    return {
        "version": __version__,
        "ranks": session.topology.size,
        "nodes": session.topology.node_count,
        "device": session.device.name,
        "dataset_id": session.dataset.dataset_id,
        "dtype": session.config.run.dtype,
        "accumulate": session.config.batch.accumulate,
        "threads": session.threads,
        **({"between_nodes": crossing} if crossing else {}),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi": library(),
        "time": time.time(),
    }


def as_dict(evaluation: Evaluation | None) -> dict[str, Any]:
    """An evaluation as JSON values."""
    if evaluation is None:
        return {}
    return {
        "split": evaluation.split,
        "samples": evaluation.samples,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
    }
