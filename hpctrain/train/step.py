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

from hpctrain.autograd import Variable
from hpctrain.collectives import cost_choice
from hpctrain.collectives.across import Dense
from hpctrain.collectives.interpreter import node_list
from hpctrain.collectives.network import load_network
from hpctrain.data import Batch
from hpctrain.errors import DivergedError
from hpctrain.mpi.agree import on_first_rank
from hpctrain.nn.layout import Store
from hpctrain.optim import Schedule
from hpctrain.parallel.buckets import bucket_ranges, suited_bytes
from hpctrain.parallel.data import DataParallel
from hpctrain.sections import RunConfig
from hpctrain.train.compressing import compression_of, facts_of, rule_beside
from hpctrain.train.scaling import loss_scale_of
from hpctrain.train.session import Session
from hpctrain.train.task import Sums

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
    checkpoint holds is as the step before has left it.
    """

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session = session
        self.compression = compression_of(config, session)
        self.parallel = DataParallel(
            session.topology,
            session.device,
            session.layouts.parameters,
            rule_beside(self.compression, session),
            config.parallel.reduction,
            config.parallel.gpu_mpi,
            bucket_ranges(session.layouts.parameters, bucket_bytes(session)),
            self.compression or Dense(config.parallel.wire),
            config.parallel.overlap,
        )
        self.averages = session.averages()
        layout = session.layouts.sums
        self.sums = Store(layout, session.device.zeros(layout.size, layout.dtype))
        session.model.bind(
            self.parallel.parameters, self.averages, self.parallel.gradients, self.sums
        )
        self.schedule = Schedule()
        self.scaling = loss_scale_of(config.run.dtype)
        self.before_backward: Callable[[], None] = lambda: None
        self.held_back: Any = None  # a residual of before, for the next gradient; on rank 0
        self._parameters = session.model.parameters()
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
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
        totals = self._totals([sums.loss, sums.weight, sums.correct, *requests])
        asked = 3 + len(requests)
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
        self._update_averages(totals[asked:])
        accuracy = correct / weight if session.task.classes and weight else math.nan
        agreed = tuple(totals[3:asked].tolist())
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

    def _gradient(self, batch: Batch, step: int, scale: float) -> Sums:
        """Forward and backward; what is ready of the gradient may be on its way already."""
        session = self.session
        early = self._ready if self.held_back is None else None  # nothing is added to it later
        tape = session.tape(batch, step, training=True, loss_scale=scale, ready=early)
        output = session.model(tape, session.task.inputs(session.device, batch))
        losses, sums = session.task.loss(tape, output, batch)
        self.before_backward()
        tape.backward(losses)
        tape.finish(self._parameters.values())
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

    def _ready(self, parameter: Variable) -> None:
        """In the backward pass: a parameter's gradient is final."""
        self.parallel.ready(self._names[id(parameter)])

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
        for parameter in self._parameters.values():
            parameter.arrive = None
        self.parallel.free()


def bucket_bytes(session: Session) -> int:
    """Bytes of gradients exchanged together: as the run file says, or what suits.

    Collective over all ranks where the run file names a network.
    """
    parallel, layout = session.config.parallel, session.layouts.parameters
    network = None
    if parallel.network:  # read also where it is not needed: a wrong one is to be seen at once
        network = on_first_rank(session.topology.comm, lambda: load_network(parallel.network))
    nbytes = layout.size * layout.dtype.itemsize
    if parallel.bucket_mib:
        return parallel.bucket_mib << 20
    crosses = session.topology.node_count > 1 or parallel.reduction == "messages"
    if not crosses or session.device.name != "cpu":
        return max(nbytes, 1)
    if network is None:
        return suited_bytes(nbytes)
    nodes, itemsize = node_list(session.topology), layout.dtype.itemsize
    return on_first_rank(
        session.topology.comm,
        lambda: cost_choice.bucket_bytes(nodes, itemsize, network, ("two-level",), nbytes),
    )


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
