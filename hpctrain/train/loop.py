"""The training loop, from top to bottom.

Layer: train. The order of samples, random numbers and learning rates are functions of the step, so
a resumed run needs the step, the position in the epoch, and the stores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain import __version__, checkpoint
from hpctrain.checkpoint import Part
from hpctrain.data import Batch, Loader
from hpctrain.errors import CheckpointError
from hpctrain.nn.layout import Store
from hpctrain.train.evaluate import Evaluation, evaluate
from hpctrain.train.folder import RunFolder
from hpctrain.train.progress import Progress
from hpctrain.train.session import Session
from hpctrain.train.step import StepResult, Trainer, schedule_of

__all__ = ["Position", "train"]


@dataclass
class Position:
    """Where a run is: `step` optimizer steps done, and `offset` samples of epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    offset: int = 0


def train(session: Session, folder: RunFolder, resume: str = "never") -> Evaluation | None:
    """Train as the session's configuration says. Collective; the last evaluation, on all ranks.

    Args:
        folder: an open run folder.
        resume: "never", "auto" (the newest valid checkpoint of the folder, if any), or the path of
            a checkpoint.
    """
    config = session.config
    loader = session.loader(config.data.train)
    trainer = Trainer(session)
    trainer.initialize()
    position = restore(session, trainer, loader, folder, resume)
    total = planned_steps(session, loader, position)
    trainer.schedule = schedule_of(config, total)
    saved = position.step if position.step else None
    evaluation = None
    folder.record("start", **facts(session), step=position.step, total_steps=total)
    folder.status("running", step=position.step)

    shown = session.comm.rank == 0
    with Progress(position.step, total, config.log.every_seconds, shown) as progress:
        progress.message(headline(session, trainer, position, total))
        while position.step < total:
            evaluation = None
            with loader.epoch(position.epoch, position=position.offset) as batches:
                for batch, waited in timed(batches):
                    result = trainer.step(batch, position.step)
                    report(folder, progress, position, result, waited)
                    advance(position, batch, loader)
                    if due(config.checkpoint, position):
                        saved = save(session, trainer, loader, folder, position)
                    if position.step == total:
                        break
            if config.data.test and evaluation_due(config.log.evaluate_every_epochs, position):
                evaluation = evaluate_now(session, folder, progress, position)
        if saved != position.step:
            save(session, trainer, loader, folder, position)
        if config.data.test and evaluation is None:
            evaluation = evaluate_now(session, folder, progress, position)

    folder.status("finished", step=position.step, evaluation=as_dict(evaluation))
    loader.close()
    trainer.free()
    return evaluation


def planned_steps(session: Session, loader: Loader, position: Position) -> int:
    """Steps of the whole run. A batch size that changed in mid-run counts from `position` on."""
    run = session.config.run
    if run.steps:
        return run.steps
    rest = -(-(loader.samples - position.offset) // loader.batch_size)
    return position.step + max(rest + (run.epochs - position.epoch - 1) * loader.steps, 0)


def advance(position: Position, batch: Batch, loader: Loader) -> None:
    """Count a step."""
    position.step += 1
    position.offset = batch.position + batch.global_samples
    if position.offset == loader.samples:
        position.epoch, position.offset = position.epoch + 1, 0


def timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch, and the seconds it took to arrive."""
    while True:
        begun = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begun


def report(
    folder: RunFolder, progress: Progress, position: Position, result: StepResult, waited: float
) -> None:
    """One step into metrics.jsonl and onto the screen."""
    folder.record(
        "step",
        step=position.step,
        epoch=position.epoch,
        loss=result.loss,
        accuracy=result.accuracy,
        lr=result.lr,
        grad_norm=result.grad_norm,
        samples=result.samples,
        data_seconds=round(waited, 6),
        time=time.time(),
    )
    progress.step(position.step, result, waited)


def due(section: Any, position: Position) -> bool:
    """Whether a checkpoint is due after the step that was just done."""
    if section.every_steps and position.step % section.every_steps == 0:
        return True
    begins = position.offset == 0
    return bool(begins and section.every_epochs and position.epoch % section.every_epochs == 0)


def evaluation_due(every_epochs: int, position: Position) -> bool:
    """Whether the split for tests is to be evaluated at the end of an epoch."""
    return bool(every_epochs and position.offset == 0 and position.epoch % every_epochs == 0)


def evaluate_now(
    session: Session, folder: RunFolder, progress: Progress, position: Position
) -> Evaluation:
    """Evaluate, record, and say so. Collective."""
    result = evaluate(session, session.config.data.test)
    folder.record("evaluation", step=position.step - 1, **as_dict(result))
    folder.flush()
    progress.message(f"epoch {position.epoch}  {result}")
    return result


def parts(trainer: Trainer, load: bool) -> list[Part]:
    """What a checkpoint of training holds, and which of it this rank writes or wants."""
    averages = trainer.averages
    everywhere = load or trainer.session.comm.rank == 0
    whole = (0, averages.layout.size) if everywhere else (0, 0)
    held = trainer.parallel.loaded_parts() if load else trainer.parallel.saved_parts()
    return [*held, Part("parameters", "", averages.layout, averages.array, whole)]


def save(
    session: Session, trainer: Trainer, loader: Loader, folder: RunFolder, position: Position
) -> int:
    """Write a checkpoint; the step it is of. Collective."""
    state = {
        "step": position.step,
        "data": loader.state(position.epoch, position=position.offset),
    }
    keep = session.config.checkpoint.keep
    folder.flush()
    checkpoint.save(
        folder.checkpoints,
        position.step,
        parts(trainer, load=False),
        state,
        session.comm,
        keep=keep,
        to_host=session.device.to_host,
    )
    folder.status("running", step=position.step)
    return position.step


def restore(
    session: Session, trainer: Trainer, loader: Loader, folder: RunFolder, resume: str
) -> Position:
    """Load the checkpoint that `resume` asks for; the position to go on from. Collective."""
    if resume == "never":
        return Position()
    path: Path | None = Path(resume)
    if resume == "auto":
        path = checkpoint.latest_valid(folder.checkpoints, session.comm)
    else:
        checkpoint.verify(Path(resume), session.comm)
    if path is None:
        return Position()
    state = checkpoint.load(path, parts(trainer, load=True), session.comm, fill=session.fill)
    trainer.parallel.publish()
    if not {"step", "data"} <= state.keys():
        raise CheckpointError(f"{path} was not written by training: its state lacks step and data")
    position = Position(int(state["step"]), *loader.restore(state["data"]))
    folder.forget_after(position.step)
    return position


def load_model(session: Session, folder: Path, path: str | None) -> Path:
    """Load parameters and averages of a run's checkpoint to evaluate it; its path. Collective.

    `path` names the checkpoint; None takes the newest valid one of the run folder.
    """
    if path is not None:
        found: Path | None = Path(path)
        checkpoint.verify(path, session.comm)
    else:
        found = checkpoint.latest_valid(folder / "checkpoints", session.comm)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet; train first")
    averages, layout = session.averages(), session.layouts.parameters
    parameters = Store(layout, session.device.zeros(layout.size, layout.dtype))
    stores = [
        Part("parameters", "", s.layout, s.array, (0, s.layout.size))
        for s in (parameters, averages)
    ]
    checkpoint.load(found, stores, session.comm, partial=True, fill=session.fill)
    session.model.bind(parameters, averages)
    return found


def headline(session: Session, trainer: Trainer, position: Position, total: int) -> str:
    """What is run on what, in one line."""
    ranks = session.topology
    n = sum(entry.size for entry in session.layouts.parameters.entries)
    start = f"resuming at step {position.step} of" if position.step else "training"
    return (
        f"{start} {total} steps: {n:,} parameters, {session.config.run.dtype}, {ranks.size} "
        f"rank{'s' * (ranks.size > 1)} on {ranks.node_count} node{'s' * (ranks.node_count > 1)}, "
        f"{session.device.name}, {session.threads} BLAS thread{'s' * (session.threads > 1)} each, "
        f"gradients by {trainer.parallel.slices.mode}"
    )


def facts(session: Session) -> dict[str, Any]:
    """What the header record of metrics.jsonl says about this start."""
    return {
        "version": __version__,
        "ranks": session.topology.size,
        "nodes": session.topology.node_count,
        "device": session.device.name,
        "dataset_id": session.dataset.dataset_id,
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
