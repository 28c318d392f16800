"""docs/sim.md: its Python runs, its settings exist. Its table: test_device_sim_mpi.py."""

import re
import shlex
import subprocess
import sys

from launching import ROOT, environment

from hpctrain.config import resolve
from hpctrain.device.sim import machine

PAGE = (ROOT / "docs" / "sim.md").read_text(encoding="utf-8")


def test_the_program_runs(tmp_path):
    [program] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_variables_and_their_values_exist():
    named = set(re.findall(r"HPCTRAIN_SIM_\w+", PAGE))
    assert named == {machine.ORDER, machine.KERNEL_TARGET, machine.DEVICES}
    for kernels in machine.KERNELS:
        assert f"| `{kernels}`" in PAGE
        machine.Machine("late", kernels, 1)
    for order in ("late", "early", "7"):
        machine.Machine(order)


def test_commands_and_paths_exist():
    [commands] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in commands.splitlines():
        words = shlex.split(line)
        [file] = [word for word in words if word.endswith(".toml")]
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        assert resolve(ROOT / file, settings).config.run.device == "sim"
    for path in re.findall(r"`((?:hpctrain|tests|jobs)/[\w./-]+)`", PAGE):
        assert (ROOT / path).exists(), path
