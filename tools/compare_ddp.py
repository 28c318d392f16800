#!/usr/bin/env python
"""Training speed of hpctrain beside PyTorch DDP: same networks, batches and precision, one run.

    .venv/bin/python tools/compare_ddp.py                          both networks
    .venv/bin/python tools/compare_ddp.py --model mlp --pairs 21

Two jobs of two ranks with one thread each stand ready: hpctrain under mpirun, PyTorch with gloo.
They do blocks of steps in turn, so that noise of the machine meets both; the figure is the median
of the pairs' ratios. The hpctrain side is the step of `hpctrain train`, on batches read from a
packed data set beforehand; the PyTorch side has its batches normalized in memory, a fused
optimizer, and of two memory formats the quicker. Both start from the same parameters, and their
losses must agree.

PyTorch comes from --torch-python, else from the virtual environment $HPCTRAIN_TORCH_VENV, else from
.venv-torch, which is made with pip where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddp_control import Jobs, serve

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
RANKS = 2
BATCHES = 8  # different ones, in turn
WARM_UP = 2  # blocks
CHECKED = 3  # steps after which the losses are compared
TOLERANCE = 1e-3  # of the losses, relative
MODELS = {  # run file's sections, samples per rank, steps per block, ratio wanted
    "mlp": ('name = "mlp"\nhidden = [2048, 2048]', 256, 12, 1.15),
    "convnet": ('name = "convnet"', 64, 8, 0.8),
}
RUN = """
[data]
path = {path!r}
[model]
{model}
[batch]
size = {size}
microbatch = {microbatch}
[optimizer]
name = "sgd"
lr = 0.01
momentum = 0.9
[run]
dtype = "float32"
device = "cpu"
[parallel]
threads = 1
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--pairs", type=int, default=15, help="blocks of each side (%(default)s)")
    parser.add_argument("--torch-python", help="a Python that has PyTorch")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--profile", type=Path, help="write rank 0's profile of hpctrain (CPU time) here"
    )
    args = parser.parse_args()
    if args.serve:
        serve_hpctrain(Path(args.serve[0]), args.serve[1], args.profile)
        return 0
    torch_python = find_torch(args.torch_python)
    found = [compare(name, args, torch_python) for name in args.model or MODELS]
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["ratio"] >= row["wanted"] for row in found) else 1


def find_torch(named: str | None) -> str:
    """A Python with PyTorch, made where it is missing."""
    if named:
        return named
    venv = Path(os.environ.get("HPCTRAIN_TORCH_VENV") or ROOT / ".venv-torch")
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"making {venv} with {TORCH}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", TORCH, "numpy"], check=True)
    return str(python)


def compare(name: str, args: argparse.Namespace, torch_python: str) -> dict[str, Any]:
    """Run both sides in turn and print the figures."""
    _, samples, steps, wanted = MODELS[name]
    with tempfile.TemporaryDirectory(prefix="compare-ddp-") as place:
        folder = Path(place)
        pack(name, folder)
        jobs = Jobs(folder)
        with hpctrain_job(folder, name, args) as ours:
            jobs.wait_for("hpctrain", RANKS, lambda: ours.poll() is None)
            with torch_job(folder, name, torch_python) as theirs:
                jobs.wait_for("torch", RANKS, lambda: all(t.poll() is None for t in theirs))
                losses = {side: jobs.steps(side, CHECKED)[1] for side in ("hpctrain", "torch")}
                pairs = measure(jobs, args.pairs, steps)
                jobs.end()
    return report(name, samples * RANKS * steps, wanted, pairs, losses, jobs.descriptions)


def measure(jobs: Jobs, pairs: int, steps: int) -> list[dict[str, float]]:
    """Seconds of both sides in every pair of blocks; each side is first in every other one."""
    found = []
    for pair in range(WARM_UP + pairs):
        sides = ("hpctrain", "torch") if pair % 2 else ("torch", "hpctrain")
        seconds = {side: jobs.steps(side, steps)[0] for side in sides}
        if pair >= WARM_UP:
            found.append(seconds)
    return found


def report(
    name: str,
    samples: int,
    wanted: float,
    pairs: list[dict[str, float]],
    losses: dict[str, float],
    descriptions: dict[str, str],
) -> dict[str, Any]:
    """Print and return the figures; an error where the losses differ."""
    ours, theirs = losses["hpctrain"], losses["torch"]
    if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
        raise SystemExit(
            f"{name}: after {CHECKED} steps hpctrain's loss is {ours} and PyTorch's {theirs}: "
            "these are not the same networks"
        )
    rates = {side: samples / statistics.median(p[side] for p in pairs) for side in pairs[0]}
    ratios = sorted(pair["torch"] / pair["hpctrain"] for pair in pairs)
    ratio = statistics.median(ratios)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    for side, rate in rates.items():
        print(f"{name:8} {side:9} {rate:9.0f} samples/s   {descriptions[side]}")
    print(
        f"{name:8} ratio     {ratio:9.2f} (quartiles {low:.2f}, {high:.2f} of {len(pairs)} pairs; "
        f"wanted {wanted}); loss after {CHECKED} steps {ours:.5f} and {theirs:.5f}; {machine()}",
        flush=True,
    )
    return {
        "model": name,
        "ratio": ratio,
        "quartiles": [low, high],
        "wanted": wanted,
        "pairs": pairs,
        "samples_per_second": rates,
        "losses": losses,
        "sides": descriptions,
        "machine": machine(),
    }


def machine() -> str:
    """The CPU and its cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "?")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {socket.gethostname()}"


def pack(name: str, folder: Path) -> None:
    """A data set of random images, and the run file."""
    import numpy as np

    from hpctrain.data import pack as pack_arrays

    model, samples, _, _ = MODELS[name]
    n = BATCHES * RANKS * samples
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n, 28, 28), np.uint8)
    labels = rng.integers(0, 10, n, np.int64)
    labels[:10] = np.arange(10)
    pack_arrays({"image": images, "label": labels}, folder / "data")
    text = RUN.format(
        path=str(folder / "data"), model=model, size=RANKS * samples, microbatch=samples
    )
    (folder / "run.toml").write_text(text, encoding="utf-8")


@contextmanager
def hpctrain_job(
    folder: Path, name: str, args: argparse.Namespace
) -> Iterator[subprocess.Popen[bytes]]:
    """This script under mpirun, on the settings of tools/env.sh."""
    beside = Path(sys.executable).parent / "mpirun"
    command = [str(beside if beside.exists() else "mpirun"), "-n", str(RANKS), sys.executable]
    command += [__file__, "--serve", str(folder), name]
    if args.profile:
        command += ["--profile", str(args.profile)]
    shell = ["bash", "-c", 'source tools/env.sh && exec "$@"', "bash"]
    with subprocess.Popen([*shell, *command], cwd=ROOT, env=environment()) as job:
        try:
            yield job
        except BaseException:
            job.terminate()
            raise


@contextmanager
def torch_job(folder: Path, name: str, python: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process per rank of the PyTorch side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, str(ROOT / "tools/ddp_torch.py"), str(folder), name]
    jobs = [
        subprocess.Popen([*command, str(rank), str(RANKS), str(port)], env=environment())
        for rank in range(RANKS)
    ]
    try:
        yield jobs
        for job in jobs:
            job.wait()
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def environment() -> dict[str, str]:
    """One thread for everything on both sides, and this checkout's package."""
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return os.environ | threads | {"PYTHONPATH": str(ROOT)}


def serve_hpctrain(folder: Path, name: str, profile: Path | None) -> None:
    """A rank of the hpctrain side: `Trainer.step`, as in `hpctrain train`."""
    import cProfile
    import itertools
    import time

    import hpctrain
    from hpctrain.config import resolve
    from hpctrain.device import open_device
    from hpctrain.mpi.start import start
    from hpctrain.train.session import open_session
    from hpctrain.train.step import Trainer

    comm = start()
    config = resolve(folder / "run.toml", environment={}).config
    with open_session(config, open_device("cpu"), comm) as session:
        loader = session.loader("train")
        trainer = Trainer(session)  # with a constant learning rate
        trainer.initialize()
        batches = list(loader.epoch(0, 0))
        write_for_torch(folder, session, trainer, batches)
        comm.Barrier()
        turns = itertools.count()
        profiler = cProfile.Profile(time.thread_time) if profile and comm.rank == 0 else None

        def steps(count: int) -> float:
            if profiler:
                profiler.enable()
            for _ in range(count):
                step = next(turns)
                result = trainer.step(batches[step % len(batches)], step)
            if profiler:
                profiler.disable()
            return result.loss

        text = f"hpctrain {hpctrain.__version__}, gradients by {trainer.parallel.slices.mode}"
        serve(folder, "hpctrain", comm.rank, text, steps, comm.Barrier)
        if profiler:
            profiler.dump_stats(profile)
        loader.close()
        trainer.free()


def write_for_torch(folder: Path, session: Any, trainer: Any, batches: list[Any]) -> None:
    """This rank's batches as the network sees them, and on rank 0 the initial parameters."""
    import numpy as np

    device, task, rank = session.device, session.task, session.comm.rank
    inputs = [device.to_host(task.inputs(device, batch).value) for batch in batches]
    labels = [batch.fields["label"].reshape(-1) for batch in batches]
    np.savez(folder / f"batches-{rank}.npz", inputs=np.stack(inputs), labels=np.stack(labels))
    if rank == 0:
        optimizer = session.config.optimizer
        np.savez(folder / "batches.npz", lr=optimizer.lr, momentum=optimizer.momentum)
        parameters = session.model.parameters()
        np.savez(
            folder / "parameters.npz",
            **{name: device.to_host(p.value) for name, p in parameters.items()},
        )


if __name__ == "__main__":
    sys.exit(main())
