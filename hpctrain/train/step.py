"""One training step: forward, backward, reduce, update.

Layer: train. Everything a step needs from other ranks passes through here: one small all-reduce of
sums, and `DataParallel.update`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpctrain.data import Batch
from hpctrain.errors import DivergedError
from hpctrain.nn.layout import Store
from hpctrain.optim import Schedule
from hpctrain.parallel.data import DataParallel
from hpctrain.sections import RunConfig
from hpctrain.train.scaling import loss_scale_of
from hpctrain.train.session import Session, rule_of

__all__ = ["StepResult", "Trainer", "schedule_of"]


@dataclass(frozen=True)
class StepResult:
    """What a step reports; the same on all ranks."""

    loss: float  # weighted mean over the global batch
    accuracy: float  # fraction of the weight-bearing samples; nan for a regression
    lr: float
    grad_norm: float  # before clipping
    samples: int
    loss_scale: float = 1.0
    skipped: bool = False  # a gradient was not finite in float16: nothing was updated
    scaled: bool = False  # whether the scale of the loss is one that changes
    requests: tuple[float, ...] = ()  # sums of what ranks asked for; see `hpctrain.train.stop`

    def scaling(self) -> dict[str, Any]:
        """What is recorded of the scale of the loss; nothing where there is none."""
        return {"loss_scale": self.loss_scale, "skipped": self.skipped} if self.scaled else {}


class Trainer:
    """The state that training changes: parameters, optimizer state, running statistics.

    Collective to create, as are `step` and `free`. `schedule` is for the caller to set.
    """

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session = session
        self.parallel = DataParallel(
            session.topology,
            session.device,
            session.layouts.parameters,
            rule_of(config),
            config.parallel.reduction,
            config.parallel.gpu_mpi,
        )
        self.averages = session.averages()
        layout = session.layouts.sums
        self.sums = Store(layout, session.device.zeros(layout.size, layout.dtype))
        session.model.bind(
            self.parallel.parameters, self.averages, self.parallel.gradients, self.sums
        )
        self.schedule = Schedule()
        self.scaling = loss_scale_of(config.run.dtype)
        self._parameters = list(session.model.parameters().values())

    def initialize(self) -> None:
        """Give parameters and statistics their initial values, a function of the seed."""
        model, seed = self.session.model, self.session.config.run.seed
        model.initialize(self.session.device, seed, parameters=False)
        parameters = model.parameters()
        self.parallel.set_parameters(lambda name: parameters[name].initial(seed, name))

    def step(self, batch: Batch, step: int, requests: tuple[float, ...] = ()) -> StepResult:
        """Train on one global batch, of which `batch` is this rank's part (it may be empty).

        `requests`: numbers to add up over all ranks on the way; as many on each.

        Raises `DivergedError` on all ranks when the loss or the gradient is not finite. In float16
        a gradient that may only have been scaled too far leads to a skipped update instead.
        """
        session = self.session
        optimizer = session.config.optimizer
        scale, scaling = self.scaling.scale, self.scaling
        tape = session.tape(batch, step, training=True, loss_scale=scale)
        output = session.model(tape, session.task.inputs(session.device, batch))
        losses, sums = session.task.loss(tape, output, batch)
        tape.backward(losses)
        tape.finish(self._parameters)

        totals = self._totals([sums.loss, sums.weight, sums.correct, *requests])
        asked = 3 + len(requests)
        loss, weight, correct = totals[:3].tolist()
        mean = loss / weight if weight else 0.0
        if not math.isfinite(mean):
            raise DivergedError(f"step {step}: the loss is {mean}; {ADVICE}")
        lr = self.schedule.rate(optimizer.lr, step)
        updates = step - scaling.skipped
        norm = self.parallel.update(updates, lr, weight * scale, optimizer.clip_norm)
        if math.isfinite(norm):
            scaling.keep()
        elif not scaling.skip():
            raise DivergedError(f"step {step}: the gradient's norm is {norm}; {ADVICE}")
        self._update_averages(totals[asked:])
        accuracy = correct / weight if session.task.classes and weight else math.nan
        agreed = tuple(totals[3:asked].tolist())
        samples, skipped = batch.global_samples, not math.isfinite(norm)
        dynamic = scaling.dynamic
        return StepResult(
            mean, accuracy, lr, norm, samples, scale, skipped, dynamic, requests=agreed
        )

    def _totals(self, numbers: list[float]) -> np.ndarray:
        """`numbers` and the sums of the statistics, over all ranks, in one message of float64."""
        statistics = self.session.device.to_host(self.sums.array)
        totals = np.concatenate([numbers, statistics]).astype(np.float64)
        self.session.all_reduce(totals)
        return totals

    def _update_averages(self, sums: np.ndarray) -> None:
        device, layout = self.session.device, self.sums.layout
        if not len(layout):
            return
        device.copy(self.sums.array, device.from_host(sums.astype(layout.dtype)))
        for name, statistic in self.session.model.statistics().items():
            n = statistic.value.size
            weight = float(sums[layout.locate(name).offset + n])  # see `Statistic.sum`
            if weight:
                device.launch(
                    "average_update", statistic.value, statistic.sum, weight, statistic.momentum,
                    n, work=n,
                )  # fmt: skip

    def free(self) -> None:
        """Give shared memory back."""
        self.parallel.free()


def schedule_of(config: RunConfig, total_steps: int) -> Schedule:
    """The schedule of a run file's [schedule]."""
    section = config.schedule
    return Schedule(
        section.name,
        total_steps,
        section.warmup_steps,
        section.final,
        section.milestones,
        section.factor,
    )


ADVICE = (
    "nothing was updated in this step; lower optimizer.lr, set optimizer.clip_norm or "
    "schedule.warmup_steps, or look for bad samples, and resume from the last checkpoint"
)
