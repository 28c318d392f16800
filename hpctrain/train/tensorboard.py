"""The numbers of metrics.jsonl as event files too, which TensorBoard shows.

    tensorboard/events.out.tfevents...    in the run folder, one file for each start

Needs `pip install hpctrain[tensorboard]`. It is an extra that cannot hurt: whatever goes wrong, a
missing package or a full disk, costs one warning and the rest of these files, never the run. So the
package's writer is used that writes where it is called: the one with a queue stops the caller for
ever once its own thread has died of an error.

Layer: train. Knows nothing of how a step is done.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["EventFiles"]

LOG = logging.getLogger(__name__)
TAGS = {
    "step": {
        "loss": "loss/train",
        "accuracy": "accuracy/train",
        "lr": "lr",
        "grad_norm": "grad_norm",
        "loss_scale": "loss_scale",
        "step_seconds": "seconds/step",
        "data_seconds": "seconds/data",
        "message_seconds": "seconds/messages",
    },
    "evaluation": {"loss": "loss/test", "accuracy": "accuracy/test"},
    "checkpoint": {"seconds": "seconds/checkpoint", "total_seconds": "seconds/checkpoint_total"},
}


class EventFiles:
    """Event files of one start of a run. No method raises."""

    def __init__(self, folder: Path) -> None:
        """`folder`: the run folder."""
        self._folder = folder / "tensorboard"
        self._writer: Any = None
        self._broken = False

    def begin(self, step: int) -> None:
        """Begin a file. What earlier files hold of `step` and later ones does not count: it is said
        in the file, and TensorBoard leaves it out."""
        self._safely(lambda: self._begin(step))

    def write(self, kind: str, values: Mapping[str, Any]) -> None:
        """The numbers of a record of metrics.jsonl."""
        if self._writer is not None and kind in TAGS:
            self._safely(lambda: self._write(TAGS[kind], values))

    def flush(self) -> None:
        """Hand it to the system."""
        if self._writer is not None:
            self._safely(self._writer.flush)

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._safely(self._writer.close)
        self._writer = None

    def _begin(self, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, which begin with the second of their making.
        self._writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        event = event_pb2.Event(wall_time=time.time(), step=step, session_log=start)
        self._writer.write_event(event)
        self._writer.flush()

    def _write(self, tags: Mapping[str, str], values: Mapping[str, Any]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        numbers = [
            summary_pb2.Summary.Value(tag=tag, simple_value=values[key])
            for key, tag in tags.items()
            if isinstance(values.get(key), int | float) and math.isfinite(values[key])
        ]
        if "samples" in values and values.get("step_seconds"):
            seconds = values["step_seconds"] + values.get("data_seconds", 0.0)
            speed = values["samples"] / seconds
            numbers.append(summary_pb2.Summary.Value(tag="samples_per_second", simple_value=speed))
        summary = summary_pb2.Summary(value=numbers)
        event = event_pb2.Event(wall_time=time.time(), step=values["step"], summary=summary)
        self._writer.write_event(event)

    def _safely(self, do: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            do()
        except Exception as error:  # whatever it is: this is an extra
            self._broken, self._writer = True, None
            hint = ""
            if isinstance(error, ImportError):
                hint = "; install it with: pip install 'hpctrain[tensorboard]'"
            LOG.warning(
                "no more event files for TensorBoard in this start: %s: %s%s",
                type(error).__name__,
                error,
                hint,
            )
