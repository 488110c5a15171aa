"""Runs a cascade of SDPoint instances: each stage goes on from the activation that the stage before has left.

A stage's program takes uint8 images or the activation at a point, and gives logits and the activation at the point of
its own instance. After each stage the host decides which images go on; their rows are gathered on the device, into the
smallest allowed batch that holds them. So every program has one of a few batch sizes and can be compiled ahead of time.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.programs.devices import Switch, on_device, shapes_of

PyTree = Any
Stages = Sequence[SDPointInstance]

# From the logits [B, K] of each stage so far to the answer [B, K] and which images go on, bool [B].
Decide = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]]


class StageKey(NamedTuple):
    """The program of a stage.

    Attributes:
        start: the point whose activation it takes; None for images. Stages that start at one point share a program,
            whichever instance came before.
        instance: that it runs.
        batch_size: rows of its input.
        keeps: whether it also gives the activation at the point of `instance`, for the next stage.
    """

    start: int | None
    instance: SDPointInstance
    batch_size: int
    keeps: bool


class GatherKey(NamedTuple):
    """The program that gathers `end_size` rows of the activation at `point` from a batch of `start_size`."""

    point: int
    start_size: int
    end_size: int


Key = StageKey | GatherKey


def run_stage(
    params: PyTree,
    batch_stats: PyTree,
    x: Any,
    *,
    model: SDPointNet,
    preprocess: Callable[[jax.Array], jax.Array],
    start: int | None,
    instance: SDPointInstance,
    keeps: bool,
) -> Any:
    """Computes logits [B, K], float32, of uint8 images or from the activation at `start`.

    Returns:
        the logits; with `keeps`, (logits, activation at the point of `instance`).
    """
    net, end = type(model), model.last_shared_point(instance)
    apply = functools.partial(model.apply, {"params": params, "batch_stats": batch_stats}, train=False)
    if start is None:
        x = apply(preprocess(x), end, method=net.prefix)
    else:
        x = apply(x, start, end, method=net.between)
    logits = apply(x, end, instance=instance, method=net.suffix)
    return (logits, x) if keeps else logits


def gather(x: PyTree, rows: jax.Array) -> PyTree:
    """Return these rows, int32 [b], of a state of arrays [B, ...]."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), x)


class CascadePrograms:
    """The programs of a model's cascades on one device. Any number of threads may run them.

        programs = CascadePrograms(model, image_shape=(32, 32, 3), preprocess=preprocess)
        logits, stages = programs.run(cascade.stages, cascade.decide, params, batch_stats, images, [1, 8, 64])

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
        images = jax.ShapeDtypeStruct((1, *self._image_shape), np.uint8)
        self._variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), preprocess(x), train=False), images)
        self._programs: Switch[Key] = Switch(self._build, self._shapes)
        self._activation = functools.cache(self._infer_activation)

    def keys(self, stages: Stages, batch_sizes: Iterable[int]) -> tuple[Key, ...]:
        """Lists the programs of a cascade at these batch sizes.

        Raises:
            ValueError: an instance that the net does not have, one that cannot go on from the stage before, or batch
                sizes that are none.
        """
        sizes, starts = _ascending(batch_sizes), self._starts(stages)
        run = [self._stage_key(stages, starts, index, size) for index in range(len(stages)) for size in sizes]
        points = [point for point in starts if point is not None]
        pairs = itertools.product(points, itertools.combinations(sizes, 2))
        return (*run, *(GatherKey(point, larger, smaller) for point, (smaller, larger) in pairs))

    def compile(
        self, cascades: Iterable[Stages], batch_sizes: Iterable[int], workers: int = 0
    ) -> Iterator[tuple[Key, float]]:
        """Compiles all programs of the cascades ahead of time; yields (key, seconds), as `devices.Switch.compile`."""
        sizes = _ascending(batch_sizes)
        keys = dict.fromkeys(key for stages in cascades for key in self.keys(stages, sizes))
        return self._programs.compile(keys, workers)

    def run(
        self,
        stages: Stages,
        decide: Decide,
        params: PyTree,
        batch_stats: Mapping[SDPointInstance, PyTree],
        images: np.ndarray,
        batch_sizes: Iterable[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Classifies images with a cascade.

        Args:
            stages: in order of depth, so that each goes on from the prefix of the one before.
            decide: see `Decide`; called after each stage, also the last, with the images that have come so far. It is
                not asked who goes on after the last.
            params: of the net, and of single instances, on the device; see `models.norm_parameters`.
            batch_stats: of each stage, on the device; of one re-estimation, so that they are the same before a point.
            images: uint8 [B, H, W, C].
            batch_sizes: at which the programs run. A batch is padded to the next of them, and split by the largest.

        Returns:
            the answers [B, K], float32, and the stage at which each image stopped, int [B].

        Raises:
            ValueError: see `keys`.
        """
        sizes, starts = _ascending(batch_sizes), self._starts(stages)
        answers = np.empty((len(images), self._model.num_classes), np.float32)
        reached = np.empty(len(images), int)
        for first in range(0, len(images), sizes[-1]):
            part = slice(first, first + sizes[-1])
            run = functools.partial(self._run_stage, stages, starts, params, batch_stats)
            self._run_batch(run, starts, decide, images[part], sizes, answers[part], reached[part])
        return answers, reached

    def _run_batch(self, run, starts, decide, images, sizes, answers, reached):
        """Runs a batch of at most the largest size; fills in `answers` and `reached`."""
        padding = _next_size(sizes, len(images)) - len(images)
        x = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)]) if padding else images
        running = np.arange(len(images))  # The images that have come so far,
        rows = running  # and their rows in `x`.
        seen: list[np.ndarray] = []
        for stage in range(len(starts)):
            logits, x = run(stage, x)
            seen.append(np.asarray(logits)[rows])
            answer, goes_on = decide(seen)
            answers[running], reached[running] = answer, stage  # Those that go on are overwritten.
            running, rows, seen = running[goes_on], rows[goes_on], [found[goes_on] for found in seen]
            if not len(running) or x is None:
                break
            x, rows = self._regroup(starts[stage + 1], x, rows, _next_size(sizes, len(rows)))

    def _run_stage(self, stages, starts, params, batch_stats, stage, x):
        """Returns a stage's logits and the activation for the next one, None after the last."""
        key = self._stage_key(stages, starts, stage, _batch_size(x))
        output = self._programs[key](params_for(params, key.instance), batch_stats[key.instance], x)
        return output if key.keeps else (output, None)

    def _regroup(self, point, x, rows, size):
        """Gathers rows of an activation into a smaller batch, if it is smaller; returns it, and their rows in it."""
        if size >= _batch_size(x):
            return x, rows
        padded = np.zeros(size, np.int32)
        padded[: len(rows)] = rows
        return self._programs[GatherKey(point, _batch_size(x), size)](x, padded), np.arange(len(rows))

    def __contains__(self, key: Key) -> bool:
        """Tells whether the program of `key` is compiled."""
        return key in self._programs

    def __iter__(self) -> Iterator[Key]:
        """Iterates over the keys whose programs are compiled."""
        return iter(self._programs)

    def __len__(self) -> int:
        """Counts the programs that are compiled."""
        return len(self._programs)

    def _starts(self, stages: Stages) -> tuple[int | None, ...]:
        """Returns the point that each stage starts at."""
        for instance in stages:
            self._model.check_instance(instance)
        points = [self._model.last_shared_point(instance) for instance in stages]
        for before, after in itertools.pairwise(range(len(stages))):
            if points[before] > points[after]:
                shorter, longer = stages[after].name, stages[before].name
                raise ValueError(f"stage {shorter}: cannot go on from the prefix of {longer}, which is longer")
        return (None, *points[:-1])

    def _stage_key(self, stages, starts, index, batch_size):
        return StageKey(starts[index], stages[index], batch_size, index < len(stages) - 1)

    def _infer_activation(self, point):
        """Returns the shape of the activation at `point`, of one image."""
        images = jax.ShapeDtypeStruct((1, *self._image_shape), np.uint8)
        prefix = functools.partial(self._model.apply, train=False, method=type(self._model).prefix)
        return jax.eval_shape(
            lambda variables, x: prefix(variables, self._preprocess(x), point), self._variables, images
        )

    def _input(self, point, batch_size):
        if point is None:
            return jax.ShapeDtypeStruct((batch_size, *self._image_shape), np.uint8)
        of_one = self._activation(point)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), of_one)

    def _build(self, key):
        if isinstance(key, GatherKey):
            # A function of its own: else JAX gives what it has in memory, and that may be what it has loaded from disk,
            # which cannot be kept once more.
            return on_device(functools.partial(gather), self.device)
        start, instance, _, keeps = key
        static = dict(model=self._model, preprocess=self._preprocess, start=start, instance=instance, keeps=keeps)
        return on_device(functools.partial(run_stage, **static), self.device)

    def _shapes(self, key):
        if isinstance(key, GatherKey):
            return self._input(key.point, key.start_size), jax.ShapeDtypeStruct((key.end_size,), np.int32)
        variables = shapes_of((self._variables["params"], self._variables.get("batch_stats", {})))
        return *variables, self._input(key.start, key.batch_size)


def _batch_size(x):
    return len(jax.tree.leaves(x)[0])


def _ascending(batch_sizes: Iterable[int]) -> list[int]:
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"batch_sizes {sizes}: give at least one, each at least 1")
    return sizes


def _next_size(sizes: Sequence[int], count: int) -> int:
    return next(size for size in sizes if size >= count)
