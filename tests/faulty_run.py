"""A training run in which one thing goes wrong, for test_train_faults.py.

    mpirun -n 2 python tests/faulty_run.py KIND RANK AT train RUN.toml ...

KIND goes wrong on RANK: "kill", "stop", "nan", "file limit" at step AT of the run, "kill in save"
and "full disk" in the AT-th write of a checkpoint's data; "none" does not.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys

from hpctrain.cli.main import main


def rank_here() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or 0)


def in_step(at, do):
    """Call `do(batch)` before step `at` of the run."""
    from hpctrain.train.step import Trainer

    step = Trainer.step

    def faulty(self, batch, number, *args):
        if number == at:
            do(self, batch)
        return step(self, batch, number, *args)

    Trainer.step = faulty


def in_write(at, do):
    """Call `do` in the `at`-th write of this process to a checkpoint."""
    pwrite, left = os.pwrite, at

    def faulty(descriptor, data, offset):
        nonlocal left
        left -= 1
        if left == 0:
            pwrite(descriptor, data[: len(data) // 2], offset)
            do()
        return pwrite(descriptor, data, offset)

    os.pwrite = faulty


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still(*_):
    os.kill(os.getpid(), signal.SIGSTOP)


def spoil(trainer, batch):
    """The first sample of this rank's first microbatch has a NaN."""
    kind = type(trainer.session.task)
    loss = kind.loss

    def spoiled(self, tape, output, batch):
        output.value[:1] = float("nan")
        return loss(self, tape, output, batch)

    kind.loss = spoiled


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limited(*_):
    """From now on this process cannot write a file of more than 64 bytes (but to its log)."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))


def plant(kind, at):
    if kind in ("kill", "stop", "nan", "file limit"):
        in_step(at, {"kill": die, "stop": stand_still, "nan": spoil, "file limit": limited}[kind])
    elif kind == "kill in save":
        in_write(at, die)
    elif kind == "full disk":
        in_write(at, full)


if __name__ == "__main__":
    kind, rank, at, *arguments = sys.argv[1:]
    if rank_here() == int(rank):
        plant(kind, int(at))
    sys.exit(main(arguments))
