"""When a run saves checkpoints, and what is said of it.

    checkpoint.every_steps, every_epochs   to the run folder, as does a file SAVE
    checkpoint.local_every_steps           to the nodes themselves

Training goes on meanwhile; see `hpctrain.checkpoint.background`. Where one is due for the run
folder while another is under way, training waits for that: a run that is killed loses one interval
and what it did while the next checkpoint was being written, never two intervals.
One for the nodes is left out then.

Layer: train. Knows nothing of files.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from hpctrain.checkpoint import NodeFolder, Saved, Saver, open_folder
from hpctrain.timeline import span
from hpctrain.train.compressing import state_of
from hpctrain.train.records import Position
from hpctrain.train.restoring import parts

if TYPE_CHECKING:
    from hpctrain.data import Loader
    from hpctrain.mpi.calls import Log
    from hpctrain.sections import CheckpointSection
    from hpctrain.train.folder import RunFolder
    from hpctrain.train.progress import Progress
    from hpctrain.train.session import Session
    from hpctrain.train.step import Trainer
    from hpctrain.train.stop import Stopping

__all__ = ["Saving"]

LOG = logging.getLogger(__name__)
LONG = 1.0  # seconds to wait for the checkpoint before, from which on it is worth a warning


class Saving:
    """The checkpoints of a run. All methods are collective but `wants`.

    Attributes:
        local: this node's folder for checkpoints; None where there are none.
    """

    def __init__(self, session: Session, folder: RunFolder, stopping: Stopping, calls: Log) -> None:
        """Open the folders; before `restore`, which looks into them."""
        self._session, self._folder, self._stopping = session, folder, stopping
        self._section = section = session.config.checkpoint
        where = session.topology
        self.local: NodeFolder | None = None
        if section.local:
            self.local = open_folder(section.local, folder.checkpoints, where)
        self._saver = Saver(
            folder.checkpoints,
            where,
            session.device,
            section.keep,
            self.local,
            calls.alive,
            folder.sync,
        )
        self._newest: int | None = None  # the step of the newest one for the run folder
        self._warned = False

    def begin(
        self, trainer: Trainer, loader: Loader, position: Position, progress: Progress
    ) -> None:
        """Get ready to save what `trainer` holds; the run goes on from `position`."""
        self._trainer, self._loader, self._progress = trainer, loader, progress
        self._newest = position.step or None
        trainer.before_backward = self._saver.settle
        self._saver.reserve(parts(trainer, load=False))

    def wants(self) -> float:
        """This rank's number to be added up over the ranks in a step."""
        return self._saver.wants()

    def after_step(self, working: float, position: Position) -> float:
        """Go on with what is under way, and save where it is due; the seconds that this took.

        `working`: the sum of what ranks want.
        """
        begun = time.monotonic()
        self._completed(self._saver.agree(working))
        if self._stopping.save or _due(self._section, position):
            self.save(position)
        elif self.local and position.step % self._section.local_every_steps == 0:
            if self._saver.busy:
                self._left_out(position)
            elif self._saver.staged:
                self._begin(position, "local")
        seconds = time.monotonic() - begun
        self._stopping.paused(seconds)
        return seconds

    def save(self, position: Position) -> None:
        """Begin a checkpoint for the run folder, unless this step has one."""
        if self._newest == position.step:
            return
        begun = time.monotonic()
        self._finish()
        if (waited := time.monotonic() - begun) > LONG:
            self._warn(
                f"a checkpoint was due while the one before was being written: training waited "
                f"{waited:.1f} s for it; save less often (checkpoint.every_steps, every_epochs)"
            )
        self._begin(position, "shared")

    def finish(self) -> None:
        """Wait until nothing is under way."""
        self._finish()

    def _finish(self) -> None:
        with span("checkpoint wait"):
            saved = self._saver.finish()
        self._completed(saved)

    def close(self) -> None:
        """After `finish`, at the end of a run that saved its last step: give everything back."""
        self._saver.close(orderly=True)

    def _begin(self, position: Position, level: str) -> None:
        if level == "shared":
            self._newest = position.step
            self._stopping.begun()
        data = self._loader.state(position.epoch, position=position.offset)
        self._folder.flush()
        state = {
            "step": position.step,
            "data": data,
            "scaling": self._trainer.scaling.state(),
            "compression": state_of(self._trainer.compression, self._session),
        }
        held = parts(self._trainer, load=False)
        with span("checkpoint stage", step=position.step, level=level):
            saved = self._saver.begin(position.step, held, state, level)
        self._completed(saved)

    def _completed(self, saved: Saved | None) -> None:
        if saved is None:
            return
        self._folder.record(
            "checkpoint",
            step=saved.step - 1,
            level=saved.level,
            seconds=round(saved.blocked, 6),
            total_seconds=round(saved.total, 6),
            cpu_seconds=round(saved.cpu, 6),
            bytes=saved.nbytes,
        )
        self._folder.flush()
        self._progress.saved(saved.blocked)
        if saved.level == "shared":
            self._stopping.saved(saved.total)
            self._folder.status("running", step=saved.step)

    def _left_out(self, position: Position) -> None:
        self._folder.record("checkpoint_left_out", step=position.step - 1)
        self._warn(
            "a checkpoint on the nodes was left out, as the one before was not complete; save "
            "less often (checkpoint.local_every_steps)"
        )

    def _warn(self, text: str) -> None:
        """Once in a run, on one rank."""
        if not self._warned and self._session.comm.rank == 0:
            LOG.warning("%s", text)
        self._warned = True


def _due(section: CheckpointSection, position: Position) -> bool:
    """Whether a checkpoint is due after the step that was just done."""
    if section.every_steps and position.step % section.every_steps == 0:
        return True
    begins = position.offset == 0
    return bool(begins and section.every_epochs and position.epoch % section.every_epochs == 0)
