"""Replays one step of a run that was not finite, to see where that begins."""

import contextlib
import functools
import pathlib

import jax
import numpy as np
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from sdpoint_jax.config import facts
from sdpoint_jax.programs import hosts
from sdpoint_jax.programs.devices import replicate, shard
from sdpoint_jax.training import restore
from sdpoint_jax.training.plan import Plan
from sdpoint_jax.training.step import Control


def replay(config: ConfigDict, workdir: pathlib.Path, step: int) -> str:
    """Computes the gradients of one step again, from its checkpoint, and changes nothing.

    Returns:
        what goes into the step, its loss and gradient norm, and which gradients are not finite.

    Raises:
        ValueError: a workdir of another config, or without a sound checkpoint of `step`.
    """
    hosts.check_same(functools.partial(facts, config))
    plan = Plan(config)
    state = restore.restore_step(plan, workdir, step).train
    with contextlib.closing(plan.training_batches(step)) as batches:
        batch = shard(next(iter(batches)))
    program = plan.programs(state).gradients(plan.draw(step))
    grads, metrics = jax.device_get(program(replicate(state.params), Control(step).shard(), batch))
    return _format(plan.describe(step), grads, float(metrics["loss"]))


def _format(what, grads, loss):
    flat = traverse_util.flatten_dict(grads, sep="/")
    bad = {name: int((~np.isfinite(grad)).sum()) for name, grad in flat.items()}
    bad = {name: count for name, count in bad.items() if count}
    lines = [f"{what}: loss {loss}, gradient norm {float(optax.tree.norm(grads))}"]
    lines += [f"  {name}: {count} of {flat[name].size} gradients not finite" for name, count in bad.items()]
    return "\n".join([*lines, f"gradients are not finite in {len(bad)} of {len(flat)} arrays"])
