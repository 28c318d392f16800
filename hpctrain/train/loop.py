"""The training loop, from top to bottom.

Layer: train. The order of samples, random numbers and learning rates are functions of the step, so
a resumed run needs the step, the position in the epoch, and the stores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from hpctrain.data import Batch, Loader
from hpctrain.errors import DivergedError
from hpctrain.mpi.calls import Log
from hpctrain.sections import RunConfig
from hpctrain.timeline import mark, span
from hpctrain.train.balance import Balance
from hpctrain.train.evaluate import Evaluation, evaluate
from hpctrain.train.folder import RunFolder
from hpctrain.train.progress import Progress
from hpctrain.train.records import Position, Times, as_dict, facts, headline, report, report_data
from hpctrain.train.restoring import restore
from hpctrain.train.saving import Saving
from hpctrain.train.session import Session
from hpctrain.train.step import Trainer, schedule_of
from hpctrain.train.stop import EXIT_RESUBMIT, Limits, Stopping
from hpctrain.train.timeline import recording

__all__ = ["Outcome", "train"]


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
    calls = calls or Log()
    saving = Saving(session, folder, stopping, calls)
    position = restore(session, trainer, loader, folder, resume, saving.local)
    total = planned_steps(session, loader, position)
    trainer.schedule = schedule_of(config, total)
    balance = Balance(session.comm, session.comm.rank == 0)
    begins = {"step": position.step, "total_steps": total}
    folder.record("start", **facts(session, trainer), **begins, **folder.before)
    folder.status("running", step=position.step)

    shown = session.comm.rank == 0
    with (
        recording(session, folder.path, calls, position.step) as at_step,
        Progress(position.step, total, config.log.every_seconds, shown) as progress,
    ):
        run = Run(
            session, trainer, loader, folder, stopping, position, calls, saving, balance, at_step
        )
        progress.figures = loader.figures
        progress.message(headline(session, trainer, position, total))
        saving.begin(trainer, loader, position, progress)
        outcome = to_the_end(run, progress, total)
    saving.close()
    loader.close()
    trainer.free()
    return outcome


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
    saving: Saving
    balance: Balance
    at_step: Callable[[int], None]  # before a step: which one


def to_the_end(run: Run, progress: Progress, total: int) -> Outcome:
    """Epochs until the run is finished or told to stop; the last checkpoint. Collective."""
    position, stopping = run.position, run.stopping
    evaluation = missed_evaluation(run, progress)
    while position.step < total and not stopping.reason:
        evaluation = epoch(run, progress, total)
    run.saving.save(position)
    run.saving.finish()
    stopped = stopping.reason if position.step < total else ""
    if not stopped and run.session.config.data.test and evaluation is None:
        evaluation = evaluate_now(run, progress)
    run.balance.finish(position.step - 1, run.folder)
    finish(run, progress, evaluation, stopped)
    return Outcome(evaluation, stopped)


def epoch(run: Run, progress: Progress, total: int) -> Evaluation | None:
    """Steps to the end of the epoch, or of the run; the evaluation where one is due. Collective."""
    position, stopping = run.position, run.stopping
    begun, figures = time.perf_counter(), replace(run.loader.figures)
    with run.loader.epoch(position.epoch, position=position.offset) as batches:
        for batch, waited in timed(batches):
            before = clocks(run)
            try:
                with span("step", step=position.step):
                    result = run.trainer.step(batch, position.step, wants(run))
            except DivergedError:  # on all ranks; what is under way is from before
                run.saving.finish()
                raise
            spent = [now - then for now, then in zip(clocks(run), before, strict=True)]
            report(run.folder, progress, position, result, Times(waited, *spent))
            advance(position, batch, run.loader)
            agree(run, progress, result.requests, Times(waited, *spent))
            run.at_step(position.step)
            if position.step == total or stopping.reason:
                break
    done = run.loader.figures.since(figures)
    report_data(run.folder, position, done, time.perf_counter() - begun)
    if stopping.reason and position.step < total:
        return None
    return evaluate_now(run, progress) if evaluation_due(run.session.config, position) else None


def wants(run: Run) -> tuple[float, ...]:
    """What this rank asks the others for, added up in the step's all-reduce."""
    return (run.saving.wants(), run.balance.wants(), *run.stopping.wants())


def agree(run: Run, progress: Progress, requests: tuple[float, ...], times: Times) -> None:
    """Do what the ranks have asked for: stop, save, compare their times. Collective."""
    working, compare, *stops = requests
    run.stopping.agree(stops)
    paused = run.saving.after_step(working, run.position)
    run.balance.count(times.step - times.messages, times.data, paused, times.messages)
    run.balance.agree(compare, run.position.step - 1, run.folder, progress)


def clocks(run: Run) -> tuple[float, ...]:
    """Seconds so far, in the order of `Times` after `data`."""
    parallel = run.trainer.parallel
    waited = parallel.slices.waited
    hidden = run.calls.all_seconds - run.calls.seconds - waited
    launches = run.session.device.launch_seconds
    exchange = parallel.exchange_seconds + run.session.exchange_seconds
    messages = run.calls.seconds + waited
    return time.perf_counter(), messages, launches, hidden, exchange, parallel.update_seconds


def finish(run: Run, progress: Progress, evaluation: Evaluation | None, stopped: str) -> None:
    """Leave word of how the run ended: STATUS.json, DONE, a line on the screen."""
    folder, step = run.folder, run.position.step
    if stopped:
        mark("stop", by=stopped)
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
        with span("wait for data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - begun


def evaluation_due(config: RunConfig, position: Position) -> bool:
    """Whether the split for tests is to be evaluated now, at the end of an epoch."""
    every = config.log.evaluate_every_epochs
    begins = position.offset == 0 and config.data.test
    return bool(begins and every and position.epoch % every == 0)


def evaluate_now(run: Run, progress: Progress) -> Evaluation:
    """Evaluate, record, and say so. Collective."""
    begun = time.perf_counter()
    with span("evaluate"):
        result = evaluate(run.session, run.session.config.data.test, run.calls.alive)
    seconds = round(time.perf_counter() - begun, 6)
    last = run.position.step - 1
    run.folder.record("evaluation", step=last, **as_dict(result), seconds=seconds)
    run.folder.flush()
    progress.message(f"epoch {run.position.epoch}  {result}")
    return result
