"""The sweep: what every SDPoint instance of a trained net costs and how accurate it is, and the artefact to deploy.

For each instance, BatchNorm statistics are re-estimated from training images and the test split is evaluated. The
artefact holds the parameters once, the statistics of each instance, and the table.
"""

import csv
import io
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from sdpoint_jax import progress
from sdpoint_jax.config import to_dict
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.profiling.macs import count_cost, list_layers
from sdpoint_jax.programs.devices import is_main_host
from sdpoint_jax.storage import checkpoint, files

ARTEFACT = "artefact"
TABLE = "sweep.json"
_PARTIAL = "partial"
_GROUP = 24  # Instances of one pass over the data, after which an interrupted sweep need not repeat them.


def sweep(
    experiment: Experiment,
    params,
    instances: Sequence[SDPointInstance],
    output: str | os.PathLike,
    *,
    split: str,
    baseline: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sweeps `instances` and writes sweep.csv, sweep.json, sweep.png and the artefact.

    Args:
        experiment: the net, its data, and how to re-estimate.
        params: trained parameters.
        instances: of the net.
        output: folder to write to. An interrupted sweep of the same parameters and settings goes on.
        split: of the data set, to evaluate.
        baseline: row of the same net trained without SDPoint, to mark in the plot; see `baseline_row`.

    Returns:
        the table, a row per instance in the order given; see `_row`.
    """
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    statistics, metrics = {}, {}
    groups = [instances[start : start + _GROUP] for start in range(0, len(instances), _GROUP)]
    for group in groups:
        for instance, (found_statistics, found) in _group_results(experiment, params, group, output, split).items():
            statistics[instance], metrics[instance] = found_statistics, found
    rows = [_row(experiment, instance, metrics[instance]) for instance in instances]
    settings = {
        "model": experiment.config.model.name,
        "dataset": experiment.config.dataset.name,
        "split": split,
        "reestimate_batches": experiment.config.reestimate_batches,
        "reestimate_images": experiment.config.reestimate_images,
    }
    shared, separate = (sum(passes) for passes in zip(*(count_passes(experiment, group) for group in groups)))
    progress.say(f"{len(rows)} instances for the MACs of {shared:.1f} full passes; {separate:.1f} one by one")
    if not is_main_host():
        return rows
    files.write_atomically(
        output / TABLE, json.dumps({**settings, "instances": rows, "baseline": baseline}, indent=1) + "\n"
    )
    _write_csv(output / "sweep.csv", rows)
    what = f"{experiment.config.model.name} on {experiment.dataset.name}, {split}"
    title = f"{what}: n = {rows[0]['n']}, bars of one standard error"
    plot(rows, output / "sweep.png", title=title, baseline=baseline)
    arrays = {"params": params, "batch_stats": {instance.name: statistics[instance] for instance in instances}}
    checkpoint.save(output / ARTEFACT, arrays, _artefact_record(experiment, settings, rows))
    shutil.rmtree(output / _PARTIAL, ignore_errors=True)
    return rows


def count_passes(experiment: Experiment, instances: Sequence[SDPointInstance]) -> tuple[float, float]:
    """What one image costs in a sweep of `instances`, in full-resolution passes: with shared layers, one by one."""
    model, size = experiment.model, tuple(experiment.config.dataset.image_size)

    def macs(instance, modules):
        layers = list_layers(model, instance, size, experiment.dataset.channels)
        return sum(layer.macs for layer in layers if layer.name.partition("/")[0] in modules)

    full = macs(FULL_RESOLUTION, model.modules)
    trunk = macs(FULL_RESOLUTION, model.modules[: max(map(model.position_of, instances)) + 1])
    suffixes = sum(macs(instance, model.modules[model.position_of(instance) + 1 :]) for instance in instances)
    return (trunk + suffixes) / full, sum(macs(instance, model.modules) for instance in instances) / full


def baseline_row(workdir: str | os.PathLike) -> dict[str, Any]:
    """The full-resolution row of the sweep of another run, trained without SDPoint.

    Raises:
        ValueError: that run has not been swept, or its table is damaged.
    """
    path = pathlib.Path(workdir) / "sweep" / TABLE
    if not path.is_file():
        raise ValueError(f"baseline {workdir}: no {path}; first run: python evaluate.py --workdir={workdir}")
    try:
        rows = json.loads(path.read_bytes())["instances"]
        found = [row for row in rows if row["instance"] == FULL_RESOLUTION.name]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"baseline {workdir}: {path} is not the table of a sweep: {error}") from None
    if not found:
        raise ValueError(f"baseline {workdir}: full resolution was not swept")
    return found[0]


def pareto_front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that no other one beats in both MACs and top-1, from the cheapest on."""
    front = []
    for row in sorted(rows, key=lambda row: (row["macs"], -row["top1"])):
        if not front or row["top1"] > front[-1]["top1"]:
            front.append(row)
    return front


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal; a star marks the Pareto front."""
    front = {row["instance"] for row in pareto_front(rows)}
    dearest = max(row["macs"] for row in rows)
    lines = [f"  {'instance':<12} {'MACs':>9} {'cost':>6} {'top-1':>8} {'top-5':>8} {'loss':>7} {'n':>7}"]
    for row in rows:
        top5 = "-" if row["top5"] is None else f"{100 * row['top5']:.2f} %"
        lines.append(
            f"{'*' if row['instance'] in front else ' '} {row['instance']:<12} {format_macs(row['macs']):>9} "
            f"{100 * row['macs'] / dearest:>4.0f} % {100 * row['top1']:>6.2f} % {top5:>8} {row['loss']:>7.4f} "
            f"{row['n']:>7}"
        )
    return "\n".join([*lines, "* on the Pareto front: no other instance is both cheaper and more accurate"])


def format_macs(macs: float) -> str:
    """MACs with three digits and a unit, as 4.09 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}"
    return f"{macs:g}"


def plot(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str, baseline=None) -> None:
    """Draws top-1, with its standard error, against MACs: a series per ratio, the front, full resolution, baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    everything = [row["macs"] for row in rows] + ([baseline["macs"]] if baseline else [])
    scale, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if max(everything) >= s)

    def draw(some, bars=True, **style):
        errors = [100 * math.sqrt(row["top1"] * (1 - row["top1"]) / row["n"]) for row in some] if bars else None
        x, y = [row["macs"] / scale for row in some], [100 * row["top1"] for row in some]
        axes.errorbar(x, y, yerr=errors, elinewidth=0.8, **style)

    draw(pareto_front(rows), bars=False, color="0.6", linewidth=7, alpha=0.4, label="Pareto front", zorder=1)
    for ratio, style in zip(sorted({row["ratio"] for row in rows if row["point"] != 0}), itertools.cycle(_STYLES)):
        some = sorted((row for row in rows if row["ratio"] == ratio and row["point"] != 0), key=lambda row: row["macs"])
        draw(some, linewidth=1, markersize=5, label=f"downsampled by {ratio:g}", zorder=2, **style)
    star = dict(marker="*", markersize=15, linestyle="", zorder=3)
    draw([row for row in rows if row["point"] == 0], color="black", label="full resolution", **star)
    if baseline:
        draw([baseline], color="tab:red", markerfacecolor="none", label="trained without SDPoint", **star)
    axes.set(xlabel=f"{unit}MACs per image", ylabel="top-1 accuracy (%)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    files.write_atomically(path, image.getvalue())


_STYLES = (
    dict(color="tab:blue", marker="o"),
    dict(color="tab:orange", marker="s"),
    dict(color="tab:green", marker="^"),
    dict(color="tab:purple", marker="D"),
    dict(color="tab:brown", marker="v"),
)


def _group_results(experiment, params, group, output, split):
    """Statistics and metrics of some instances, by instance: from an interrupted sweep, or measured and kept."""
    names = [instance.name for instance in group]
    key = {
        "instances": names,
        "split": split,
        "params": checkpoint.checksum_tree(params),
        "config": to_dict(experiment.config),
    }
    path = output / _PARTIAL / names[0]
    if path.is_dir():
        try:
            arrays, record = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            progress.say(f"measuring again: {error}")
        else:
            if record["key"] == key:
                progress.say(f"measured before: {names[0]} to {names[-1]}")
                return {i: (arrays.get(i.name, {}), record["metrics"][i.name]) for i in group}
    statistics, metrics = _measure(experiment, params, group, split)
    arrays = {instance.name: statistics[instance] for instance in group}
    if is_main_host():
        checkpoint.save(path, arrays, {"key": key, "metrics": {i.name: metrics[i] for i in group}})
    return {instance: (statistics[instance], metrics[instance]) for instance in group}


def _measure(experiment, params, group, split):
    evaluator = experiment.evaluator(group)
    progress.compile_with_bar(
        evaluator.compile(experiment.compile_workers), evaluator.num_programs, f"{group[0].name} to {group[-1].name}"
    )
    num_batches, size = experiment.config.reestimate_batches, experiment.config.evaluation_batch_size
    with experiment.reestimation_batches(experiment.config.reestimate_images) as batches:
        chosen = itertools.islice(batches, num_batches)
        statistics = evaluator.reestimate(params, progress.bar(chosen, total=num_batches, desc="re-estimating"))
    num_examples = len(experiment.dataset.source(split))
    with experiment.evaluation_batches(split) as batches:
        metrics = evaluator.evaluate(
            params, statistics, progress.bar(batches, total=-(-num_examples // size), desc="evaluating")
        )
    counts = {found["count"] for found in metrics.values()}
    if experiment.config.dataset.on_bad_image == "error" and counts != {num_examples}:
        raise RuntimeError(f"evaluated {sorted(counts)} examples of {split}, which has {num_examples}")
    return statistics, metrics


def _row(experiment, instance, metrics):
    """A row of the table: the instance, its cost for one image, and its metrics (top1 and top5 in 0..1)."""
    size, channels = tuple(experiment.config.dataset.image_size), experiment.dataset.channels
    cost = count_cost(experiment.model, instance, size, channels)
    return {
        "instance": instance.name,
        "point": instance.point,
        "ratio": instance.ratio,
        "macs": cost.macs,
        "params": cost.params,
        "top1": metrics["top1"],
        "top5": metrics["top5"],
        "loss": metrics["loss"],
        "n": metrics["count"],
        "reestimated_from": f"{experiment.config.reestimate_images} training images",
        "reestimate_images": experiment.config.reestimate_batches * experiment.config.evaluation_batch_size,
    }


def _artefact_record(experiment, settings, rows):
    dataset = experiment.config.dataset
    return {
        "model": {"name": experiment.config.model.name, "dtype": experiment.config.model.dtype},
        "num_classes": experiment.dataset.num_classes,
        "class_names": list(experiment.dataset.class_names),
        "image_shape": list(experiment.image_shape),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "config": to_dict(experiment.config),
        "settings": settings,
        "table": rows,
    }


def _write_csv(path, rows):
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0].keys())
    table.writeheader()
    table.writerows(rows)
    files.write_atomically(path, text.getvalue())
