"""The picture of a sweep: accuracy against cost."""

import io
import itertools
import os
from collections.abc import Sequence

from sdpoint_jax.evaluation.table import pareto_front
from sdpoint_jax.storage import files
from sdpoint_jax.storage.artefact import InstanceRow

_STYLES = (
    dict(color="tab:blue", marker="o"),
    dict(color="tab:orange", marker="s"),
    dict(color="tab:green", marker="^"),
    dict(color="tab:purple", marker="D"),
    dict(color="tab:brown", marker="v"),
)


def plot_macs(
    rows: Sequence[InstanceRow], path: str | os.PathLike, *, title: str, baseline: InstanceRow | None = None
) -> None:
    """Draws top-1, with its standard error, against MACs: a series per ratio, the front, full resolution, baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    highest = max(row.macs for row in [*rows, *([baseline] if baseline else [])])
    scale, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if highest >= s)

    def draw(some, bars=True, **style):
        errors = [100 * row.top1_standard_error for row in some] if bars else None
        x, y = [row.macs / scale for row in some], [100 * row.top1 for row in some]
        axes.errorbar(x, y, yerr=errors, elinewidth=0.8, **style)

    downsampled = sorted((row for row in rows if row.instance.point != 0), key=lambda row: row.macs)
    draw(pareto_front(rows), bars=False, color="0.6", linewidth=7, alpha=0.4, label="Pareto front", zorder=1)
    for ratio, style in zip(sorted({row.instance.ratio for row in downsampled}), itertools.cycle(_STYLES)):
        some = [row for row in downsampled if row.instance.ratio == ratio]
        draw(some, linewidth=1, markersize=5, label=f"downsampled by {ratio:g}", zorder=2, **style)
    star = dict(marker="*", markersize=15, linestyle="", zorder=3)
    draw([row for row in rows if row.instance.point == 0], color="black", label="full resolution", **star)
    if baseline:
        draw([baseline], color="tab:red", markerfacecolor="none", label="trained without SDPoint", **star)
    axes.set(xlabel=f"{unit}MACs per image", ylabel="top-1 accuracy (%)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    files.write_atomically(path, image.getvalue())
