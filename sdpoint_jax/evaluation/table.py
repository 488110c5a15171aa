"""The table of a sweep: for a terminal, as CSV and as JSON."""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Sequence

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.storage import files
from sdpoint_jax.storage.artefact import InstanceRow, SweepSettings

TABLE = "sweep.json"


def pareto_front(rows: Sequence[InstanceRow]) -> list[InstanceRow]:
    """Returns the rows that no other one beats in both MACs and top-1, from the cheapest on."""
    front = []
    for row in sorted(rows, key=lambda row: (row.macs, -row.top1)):
        if not front or row.top1 > front[-1].top1:
            front.append(row)
    return front


def format_table(rows: Sequence[InstanceRow]) -> str:
    """Formats the table for a terminal; a star marks the Pareto front."""
    front = {row.instance for row in pareto_front(rows)}
    full_cost = max(row.macs for row in rows)
    lines = [f"  {'instance':<12} {'MACs':>9} {'cost':>6} {'top-1':>8} {'top-5':>8} {'loss':>7} {'n':>7}"]
    for row in rows:
        top5 = "-" if row.top5 is None else f"{100 * row.top5:.2f} %"
        lines.append(
            f"{'*' if row.instance in front else ' '} {row.name:<12} {format_macs(row.macs):>9} "
            f"{100 * row.macs / full_cost:>4.0f} % {100 * row.top1:>6.2f} % {top5:>8} {row.loss:>7.4f} {row.n:>7}"
        )
    return "\n".join([*lines, "* on the Pareto front: no other instance is both cheaper and more accurate"])


def format_macs(macs: float) -> str:
    """Formats MACs with three digits and a unit, as 4.09 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:g}"


def write_json(
    path: pathlib.Path, settings: SweepSettings, rows: Sequence[InstanceRow], baseline: InstanceRow | None
) -> None:
    """Writes the table, how it was measured, and the row of the baseline if there is one."""
    records = {"instances": [row.to_record() for row in rows], "baseline": baseline and baseline.to_record()}
    files.write_atomically(path, json.dumps(dataclasses.asdict(settings) | records, indent=1) + "\n")


def write_csv(path: pathlib.Path, rows: Sequence[InstanceRow]) -> None:
    """Writes the table, a line per instance."""
    records = [row.to_record() for row in rows]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, records[0].keys())
    table.writeheader()
    table.writerows(records)
    files.write_atomically(path, text.getvalue())


def read_baseline(workdir: str | os.PathLike) -> InstanceRow:
    """Reads the full-resolution row of the sweep of another run, trained without SDPoint.

    Raises:
        ValueError: that run has not been swept, or its table is damaged.
    """
    path = pathlib.Path(workdir) / "sweep" / TABLE
    if not path.is_file():
        raise ValueError(f"baseline {workdir}: no {path}; first run: python evaluate.py --workdir={workdir}")
    try:
        rows = [InstanceRow.from_record(record) for record in json.loads(path.read_bytes())["instances"]]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"baseline {workdir}: {path} is not the table of a sweep: {error}") from None
    found = [row for row in rows if row.instance == FULL_RESOLUTION]
    if not found:
        raise ValueError(f"baseline {workdir}: full resolution was not swept")
    return found[0]
