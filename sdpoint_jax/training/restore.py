"""What a run starts from: the config in its workdir, its newest checkpoint, or parameters from elsewhere."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import serialization
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sdpoint_jax.config import differences, from_dict, to_dict
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.storage import checkpoint, files
from sdpoint_jax.training.step import TrainState

CONFIG = "config.json"


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError if `workdir` holds a run of a config that computes something else."""
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        there = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a config: {error}") from None
    _check_same(config, there, f"workdir {workdir}")


def write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the config of a run for `check_workdir`."""
    files.write_atomically(workdir / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")


def restore_newest(
    config: ConfigDict, workdir: pathlib.Path, state: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """The state and record of the newest sound checkpoint of a run; None if it has none yet.

    Args:
        config: of the run.
        workdir: of the run, the same folder for all hosts.
        state: of the net of `config`; its values are not used.

    Raises:
        CheckpointError: none of the checkpoints is sound.
        ValueError: they are of another config, or the hosts do not see the same ones.
    """
    found = checkpoint.newest(workdir / checkpoint.CHECKPOINTS)
    _check_same_on_all_hosts(found[0] if found else -1, workdir)
    return found and _fill(config, workdir / checkpoint.CHECKPOINTS / str(found[0]), state, *found[1:])


def restore(
    config: ConfigDict, workdir: pathlib.Path, state: TrainState, step: int
) -> tuple[TrainState, dict[str, Any]]:
    """Likewise, of the checkpoint of one step; raises CheckpointError if that is missing or damaged."""
    path = workdir / checkpoint.CHECKPOINTS / str(step)
    if not path.exists():
        there = ", ".join(map(str, checkpoint.list_steps(path.parent))) or "none"
        raise checkpoint.CheckpointError(f"{path}: no such checkpoint; there are {there}")
    return _fill(config, path, state, *checkpoint.load(path))


def initial_params(experiment: Experiment, drawn: dict[str, Any]) -> dict[str, Any]:
    """The parameters in the checkpoint `config.init_from`, but for a classifier that is to be drawn anew.

    Args:
        experiment: its config names the checkpoint.
        drawn: parameters of the net.

    Raises:
        ValueError: they do not fit the net, or there are none.
    """
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


def _fill(config, path, state, arrays, record):
    if not isinstance(record, dict) or not {"config", "step", "validation"} <= record.keys():
        raise checkpoint.CheckpointError(f"{path}: not the checkpoint of a run")
    _check_same(config, record["config"], path)
    return serialization.from_state_dict(state, arrays), record


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
