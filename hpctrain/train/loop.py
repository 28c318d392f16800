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

from hpctrain import checkpoint
from hpctrain.checkpoint import Part
from hpctrain.data import Batch, Loader
from hpctrain.device.dtypes import wide_dtype
from hpctrain.errors import CheckpointError
from hpctrain.mpi.calls import Log
from hpctrain.nn.layout import Store
from hpctrain.sections import RunConfig
from hpctrain.train.evaluate import Evaluation, evaluate
from hpctrain.train.folder import RunFolder
from hpctrain.train.progress import Progress
from hpctrain.train.records import Position, Times, as_dict, facts, headline, report
from hpctrain.train.session import Session
from hpctrain.train.step import Trainer, schedule_of
from hpctrain.train.stop import EXIT_RESUBMIT, Limits, Stopping

__all__ = ["Outcome", "load_model", "train"]


@dataclass(frozen=True)
class Outcome:
    """How `train` ended, the same on all ranks: the last evaluation, and why it stopped early."""

    evaluation: Evaluation | None
    stopped: str  # "" for a run that is finished

    @property
    def exit_code(self) -> int:
        return EXIT_RESUBMIT if self.stopped else 0


def train(
    session: Session,
    folder: RunFolder,
    resume: str = "never",
    stopping: Stopping | None = None,
    calls: Log | None = None,
) -> Outcome:
    """Train as the session's configuration says, to the end or until told to stop. Collective.

    Args:
        folder: an open run folder.
        resume: "never", "auto" (the newest valid checkpoint of the folder, if any), or the path of
            a checkpoint.
        stopping: when to end early; default: never.
        calls: what the session's communicator notes, to report the time spent in messages.
    """
    config = session.config
    stopping = stopping or Stopping(Limits(None, None), folder.path, first_rank=False)
    loader = session.loader(config.data.train)
    trainer = Trainer(session)
    trainer.initialize()
    position = restore(session, trainer, loader, folder, resume)
    total = planned_steps(session, loader, position)
    trainer.schedule = schedule_of(config, total)
    run = Run(session, trainer, loader, folder, stopping, position, calls or Log())
    folder.record("start", **facts(session), step=position.step, total_steps=total)
    folder.status("running", step=position.step)

    shown = session.comm.rank == 0
    with Progress(position.step, total, config.log.every_seconds, shown) as progress:
        progress.message(headline(session, trainer, position, total))
        evaluation = missed_evaluation(run, progress)
        while position.step < total and not stopping.reason:
            evaluation = epoch(run, progress, total)
        if run.saved != position.step:
            save(run)
        stopped = stopping.reason if position.step < total else ""
        if not stopped and config.data.test and evaluation is None:
            evaluation = evaluate_now(run, progress)
        finish(run, progress, evaluation, stopped)
    loader.close()
    trainer.free()
    return Outcome(evaluation, stopped)


@dataclass
class Run:
    """What the functions of the loop share."""

    session: Session
    trainer: Trainer
    loader: Loader
    folder: RunFolder
    stopping: Stopping
    position: Position
    calls: Log
    saved: int | None = None  # the step of the newest checkpoint that this start knows of

    def __post_init__(self) -> None:
        self.saved = self.position.step or None


def epoch(run: Run, progress: Progress, total: int) -> Evaluation | None:
    """Steps to the end of the epoch, or of the run; the evaluation where one is due. Collective."""
    position, stopping = run.position, run.stopping
    with run.loader.epoch(position.epoch, position=position.offset) as batches:
        for batch, waited in timed(batches):
            before = clocks(run)
            result = run.trainer.step(batch, position.step, stopping.wants())
            stopping.agree(result.requests)
            spent = [now - then for now, then in zip(clocks(run), before, strict=True)]
            report(run.folder, progress, position, result, Times(waited, *spent))
            advance(position, batch, run.loader)
            if stopping.save or due(run.session.config.checkpoint, position):
                save(run)
            if position.step == total or stopping.reason:
                break
    if stopping.reason and position.step < total:
        return None
    return evaluate_now(run, progress) if evaluation_due(run.session.config, position) else None


def clocks(run: Run) -> tuple[float, float, float]:
    """Seconds so far: of the clock, inside MPI, launching kernels."""
    return time.perf_counter(), run.calls.seconds, run.session.device.launch_seconds


def finish(run: Run, progress: Progress, evaluation: Evaluation | None, stopped: str) -> None:
    """Leave word of how the run ended: STATUS.json, DONE, a line on the screen."""
    folder, step = run.folder, run.position.step
    if stopped:
        folder.record("stop", step=step - 1, reason=stopped, time=time.time())
        folder.status("stopped" if "STOP" in stopped else "resubmit", step=step, reason=stopped)
        progress.message(f"stopped after {step} steps by {stopped}; go on with --resume auto")
    else:
        folder.status("finished", step=step, evaluation=as_dict(evaluation))
        folder.mark_done(run.session.config, step)


def missed_evaluation(run: Run, progress: Progress) -> Evaluation | None:
    """The evaluation that was due where the run stopped, unless it is recorded. Collective."""
    position, folder = run.position, run.folder
    if not position.step or not evaluation_due(run.session.config, position):
        return None
    recorded = folder.holds("evaluation", position.step - 1)
    return None if run.session.comm.bcast(recorded) else evaluate_now(run, progress)


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


def due(section: Any, position: Position) -> bool:
    """Whether a checkpoint is due after the step that was just done."""
    if section.every_steps and position.step % section.every_steps == 0:
        return True
    begins = position.offset == 0
    return bool(begins and section.every_epochs and position.epoch % section.every_epochs == 0)


def evaluation_due(config: RunConfig, position: Position) -> bool:
    """Whether the split for tests is to be evaluated now, at the end of an epoch."""
    every = config.log.evaluate_every_epochs
    begins = position.offset == 0 and config.data.test
    return bool(begins and every and position.epoch % every == 0)


def evaluate_now(run: Run, progress: Progress) -> Evaluation:
    """Evaluate, record, and say so. Collective."""
    begun = time.perf_counter()
    result = evaluate(run.session, run.session.config.data.test, run.calls.alive)
    seconds = round(time.perf_counter() - begun, 6)
    last = run.position.step - 1
    run.folder.record("evaluation", step=last, **as_dict(result), seconds=seconds)
    run.folder.flush()
    progress.message(f"epoch {run.position.epoch}  {result}")
    return result


def parts(trainer: Trainer, load: bool) -> list[Part]:
    """What a checkpoint of training holds, and which of it this rank writes or wants."""
    averages = trainer.averages
    everywhere = load or trainer.session.comm.rank == 0
    whole = (0, averages.layout.size) if everywhere else (0, 0)
    held = trainer.parallel.loaded_parts() if load else trainer.parallel.saved_parts()
    return [*held, Part("parameters", "", averages.layout, averages.array, whole)]


def save(run: Run) -> None:
    """Write a checkpoint. Collective."""
    session, position = run.session, run.position
    begun = time.perf_counter()
    data = run.loader.state(position.epoch, position=position.offset)
    run.folder.flush()
    checkpoint.save(
        run.folder.checkpoints,
        position.step,
        parts(run.trainer, load=False),
        {"step": position.step, "data": data, "scaling": run.trainer.scaling.state()},
        session.comm,
        keep=session.config.checkpoint.keep,
        to_host=session.device.to_host,
    )
    run.saved = position.step
    seconds = time.perf_counter() - begun
    run.stopping.saved(seconds)
    run.folder.record("checkpoint", step=position.step - 1, seconds=round(seconds, 6))
    run.folder.status("running", step=position.step)


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
    trainer.scaling.restore(state.get("scaling", {}))
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
    wide = layout.with_dtype(wide_dtype(layout.dtype))
    parameters = Store(wide, session.device.zeros(layout.size, wide.dtype))
    stores = [
        Part("parameters", "", s.layout, s.array, (0, s.layout.size))
        for s in (parameters, averages)
    ]
    checkpoint.load(found, stores, session.comm, partial=True, fill=session.fill)
    if wide.dtype != layout.dtype:
        short = Store(layout, session.device.zeros(layout.size, layout.dtype))
        session.device.launch(
            "narrow", parameters.array, short.array, layout.size, work=layout.size
        )
        parameters = short
    session.model.bind(parameters, averages)
    return found
