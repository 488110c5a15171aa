"""The sweep: what every SDPoint instance of a trained net costs and how accurate it is, and the artefact to deploy.

For each instance, BatchNorm statistics are re-estimated from training images and a split is evaluated. Instances share
passes over the data, a group of them at a time; each group is kept until the end, so that an interrupted sweep goes on.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdpoint_jax import progress
from sdpoint_jax.choice.cascade import CascadeRow
from sdpoint_jax.config import identity, to_dict
from sdpoint_jax.evaluation import plot, table
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.profiling import latency
from sdpoint_jax.profiling.macs import count_cost, count_macs, count_set_macs
from sdpoint_jax.programs import hosts
from sdpoint_jax.programs.devices import is_main_host
from sdpoint_jax.programs.evaluator import Evaluator, Metrics
from sdpoint_jax.storage import artefact, checkpoint
from sdpoint_jax.storage.artefact import Artefact, InstanceRow, SweepSettings
from sdpoint_jax.storage.lock import FolderLock

PyTree = Any
LATENCY_PLOT = "latency.png"
_PARTIAL = "partial"
# Replaced by each sweep, and by those that add cascades or latencies.
_OF_CASCADES = ("cascades.json", "cascades.png")
_NAMES = ("sweep.csv", "sweep.png", LATENCY_PLOT, *_OF_CASCADES)
_GROUP = 24  # Instances of one pass over the data, after which an interrupted sweep need not repeat them.


def sweep(
    experiment: Experiment,
    params: PyTree,
    instances: Sequence[SDPointInstance],
    output: str | os.PathLike,
    *,
    split: str,
    baseline: InstanceRow | None = None,
    statistics: PyTree | None = None,
) -> tuple[InstanceRow, ...]:
    """Sweeps `instances` and writes sweep.csv, sweep.json, sweep.png and the artefact.

    Args:
        experiment: the net, its data, and how to re-estimate.
        params: trained parameters.
        instances: of the net.
        output: folder to write to. What was measured there from the same parameters, images and settings is not
            measured again. Latencies of the same parameters, and cascades of the same sweep, stay; what no longer
            holds is removed, and said.
        split: of the data set, to evaluate.
        baseline: row of the same net trained without SDPoint, to mark in the plot; see `table.read_baseline`.
        statistics: `batch_stats` that came with imported parameters, in place of re-estimated ones. They are those of
            full resolution, which `instances` must then be alone.

    Returns:
        the table, a row per instance in the order given.

    Raises:
        ValueError: another process sweeps into `output`, or files are there that a sweep did not write; imported
            statistics for more than full resolution; or see
            `Evaluator.evaluate`.
        OSError: something could not be written; names the path.
    """
    if statistics is not None and tuple(instances) != (FULL_RESOLUTION,):
        names = ", ".join(instance.name for instance in instances)
        raise ValueError(f"imported statistics are those of full resolution alone, not of {names}: re-estimate these")
    imported = None if statistics is None else {FULL_RESOLUTION: statistics}
    output = pathlib.Path(output)
    hosts.together(functools.partial(check_output, output))
    source = _describe_source(experiment, params, split, imported)
    names = ", ".join(instance.name for instance in instances)
    hosts.check_same(lambda: source | {"instances": names})
    with FolderLock(output, "output folder") if is_main_host() else contextlib.nullcontext():
        before = _load_before(output)
        finished = {row.instance: row for row in before.rows} if before and before.source == source else {}
        finished = {i: row for i, row in finished.items() if i in instances}
        if not _all_hosts(bool(finished)):
            finished = {}
        if finished:
            progress.say(f"measured before: {len(finished)} of {len(instances)} instances")
        missing = [instance for instance in instances if instance not in finished]
        groups = [missing[start : start + _GROUP] for start in range(0, len(missing), _GROUP)]
        found_statistics = {instance: before.batch_stats[instance] for instance in finished}
        metrics: dict[SDPointInstance, Metrics] = {}
        for group in groups:
            of_group, metrics_of_group = _group_results(experiment, params, group, output, split, source, imported)
            found_statistics |= of_group
            metrics |= metrics_of_group
        rows = tuple(finished.get(i) or _row(experiment, i, metrics[i], imported) for i in instances)
        if groups:
            shared, separate = (sum(passes) for passes in zip(*(count_passes(experiment, group) for group in groups)))
            progress.say(
                f"{len(missing)} instances for the MACs of {shared:.1f} full passes; {separate:.1f} one by one"
            )
        if is_main_host():
            swept = _artefact(experiment, params, found_statistics, rows, split, imported, source)
            rows = _replace(before, swept, output, baseline)
            _remove_partial(output / _PARTIAL)
    return rows


def _describe_source(experiment, params, split, imported):
    """Return digests of all that a sweep measures from, as JSON holds it."""
    config = experiment.config
    described = {
        "parameters": checkpoint.checksum_tree(params),
        "imported statistics": imported and checkpoint.checksum_tree(imported[FULL_RESOLUTION]),
        "training images": experiment.digest(config.dataset.train_split),
        "evaluated images": experiment.digest(split),
        "classes": experiment.dataset.class_names,
        "on_bad_image": config.dataset.on_bad_image,
        "evaluation batch": experiment.evaluation_batch_size,
        "config": identity(config),
    }
    return json.loads(json.dumps(described))


def _load_before(output):
    """Load the artefact that is there; None where there is none that can be read."""
    path = output / artefact.ARTEFACT
    try:
        return artefact.load(path)
    except checkpoint.CheckpointError as error:
        if path.exists():
            progress.say(f"measuring again: {error}")
        return None


def _replace(before, swept, output, baseline):
    """Write a sweep's results over earlier ones; keep what was measured of the same net, and say what goes."""
    removed = []
    if before:
        swept = _with_latencies_of(before, swept)
        wanted = {row.instance for row in swept.rows}
        if gone := [row.name for row in before.rows if row.instance not in wanted]:
            removed.append(f"{', '.join(gone)}, not asked for this time")
        kept = {row.instance for row in swept.rows if row.latencies}
        if lost := [row.name for row in before.rows if row.latencies and row.instance in wanted - kept]:
            removed.append(f"the latencies of {', '.join(lost)}, measured with other parameters")
        if before.source == swept.source and _have_stages(before.cascades, wanted):
            swept = dataclasses.replace(swept, cascades=before.cascades)
        elif before.cascades:
            removed.append("the cascades, which were chosen with other parameters, statistics or instances")
        if before.source == swept.source and baseline is None and (output / table.TABLE).exists():
            _, baseline = table.read_table(output / table.TABLE)
    for line in removed:
        progress.say(f"removed from {output}: {line}")
    write_results(swept, output, baseline)
    if not swept.cascades:
        for name in _OF_CASCADES:
            (output / name).unlink(missing_ok=True)
    if before and before.source != swept.source:
        artefact.unfinished_profile(output / artefact.ARTEFACT).unlink(missing_ok=True)
    return swept.rows


def _with_latencies_of(before, swept):
    """Return `swept` with the latencies of `before`, which hold as long as the net and its parameters are the same."""
    net = [
        (found.model, found.dtype, found.image_shape, found.num_classes, checkpoint.checksum_tree(found.params))
        for found in (before, swept)
    ]
    if net[0] != net[1]:
        return swept
    latencies = {row.instance: row.latencies for row in before.rows}
    return swept.with_rows([dataclasses.replace(row, latencies=latencies.get(row.instance, ())) for row in swept.rows])


def _have_stages(cascades, instances):
    stages = {stage for record in cascades for stage in CascadeRow.from_record(record).cascade.stages}
    return stages <= instances


def check_output(output: pathlib.Path) -> None:
    """Raise ValueError if files in the folder `output` that a sweep did not write are in the way of its results."""
    checkpoint.check_replaceable(output / artefact.ARTEFACT)
    latency.check_unfinished(artefact.unfinished_profile(output / artefact.ARTEFACT))
    if (output / table.TABLE).exists():
        table.read_table(output / table.TABLE)  # With a sweep's table in it, the folder is the folder of a sweep.
    elif found := [name for name in _NAMES if os.path.lexists(output / name)]:
        raise ValueError(
            f"{output / found[0]}: exists, and no {table.TABLE} beside it says that a sweep wrote it; "
            "move it, or give another --output"
        )


def _remove_partial(folder):
    """Remove the results of groups, of this sweep and of others that were interrupted."""
    if folder.is_dir():
        for path in folder.iterdir():
            checkpoint.remove(path)
        with contextlib.suppress(OSError):  # What is left in it is not ours.
            folder.rmdir()


def write_results(
    swept: Artefact, output: pathlib.Path, baseline: InstanceRow | None = None, device: str | None = None
) -> None:
    """Writes sweep.csv, sweep.json, sweep.png, latency.png and the artefact itself into the folder `output`.

    Args:
        swept: the artefact.
        output: the folder.
        baseline: row of the same net trained without SDPoint.
        device: whose latencies to draw, which at least one row has; None for the last one that was measured. Without
            any latency, an old latency.png is removed.
    """
    settings, rows = swept.settings, swept.rows
    measured = [latency.device for row in rows for latency in row.latencies]
    table.write_json(output / table.TABLE, settings, rows, baseline)
    table.write_csv(output / "sweep.csv", rows)
    net = settings.model + (f" in {settings.dtype}" if settings.dtype != "float32" else "")
    what = f"{net} on {pathlib.PurePath(settings.dataset).name}, {settings.split}"
    title = f"{what}: n = {rows[0].n}, bars of one standard error"
    plot.plot_macs(rows, output / "sweep.png", title=title, baseline=baseline)
    if measured:
        plot.plot_latency(rows, output / LATENCY_PLOT, title=title, device=device or measured[-1])
    else:
        (output / LATENCY_PLOT).unlink(missing_ok=True)
    artefact.save(swept, output / artefact.ARTEFACT)


def count_passes(experiment: Experiment, instances: Sequence[SDPointInstance]) -> tuple[float, float]:
    """Counts what one image costs in a sweep, in full-resolution passes: with shared layers, and one by one."""
    model, images = experiment.model, (tuple(experiment.config.dataset.image_size), experiment.dataset.channels)
    full = count_macs(model, FULL_RESOLUTION, *images)
    separate = sum(count_macs(model, instance, *images) for instance in instances)
    return count_set_macs(model, instances, *images) / full, separate / full


def _group_results(experiment, params, group, output, split, source, imported):
    """Returns (statistics, metrics) of some instances: from an interrupted sweep, or measured now and kept."""
    names = [instance.name for instance in group]
    key = source | {"instances": names}
    path = output / _PARTIAL / names[0]
    found = _load_group(path, key)
    if _all_hosts(found is not None):
        progress.say(f"measured before: {names[0]} to {names[-1]}")
        statistics, metrics = found
        return {i: statistics.get(i.name, {}) for i in group}, {i: Metrics(**metrics[i.name]) for i in group}
    measure = functools.partial(_measure, statistics=imported) if imported else _measure
    statistics, metrics = measure(experiment, params, group, split)
    if is_main_host():
        arrays = {instance.name: statistics[instance] for instance in group}
        kept = {instance.name: dataclasses.asdict(metrics[instance]) for instance in group}
        checkpoint.save(path, arrays, {"key": key, "metrics": kept})
    return statistics, metrics


def _load_group(path, key):
    """Returns (statistics, metrics) by name, as they were kept with the same key; None where they were not."""
    if not path.is_dir():
        return None
    try:
        arrays, record = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        progress.say(f"measuring again: {error}")
        if is_main_host() and checkpoint.own_files(path) is None:
            checkpoint.move_aside(path)  # So damaged that nothing says that it is ours to replace.
        return None
    return (arrays, record["metrics"]) if record["key"] == key else None


def _all_hosts(value):
    """Tells whether `value` is true on all hosts, which so take the same way: measuring takes all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.bool_(value)).all())


def make_evaluator(experiment: Experiment, instances: Sequence[SDPointInstance]) -> Evaluator:
    """Makes the evaluator of instances for an experiment's images; compiles nothing yet."""
    return Evaluator(
        experiment.model,
        instances,
        image_shape=experiment.image_shape,
        batch_size=experiment.evaluation_batch_size // jax.process_count(),
        preprocess=experiment.preprocess,
    )


def _measure(experiment, params, group, split, statistics=None):
    config, size = experiment.config, experiment.evaluation_batch_size
    evaluator = make_evaluator(experiment, group)
    compiled = evaluator.compile(config.compile_workers)
    progress.compile_with_bar(compiled, evaluator.num_programs, f"{group[0].name} to {group[-1].name}")
    num_examples = len(experiment.dataset.source(split))
    if statistics is None:
        statistics = _reestimate(experiment, params, evaluator)
    with experiment.evaluation_batches(split) as batches:
        shown = progress.bar(batches, total=-(-num_examples // size), desc="evaluating")
        metrics = evaluator.evaluate(params, statistics, shown)
    counts = {found.count for found in metrics.values()}
    if config.dataset.on_bad_image == "error" and counts != {num_examples}:
        raise RuntimeError(f"evaluated {sorted(counts)} examples of {split}, which has {num_examples}")
    return statistics, metrics


def _reestimate(experiment, params, evaluator):
    num_batches = experiment.config.reestimate_batches
    with experiment.reestimation_batches(experiment.config.reestimate_images) as batches:
        chosen = progress.bar(itertools.islice(batches, num_batches), total=num_batches, desc="re-estimating")
        return evaluator.reestimate(params, chosen)


def _row(experiment, instance, metrics, imported):
    size, channels = tuple(experiment.config.dataset.image_size), experiment.dataset.channels
    cost = count_cost(experiment.model, instance, size, channels)
    return InstanceRow(
        instance,
        cost.macs,
        cost.params,
        metrics.top1,
        metrics.top5,
        metrics.loss,
        metrics.count,
        "imported with the parameters" if imported else f"{experiment.config.reestimate_images} training images",
        0 if imported else experiment.config.reestimate_batches * experiment.evaluation_batch_size,
    )


def _artefact(experiment, params, statistics, rows, split, imported, source):
    config, dataset = experiment.config, experiment.config.dataset
    batches, images = (0, "none") if imported else (config.reestimate_batches, config.reestimate_images)
    return Artefact(
        params,
        {row.instance: statistics[row.instance] for row in rows},
        rows,
        config.model.name,
        config.model.dtype,
        tuple(experiment.dataset.class_names),
        experiment.image_shape,
        experiment.resize,
        tuple(dataset.mean),
        tuple(dataset.std),
        to_dict(config),
        SweepSettings(config.model.name, dataset.name, split, batches, images, config.model.dtype),
        source=source,
        model_args=config.model.args,
        downsampling=config.model.downsampling,
        given_model=experiment.model,
    )
