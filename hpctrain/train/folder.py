"""The run directory: what a run leaves behind, written by rank 0.

    run.toml         the resolved run file
    metrics.jsonl    one JSON object per line: a header per start, steps, evaluations
    STATUS.json      running, finished, resubmit (a batch job is to go on), stopped or failed
    DONE             the run is finished; see `hpctrain.train.stop` for this and STOP and SAVE
    checkpoints/     see `hpctrain.checkpoint`
    tensorboard/     see `hpctrain.train.tensorboard`; only where log.tensorboard says so

Layer: train. Knows nothing of networks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hpctrain.errors import HpctrainError, UsageError
from hpctrain.sections import RunConfig
from hpctrain.train.stop import mark_done
from hpctrain.train.tensorboard import EventFiles

__all__ = ["RunFolder"]

FLUSH_EVERY = 1.0  # seconds


class RunFolder:
    """A run's folder. Only rank 0 (`writes`) touches files; on other ranks all calls do nothing.

    `events`: also write event files for TensorBoard.
    """

    def __init__(self, path: str | Path, writes: bool, events: bool = False) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._writes = writes
        self._metrics: IO[str] | None = None
        self._flushed = 0.0
        self.before: dict[str, Any] = {}  # what a resumed run found, for its record `start`
        self._events = EventFiles(self.path) if writes and events else None

    def holds_a_run(self) -> bool:
        """Whether a run was started here before."""
        return (self.path / "metrics.jsonl").exists()

    def open(self, run_toml: str, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready. Raises `UsageError` where it holds a run already."""
        if not self._writes:
            return
        if self.holds_a_run() and not resume:
            if not overwrite:
                raise UsageError(
                    f"{self.path} holds a run already; go on with it (--resume auto), start anew "
                    "(--overwrite), or name another folder (--set run.folder=PATH)"
                )
            (self.path / "metrics.jsonl").unlink()
            (self.path / "DONE").unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            for old in ("timeline", "tensorboard"):
                shutil.rmtree(self.path / old, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_whole(self.path / "run.toml", run_toml)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps from `step` on, which a resumed run is about to do again.

        What they were is added up in `before`.
        """
        if self._metrics is None:
            return
        self._metrics.close()
        path = self.path / "metrics.jsonl"
        kept, again, seconds, last = [], 0, 0.0, 0.0
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed run did not finish
                continue
            last = max(last, record.get("time", 0.0))
            if record.get("step", -1) < step or record["kind"] == "start":
                kept.append(line)
            elif record["kind"] == "step":
                again += 1
                seconds += record.get("step_seconds", 0.0) + record.get("data_seconds", 0.0)
        if last:
            self.before = {"again": again, "again_seconds": round(seconds, 6), "last_time": last}
        _write_whole(path, "".join(kept))
        self._metrics = path.open("a", encoding="utf-8")

    def holds(self, kind: str, step: int) -> bool:
        """Whether metrics.jsonl has a record of this kind and step; False where not `writes`."""
        if self._metrics is None:
            return False
        self._metrics.flush()
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        records = map(json.loads, text.splitlines())
        return any(record["kind"] == kind and record.get("step") == step for record in records)

    def record(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl; a killed run loses those of its last second."""
        if self._metrics is not None:
            with writing(self.path / "metrics.jsonl"):
                self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
                if time.monotonic() - self._flushed > FLUSH_EVERY:
                    self._metrics.flush()
                    self._flushed = time.monotonic()
        if self._events is not None:
            if kind == "start":
                self._events.begin(values["step"])
            self._events.write(kind, values)

    def flush(self) -> None:
        """Hand the metrics to the system."""
        if self._metrics is not None:
            with writing(self.path / "metrics.jsonl"):
                self._metrics.flush()
        if self._events is not None:
            self._events.flush()

    def sync(self) -> None:
        """Put on the disk what was handed to the system; a thread may do it."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def status(self, state: str, **values: Any) -> None:
        """Write STATUS.json; the states are listed above."""
        if self._writes and self.path.is_dir():
            text = json.dumps({"state": state, "time": time.time(), **values}, indent=1)
            _write_whole(self.path / "STATUS.json", text + "\n")

    def mark_done(self, config: RunConfig, step: int) -> None:
        """Write DONE."""
        if self._writes:
            with writing(self.path / "DONE"):
                mark_done(self.path, config, step)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._events is not None:
            self._events.close()
        if self._metrics is None:
            return
        if error is None:
            with writing(self.path / "metrics.jsonl"):
                self._metrics.close()
            return
        with contextlib.suppress(OSError):  # it may be what has failed, and is told of already
            self._metrics.close()
        with contextlib.suppress(HpctrainError):
            self.status("failed", error=f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `HpctrainError` that names `path` and the way out where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise HpctrainError(
            f"{path} cannot be written: {error.strerror or error}; make room (or see to the file "
            "system), and go on with --resume auto: complete checkpoints stay as they are"
        ) from error


def _write_whole(path: Path, text: str) -> None:
    """Write aside and rename: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
