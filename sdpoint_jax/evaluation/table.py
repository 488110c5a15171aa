"""The table of a sweep: for a terminal, as CSV and as JSON."""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdpoint_jax.choice import pareto
from sdpoint_jax.choice.table import Latency, Setting
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.storage import files
from sdpoint_jax.storage.artefact import InstanceRow, SweepSettings

TABLE = "sweep.json"
PAPER_ONLY = "cheap on paper only: saves less than half as much time as MACs"
LEAST_SAVING = 0.05  # Share of the MACs; less is not worth a mark.


@dataclasses.dataclass(frozen=True)
class Saving:
    """What an instance saves against full resolution, as shares: 0.25 is a quarter; negative where it costs more.

    Attributes:
        macs: of the MACs.
        time: of the median time of a call in one setting; None where it, or that of full resolution, is not measured.
    """

    macs: float
    time: float | None

    @property
    def is_on_paper_only(self) -> bool:
        """Tells whether the instance saves MACs, but less than half as much time."""
        return self.time is not None and self.macs >= LEAST_SAVING and self.time < self.macs / 2


def list_savings(rows: Sequence[InstanceRow], setting: Setting) -> dict[SDPointInstance, Saving]:
    """Computes what each instance saves in a setting, against full resolution; without it, the one of the most MACs."""
    reference, medians = _reference(rows), list_medians(rows, setting)
    full_time = medians.get(reference.instance)
    savings = {}
    for row in rows:
        time = 1 - medians[row.instance] / full_time if full_time and row.instance in medians else None
        savings[row.instance] = Saving(_macs_saved(row, reference), time)
    return savings


def list_medians(rows: Sequence[InstanceRow], setting: Setting) -> dict[SDPointInstance, float]:
    """Lists the median time of a call, in milliseconds, of each instance that was measured in a setting."""
    return {row.instance: measured.p50_ms for row in rows if (measured := row.latency(setting))}


def list_settings(rows: Sequence[InstanceRow], device: str | None = None) -> list[Setting]:
    """Lists the settings that any row was measured in, in order; only those of `device`, if one is named."""
    found = {latency.setting for row in rows for latency in row.latencies}
    return sorted(setting for setting in found if device in (None, setting[0]))


def pareto_front(
    rows: Sequence[InstanceRow], cost: Callable[[InstanceRow], float] = lambda row: row.macs
) -> list[InstanceRow]:
    """Return the rows that no other row beats in both cost, by default MACs, and top-1, from the cheapest on."""
    return pareto.pareto_front(rows, lambda row: row.top1, lambda row: (cost(row),))[::-1]


def format_table(rows: Sequence[InstanceRow], full_macs: int) -> str:
    """Format the table for a terminal; a star marks the Pareto front, and costs are shares of `full_macs`."""
    front = {row.instance for row in pareto_front(rows)}
    lines = [f"  {'instance':<12} {'MACs':>9} {'cost':>6} {'top-1':>8} {'top-5':>8} {'loss':>7} {'n':>7}"]
    for row in rows:
        top5 = "-" if row.top5 is None else f"{100 * row.top5:.2f} %"
        lines.append(
            f"{'*' if row.instance in front else ' '} {row.name:<12} {format_macs(row.macs):>9} "
            f"{100 * row.macs / full_macs:>4.0f} % {100 * row.top1:>6.2f} % {top5:>8} {row.loss:>7.4f} {row.n:>7}"
        )
    return "\n".join([*lines, "* on the Pareto front: no other instance is both cheaper and more accurate"])


def format_latencies(rows: Sequence[InstanceRow], device: str) -> str:
    """Formats the latencies on a device for a terminal: a table for each runtime and dtype, a column per batch size.

    A star marks the Pareto front in latency of a batch size, an exclamation mark what is cheap on paper only.
    """
    settings = list_settings(rows, device)
    lines = [f"latency on {device}: median milliseconds of a batch, and time saved against full resolution"]
    for runtime, dtype in dict.fromkeys(setting[1:3] for setting in settings):
        here = [setting for setting in settings if setting[1:3] == (runtime, dtype)]
        measured = [row for row in rows if any(map(row.latency, here))]
        names = "".join(f" | {f'batch {size}':>10} {'saved':>6}   " for *_, size in here)
        lines.append(f"{f'{runtime}, {dtype}':<20} {'top-1':>8} {'MACs saved':>10}{names}".rstrip())
        columns = [_format_column(rows, measured, setting) for setting in here]
        reference = _reference(rows)
        for row, *cells in zip(measured, *columns):
            macs = f"{round(100 * _macs_saved(row, reference))} %"
            lines.append(f"{row.name:<20} {100 * row.top1:>6.2f} % {macs:>10}{''.join(cells)}".rstrip())
    marks = ["* no other instance is both faster and more accurate at this batch size", f"! {PAPER_ONLY}"]
    return "\n".join([*lines, *marks])


def _format_column(rows, measured, setting):
    """Formats the latencies in one setting, a cell for each row of `measured`."""
    savings, medians = list_savings(rows, setting), list_medians(rows, setting)
    front = pareto_front([row for row in rows if row.instance in medians], lambda row: medians[row.instance])
    cells = []
    for row in measured:
        median, saving = medians.get(row.instance), savings[row.instance]
        p50 = "-" if median is None else f"{median:#.4g}"
        saved = "-" if saving.time is None else f"{round(100 * saving.time)} %"
        marks = ("*" if row in front else " ") + ("!" if saving.is_on_paper_only else " ")
        cells.append(f" | {p50:>10} {saved:>6} {marks}")
    return cells


def format_macs(macs: float) -> str:
    """Formats MACs with three digits and a unit, as 4.09 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:g}"


def write_json(
    path: pathlib.Path, settings: SweepSettings, rows: Sequence[InstanceRow], baseline: InstanceRow | None
) -> None:
    """Writes the table, how it was measured, and the row of the baseline if there is one.

    Each instance has `macs_saved_percent`, each of its latencies `images_per_second`, `time_saved_percent` (against
    full resolution, null where that was not measured) and `on_paper_only`; see `Saving`.
    """
    records = {"instances": _json_records(rows), "baseline": baseline and baseline.to_record()}
    files.write_atomically(path, json.dumps(dataclasses.asdict(settings) | records, indent=1) + "\n")


def write_csv(path: pathlib.Path, rows: Sequence[InstanceRow]) -> None:
    """Writes the table, a line per instance.

    The columns of a latency begin with what it was measured in: `DEVICE | RUNTIME | DTYPE | batch SIZE | p50_ms`, and
    likewise `p95_ms`, `images_per_second`, `time_saved_percent`, `on_paper_only`, `peak_memory_bytes`,
    `compile_seconds`, `repeats`. They are empty where an instance was not measured, or something is not known.
    """
    records = [_csv_record(row, rows) for row in rows]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, records[0].keys())
    table.writeheader()
    table.writerows(records)
    files.write_atomically(path, text.getvalue())


def _json_records(rows):
    """Makes the record of each row, with what is derived from other rows."""
    savings, reference = {setting: list_savings(rows, setting) for setting in list_settings(rows)}, _reference(rows)
    records = []
    for row in rows:
        record = row.to_record() | {"macs_saved_percent": _percent(_macs_saved(row, reference))}
        if row.latencies:
            record["latencies"] = [
                dataclasses.asdict(latency) | _derived(latency, savings[latency.setting][row.instance])
                for latency in row.latencies
            ]
        records.append(record)
    return records


def _csv_record(row, rows):
    record = {key: value for key, value in row.to_record().items() if key != "latencies"}
    record["macs_saved_percent"] = _percent(_macs_saved(row, _reference(rows)))
    columns = ("p50_ms", "p95_ms", *_DERIVED, "peak_memory_bytes", "compile_seconds", "repeats")
    for setting in list_settings(rows):
        device, runtime, dtype, batch_size = setting
        latency = row.latency(setting)
        values = {}
        if latency:
            values = dataclasses.asdict(latency) | _derived(latency, list_savings(rows, setting)[row.instance])
        where = f"{device} | {runtime} | {dtype} | batch {batch_size}"
        record |= {f"{where} | {column}": values.get(column) for column in columns}
    return record


_DERIVED = ("images_per_second", "time_saved_percent", "on_paper_only")


def _derived(latency: Latency, saving: Saving) -> dict[str, Any]:
    """Computes what the files say of a latency beside its own record."""
    time_saved = None if saving.time is None else _percent(saving.time)
    return dict(zip(_DERIVED, (round(latency.images_per_second, 1), time_saved, saving.is_on_paper_only)))


def _read_row(record: Mapping[str, Any]) -> InstanceRow:
    """Reads a row that `write_json` wrote, without what is derived."""
    plain = {key: value for key, value in record.items() if key != "macs_saved_percent"}
    if "latencies" in plain:
        plain["latencies"] = [{k: v for k, v in found.items() if k not in _DERIVED} for found in plain["latencies"]]
    return InstanceRow.from_record(plain)


def _reference(rows: Sequence[InstanceRow]) -> InstanceRow:
    """Returns the row that others are compared with: that of full resolution, else the one of the most MACs."""
    return max(rows, key=lambda row: (row.instance == FULL_RESOLUTION, row.macs))


def _macs_saved(row, reference):
    return 1 - row.macs / reference.macs


def _percent(share):
    return round(100 * share, 2)


def read_table(path: str | os.PathLike) -> tuple[tuple[InstanceRow, ...], InstanceRow | None]:
    """Reads a table that `write_json` wrote.

    Returns:
        (rows, baseline), the second None where there is none.

    Raises:
        ValueError: it is damaged; names the path.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(pathlib.Path(path).read_bytes())
        baseline = content.get("baseline")
        return tuple(map(_read_row, content["instances"])), baseline and _read_row(baseline)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not the table of a sweep: {error}") from None


def read_baseline(workdir: str | os.PathLike) -> InstanceRow:
    """Reads the full-resolution row of the sweep of another run, trained without SDPoint.

    Raises:
        ValueError: that run has not been swept, or its table is damaged.
    """
    path = pathlib.Path(workdir) / "sweep" / TABLE
    if not path.is_file():
        raise ValueError(f"baseline {workdir}: no {path}; first run: python evaluate.py --workdir={workdir}")
    try:
        rows, _ = read_table(path)
    except ValueError as error:
        raise ValueError(f"baseline {workdir}: {error}") from None
    found = [row for row in rows if row.instance == FULL_RESOLUTION]
    if not found:
        raise ValueError(f"baseline {workdir}: full resolution was not swept")
    return found[0]
