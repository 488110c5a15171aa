"""Inference within a budget: loads a sweep's artefact, picks an SDPoint instance, predicts."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.inference import InferencePrograms
from sdpoint_jax.storage import artefact
from sdpoint_jax.storage.artefact import Artefact, InstanceRow

_LARGEST_BATCH = 256  # Larger ones are split; smaller ones padded to a power of two, so that programs stay few.


class Predictor:
    """A trained net with the statistics of the instances that were swept. Any number of threads may use it.

        predictor = Predictor.load("runs/digits/sweep/artefact")
        logits = predictor.predict(images, max_macs=5_000_000)

    Programs are compiled on first use, and kept on disk for the next start. `compile` makes them ahead of time; from
    then on nothing else is compiled: batches are padded to the sizes that were asked for, and an instance that was not
    is an error.

    Attributes:
        rows: the table, a row per instance.
        class_names: of the K classes.
        image_shape: (H, W, C) of the images it takes.
        programs: the compiled programs.
    """

    def __init__(self, swept: Artefact):
        """Takes the parts of an artefact; see `load`."""
        self._artefact = swept
        self.rows: tuple[InstanceRow, ...] = swept.rows
        self.class_names, self.image_shape = swept.class_names, swept.image_shape
        self.programs = InferencePrograms(
            create_model(swept.model, swept.num_classes, dtype=swept.dtype),
            image_shape=swept.image_shape,
            preprocess=functools.partial(normalize, mean=swept.mean, std=swept.std),
        )
        self._params = jax.device_put(swept.params, self.programs.device)
        self._batch_stats = {
            instance: jax.device_put(tree, self.programs.device) for instance, tree in swept.batch_stats.items()
        }
        self._compiled: dict[SDPointInstance, tuple[int, ...]] = {}  # Batch sizes, ascending.

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Predictor":
        """Loads and verifies the artefact at `path`, as `runs/digits/sweep/artefact`.

        Raises:
            CheckpointError: there is none, it is damaged, or it is a checkpoint without re-estimated statistics.
        """
        return cls(artefact.load(path))

    @property
    def instances(self) -> tuple[SDPointInstance, ...]:
        """Lists the instances that can be used."""
        return tuple(row.instance for row in self.rows)

    def compile(self, instances: Iterable[SDPointInstance | str], batch_sizes: Iterable[int], workers: int = 0) -> None:
        """Compiles ahead of time, or loads what an earlier process has compiled; from then on, nothing else is.

        Args:
            instances: or their names.
            batch_sizes: a batch is padded to the next of them, and split by the largest.
            workers: threads that compile; 0 for one per core.

        Raises:
            ValueError: an instance that was not swept, or a batch size below 1.
        """
        sizes = tuple(sorted(set(batch_sizes)))
        if not sizes or sizes[0] < 1:
            raise ValueError(f"batch_sizes {list(sizes)}: give at least one, each at least 1")
        chosen = [self._find(instance) for instance in instances]
        keys = [(instance, size) for instance in chosen for size in sizes]
        for _ in self.programs.compile(keys, workers):
            pass
        for instance in chosen:
            self._compiled[instance] = tuple(sorted({*self._compiled.get(instance, ()), *sizes}))

    def program(self, instance: SDPointInstance | str, batch_size: int) -> Callable[[ArrayLike], jax.Array]:
        """Returns the program of an instance for just this batch size, compiled now if it is not.

        Returns:
            from uint8 images [batch_size, H, W, C] to logits [batch_size, K] on the device, which it does not wait for.
        """
        found = self._find(instance)
        return functools.partial(self.programs[found, batch_size], self._params, self._batch_stats[found])

    def select(self, *, max_macs: float | None = None) -> SDPointInstance:
        """Picks the most accurate instance (top-1) within a budget; of equally accurate ones the cheapest.

        Args:
            max_macs: the most MACs that one image may cost; None for no limit.

        Raises:
            ValueError: no instance is that cheap; names the cheapest.
        """
        affordable = [row for row in self.rows if max_macs is None or row.macs <= max_macs]
        if not affordable:
            cheapest = min(self.rows, key=lambda row: row.macs)
            raise ValueError(
                f"max_macs {max_macs:g}: the cheapest instance, {cheapest.name}, needs {cheapest.macs} MACs"
            )
        return max(affordable, key=lambda row: (row.top1, -row.macs)).instance

    def predict(
        self, images: ArrayLike, *, max_macs: float | None = None, instance: SDPointInstance | str | None = None
    ) -> np.ndarray:
        """Classifies with one instance.

        Args:
            images: uint8 [B, H, W, C], of `image_shape`.
            max_macs: the budget for one image; see `select`.
            instance: the one to use, or its name, instead of a budget.

        Returns:
            logits [B, K], float32.

        Raises:
            ValueError: images of another shape or type, an impossible budget, an instance that was not swept, or one
                that was not compiled where `compile` was called.
        """
        if max_macs is not None and instance is not None:
            raise ValueError(f"max_macs {max_macs:g} and instance {instance}: give one of them")
        chosen = self.select(max_macs=max_macs) if instance is None else self._find(instance)
        checked, sizes = self._check_images(images), self._batch_sizes(chosen)
        starts = range(0, len(checked), sizes[-1])
        logits = [self._predict_batch(checked[start : start + sizes[-1]], chosen, sizes) for start in starts]
        return np.concatenate([np.empty((0, len(self.class_names)), np.float32), *logits])

    def _predict_batch(self, images, instance, sizes):
        size = next(size for size in sizes if size >= len(images))
        padded = np.pad(images, [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]) if size > len(images) else images
        return np.asarray(self.program(instance, size)(padded))[: len(images)]

    def _batch_sizes(self, instance) -> Sequence[int]:
        """Returns the batch sizes that `instance` may run at, ascending."""
        if not self._compiled:
            return [1 << power for power in range(_LARGEST_BATCH.bit_length())]
        if instance not in self._compiled:
            names = ", ".join(compiled.name for compiled in self._compiled)
            raise ValueError(f"instance {instance.name}: not compiled; compiled are {names}")
        return self._compiled[instance]

    def _find(self, instance) -> SDPointInstance:
        """Returns the instance, or the one of that name; raises ValueError if it was not swept."""
        found = SDPointInstance.from_name(instance) if isinstance(instance, str) else instance
        return self._artefact.row(found).instance

    def _check_images(self, given) -> np.ndarray:
        images = np.asarray(given)
        if images.ndim != 4 or images.shape[1:] != self.image_shape or images.dtype != np.uint8:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images {images.dtype} {list(images.shape)}: needs uint8 [B, {wanted}]")
        return images
