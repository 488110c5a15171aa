"""One cell of a grid: its config, its training, its sweeps, its rows of results."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import grids
import jax
from ml_collections import ConfigDict
from results import CASCADE, Row

from sdpoint_jax.choice.cascade import select_cascade
from sdpoint_jax.config import RUN_TIME_KEYS, check_config, default_config, known_keys
from sdpoint_jax.evaluation import cascades
from sdpoint_jax.evaluation.sweep import sweep
from sdpoint_jax.experiment import Experiment, parse_instances
from sdpoint_jax.instance import FULL_RESOLUTION, SAMPLINGS, WEIGHTED, SDPointInstance
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.storage.artefact import InstanceRow
from sdpoint_jax.training import loop

_TIMES = "seconds.jsonl"
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "sdpoint_jax")
_PLACES = ("seed", "dataset.name", "init_from", "teacher", *RUN_TIME_KEYS)  # Not part of a recipe.


class NotAvailableError(ValueError):
    """A cell that this version of the package, or this command line, cannot run."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the data are, and how long to train: what differs between machines, and not between recipes.

    Attributes:
        data: value of `config.dataset.name`, as `cifar10` or `folder:/path/to/images`.
        data_dir: of prepared data sets; empty for the usual place.
        epochs: of a recipe of length 1; None for the study's own.
        init_from: checkpoint to start from, for the studies that need one.
        num_workers: processes that read images; 0 for a thread.
    """

    data: str
    data_dir: str = ""
    epochs: float | None = None
    init_from: str = ""
    num_workers: int = 0

    @property
    def name(self) -> str:
        """Names the data set; of a folder, its last part."""
        return pathlib.PurePath(self.data).name


@dataclasses.dataclass(frozen=True)
class Cell:
    """One recipe of a study with one seed."""

    study: grids.Study
    recipe: grids.Recipe
    seed: int

    @property
    def name(self) -> str:
        """Names the cell, as `A/sdpoint/0`."""
        return f"{self.study.name}/{self.recipe.name}/{self.seed}"


def list_cells(study: grids.Study, seeds: Iterable[int], recipes: Iterable[str] = ()) -> tuple[Cell, ...]:
    """Lists the cells of a study: all recipes with the first seed, then all with the next.

    Args:
        study: the study.
        seeds: of the grid.
        recipes: names of some recipes; all where there are none.

    Raises:
        ValueError: a recipe that the study does not have.
    """
    chosen = [study.recipe(name) for name in recipes] or study.recipes
    return tuple(Cell(study, recipe, seed) for seed in seeds for recipe in chosen)


def make_config(cell: Cell, source: Source) -> ConfigDict:
    """Makes the config of the cell's training.

    Raises:
        NotAvailableError: a key, value or net that this version does not have, or no checkpoint to start from.
    """
    config = default_config()
    changes = {**cell.study.base, **cell.recipe.changes}
    if cell.study.needs_init:
        if not source.init_from:
            raise NotAvailableError("starts from a trained net: give --init-from=CHECKPOINT")
        changes["init_from"] = source.init_from
        if changes.get("teacher") == grids.ORIGINAL:
            changes["teacher"] = source.init_from
    for key, value in changes.items():
        if key not in known_keys():
            raise NotAvailableError(f"this version has no config.{key}")
        *path, last = key.split(".")
        (config[path[0]] if path else config)[last] = value
    config.seed = cell.seed
    config.dataset.name, config.dataset.data_dir = source.data, source.data_dir
    config.dataset.num_workers = source.num_workers
    epochs = cell.recipe.length * (cell.study.epochs if source.epochs is None else source.epochs)
    config.num_epochs = float(epochs or 1)  # Of length 0, nothing is trained.
    _check(config)
    return config


def _check(config):
    try:
        create_model(config.model.name, num_classes=10)
    except ValueError:
        raise NotAvailableError(f"this version has no net {config.model.name!r}") from None
    try:
        check_config(config)
    except ValueError as error:
        raise NotAvailableError(str(error)) from None
    samplings = (*SAMPLINGS, *WEIGHTED)
    if config.sampling not in samplings:
        raise NotAvailableError(f"config.sampling {config.sampling!r}: this version has {', '.join(samplings)}")


def digest_settings(config: ConfigDict) -> str:
    """Returns a digest of what a config changes of the defaults; seed, place of the data and the like do not count."""
    given, defaults = _flat(config), _flat(default_config())
    changed = {key: value for key, value in given.items() if key not in _PLACES and value != defaults[key]}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


def _flat(config):
    nested = json.loads(config.to_json())
    flat = {key: value for key, value in nested.items() if not isinstance(value, dict)}
    return flat | {
        f"{room}.{key}": v for room, inner in nested.items() if isinstance(inner, dict) for key, v in inner.items()
    }


def workdir_of(cell: Cell, source: Source, output: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the cell's training, named after its settings: studies that share one share the run."""
    kind = f"{digest_settings(make_config(cell, source))}_seed{cell.seed}"
    return output / (kind if cell.recipe.length else f"untrained_{kind}")


def run_cell(
    cell: Cell, source: Source, output: pathlib.Path, sweeps: Iterable[grids.Sweep]
) -> Iterator[tuple[Row, ...]]:
    """Trains the net of a cell, or goes on with that, and sweeps it.

    Args:
        cell: the cell.
        source: of its data.
        output: folder of all workdirs.
        sweeps: those of the recipe that are to be done.

    Yields:
        the rows of each sweep, when it is done.

    Raises:
        NotAvailableError: see `make_config`.
        Interrupted: see `sdpoint_jax.training.loop.train`, also for its other errors.
    """
    config, workdir = make_config(cell, source), workdir_of(cell, source, output)
    if cell.recipe.length:
        _train(config, workdir)
    arrays, record = checkpoint.load_newest(workdir if cell.recipe.length else config.init_from)
    params, experiment = arrays["ema" if config.ema_decay else "params"], Experiment(config)
    experiment.check_params(params, str(workdir))
    shared = {
        "study": cell.study.name,
        "recipe": cell.recipe.name,
        "seed": cell.seed,
        "settings": digest_settings(config),
        "dataset": source.name,
        "train_images": experiment.num_training_images,
        "model": config.model.name,
        "image_size": "x".join(map(str, config.dataset.image_size)),
        "epochs": config.num_epochs if cell.recipe.length else 0.0,
        "images_seen": record["examples_seen"] if cell.recipe.length else 0,
        "machine": describe_machine(),
        "versions": describe_versions(),
        **_read_times(workdir / _TIMES),
    }
    for chosen in sweeps:
        experiment.config.reestimate_images, experiment.config.reestimate_batches = chosen.images, chosen.batches
        instances = parse_instances(experiment.model, chosen.instances, config.points, config.ratios)
        folder = workdir / "sweeps" / f"{chosen.images}_{chosen.batches}"
        swept = sweep(experiment, params, instances, folder, split=experiment.test_split)
        rows = [_row(row, chosen, shared) for row in swept]
        yield tuple(rows + (_cascades(experiment, instances, folder, rows) if chosen.cascades else []))


def _cascades(
    experiment: Experiment, instances: Sequence[SDPointInstance], folder: pathlib.Path, rows: Sequence[Row]
) -> list[Row]:
    """Finds the best cascade at each of `grids.CASCADE_COSTS`, on training images, as those of a sweep's artefact."""
    data, full = experiment.config.dataset, next(row for row in rows if row.instance == FULL_RESOLUTION.name)
    plan = cascades.plan_cascades(
        experiment, instances, cascades.AUTO, split=experiment.test_split, calibration_split=data.train_split
    )
    found, _ = cascades.evaluate_cascades(experiment, plan, folder)
    cheapest = min((row.evaluated.mean_macs for row in found), default=math.inf)
    best = {
        percent: select_cascade(found, percent / 100 * full.macs)
        for percent in grids.CASCADE_COSTS
        if percent / 100 * full.macs >= cheapest
    }
    return [
        dataclasses.replace(
            full,
            instance=f"{CASCADE}{percent}",
            macs=round(row.evaluated.mean_macs),
            top1=row.evaluated.top1,
            loss=None,
            n=row.evaluated.n,
        )
        for percent, row in best.items()
    ]


def _row(row: InstanceRow, chosen: grids.Sweep, shared: Mapping[str, Any]) -> Row:
    return Row(
        params=row.params,
        instance=row.name,
        macs=row.macs,
        top1=row.top1,
        loss=row.loss,
        n=row.n,
        statistics=chosen.images,
        statistics_batches=chosen.batches,
        statistics_images=row.reestimate_images,
        **shared,
    )


def _train(config, workdir):
    """Trains, unless that is done."""
    if not _is_finished(workdir / _TIMES):
        with _timed(workdir / _TIMES):
            loop.train(config, workdir)


@contextlib.contextmanager
def _timed(path):
    """Notes in a file that a part of a training begins, and how long it took when it ends, by itself or by a stop."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, {"begins": True})
    wall, cpu, finished = time.perf_counter(), time.process_time(), False
    try:
        yield
        finished = True
    finally:
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        _append(path, {"begins": False, "finished": finished, **seconds})


def _append(path, record):
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _is_finished(path):
    return any(record.get("finished") for record in _records(path))


def _read_times(path):
    """Returns the time of all parts of a training; None where one of them was cut off before it could say."""
    records = _records(path)
    ended = [record for record in records if not record["begins"]]
    known = records and 2 * len(ended) == len(records)
    return {
        "train_seconds": round(sum(record["wall"] for record in ended), 1) if known else None,
        "train_cpu_seconds": round(sum(record["cpu"] for record in ended), 1) if known else None,
    }


def describe_machine() -> str:
    """Describes the processor and the devices, as `AMD EPYC, 2 cores; cpu x 1`."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return f"{processor}, {os.cpu_count()} cores; {jax.devices()[0].device_kind} x {jax.device_count()}"


def describe_versions() -> str:
    """Describes the versions of Python and of the libraries that compute."""
    return ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in _LIBRARIES)]
    )
