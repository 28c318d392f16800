"""One training step: forward, backward, reduce, update.

Layer: train. Everything a step needs from other ranks passes through here: one small all-reduce of
sums, and `DataParallel.update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.collectives.across import Dense
from hpctrain.data import Batch
from hpctrain.errors import DivergedError
from hpctrain.nn.layout import Store
from hpctrain.optim import Schedule
from hpctrain.parallel.buckets import bucket_ranges
from hpctrain.parallel.data import DataParallel
from hpctrain.sections import RunConfig
from hpctrain.train.compressing import compression_of, facts_of, rule_beside
from hpctrain.train.crossing import algorithms, bucket_bytes, network_of
from hpctrain.train.passes import Passes
from hpctrain.train.scaling import loss_scale_of
from hpctrain.train.session import Session

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
    between: dict[str, Any] = field(default_factory=dict)  # of compression between nodes

    def scaling(self) -> dict[str, Any]:
        """What is recorded of the scale of the loss; nothing where there is none."""
        return {"loss_scale": self.loss_scale, "skipped": self.skipped} if self.scaled else {}


class Trainer:
    """The state that training changes: parameters, optimizer state, running statistics.

    Collective to create, as are `step` and `free`. `schedule` is for the caller to set, and
    `before_backward`: called in every step before the first gradient; until then all that a
    checkpoint holds is as the step before has left it. `picks`: for each bucket the algorithm that
    carries it between nodes; empty where none is chosen.
    """

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session = session
        network = network_of(session)
        self.compression = compression_of(config, session, network)
        buckets = bucket_ranges(session.layouts.parameters, bucket_bytes(session, network))
        self.picks = {} if self.compression else algorithms(session, buckets, network)
        dense = Dense(
            config.parallel.wire, {bucket: found.algorithm for bucket, found in self.picks.items()}
        )
        self.parallel = DataParallel(
            session.topology,
            session.device,
            session.layouts.parameters,
            rule_beside(self.compression, session),
            config.parallel.reduction,
            config.parallel.gpu_mpi,
            buckets,
            self.compression or dense,
            config.parallel.overlap,
        )
        self.averages = session.averages()
        layout = session.layouts.sums
        self.sums = Store(layout, session.device.zeros(layout.size, layout.dtype))
        session.model.bind(
            self.parallel.parameters, self.averages, self.parallel.gradients, self.sums
        )
        self.passes = Passes(session, self.parallel.gradients, self.sums)
        self.schedule = Schedule()
        self.scaling = loss_scale_of(config.run.dtype)
        self.before_backward: Callable[[], None] = lambda: None
        self.held_back: Any = None  # a residual of before, for the next gradient; on rank 0
        self._parameters = session.model.parameters()
        for name, parameter in self._parameters.items():
            parameter.arrive = partial(self.parallel.arrive, name)

    def initialize(self) -> None:
        """Give parameters and statistics their initial values, a function of the seed."""
        seed, parameters = self.session.config.run.seed, self._parameters
        self.session.model.initialize(self.session.device, seed, parameters=False)
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
        sums = self._gradient(batch, step, scale)
        totals = np.concatenate([sums, requests])
        session.all_reduce(totals)
        loss, weight, correct = totals[:3].tolist()
        mean = loss / weight if weight else 0.0
        if not math.isfinite(mean):
            self.parallel.abandon()
            raise DivergedError(f"step {step}: the loss is {mean}; {ADVICE}")
        lr = self.schedule.rate(optimizer.lr, step)
        updates = step - scaling.skipped
        norm = self.parallel.update(updates, lr, weight * scale, optimizer.clip_norm)
        if math.isfinite(norm):
            scaling.keep()
        elif self.compression is not None:
            self.compression.undo()
        if not math.isfinite(norm) and not scaling.skip():
            raise DivergedError(f"step {step}: the gradient's norm is {norm}; {ADVICE}")
        self._update_averages(totals[3 : len(sums)])
        accuracy = correct / weight if session.task.classes and weight else math.nan
        agreed = tuple(totals[len(sums) :].tolist())
        samples, skipped = batch.global_samples, not math.isfinite(norm)
        return StepResult(
            mean,
            accuracy,
            lr,
            norm,
            samples,
            scale,
            skipped,
            scaling.dynamic,
            agreed,
            facts_of(self.compression, session),
        )

    def _gradient(self, batch: Batch, step: int, scale: float) -> NDArray[np.float64]:
        """Forward and backward; what is ready of the gradient may be on its way already."""
        early = self.parallel.ready if self.held_back is None else None  # it is added to below
        sums = self.passes.run(batch, step, scale, early, self.before_backward)
        self._add_held_back()
        return sums

    def _add_held_back(self) -> None:
        """Give back what a checkpoint's residuals hold, where nothing is compressed any more."""
        if self.held_back is None:
            return
        device, gradients = self.session.device, self.parallel.gradients.array
        n, part = gradients.shape[0], self.held_back.astype(gradients.dtype)
        device.launch("add_into", gradients, device.from_host(part), n, work=n)
        self.held_back = None

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
        for parameter in self._parameters.values():
            parameter.arrive = None
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
