"""What a run starts from: the config in its workdir, its newest checkpoint, or parameters from elsewhere."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sdpoint_jax.config import differences, from_dict, to_dict
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.models.norm_parameters import with_own_norms
from sdpoint_jax.programs.evaluator import Metrics
from sdpoint_jax.storage import checkpoint, files
from sdpoint_jax.training.logs import METRICS
from sdpoint_jax.training.plan import Plan
from sdpoint_jax.training.step import TrainState

CONFIG = "config.json"
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass
class RunState:
    """What the loop carries from step to step, and a checkpoint keeps.

    Attributes:
        train: parameters and optimiser.
        step: how many steps are done.
        validation: metrics of the last validation, by instance name; None before the first.
        validated_at: the step after which that was.
        skipped: steps that were not finite and had no effect.
    """

    train: TrainState
    step: int = 0
    validation: dict[str, Metrics] | None = None
    validated_at: int = 0
    skipped: int = 0

    def to_record(self, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (arrays, record) of a checkpoint: host arrays, and what JSON holds."""
        validation = self.validation and {name: dataclasses.asdict(value) for name, value in self.validation.items()}
        record = {
            "config": to_dict(plan.config),
            "step": self.step,
            "examples_seen": self.step * plan.config.batch_size,
            "class_names": list(plan.experiment.dataset.class_names),
            "validation": validation,
            "validated_at": self.validated_at,
            "skipped": self.skipped,
            "versions": {name: metadata.version(name) for name in _LIBRARIES},
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


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raise ValueError if `workdir` holds a run that computes something else, or the log of another program."""
    path = workdir / CONFIG
    if not path.exists():
        if (workdir / METRICS).exists():  # A run writes its config first.
            raise ValueError(
                f"{workdir / METRICS}: no {CONFIG} beside it says that a run wrote it; move it to train here"
            )
        return
    try:
        there = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a config: {error}") from None
    _check_same(config, there, f"workdir {workdir}")


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the config of a run for `check_workdir`."""
    files.write_atomically(workdir / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")


def restore(plan: Plan, workdir: pathlib.Path) -> RunState | None:
    """Returns the newest sound checkpoint of a run; None where it has none yet.

    Args:
        plan: of the run.
        workdir: of the run, the same folder for all hosts.

    Raises:
        CheckpointError: none of the run's checkpoints is sound.
        ValueError: they are of another config, or the hosts do not see the same ones.
    """
    folder = workdir / checkpoint.CHECKPOINTS
    found = checkpoint.newest(folder)
    _check_same_on_all_hosts(found[0] if found else -1, workdir)
    return _from_checkpoint(plan, folder / str(found[0]), *found[1:]) if found else None


def create(plan: Plan) -> RunState:
    """Returns what a run without a checkpoint starts from: the parameters of `config.init_from`, or drawn ones.

    Raises:
        ValueError: `config.init_from` does not fit the net.
    """
    state = plan.create_state()
    if plan.config.init_from:
        params = with_own_norms(plan.experiment.model, _initial_params(plan.experiment, state.params), plan.own_norms)
        params = jax.tree.map(np.copy, params)  # Instances' own begin as the shared ones, apart from them in memory.
        state = state.replace(params=params, ema=state.ema and jax.tree.map(np.copy, params))
    return RunState(state)


def restore_step(plan: Plan, workdir: pathlib.Path, step: int) -> RunState:
    """Returns the checkpoint of one step; raises CheckpointError if that is missing or damaged."""
    path = workdir / checkpoint.CHECKPOINTS / str(step)
    if not path.exists():
        there = ", ".join(map(str, checkpoint.list_steps(path.parent))) or "none"
        raise checkpoint.CheckpointError(f"{path}: no such checkpoint; there are {there}")
    return _from_checkpoint(plan, path, *checkpoint.load(path))


def _initial_params(experiment: Experiment, drawn):
    """Returns the parameters in `config.init_from`, but for a classifier that is to be drawn anew."""
    source = experiment.config.init_from
    arrays, _ = checkpoint.load_newest(source)
    params = arrays["params"]
    if experiment.config.reset_head:
        params = params | {"head": params.get("head", {}) | {"dense": drawn["head"]["dense"]}}
    try:
        experiment.check_params(params, f"config.init_from {source}")
    except ValueError as error:
        hint = "" if experiment.config.reset_head else "; config.reset_head=True draws a new classifier"
        raise ValueError(f"{error}{hint}") from None
    return params


def _from_checkpoint(plan, path, arrays, record):
    if not isinstance(record, dict) or not {"config", "step", "validation"} <= record.keys():
        raise checkpoint.CheckpointError(f"{path}: not the checkpoint of a run")
    _check_same(plan.config, record["config"], path)
    return RunState.from_record(plan.shapes_of_state(), arrays, record)


def _check_same(config, there, where):
    try:
        changed = differences(from_dict(there), config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if changed:
        raise ValueError(f"{where} holds a run of another config (there, here): {'; '.join(changed)}")


def _check_same_on_all_hosts(step, workdir):
    if jax.process_count() == 1:
        return
    steps = multihost_utils.process_allgather(np.int32(step)).ravel().tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"workdir {workdir}: the hosts find checkpoints of different steps, {steps} (-1 for none): "
            "it must be one folder that all of them share"
        )
