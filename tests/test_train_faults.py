"""Faults drawn at random, one after the other in one run, which reaches its end all the same.

Every start goes on from what the fault before has left, and meets the next one. Each must end in
time, with the documented status and a message that names the cause, and lose at most what came
after the newest complete checkpoint: the one that was due last, or the one before while that was
being written. At the end no step is missing or there
twice, and the losses are those of a run without faults.
"""

from __future__ import annotations

import random
import re
import shutil

import h5py
import numpy as np
import pytest
from checkpoint_cases import memory_folder
from launching import ROOT, mpirun
from training import hpctrain, make_digits, run_file, steps

from hpctrain.train.report import read_run

SCRIPT = str(ROOT / "tests" / "faulty_run.py")
EVERY = 5  # steps between checkpoints
RANKS = 2
SETTINGS = (
    f'[checkpoint]\nevery_steps = {EVERY}\nevery_epochs = 0\nlocal_every_steps = 2\nlocal = "'
)
KINDS = ("kill", "kill in save", "nan", "full disk", "file limit", "corrupt shard", "damage")
SAYS = {
    "kill": (None, ""),  # the launcher's status and words
    "kill in save": (None, ""),
    "damage": (None, "trying the one before it"),  # then killed
    "nan": (3, "the loss is nan"),
    "full disk": (1, "No space left on device"),
    "file limit": (1, ": File too large"),
    "corrupt shard": (1, "data verify"),
    "stop": (124, "no sign of life"),
}


@pytest.fixture
def folder():
    """Where syncing takes no time, however busy the disk is."""
    path = memory_folder()
    yield path
    shutil.rmtree(path)


class Chain:
    """A run that is started again and again, and what must hold after each fault."""

    def __init__(self, folder, seed):
        self.draw = random.Random(seed)
        self.folder, self.run = folder, folder / "run"
        self.data = make_digits(folder / "data")
        more = f'{SETTINGS}{folder / "disks"}"\n[log]\nevaluate_every_epochs = 0\n'
        self.file = run_file(folder / "run.toml", self.data, more=more)
        self.at = 0  # the step that the next start must go on from, at least

    def checkpoints(self):
        """Steps of the checkpoints that there are by name, the newest first."""
        found = [path.name for path in (self.run / "checkpoints").glob("step_*")]
        return sorted((int(name[5:]) for name in found), reverse=True)

    def damage(self):
        """Cut or flip the newest one, as a disk might. Those on the nodes are gone as well."""
        shutil.rmtree(self.folder / "disks", ignore_errors=True)
        newest, *others = self.checkpoints()
        path = (
            self.run
            / f"checkpoints/step_{newest:08d}/{self.draw.choice(['parameters', 'optimizer'])}"
        )
        path = path.with_suffix(".safetensors")
        content = bytearray(path.read_bytes())
        place = self.draw.randrange(len(content))
        if self.draw.random() < 0.5:
            content = content[:place]
        else:
            content[place] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        self.at = others[0]

    def fault(self, kind):
        """Start, meet the fault, and check how it ended."""
        if kind == "damage":
            if len(self.checkpoints()) < 2:
                self.fault("kill")
            self.damage()
        rank = 1 if kind == "file limit" else self.draw.randrange(RANKS)
        step = self.at + 2 * EVERY + self.draw.randint(1, 2 * EVERY)
        planted = {"damage": "kill", "corrupt shard": "none"}.get(kind, kind)
        count = step if planted not in ("kill in save", "full disk") else self.draw.randint(1, 8)
        print(f"{kind!r} on rank {rank} at {count}; the run is at {self.at}")
        shards = self.corrupt() if kind == "corrupt shard" else {}
        done = self.start(planted, rank, count, until=step + 100 * EVERY, hangs=kind == "stop")
        for path, content in shards.items():
            path.write_bytes(content)
        self.check(kind, rank, done)
        if planted in ("kill", "stop", "nan", "file limit"):  # at that step
            due = step // EVERY * EVERY
            saved = [
                each["step"] + 1
                for each in read_run(self.run).checkpoints
                if each["level"] == "shared"
            ]
            # Where the newest was under way, the one before it is complete.
            least = due if due in saved else due - EVERY
            assert max(self.checkpoints(), default=0) >= least, (step, saved)
        self.at = max(self.checkpoints(), default=0)

    def start(self, kind, rank, count, until, hangs=False):
        # Open MPI leaves files of its own behind where a rank is killed.
        environment = {"OMPI_MCA_btl_sm_backing_directory": str(self.folder)}
        command = (SCRIPT, kind, str(rank), str(count), "train", str(self.file), "--resume", "auto")
        command += ("--set", f"run.steps={until}", "--hang-after", "1.5" if hangs else "0")
        return mpirun(RANKS, *command, timeout=120, env=environment)

    def check(self, kind, rank, done):
        status, words = SAYS[kind]
        assert done.returncode not in (0, 75) and "not finished after" not in done.stdout, done
        if status is not None:
            assert done.returncode == status, done.stdout
        assert words in done.stdout, done.stdout
        if kind == "stop":
            assert f"rank {rank} (" in done.stdout, done.stdout
        if self.at:
            found = re.search(r"resuming at step (\d+) of", done.stdout)
            early = ("corrupt shard", "kill in save", "full disk")  # also before it is said
            assert found or kind in early, done.stdout
            assert not found or int(found[1]) >= self.at, done.stdout

    def corrupt(self):
        """Flip a byte of every shard's images; what they were."""
        whole = {path: path.read_bytes() for path in (self.data / "train").iterdir()}
        for path, content in whole.items():
            with h5py.File(path) as file:
                places = file["fields/image"].id
                at = [places.get_chunk_info(i).byte_offset for i in range(places.get_num_chunks())]
            changed = bytearray(content)
            for offset in at:
                changed[offset + self.draw.randrange(64)] ^= 4
            path.write_bytes(changed)
        return whole

    def finish(self):
        """Go on to the end without a fault, and compare."""
        end = self.at + EVERY + 2
        done = self.start("none", 0, 0, until=end)
        assert done.returncode == 0, done.stdout
        assert not list((self.folder / "disks").glob("*"))
        whole = ("--set", f"run.folder={self.folder / 'whole'}", "--set", f"run.steps={end}")
        same = hpctrain(1, "train", self.file, *whole)
        assert same.returncode == 0, same.stdout
        assert len(steps(self.run)) == end
        np.testing.assert_allclose(steps(self.run), steps(self.folder / "whole"), rtol=1e-9)


def test_one_fault_of_each_kind(folder):
    chain = Chain(folder, seed=1)
    for kind in (*(kind for kind in KINDS if kind != "file limit"), "stop"):
        chain.fault(kind)
    chain.finish()


@pytest.mark.slow
def test_sixty_faults_drawn_at_random(folder):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chain = Chain(folder, seed)
    for _ in range(60):
        chain.fault(chain.draw.choice((*KINDS, *KINDS, "stop")))
    chain.finish()
