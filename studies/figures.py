"""The figure of a study: top-1 of each curve's points, mean and spread over the seeds."""

import io
import itertools
import os
from collections.abc import Sequence
from typing import Any

import results
from grids import STATISTICS_BATCHES, Curve, Study
from results import Point, Row

from sdpoint_jax.storage import files

_STYLES = (
    dict(color="tab:blue", marker="o"),
    dict(color="tab:orange", marker="s"),
    dict(color="tab:green", marker="^"),
    dict(color="tab:purple", marker="D"),
    dict(color="tab:brown", marker="v"),
    dict(color="tab:red", marker="P"),
    dict(color="tab:cyan", marker="X"),
    dict(color="tab:olive", marker="*"),
)


def draw(study: Study, rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draws a study's figure as PNG at `path`, from the rows alone.

    A line joins the points that no other one of its curve beats in both cost and mean accuracy. Bars go from the
    lowest to the highest seed.

    Raises:
        ValueError: the rows have no point of any curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = [(curve, points_of(study, curve, rows)) for curve in study.curves]
    if not any(points for _, points in curves):
        raise ValueError(f"study {study.name}: the results hold no point of its figure")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    for (curve, points), style in zip(curves, itertools.cycle(_STYLES)):
        if points:
            _draw_curve(axes, study, curve, points, style)
    points = [point for _, found in curves for point in found]
    axes.set(xlabel=_X_LABELS[study.x], ylabel="top-1 accuracy on the test images (%)", title=_title(points))
    if study.x == "macs":
        axes.set_xlim(left=0)
    else:
        shown = sorted({point.first.statistics_batches for point in points})
        axes.set_xscale("log")
        axes.set_xticks(shown, labels=map(str, shown))
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


_X_LABELS = {
    "macs": "millions of multiply-accumulates (MACs) per image",
    "statistics_batches": "batches of images that the BatchNorm statistics come from",
}


def draw_headline(study: Study, rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Draw the study's headline as PNG at `path`; see `write_headline`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    write_headline(study, rows, FigureCanvasAgg(figure).figure.subplots())
    _save(figure, path)


def has_headline(study: Study, rows: Sequence[Row]) -> bool:
    """Return whether the study has a headline, and `rows` all points of it."""
    line = study.headline
    return line is not None and all(
        line.instance in _fronts(rows, recipe)[1] for recipe in (line.recipe, line.baseline)
    )


def write_headline(study: Study, rows: Sequence[Row], axes: Any) -> None:
    """Draw two curves with their names beside them, and write their difference at one instance.

    The curves join the instances that no other one of their recipe beats; means over the seeds.
    """
    line = study.headline
    assert line is not None
    (front, at), (baseline, baseline_at) = (_fronts(rows, recipe) for recipe in (line.recipe, line.baseline))
    full = max(point.macs for point in front)

    def place(point):
        return 100 * point.macs / full, 100 * point.mean

    styles = dict(color="tab:blue", marker="o"), dict(color="tab:gray", marker="s")
    # The names are at the middles of the curves, above the better one and below the other.
    for points, label, style, side in (
        (front, line.label, styles[0], 1),
        (baseline, line.baseline_label, styles[1], -1),
    ):
        axes.plot(*zip(*map(place, points)), linewidth=2, markersize=5, **style)
        offset = {"xytext": (0, 14 * side), "textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(label, place(points[len(points) // 2]), color=style["color"], **offset)
    (x, high), (_, low) = place(at[line.instance]), place(baseline_at[line.instance])
    axes.annotate("", (x, high), (x, low), arrowprops=dict(arrowstyle="->", color="black", shrinkA=4, shrinkB=4))
    axes.text(x + 1.5, (high + low) / 2, f"{high - low:+.1f} points\nat {x:.0f} % of the cost", va="center")
    axes.set(xlabel="cost of an image, in % of the whole network's", ylabel="images classified correctly (%)")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)


def _fronts(rows, recipe):
    """Return the Pareto front of a recipe's instances, and all of its points by their instances' names."""
    points = results.points(rows, recipe, statistics="augmented", batches=STATISTICS_BATCHES)
    return pareto_front(points), {point.first.instance: point for point in points}


def _save(figure, path):
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png", metadata={"Software": None})
    files.write_atomically(path, image.getvalue())


def points_of(study: Study, curve: Curve, rows: Sequence[Row]) -> tuple[Point, ...]:
    """Returns the points of one curve, in order of the horizontal axis.

    A curve of nets that were trained for one cost each has none until there are two of them.
    """
    batches = STATISTICS_BATCHES if study.x == "macs" else None
    found = [
        point
        for recipe in curve.recipes
        for point in results.points(
            rows, recipe, statistics=curve.statistics, batches=batches, cascades=curve.instances == "cascades"
        )
        if curve.instances != "full" or point.first.instance == "full"
    ]
    if len(found) < min(2, len(curve.recipes)):
        return ()
    return tuple(sorted(found, key=lambda point: (_x_of(study, point), point.mean)))


def _x_of(study, point):
    """Where a point lies on the horizontal axis."""
    return point.macs / 1e6 if study.x == "macs" else point.first.statistics_batches


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other one beats in both MACs and mean top-1, from the cheapest on."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.macs, -point.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front


def _draw_curve(axes, study, curve, points, style):
    x = [_x_of(study, point) for point in points]
    y = [100 * point.mean for point in points]
    bars = [[100 * (point.mean - point.low) for point in points], [100 * (point.high - point.mean) for point in points]]
    axes.errorbar(x, y, yerr=bars, linestyle="", markersize=5, elinewidth=1, capsize=2, label=curve.label, **style)
    line = pareto_front(points) if study.x == "macs" and curve.instances != "full" else points
    axes.plot(
        [_x_of(study, point) for point in line],
        [100 * point.mean for point in line],
        color=style["color"],
        linewidth=1,
        alpha=0.7,
    )


def _title(points):
    seeds = [len(point.rows) for point in points]
    epochs = [point.first.epochs for point in points]
    first = points[0].first
    spread = "seeds, bars from the lowest to the highest" if max(seeds) > 1 else "seed, so no spread"
    return (
        f"{first.model} on {first.dataset}, {first.train_images:,} training images, {_range(epochs)} epochs\n"
        f"n = {_range(seeds)} {spread}; {first.n:,} test images each"
    )


def _range(numbers):
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
