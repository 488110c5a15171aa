"""Cascades of a swept net: chosen on held-out images, reported on the images of the sweep, kept in its artefact.

Thresholds and stages are chosen on *calibration images*, which are never those that are reported. Their logits are kept
in memory as float16: 2 bytes x instances x images x classes, which is 1.4 GB for 69 instances, 10,000 images and 1,000
classes. Of the images that are reported only counts are kept.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sdpoint_jax import progress
from sdpoint_jax.choice import cascade as arithmetic
from sdpoint_jax.choice.cascade import Calibrated, Cascade, CascadeRow, Measured
from sdpoint_jax.evaluation.sweep import make_evaluator
from sdpoint_jax.evaluation.table import format_macs, pareto_front
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.profiling.macs import count_macs, count_suffix_macs
from sdpoint_jax.storage import artefact, files
from sdpoint_jax.storage.artefact import Artefact, InstanceRow
from sdpoint_jax.storage.lock import FolderLock

PyTree = Any
Stages = tuple[SDPointInstance, ...]
Batch = Mapping[str, np.ndarray]

AUTO = "auto"
CALIBRATION_IMAGES = 10_000
TABLE, PLOT = "cascades.json", "cascades.png"
_TARGETS = 33  # Mean costs at which cascades are chosen, from the cheapest stage to the full cost.
_LARGEST = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True)
class CascadePlan:
    """Which cascades to evaluate, and on which images.

    Attributes:
        cascades: the stages of each; empty to search for them.
        split: that is reported, the one of the sweep.
        calibration_split: whose images thresholds are chosen on; empty for those of the training, as in evaluation.
        calibration_images: at most so many of them.
        calibrated_on: the same in words.
    """

    cascades: tuple[Stages, ...]
    split: str
    calibration_split: str
    calibration_images: int
    calibrated_on: str


def plan_cascades(
    experiment: Experiment,
    instances: Sequence[SDPointInstance],
    names: str,
    *,
    split: str,
    calibration_split: str = "",
    calibration_images: int = CALIBRATION_IMAGES,
) -> CascadePlan:
    """Checks what is asked for, before anything is measured, and finds images to calibrate on.

    Args:
        experiment: the net and its data.
        instances: those that are swept.
        names: of cascades, as `p03_r0.50+full,p01_r0.50+p05_r0.50+full`; or `auto`, to search pairs and triples.
        split: that is swept.
        calibration_split: of the data set; by default the config's validation split if it shares no images with
            `split`, else the training images, with a warning.
        calibration_images: the most images to calibrate on, drawn at random where there are more.

    Raises:
        ValueError: a name that is none, an instance that is not swept, no images to calibrate on, or several hosts.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "--cascades: on a single host only; sweep with all, then evaluate.py --cascades on one of them"
        )
    if calibration_images < 1:
        raise ValueError(f"--calibration-images={calibration_images}: at least 1")
    cascades = () if names == AUTO else tuple(map(arithmetic.stages_from_name, names.split(",")))
    if missing := {stage.name for stages in cascades for stage in stages} - {instance.name for instance in instances}:
        swept = ", ".join(instance.name for instance in instances)
        raise ValueError(f"--cascades={names}: {', '.join(sorted(missing))} is not swept; swept are {swept}")
    if len(instances) < 2:
        raise ValueError(f"--cascades={names}: a cascade needs two instances; swept is {instances[0].name} alone")
    chosen = _calibration_split(experiment, split, calibration_split)
    where = chosen or f"{experiment.config.dataset.train_split}, clean"
    if _share_images(
        experiment, chosen or experiment.config.dataset.train_split, experiment.config.dataset.train_split
    ):
        progress.say(
            f"warning: cascades are calibrated on images that the net was trained on ({where}), of which it is surer "
            "than of others: they may cost more, or be less accurate, than another split would have it; give one that "
            "the net has not seen as --calibration-split"
        )
        where = f"{where}, seen in training"
    return CascadePlan(cascades, split, chosen, calibration_images, where)


def evaluate_cascades(
    experiment: Experiment, plan: CascadePlan, output: str | os.PathLike
) -> tuple[list[CascadeRow], Artefact]:
    """Evaluates cascades of the sweep in `output`; writes cascades.json and cascades.png, adds them to the artefact.

    Those on the Pareto front of the calibration images are kept in the artefact. Where a search finds none, as no
    instance is more accurate than a cheaper one on the calibration images, it says so and writes nothing.

    Args:
        experiment: that was swept.
        plan: see `plan_cascades`.
        output: folder of the sweep.

    Returns:
        a row for each cascade and each mean cost at which it is the best choice, cheapest first within the same
        stages; and the artefact with the cascades.

    Raises:
        CheckpointError: the folder holds no sound artefact.
        ValueError: another process works in `output`.
        OSError: something could not be written; names the path.
    """
    output = pathlib.Path(output)
    with FolderLock(output, "output folder"):
        swept = artefact.load(output / artefact.ARTEFACT, experiment.model)
        instances = list(dict.fromkeys(itertools.chain(*plan.cascades))) or [row.instance for row in swept.rows]
        statistics = share_statistics(experiment.model, {i: swept.batch_stats[i] for i in instances})
        evaluator = _evaluator(experiment, instances)
        classify = functools.partial(evaluator.classify, swept.params, statistics)
        logits, labels = _calibration_logits(experiment, plan, classify, instances)
        costs_of = _costs_of(experiment)
        chosen = choose_cascades(plan.cascades, logits, labels, costs_of)
        if not chosen:
            progress.say(
                f"no cascade found: on the {len(labels)} calibration images no instance is more accurate than a "
                "cheaper one; give names instead of auto to see some all the same"
            )
            return [], swept
        tallies = _tally_split(experiment, plan.split, classify, [calibrated.cascade for calibrated in chosen])
        rows = [
            _row(calibrated.cascade, costs_of(calibrated.cascade.stages), plan, logits, labels, tally)
            for calibrated, tally in zip(chosen, tallies)
        ]
        front = arithmetic.pareto_front(rows)
        rows = front if not plan.cascades else rows
        swept = dataclasses.replace(swept, cascades=tuple(row.to_record() for row in front))
        write_results(rows, plan, swept, output)
    return rows, swept


def choose_cascades(
    cascades: Sequence[Stages],
    logits: Mapping[SDPointInstance, np.ndarray],
    labels: np.ndarray,
    costs_of: Callable[[Sequence[SDPointInstance]], Sequence[int]],
) -> list[Calibrated]:
    """Chooses cascades at mean costs evenly spaced from that of the cheapest stage to that of the dearest.

    Args:
        cascades: the stages of each; empty to search among all instances of `logits`.
        logits: [n, K] of each instance, of the calibration images.
        labels: [n].
        costs_of: from stages to the costs of `choice.cascade.mean_cost`.

    Returns:
        for each of `cascades` its best thresholds at these costs; of a search, the best of all at these costs.
    """
    alone = [costs_of((instance,))[0] for instance in logits]
    targets = np.linspace(min(alone), max(alone), _TARGETS)
    found = cascades or arithmetic.search(logits, labels, costs_of, targets)
    best: list[list[Calibrated | None]] = []
    for stages in progress.bar(found, desc="calibrating", unit="cascade"):
        some = [logits[stage] for stage in stages]
        best.append(arithmetic.calibrate(stages, some, labels, costs_of(stages), targets))
    if not cascades:
        best = [[functools.reduce(arithmetic.better, at_target) for at_target in zip(*best)]]
    return list({calibrated.cascade: calibrated for calibrated in itertools.chain(*best) if calibrated}.values())


def stage_costs(
    model: SDPointNet, stages: Sequence[SDPointInstance], image_size: tuple[int, int], channels: int = 3
) -> tuple[int, ...]:
    """Counts the MACs of each stage for an image that reaches it: what the stages share is in the first one alone."""
    later = (
        _suffix_macs(model, after, model.last_shared_point(before), image_size, channels)
        for before, after in itertools.pairwise(stages)
    )
    return (_macs(model, stages[0], image_size, channels), *later)


_macs = functools.cache(count_macs)
_suffix_macs = functools.cache(count_suffix_macs)


def share_statistics(model: SDPointNet, batch_stats: Mapping[SDPointInstance, PyTree]) -> dict[SDPointInstance, PyTree]:
    """Gives all instances the same statistics before their points: those of the deepest one.

    They are equal up to rounding, as the groups of a sweep re-estimate from the same images; but not bit for bit, where
    a device adds up in no fixed order.
    """
    deepest = max(batch_stats, key=model.last_shared_point)
    shared = {
        instance: set(model.prefix_modules(model.last_shared_point(instance))) & set(tree)
        for instance, tree in batch_stats.items()
    }
    return {
        instance: {**tree, **{module: batch_stats[deepest][module] for module in shared[instance]}}
        for instance, tree in batch_stats.items()
    }


def write_results(rows: Sequence[CascadeRow], plan: CascadePlan, swept: Artefact, output: pathlib.Path) -> None:
    """Writes cascades.json, cascades.png and the artefact into the folder `output`."""
    record = {
        "model": swept.model,
        "dataset": swept.settings.dataset,
        "split": plan.split,
        "calibrated_on": plan.calibrated_on,
        "calibration_images": rows[0].calibration.n,
        "cascades": [row.to_record() for row in rows],
    }
    files.write_atomically(output / TABLE, json.dumps(record, indent=1) + "\n")
    dataset = pathlib.PurePath(swept.settings.dataset).name
    title = f"{swept.model} on {dataset}, {plan.split}: n = {rows[0].evaluated.n}, bars of one standard error"
    curves = {name: list(some) for name, some in itertools.groupby(rows, key=lambda row: row.name)}
    plot_cascades(curves if plan.cascades else {"cascades": rows}, swept.rows, output / PLOT, title=title)
    artefact.save(swept, output / artefact.ARTEFACT)


def cascade_points(rows: Iterable[CascadeRow]) -> list[tuple[float, float, float]]:
    """Returns the curve of cascades on the evaluated images: (mean MACs, top-1, its standard error), cheapest first."""
    measured = sorted((row.evaluated for row in rows), key=lambda found: found.mean_macs)
    return [(found.mean_macs, found.top1, found.top1_standard_error) for found in measured]


def plot_cascades(
    curves: Mapping[str, Sequence[CascadeRow]],
    rows: Sequence[InstanceRow],
    path: str | os.PathLike,
    *,
    title: str,
) -> None:
    """Draws top-1, with its standard error, against mean MACs: curves of cascades, and the single instances.

    Args:
        curves: the rows of each, by what it is called.
        rows: of the instances.
        path: of the picture.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    points = {name: cascade_points(some) for name, some in curves.items()}
    highest = max(row.macs for row in rows)
    scale, unit = next((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")) if highest >= s)

    def draw(some, **style):
        macs, top1, errors = np.array(some).T * [[1 / scale], [100], [100]]
        axes.errorbar(macs, top1, yerr=errors, elinewidth=0.8, **style)

    def singles(some):
        return [(row.macs, row.top1, row.top1_standard_error) for row in some]

    draw(singles(rows), color="0.6", marker="o", markersize=4, linestyle="", label="single instances", zorder=1)
    draw(singles(pareto_front(rows)), color="0.6", linewidth=2, label="their Pareto front", zorder=1)
    for index, (name, some) in enumerate(points.items()):
        draw(some, color=f"C{index % 10}", marker="o", markersize=5, linewidth=1.5, label=name, zorder=2)
    full = [row for row in rows if row.instance.point == 0]
    if full:
        draw(singles(full), color="black", marker="*", markersize=15, linestyle="", label="full resolution", zorder=3)
    axes.set(xlabel=f"{unit}MACs per image, mean", ylabel="top-1 accuracy (%)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    files.write_atomically(path, image.getvalue())


def format_table(rows: Sequence[CascadeRow], instances: Sequence[InstanceRow], full_macs: int) -> str:
    """Format the table for a terminal; beside each cascade the best single instance that costs no more.

    Costs are shares of `full_macs`.
    """
    head = f"{'mean MACs':>9} {'cost':>6} {'top-1':>8} {'single':>8} {'calibr.':>8}  cascade (share of the images that"
    lines = [f"{head} stop there, threshold)"]
    for row in sorted(rows, key=lambda row: row.evaluated.mean_macs):
        found, cascade = row.evaluated, row.cascade
        within = [100 * single.top1 for single in instances if single.macs <= found.mean_macs]
        single = f"{max(within):.2f} %" if within else "-"
        limits = [
            f" {'p' if cascade.confidence == 'max_probability' else 'margin'} >= {t:.3f}" for t in cascade.thresholds
        ]
        shares = zip(cascade.stages, found.shares, [*limits, ""])
        stages = " + ".join(f"{stage.name} ({100 * share:.0f} %{limit})" for stage, share, limit in shares)
        lines.append(
            f"{format_macs(found.mean_macs):>9} {100 * found.mean_macs / full_macs:>4.0f} % {100 * found.top1:>6.2f} % "
            f"{single:>8} {100 * row.calibration.top1:>6.2f} %  {stages}{', averaged' if cascade.average else ''}"
        )
    first = rows[0]
    lines.append(
        f"top-1 on {first.evaluated.n} images; single: of the best instance that costs no more; calibr.: on the "
        f"{first.calibration.n} images that all was chosen on ({first.calibrated_on})"
    )
    return "\n".join(lines)


def _row(cascade, costs, plan, logits, labels, tally):
    on_calibration = cascade.tally([logits[stage] for stage in cascade.stages], labels)
    calibration, evaluated = (Measured.from_tally(found, costs) for found in (on_calibration, tally))
    return CascadeRow(cascade, costs, plan.calibrated_on, calibration, evaluated)


def _costs_of(experiment):
    """Returns what counts the costs of stages for the images of the experiment."""
    size = tuple(experiment.config.dataset.image_size)
    return lambda stages: stage_costs(experiment.model, stages, size, experiment.dataset.channels)


def _evaluator(experiment, instances):
    evaluator = make_evaluator(experiment, instances)
    compiled = evaluator.compile_to_classify(experiment.config.compile_workers)
    progress.compile_with_bar(compiled, evaluator.num_parts, "cascades")
    return evaluator


def _calibration_logits(experiment, plan, classify, instances):
    """Returns the calibration images' logits, float16 [n, K] by instance, and labels [n]."""
    parts: dict[SDPointInstance, list[np.ndarray]] = {instance: [] for instance in instances}
    labels = []
    with _calibration_batches(experiment, plan) as batches:
        for found, some_labels in classify(progress.bar(batches, desc="calibration images", unit="batch")):
            labels.append(some_labels)
            for instance, logits in found.items():
                parts[instance].append(np.clip(logits, -_LARGEST, _LARGEST).astype(np.float16))
    if not sum(map(len, labels)):
        raise ValueError(f"no images to calibrate on in {plan.calibrated_on}")
    # One instance after the other, so that never all are there twice.
    return {instance: np.concatenate(parts.pop(instance)) for instance in instances}, np.concatenate(labels)


@contextlib.contextmanager
def _calibration_batches(experiment: Experiment, plan: CascadePlan) -> Iterator[Iterator[Batch]]:
    """Opens the calibration images, with masks: a random choice of the split, or of the training images."""
    size = experiment.evaluation_batch_size
    if plan.calibration_split:
        count = len(experiment.dataset.source(plan.calibration_split))
        order = np.random.default_rng(experiment.config.seed).permutation(count)
        chosen = np.zeros(-(-count // size) * size, bool)
        chosen[order[: plan.calibration_images]] = True
        with experiment.evaluation_batches(plan.calibration_split) as batches:
            yield regroup(batches, chosen)
    else:
        count = min(plan.calibration_images, experiment.num_training_images)
        with experiment.reestimation_batches("clean") as batches:
            some = itertools.islice(batches, -(-count // size))
            starts = itertools.count(0, size)
            yield (
                {**batch, "mask": (start + np.arange(size) < count).astype(np.float32)}
                for start, batch in zip(starts, some)
            )


def regroup(batches: Iterable[Batch], chosen: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Gathers some rows of batches into batches of the same size, the last one filled up with rows of mask 0.

    Args:
        batches: with `mask` [b]; its rows of 0 are left out.
        chosen: bool, which rows to take, one batch after the other.
    """
    held: dict[str, np.ndarray] = {}
    start = size = 0
    for batch in batches:
        size = len(batch["mask"])
        rows = np.flatnonzero(chosen[start : start + size] & (batch["mask"] > 0))
        start += size
        held = {name: np.concatenate([held.get(name, value[:0]), value[rows]]) for name, value in batch.items()}
        if len(held["mask"]) >= size:
            yield {name: value[:size] for name, value in held.items()}
            held = {name: value[size:] for name, value in held.items()}
    if held and len(held["mask"]):
        missing = size - len(held["mask"])
        yield {name: np.pad(value, [(0, missing), *[(0, 0)] * (value.ndim - 1)]) for name, value in held.items()}


def _tally_split(experiment, split, classify, cascades: Sequence[Cascade]) -> list[np.ndarray]:
    """Counts over the split, for each cascade; see `Cascade.tally`."""
    tallies = [np.zeros((len(cascade.stages), 2), int) for cascade in cascades]
    used = set(itertools.chain(*(cascade.stages for cascade in cascades)))
    num_examples = len(experiment.dataset.source(split))
    with experiment.evaluation_batches(split) as batches:
        total = -(-num_examples // experiment.evaluation_batch_size)
        for found, labels in classify(progress.bar(batches, total=total, desc="evaluating cascades"), instances=used):
            for cascade, tally in zip(cascades, tallies):
                tally += cascade.tally([found[stage] for stage in cascade.stages], labels)
    return tallies


def _calibration_split(experiment, split, given):
    """Returns the split to calibrate on; an empty name for the training images."""
    if given:
        if _share_images(experiment, given, split):
            raise ValueError(
                f"--calibration-split={given}: shares images with {split}, on which cascades are reported; give others"
            )
        return given
    validation, training = experiment.validation_split, experiment.config.dataset.train_split
    if not _share_images(experiment, validation, split):
        return validation
    if _share_images(experiment, training, split):
        raise ValueError(
            f"--cascades: the validation split, {validation}, and the training split, "
            f"{training}, share images with {split}, on which cascades are reported; give others as "
            "--calibration-split"
        )
    return ""


def _share_images(experiment, one, other):
    """Tells whether two splits have an example in common."""
    parts = itertools.product(*(experiment.dataset.source(split).parts for split in (one, other)))
    return any(a is b and max(start, begin) < min(stop, end) for (a, start, stop), (b, begin, end) in parts)
