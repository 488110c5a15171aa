"""What a run starts from: its newest checkpoint, or parameters from elsewhere; and whether it is the same run."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import serialization
from ml_collections import ConfigDict

from sdpoint_jax import progress
from sdpoint_jax.config import differences, from_dict, named_net, to_dict, with_absolute_paths
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.models.norm_parameters import with_own_norms
from sdpoint_jax.programs.evaluator import Metrics
from sdpoint_jax.storage import checkpoint, files
from sdpoint_jax.training.logs import METRICS
from sdpoint_jax.training.plan import Plan
from sdpoint_jax.training.step import TrainState

PyTree = Any
CONFIG = "config.json"  # For people: a run is compared with the config in its checkpoints.
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sdpoint_jax")
_OF_RESULTS = ("jax", "jaxlib", "flax", "optax")  # Libraries whose versions may change a result's last bits.


@dataclasses.dataclass(frozen=True)
class Initial:
    """Parameters that a run starts from; see `config.init_from`.

    Attributes:
        params: nested dict of arrays; of a classifier that is drawn anew, the shapes.
        checksum: of the parameters as they were found.
    """

    params: PyTree
    checksum: int


@dataclasses.dataclass
class RunState:
    """What the loop carries from step to step, and a checkpoint keeps.

    Attributes:
        train: parameters and optimiser.
        step: how many steps are done.
        validation: metrics of the last validation, by instance name; None before the first.
        validated_at: the step after which that was.
        skipped: steps that were not finite and had no effect.
        initial: checksum of the parameters of `config.init_from`; None without them.
    """

    train: TrainState
    step: int = 0
    validation: dict[str, Metrics] | None = None
    validated_at: int = 0
    skipped: int = 0
    initial: int | None = None

    def to_record(self, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (arrays, record) of a checkpoint: host arrays, and what JSON holds."""
        validation = self.validation and {name: dataclasses.asdict(value) for name, value in self.validation.items()}
        record = {
            "config": to_dict(plan.config),
            "step": self.step,
            "examples_seen": self.step * plan.config.batch_size,
            "class_names": list(plan.experiment.dataset.class_names),
            "images": plan.images,
            "initial": self.initial,
            "teacher": plan.teacher and plan.teacher.checksum,
            "validation": validation,
            "validated_at": self.validated_at,
            "skipped": self.skipped,
            "versions": _versions(),
        }
        arrays = serialization.to_state_dict(jax.device_get(self.train))
        return {name: value for name, value in arrays.items() if value is not None}, record

    @classmethod
    def from_record(cls, train: TrainState, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> "RunState":
        """Returns the inverse of `to_record`; of `train`, the structure counts alone."""
        found = record["validation"]
        return cls(
            serialization.from_state_dict(train, {"ema": None, **arrays}),
            record["step"],
            found and {name: Metrics(**values) for name, values in found.items()},
            record["validated_at"],
            record["skipped"],
            record.get("initial"),
        )


def score(record: Mapping[str, Any], best_metric: str) -> float | None:
    """Scores a checkpoint's record by `config.best_metric`, the higher the better; None without a validation."""
    instance, _, metric = best_metric.partition("/")
    if not record.get("validation") or record["validated_at"] != record["step"]:
        return None
    value = record["validation"].get(instance, {}).get(metric)
    return -value if metric == "loss" and value is not None else value


def check_best_metric(plan: Plan) -> None:
    """Raises ValueError unless `config.best_metric` names a validation instance and top1 or loss."""
    instance, _, metric = plan.config.best_metric.partition("/")
    names = [instance.name for instance in plan.validation_instances]
    if instance not in names or metric not in ("top1", "loss"):
        raise ValueError(
            f"config.best_metric {plan.config.best_metric!r}: valid are {', '.join(names)}, each with /top1 or /loss"
        )


def check_workdir(workdir: pathlib.Path) -> None:
    """Raise ValueError if `workdir` holds the log of another program."""
    if (workdir / METRICS).exists() and not (workdir / CONFIG).exists():  # A run writes its config first.
        raise ValueError(f"{workdir / METRICS}: no {CONFIG} beside it says that a run wrote it; move it to train here")


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Write the config of a run into its workdir."""
    files.write_atomically(workdir / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")


def run_facts(plan: Plan, run: RunState | None, initial: Initial | None) -> dict[str, Any]:
    """Return what else decides the result of a run and may differ between hosts, for `hosts.check_same`."""
    names = plan.experiment.dataset.class_names
    return (
        {f"number of {purpose} images": count for purpose, (count, _) in plan.images.items()}
        | {f"digest of the {purpose} images": digest for purpose, (_, digest) in plan.images.items()}
        | {"number of classes": len(names)}
        | {f"class {index}": name for index, name in enumerate(names)}
        | {
            "parameters of config.init_from": initial and initial.checksum,
            "parameters of config.teacher": plan.teacher and plan.teacher.checksum,
            # A workdir that is not one folder for all hosts shows here.
            "newest checkpoint in the workdir": run and f"step {run.step}",
            "parameters in it": run and checkpoint.checksum_tree(run.train.params),
            "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].platform}",
        }
        | {f"version of {name}": version for name, version in _versions().items()}
    )


def restore(plan: Plan, workdir: pathlib.Path) -> RunState | None:
    """Return the newest sound checkpoint of a run; None where it has none yet.

    Raises:
        CheckpointError: none of the run's checkpoints is sound.
        ValueError: they are of another config, or of other classes, images or parameters to start from.
    """
    folder = workdir / checkpoint.CHECKPOINTS
    found = checkpoint.newest(folder)
    return _from_checkpoint(plan, folder / str(found[0]), *found[1:]) if found else None


def load_initial(experiment: Experiment, shapes: TrainState) -> Initial | None:
    """Load the parameters of `config.init_from`, before anything is compiled; None without them.

    Args:
        experiment: the net and its data.
        shapes: of the state before step 0.

    Raises:
        ValueError: they do not fit the net, or are of other classes.
    """
    config = experiment.config
    if not config.init_from:
        return None
    arrays, record = checkpoint.load_newest(config.init_from)
    params, where, hint = arrays["params"], f"config.init_from {config.init_from}", ""
    checksum = checkpoint.checksum_tree(params)
    if config.reset_head:
        params = params | {"head": params.get("head", {}) | {"dense": shapes.params["head"]["dense"]}}
    else:
        hint = "; config.reset_head=True draws a new classifier"
    net = named_net(record)
    if net not in (None, config.model.name):
        hint = f"; it is of a {net}: config.model.name={net}{hint and ' or '}{hint.removeprefix('; ')}"
    try:
        experiment.check_params(params, where)
        if not config.reset_head:
            experiment.check_classes(record, where)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    return Initial(params, checksum)


def create(plan: Plan, initial: Initial | None) -> RunState:
    """Return what a run without a checkpoint starts from: the parameters of `initial`, or drawn ones."""
    state = plan.create_state()
    if initial is None:
        return RunState(state)
    params = initial.params
    if plan.config.reset_head:
        params = params | {"head": params["head"] | {"dense": state.params["head"]["dense"]}}
    params = with_own_norms(plan.experiment.model, params, plan.own_norms)
    params = jax.tree.map(np.copy, params)  # Instances' own begin as the shared ones, apart from them in memory.
    state = state.replace(params=params, ema=state.ema and jax.tree.map(np.copy, params))
    return RunState(state, initial=initial.checksum)


def restore_step(plan: Plan, workdir: pathlib.Path, step: int) -> RunState:
    """Returns the checkpoint of one step; raises CheckpointError if that is missing or damaged."""
    path = workdir / checkpoint.CHECKPOINTS / str(step)
    if not path.exists():
        there = ", ".join(map(str, checkpoint.list_steps(path.parent))) or "none"
        raise checkpoint.CheckpointError(f"{path}: no such checkpoint; there are {there}")
    return _from_checkpoint(plan, path, *checkpoint.load(path))


def _versions():
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # A checkout that is not installed.
            found[name] = "unknown"
    return found


def _from_checkpoint(plan, path, arrays, record):
    if not isinstance(record, dict) or not {"config", "step", "validation"} <= record.keys():
        raise checkpoint.CheckpointError(f"{path}: not the checkpoint of a run")
    _check_config(plan.config, record, path)
    plan.experiment.check_classes(record, str(path))
    _check_images(plan, record, path)
    _check_parameters(plan, record, path)
    there, here = record.get("versions", {}), _versions()
    if changed := [name for name in _OF_RESULTS if there.get(name, here[name]) != here[name]]:
        listed = ", ".join(f"{name} {here[name]} (was {there[name]})" for name in changed)
        progress.say(f"other versions than before, results are the same up to rounding: {listed}")
    return RunState.from_record(plan.shapes_of_state(), arrays, record)


def _config_of(record, where):
    try:
        return with_absolute_paths(from_dict(record["config"]))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_config(config, record, where):
    there = _config_of(record, where)
    changed = differences(there, config)
    if "images" not in record and there.dataset.name != config.dataset.name:  # An earlier version kept no digest.
        changed.append(f"dataset.name: {there.dataset.name!r}, {config.dataset.name!r}")
    if changed:
        hint = ""
        if there.num_epochs != config.num_epochs:
            hint = "; the learning rate depends on num_epochs: to train on, give another --workdir and "
            hint += f"--config.init_from={where.parents[1]}"
        raise ValueError(f"{where} holds a run of another config (there, here): {'; '.join(changed)}{hint}")


def _check_images(plan, record, where):
    """Compare the images that a run has read with those that it would read from now on."""
    changed = []
    for purpose, (count, digest) in plan.images.items():
        was_count, was_digest = record.get("images", {}).get(purpose, (count, digest))
        if digest != was_digest:
            counts = f"{was_count} then, {count} now" if was_count != count else f"{count} then and now, but others"
            changed.append(f"{purpose} images: {counts}")
    if not changed:
        return
    what = f"{plan.experiment.dataset.name}: the images have changed since {where} ({'; '.join(changed)})"
    if plan.config.dataset.on_changed_images != "continue":
        raise ValueError(f"{what}; to resume with those of now: --config.dataset.on_changed_images=continue")
    progress.say(f"{what}; resuming with those of now")


def _check_parameters(plan, record, where):
    """Compare the parameters that `init_from` and `teacher` name now with those of the run; paths may differ."""
    config, there = plan.config, _config_of(record, where)
    teacher = plan.teacher and plan.teacher.checksum
    if record.get("teacher", teacher) != teacher:
        raise ValueError(f"{where}: trained with another teacher than config.teacher {config.teacher!r}")
    if config.init_from == there.init_from:
        return  # It has done its part, and may be gone by now.
    initial = load_initial(plan.experiment, plan.shapes_of_state())
    if record.get("initial") != (initial and initial.checksum):
        raise ValueError(
            f"{where} holds a run of another config (there, here): init_from: {there.init_from!r}, "
            f"{config.init_from!r}, whose parameters are others"
        )
