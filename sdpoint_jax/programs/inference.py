"""Inference programs: uint8 images in, logits out, one program for each SDPoint instance and batch size."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.programs.devices import Switch, on_device, shapes_of

PyTree = Any
Key = tuple[SDPointInstance, int]  # An instance and a batch size.


def classify(
    params: PyTree,
    batch_stats: PyTree,
    images: jax.Array,
    *,
    model: SDPointNet,
    instance: SDPointInstance,
    preprocess: Callable[[jax.Array], jax.Array],
) -> Any:
    """Computes logits [B, K], float32, of uint8 images [B, H, W, C] with an instance's own statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    return model.apply(variables, preprocess(images), instance=instance, train=False)


class InferencePrograms:
    """The inference programs of a model: `programs[instance, batch_size](params, batch_stats, images)` gives logits.

    Each is compiled on first use or ahead of time, once, and kept on disk for the next start; see `devices.Switch`.
    """

    def __init__(
        self,
        model: SDPointNet,
        *,
        image_shape: tuple[int, int, int],
        preprocess: Callable[[jax.Array], jax.Array],
        device: jax.Device | None = None,
    ):
        """Builds from shapes; compiles nothing yet.

        Args:
            model: the net, without variables.
            image_shape: (H, W, C) of the uint8 images.
            preprocess: maps uint8 images to the net's input.
            device: of this host; its first by default.
        """
        self._model, self._image_shape, self._preprocess = model, tuple(image_shape), preprocess
        self.device = device or jax.local_devices()[0]
        variables = jax.eval_shape(
            lambda key: model.init(key, jnp.zeros((1, *self._image_shape)), train=False), jax.random.key(0)
        )
        self._variables = shapes_of((variables["params"], variables.get("batch_stats", {})))
        self._programs: Switch[Key] = Switch(self._build, self._shapes)

    def function(self, instance: SDPointInstance) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
        """Returns what the program of `instance` computes, for any batch size; see `classify`."""
        return functools.partial(classify, model=self._model, instance=instance, preprocess=self._preprocess)

    def compile(self, keys: Iterable[Key], workers: int = 0) -> Iterator[tuple[Key, float]]:
        """Compiles ahead of time; yields (key, seconds) of each program, as `devices.Switch.compile`."""
        return self._programs.compile(keys, workers)

    def __getitem__(self, key: Key) -> Callable[[PyTree, PyTree, jax.Array], jax.Array]:
        """Returns the program of (instance, batch size), compiled now if it is not there."""
        return self._programs[key]

    def __contains__(self, key: Key) -> bool:
        """Tells whether the program of (instance, batch size) is compiled."""
        return key in self._programs

    def __iter__(self) -> Iterator[Key]:
        """Iterates over the keys whose programs are compiled."""
        return iter(self._programs)

    def __len__(self) -> int:
        """Counts the programs that are compiled."""
        return len(self._programs)

    def _build(self, key):
        instance, _ = key
        return on_device(self.function(instance), self.device)

    def _shapes(self, key):
        _, batch_size = key
        return *self._variables, jax.ShapeDtypeStruct((batch_size, *self._image_shape), np.uint8)
