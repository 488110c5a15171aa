"""The pictures of a sweep: accuracy against cost, and against latency."""

import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdpoint_jax.choice.table import Setting
from sdpoint_jax.evaluation.table import (
    LEAST_SAVING,
    PAPER_ONLY,
    list_medians,
    list_savings,
    list_settings,
    pareto_front,
)
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.storage import files
from sdpoint_jax.storage.artefact import InstanceRow

_STYLES = (
    dict(color="tab:blue", marker="o"),
    dict(color="tab:orange", marker="s"),
    dict(color="tab:green", marker="^"),
    dict(color="tab:purple", marker="D"),
    dict(color="tab:brown", marker="v"),
)
_STAR: dict[str, Any] = dict(color="black", marker="*", markersize=15, linestyle="", zorder=3)
_FRONT: dict[str, Any] = dict(color="0.6", linewidth=7, alpha=0.4, zorder=1)
_DPI = 150

Costs = Mapping[SDPointInstance, float]


def plot_macs(
    rows: Sequence[InstanceRow], path: str | os.PathLike, *, title: str, baseline: InstanceRow | None = None
) -> None:
    """Draws top-1, with its standard error, against MACs: a series per ratio, the front, full resolution, baseline."""
    figure, [[axes]] = _subplots(1, 1, figsize=(8, 5))
    highest = max(row.macs for row in [*rows, *([baseline] if baseline else [])])
    scale, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if highest >= s)
    _draw_accuracy(axes, rows, {row.instance: row.macs / scale for row in rows})
    if baseline:
        style = _STAR | dict(color="tab:red", markerfacecolor="none", label="trained without SDPoint")
        _draw(axes, [baseline], {baseline.instance: baseline.macs / scale}, **style)
    axes.set_xlim(0, 1.06 * highest / scale)
    axes.set(xlabel=f"{unit}MACs per image", ylabel="top-1 accuracy (%)", title=title)
    figure.legend(loc="outside lower center", ncols=3)
    _write(figure, path)


def plot_latency(rows: Sequence[InstanceRow], path: str | os.PathLike, *, title: str, device: str) -> None:
    """Draws what was measured on a device, a column for each batch size, and for each runtime and dtype.

    Above: top-1 against latency, as `plot_macs`. Below: the time saved against the MACs saved, with a line where both
    are the same, and an area where an instance is cheap on paper only.
    """
    settings = list_settings(rows, device)
    several = len({setting[1:3] for setting in settings}) > 1
    figure, axes = _subplots(2, len(settings), figsize=(max(7, 1.5 + 3.8 * len(settings)), 8), sharey="row")
    for setting, above, below in zip(settings, *axes):
        _, runtime, dtype, batch_size = setting
        medians = list_medians(rows, setting)
        _draw_accuracy(above, [row for row in rows if row.instance in medians], medians)
        what = f"batch {batch_size}" + (f" ({runtime}, {dtype})" if several else "")
        above.set_xlim(0, 1.06 * max(medians.values()))
        above.set(xlabel="latency of a batch (ms)", title=what)
        _draw_savings(below, rows, setting)
        below.set(xlabel="MACs saved (%)")
    axes[0][0].set(ylabel="top-1 accuracy (%)")
    axes[1][0].set(ylabel="time saved (%)")
    handles = {label: handle for row in axes for handle, label in zip(*row[0].get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(settings)))
    figure.suptitle(f"{title}\n{device}" + ("" if several else f"; {settings[0][1]}, {settings[0][2]}"))
    _write(figure, path)


def _draw_accuracy(axes, rows: Sequence[InstanceRow], costs: Costs) -> None:
    """Draws top-1 with its standard error against `costs`: the front, a series per ratio, full resolution."""
    front = pareto_front(rows, lambda row: costs[row.instance])
    _draw(axes, front, costs, bars=False, label="Pareto front", **_FRONT)
    for ratio, some, style in _by_ratio(rows):
        some.sort(key=lambda row: costs[row.instance])
        series = dict(style, linewidth=1, markersize=5, zorder=2)
        _draw(axes, some, costs, label=f"downsampled by {ratio:g}", **series)
    _draw(axes, _full(rows), costs, label="full resolution", **_STAR)
    axes.grid(alpha=0.3)


def _draw(axes, rows: Sequence[InstanceRow], costs: Costs, bars: bool = True, **style: Any) -> None:
    x, y = [costs[row.instance] for row in rows], [100 * row.top1 for row in rows]
    errors = [100 * row.top1_standard_error for row in rows] if bars else None
    axes.errorbar(x, y, yerr=errors, elinewidth=0.8, **style)


def _draw_savings(axes, rows, setting: Setting) -> None:
    """Draws the time saved against the MACs saved, both in per cent."""
    from matplotlib.patches import Polygon

    savings = list_savings(rows, setting)
    measured = [row for row in rows if savings[row.instance].time is not None]

    def draw(some, **style):
        x = [100 * savings[row.instance].macs for row in some]
        axes.plot(x, [100 * savings[row.instance].time for row in some], **dict(style, linestyle=""))

    axes.axline((0, 0), slope=1, color="0.6", linewidth=1, zorder=1, label="saves as much time as MACs")
    least = 100 * LEAST_SAVING
    corners = [(least, least / 2), (100, 50), (100, -1000), (least, -1000)]  # An artist leaves the limits as they are.
    axes.add_artist(Polygon(corners, color="tab:red", alpha=0.12, linewidth=0, label=PAPER_ONLY, zorder=0))
    for _, some, style in _by_ratio(measured):
        draw(some, markersize=5, zorder=2, **style)
    draw(_full(measured), **_STAR)
    axes.grid(alpha=0.3)


def _full(rows):
    return [row for row in rows if row.instance.point == 0]


def _by_ratio(rows) -> Iterator[tuple[float, list[InstanceRow], dict[str, Any]]]:
    """Yields each downsampling ratio, its rows, and their colour and marker."""
    downsampled = [row for row in rows if row.instance.point != 0]
    for ratio, style in zip(sorted({row.instance.ratio for row in downsampled}), itertools.cycle(_STYLES)):
        yield ratio, [row for row in downsampled if row.instance.ratio == ratio], style


def _subplots(rows, columns, **settings):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=settings.pop("figsize"), layout="constrained")
    return figure, FigureCanvasAgg(figure).figure.subplots(rows, columns, squeeze=False, **settings)


def _write(figure, path):
    image = io.BytesIO()
    figure.savefig(image, dpi=_DPI, format="png")
    files.write_atomically(path, image.getvalue())
