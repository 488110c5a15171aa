"""A net and an experiment small enough for tests."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpoint_jax.config import default_config
from sdpoint_jax.evaluation import sweep as sweeping
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.storage.artefact import InstanceRow

IMAGE_SHAPE = (8, 8, 1)
preprocess = functools.partial(normalize, mean=(0.3,), std=(0.4,))


def net(**kwargs):
    """Three pre-activation blocks: seven instances."""
    return create_model("wrn10_1", 10, **kwargs)


def variables(model, image_shape=IMAGE_SHAPE):
    """Parameters and statistics, on the host."""
    return jax.device_get(jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))())


def batch(size, seed=0):
    """Random images and labels."""
    rng = np.random.RandomState(seed)
    images = rng.randint(0, 256, (size, *IMAGE_SHAPE)).astype(np.uint8)
    return {"images": images, "labels": rng.randint(0, 10, size).astype(np.int32)}


def config(**values):
    """Three instances on the digits, 30 steps, a validation at the end."""
    tiny = default_config()
    tiny.model.name = "wrn10_1"
    tiny.instances = "full,p01_r0.50,p02_r0.75"
    tiny.validation_instances = "full,p01_r0.50"
    tiny.batch_size = 40
    tiny.num_epochs = 1.0
    tiny.reestimate_batches = 2
    tiny.checkpoint_every_steps = 10
    tiny.update(values)
    return tiny


class Swept(NamedTuple):
    """A sweep of the tiny net."""

    folder: pathlib.Path
    rows: tuple[InstanceRow, ...]
    experiment: Experiment
    params: Any


def sweep(folder):
    """Sweeps all instances of the net with drawn parameters."""
    experiment = Experiment(config(instances="all"))
    params = variables(experiment.model)["params"]
    return Swept(
        folder, sweeping.sweep(experiment, params, experiment.instances, folder, split="test"), experiment, params
    )


def row(name, macs, top1, n=9, **values):
    """A row of a table, by the instance's name."""
    fields = dict(params=10, top5=None, loss=1.0, reestimated_from="augmented training images", reestimate_images=100)
    return InstanceRow(SDPointInstance.from_name(name), macs, top1=top1, n=n, **fields | values)
