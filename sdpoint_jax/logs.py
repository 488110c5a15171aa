"""The metrics of a run: `metrics.jsonl`, a row per logged step or validation, and TensorBoard event files."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"


class RunLog:
    """Writes both. Rows have no times in them: a resumed run's file equals that of an uninterrupted one."""

    def __init__(self, workdir: pathlib.Path, start_step: int):
        """Drops what was logged at `start_step` and later, by a run that was cut off after its checkpoint."""
        path = workdir / METRICS
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < start_step]
        replacement = path.with_suffix(".writing")
        replacement.write_text("".join(kept))
        replacement.rename(path)
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step or None)

    def step(self, step: int, row: Mapping[str, Any], images_per_second: float) -> None:
        """Logs training step `step`; the rate goes to TensorBoard alone."""
        self._write({"step": step, **row})
        for name, value in row.items():
            if isinstance(value, float):
                self._events.add_scalar(f"train/{name}", value, step)
        self._events.add_scalar("train/images_per_second", images_per_second, step)

    def validation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs metrics by instance name, measured after step `step`."""
        self._write({"step": step, "validation": results})
        for instance, metrics in results.items():
            for name in ("loss", "top1"):
                self._events.add_scalar(f"validation_{name}/{instance}", metrics[name], step)

    def flush(self) -> None:
        """Hands everything to the operating system: before a checkpoint, which must not be ahead of its log."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _write(self, row):
        self._file.write(json.dumps(row) + "\n")


class NoLog:
    """The log of a host that is not the main one."""

    def step(self, *_):
        """Writes nothing, as all else."""

    validation = flush = close = step


def _whole_lines(path):
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
