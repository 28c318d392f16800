"""Saves that die at every system call in turn, for test_checkpoint_write.py.

    python tests/dying_saves.py FOLDER

A child process saves a checkpoint and ends, as if by SIGKILL, just before its k-th call that
changes a disk, a write being done by half; for k = 1, 2, ... until the save comes to its end. After
each the parent verifies all checkpoints, loads the newest, and saves another.
Prints the number of calls.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from checkpoint_cases import ALONE, check_alone, save_alone

from hpctrain.checkpoint import latest_valid, verify

CHANGES = ["open", "pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink", "rmdir"]


def die_at(count):
    """Let this process end before its `count`-th call of CHANGES."""
    left = count

    def counted(name, function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if name == "pwrite":
                    descriptor, data, offset = args
                    function(descriptor, data[: len(data) // 2], offset)
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, counted(name, getattr(os, name)))


def dies(folder, step, count):
    """Whether a child that saves `step` dies before the end."""
    child = os.fork()
    if child == 0:
        die_at(count)
        save_alone(folder, step)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


def main(folder):
    for step in (3, 2):  # a new checkpoint, and one that replaces another
        count, died = 0, True
        seen = set()
        while died:
            count += 1
            shutil.rmtree(folder, ignore_errors=True)
            save_alone(folder, 1)
            save_alone(folder, 2)
            died = dies(folder, step, count)
            for path in folder.glob("step_*"):
                verify(path, ALONE)  # whatever has the name of a checkpoint
            path = latest_valid(folder, ALONE)
            found = int(path.name.rpartition("_")[2])
            check_alone(path, found)
            assert found in (2, step), (count, path)
            seen.add(path.name)
            check_alone(save_alone(folder, 4), 4)
            left = sorted(path.name.removeprefix(".replaced-") for path in folder.iterdir())
            assert left == [f"step_{max(2, found):08d}", "step_00000004"], (count, left)
        assert len(seen) == 2, seen  # also the checkpoint that was being replaced, under its name
        print(count - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "checkpoints")
