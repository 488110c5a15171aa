"""The metrics of a run: `metrics.jsonl`, a row per logged step or validation, and TensorBoard event files."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from sdpoint_jax import progress
from sdpoint_jax.storage import files


@contextlib.contextmanager
def _hidden(name):
    """Lets an import of the package `name` fail, in this context, unless it was imported before."""
    was_there = name in sys.modules
    sys.modules.setdefault(name, None)
    yield
    if not was_there:
        del sys.modules[name]


with _hidden("torch"):  # The library takes it along if it is there, for seconds and nothing that is used here.
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter writes in a thread: errors are lost.
    from tensorboardX.proto.event_pb2 import Event, SessionLog

METRICS = "metrics.jsonl"


class RunLog:
    """Writes both. Rows have no times in them: a resumed run's file equals that of an uninterrupted one."""

    def __init__(self, workdir: pathlib.Path, start_step: int, *, validated: bool = True, on_error: str = "error"):
        """Drops what a run that was cut off after its checkpoint has logged since.

        Args:
            workdir: of the run.
            start_step: of the checkpoint; dropped is what was logged at that step and later.
            validated: whether a validation due after the step before it is done; if not, its row is dropped too.
            on_error: `continue` to go on without logging where that fails, after saying so.

        Raises:
            OSError: from here and all methods, unless `on_error` is `continue`; names the workdir.
            ValueError: the file that is there is no such log.
        """
        self._workdir, self._on_error, self._failed = workdir, on_error, False
        self._file = self._events = None
        self._attempt(self._open, start_step, validated)

    def step(self, step: int, row: Mapping[str, Any], images_per_second: float) -> None:
        """Logs training step `step`; the rate goes to TensorBoard alone.

        Args:
            step: its number.
            row: metrics by name; below `instances`, if there, those of each instance by its name.
            images_per_second: the rate.
        """
        scalars = {f"train/{name}": value for name, value in row.items() if isinstance(value, float)}
        scalars |= {
            f"train_{name}/{instance}": value
            for instance, metrics in row.get("instances", {}).items()
            for name, value in metrics.items()
        }
        rate = {"train/images_per_second": images_per_second}
        self._attempt(self._write, step, {"step": step, **row}, scalars | rate)

    def validation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs metrics by instance name, measured after step `step`."""
        scalars = {
            f"validation_{name}/{instance}": metrics[name]
            for instance, metrics in results.items()
            for name in ("loss", "top1")
        }
        self._attempt(self._write, step, {"step": step, "validation": results}, scalars)

    def flush(self) -> None:
        """Puts everything on the disk: before a checkpoint, which must not be ahead of its log."""
        self._attempt(self._flush)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file:
            self._attempt(self._flush)
        self._close()

    def _attempt(self, write, *args):
        if self._failed:
            return
        try:
            write(*args)
        except OSError as error:
            self._failed = True
            self._close()
            message = f"{self._workdir}: cannot write the log: {error.strerror or error}"
            if self._on_error != "continue":
                raise OSError(f"{message} (config.on_log_error=continue trains on without)") from error
            progress.say(f"{message}; training goes on without it")

    def _open(self, start_step, validated):
        path = self._workdir / METRICS
        rows = _whole_rows(path)
        kept = [line for line, row in rows if _is_before(row, start_step, validated)]
        files.write_atomically(path, b"".join(kept))
        self._file = path.open("a")
        (self._workdir / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(self._workdir / "tensorboard" / "events"))
        if start_step:  # TensorBoard then drops what it has read of this step and later ones.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=start_step, session_log=start))

    def _write(self, step, row, scalars):
        self._file.write(json.dumps(row) + "\n")
        for name, value in scalars.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))

    def _flush(self):
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def _close(self):
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):
                if file:
                    file.close()
        self._file = self._events = None


class NoLog:
    """The log of a host that is not the main one."""

    def step(self, *_: Any) -> None:
        """Writes nothing, as all else."""

    validation = flush = close = step


def _is_before(row, start_step, validated):
    return row["step"] < start_step - (not validated and "validation" in row)


def _whole_rows(path):
    """Reads (line, row) of each line but a last one that was cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [(line, _row(path, number, line)) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _row(path, number, line):
    try:
        row = json.loads(line)
        if not isinstance(row["step"], int):
            raise TypeError("step is no integer")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: line {number} is no row of a log ({error}); move the file to train on") from None
    return row
