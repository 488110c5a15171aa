"""Re-estimates BatchNorm statistics and evaluates, for many SDPoint instances in one pass over the data.

Up to its point, an instance computes just what full resolution does. So each batch walks the prefix once, from point
to point; at each of them the instances that downsample there run their suffix. The suffix of full resolution starts at
the last point.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.models.shared_trace import reestimating
from sdpoint_jax.programs.devices import (
    AXIS,
    REPLICATED,
    SHARDED,
    Switch,
    parallel,
    prefetch,
    replicate,
    shape_of_shards,
    shapes_of,
)

PyTree = Any
Part = int | SDPointInstance
_REESTIMATE, _EVALUATE, _CLASSIFY = "reestimate", "evaluate", "classify"  # What a program does.


@dataclasses.dataclass(frozen=True)
class Metrics:
    """How well an instance classifies.

    Attributes:
        loss: mean cross-entropy.
        top1: share of the examples whose most likely class is the true one.
        top5: share of those whose five most likely classes hold the true one; None for less than six classes.
        count: evaluated examples.
    """

    loss: float
    top1: float
    top5: float | None
    count: int


class Evaluator:
    """Re-estimates and evaluates some instances of a net; compiled once, it serves any parameters.

    A *part* of the net is an instance, for its suffix, or a point, for the layers that lead to it from the point
    before. Each part has a program to evaluate and, where it has BatchNorm, one to re-estimate.
    """

    def __init__(
        self,
        model: SDPointNet,
        instances: Sequence[SDPointInstance],
        *,
        image_shape: tuple[int, int, int],
        batch_size: int,
        preprocess: Callable[[jax.Array], jax.Array],
    ):
        """Builds from shapes; compiles nothing yet.

        Args:
            model: the net.
            instances: those of the net to serve.
            image_shape: (H, W, C) of the uint8 images.
            batch_size: images of one batch of this host, over all its devices.
            preprocess: maps uint8 images to the net's input.

        Raises:
            ValueError: no instances, or one that the net does not have.
        """
        if not instances:
            raise ValueError("no instances to evaluate")
        for instance in instances:
            model.check_instance(instance)
        self._model = model
        self._preprocess = preprocess
        self._suffixes = collections.defaultdict(list)  # The instances whose suffix starts at a point.
        for instance in dict.fromkeys(instances):
            self._suffixes[model.last_shared_point(instance)].append(instance)
        self._instances = [instance for point in self._suffixes for instance in self._suffixes[point]]
        self._points = (STEM, *range(1, max(self._suffixes) + 1))
        self._parts = [*self._points, *self._instances]
        self._infer_shapes((batch_size, *image_shape))
        # Re-estimation walks to the last point that something with statistics follows or precedes.
        with_statistics = [part for part in self._parts if self._statistics_shapes[part]]
        ends = (
            model.last_shared_point(part) if isinstance(part, SDPointInstance) else part for part in with_statistics
        )
        last = max(ends, default=None)
        self._points_reestimated = tuple(point for point in self._points if last is not None and point <= last)
        self._programs: Switch[tuple[str, Part]] = Switch(self._build, self._shapes)

    def compile(self, workers: int = 0) -> Iterator[tuple[str, float]]:
        """Compiles all programs in `workers` threads (0: one per core); yields (what it does, seconds) of each."""
        return self._compile(self._keys(), workers)

    def compile_to_classify(self, workers: int = 0) -> Iterator[tuple[str, float]]:
        """Compiles the programs of `classify`, `num_parts` of them; as `compile`."""
        does = {part: _CLASSIFY if isinstance(part, SDPointInstance) else _EVALUATE for part in self._parts}
        return self._compile([(does[part], part) for part in self._parts], workers)

    def _compile(self, keys, workers):
        for (does, part), seconds in self._programs.compile(keys, workers):
            yield f"{does} {part}", seconds

    @property
    def num_programs(self) -> int:
        """Counts the programs that `compile` compiles."""
        return len(self._keys())

    @property
    def num_parts(self) -> int:
        """Counts the parts of the net."""
        return len(self._parts)

    def _keys(self):
        """Lists the programs that `reestimate` and `evaluate` use; a part without BatchNorm has one alone."""
        suffixes = filter(self._has_statistics, self._instances)
        reestimated = [(_REESTIMATE, part) for part in (*self._points_reestimated, *suffixes)]
        return [*reestimated, *((_EVALUATE, part) for part in self._parts)]

    def _has_statistics(self, part):
        return bool(self._statistics_shapes[part])  # The head of a post-activation ResNet has none.

    @property
    def has_statistics(self) -> bool:
        """Whether there is anything to re-estimate: a network without BatchNorm has no statistics."""
        return bool(self._points_reestimated)

    def reestimate(self, params: PyTree, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[SDPointInstance, PyTree]:
        """Computes the BatchNorm statistics of each instance: exact moments pooled over all images of `batches`.

        Each batch is normalised by its own statistics, as in training; then the first and second moments of every
        layer's input are pooled over batches, devices and hosts (the authors keep a running average instead).

        Args:
            params: of the net, and of single instances; see `models.norm_parameters`.
            batches: host batches with `images` [b, H, W, C] uint8, all of the same size.

        Returns:
            `batch_stats` on the host, by instance; empty ones where the network has no BatchNorm, which reads no batch.

        Raises:
            ValueError: no batches.
        """
        if not self.has_statistics:
            return {instance: {} for instance in self._instances}
        params = self._place_params(params)
        moments = {part: replicate(jax.tree.map(_zeros, self._statistics_shapes[part])) for part in self._parts}
        count = 0
        for batch in prefetch({"images": batch["images"]} for batch in batches):
            count += 1
            share = np.float32(1 / count)
            x, done = batch["images"], list(moments.values())
            for point in self._points_reestimated:
                moments[point], x = self._programs[_REESTIMATE, point](params[point], moments[point], share, x)
                for instance in filter(self._has_statistics, self._suffixes.get(point, ())):
                    moments[instance] = self._programs[_REESTIMATE, instance](
                        params[instance], moments[instance], share, x
                    )
            jax.block_until_ready(done)  # Stay at most one batch ahead of the devices.
        if not count:
            raise ValueError("no batches to re-estimate statistics from")
        moments = {key: jax.device_get(value) for key, value in moments.items()}
        return {instance: self._assemble(moments, instance) for instance in self._instances}

    def evaluate(
        self,
        params: PyTree,
        statistics: Mapping[SDPointInstance, PyTree],
        batches: Iterable[Mapping[str, np.ndarray]],
    ) -> dict[SDPointInstance, Metrics]:
        """Computes the metrics of each instance with its own statistics.

        Args:
            params: of the net, and of single instances; see `models.norm_parameters`.
            statistics: `batch_stats` of each instance; for the layers before its point the same for all instances, as
                `reestimate` returns them.
            batches: host batches with `images` [b, H, W, C] uint8, `labels` [b] and `mask` [b], 1 for examples and
                0 for padding.

        Returns:
            the metrics, by instance.

        Raises:
            ValueError: an instance without statistics, or whose statistics differ from another's before its point; or
                no examples.
        """
        params, statistics = self._place(params, statistics)
        sums = {instance: replicate(_zero_sums()) for instance in self._instances}
        for batch in prefetch(batches):
            done = list(sums.values())
            for instance, x in self._activations(params, statistics, batch["images"]):
                sums[instance] = self._programs[_EVALUATE, instance](
                    params[instance],
                    statistics[instance],
                    sums[instance],
                    x,
                    batch["labels"],
                    batch["mask"],
                )
            jax.block_until_ready(done)
        return {instance: self._means(jax.device_get(total)) for instance, total in sums.items()}

    def classify(
        self,
        params: PyTree,
        statistics: Mapping[SDPointInstance, PyTree],
        batches: Iterable[Mapping[str, np.ndarray]],
        instances: Collection[SDPointInstance] | None = None,
    ) -> Iterator[tuple[dict[SDPointInstance, np.ndarray], np.ndarray]]:
        """Computes the logits of each instance with its own statistics; on a single host only.

        Args:
            params: of the net, and of single instances; see `models.norm_parameters`.
            statistics: see `evaluate`.
            batches: see `evaluate`.
            instances: some of the evaluator's; all by default.

        Yields:
            for each batch, of its examples without the padding: logits [m, K], float32, by instance; labels [m].

        Raises:
            ValueError: as `evaluate`, except that batches without examples are no error.
        """
        wanted = set(self._instances if instances is None else instances)
        params, statistics = self._place(params, statistics)
        for batch in prefetch(batches):
            found = {
                instance: self._programs[_CLASSIFY, instance](params[instance], statistics[instance], x)
                for instance, x in self._activations(params, statistics, batch["images"])
                if instance in wanted
            }
            labels, mask = (np.asarray(batch[name]).reshape(-1) for name in ("labels", "mask"))
            used = mask > 0
            logits = {instance: np.asarray(some).reshape(len(used), -1)[used] for instance, some in found.items()}
            yield logits, labels[used]

    def _place(self, params, statistics):
        """Puts the parameters and the statistics of each part on the devices; checks the statistics."""
        if missing := [instance.name for instance in self._instances if instance not in statistics]:
            raise ValueError(f"no re-estimated statistics for {', '.join(missing)}")
        deepest = self._suffixes[self._points[-1]][0]
        self._check_shared(statistics, deepest)
        by_part = {point: statistics[deepest] for point in self._points} | dict(statistics)
        return self._place_params(params), {part: replicate(self._of(part, by_part[part])) for part in self._parts}

    def _place_params(self, params):
        """Puts parameters on the devices; returns those of each part, which share what is shared."""
        params = replicate(params)
        used = {part: part if isinstance(part, SDPointInstance) else FULL_RESOLUTION for part in self._parts}
        return {part: self._of(part, params_for(params, instance)) for part, instance in used.items()}

    def _activations(self, params, statistics, x):
        """Walks the prefix once; yields each instance with the activation at its point."""
        for point in self._points:
            x = self._programs[_EVALUATE, point](params[point], statistics[point], x)
            for instance in self._suffixes.get(point, ()):
                yield instance, x

    def _of(self, part, tree):
        """Picks what a part of the net uses of parameters or statistics."""
        if isinstance(part, SDPointInstance):
            modules = self._model.suffix_modules(self._model.last_shared_point(part))
        else:
            modules = self._model.prefix_modules(part)[-1:]
        return {module: tree[module] for module in modules if module in tree}

    def _assemble(self, moments, instance):
        last = self._model.last_shared_point(instance)
        prefix = (moments[point] for point in self._points if point <= last)
        return functools.reduce(lambda merged, part: merged | part, prefix, {}) | moments[instance]

    def _check_shared(self, statistics, deepest):
        """Raises ValueError unless the statistics of all instances are those of `deepest` before their points."""
        for instance in self._instances:
            modules = self._model.prefix_modules(self._model.last_shared_point(instance))
            theirs, shared = (
                traverse_util.flatten_dict({module: tree[module] for module in modules if module in tree}, sep="/")
                for tree in (statistics[instance], statistics[deepest])
            )
            same = functools.partial(np.array_equal, equal_nan=True)
            if different := [name for name in shared if not same(theirs.get(name), shared[name])]:
                raise ValueError(
                    f"statistics of {instance.name} and {deepest.name} differ before the point of the first, in "
                    f"{different[0]}: they are not from one re-estimation, so evaluate these instances separately"
                )

    def _means(self, total):
        count = int(total.pop("count"))
        if not count:
            raise ValueError("no examples to evaluate: all were padding, or left out by config.dataset.on_bad_image")
        means = {name: float(value) / count for name, value in total.items()}
        return Metrics(means["loss"], means["top1"], means["top5"] if self._model.num_classes > 5 else None, count)

    def _infer_shapes(self, images_shape):
        sharded = shape_of_shards(images_shape, np.uint8)
        devices, *on_one = sharded.shape
        images = jax.ShapeDtypeStruct(tuple(on_one), np.uint8)
        variables = jax.eval_shape(
            lambda x: self._model.init(jax.random.key(0), self._preprocess(x), train=False), images
        )
        self._params_shapes, activations, self._statistics_shapes = shapes_of(variables["params"]), {}, {}
        for part in self._parts:
            self._statistics_shapes[part] = self._of(part, variables.get("batch_stats", {}))
        x = images
        for point in self._points:
            activations[point] = x
            forward = functools.partial(_forward, train=False, **self._net(point))
            x, _ = jax.eval_shape(forward, self._of(point, variables["params"]), self._statistics_shapes[point], x)
            activations |= dict.fromkeys(self._suffixes.get(point, ()), x)
        on_all = lambda leaf: jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype)  # noqa: E731
        self._input_shapes = {part: jax.tree.map(on_all, x) for part, x in activations.items()}

    def _shapes(self, key):
        does, part = key
        params, statistics = self._of(part, self._params_shapes), self._statistics_shapes[part]
        x = self._input_shapes[part]
        if does == _REESTIMATE:
            return params, statistics, jax.ShapeDtypeStruct((), np.float32), x
        if does == _CLASSIFY or not isinstance(part, SDPointInstance):
            return params, statistics, x
        images = jax.tree.leaves(x)[0].shape[:2]
        labels, mask = (jax.ShapeDtypeStruct(images, dtype) for dtype in (np.int32, np.float32))
        return params, statistics, shapes_of(_zero_sums()), x, labels, mask

    def _build(self, key):
        does, part = key
        is_suffix = isinstance(part, SDPointInstance)
        if does == _REESTIMATE:
            step = functools.partial(_pool_batch, **self._net(part))
            out_axes = REPLICATED if is_suffix else (REPLICATED, SHARDED)
            return parallel(step, in_axes=(REPLICATED, REPLICATED, REPLICATED, SHARDED), out_axes=out_axes)
        if not is_suffix or does == _CLASSIFY:
            step = functools.partial(_advance, **self._net(part))
            return parallel(step, in_axes=(REPLICATED, REPLICATED, SHARDED), out_axes=SHARDED)
        in_axes = (REPLICATED, REPLICATED, REPLICATED, SHARDED, SHARDED, SHARDED)
        return parallel(functools.partial(_add_metrics, **self._net(part)), in_axes=in_axes, out_axes=REPLICATED)

    def _net(self, part):
        """Returns the static arguments of `_forward` for a part."""
        return dict(model=self._model, preprocess=self._preprocess, part=part)


def _forward(params, statistics, x, *, model, preprocess, part, train):
    """Runs a part of the net; returns its output and the statistics of the batch, if training."""
    net = type(model)
    if isinstance(part, SDPointInstance):
        method = functools.partial(net.suffix, start=model.last_shared_point(part), instance=part)
    elif part == STEM:
        method, x = functools.partial(net.prefix, point=STEM), preprocess(x)
    else:
        method = functools.partial(net.between, start=part - 1 or STEM, end=part)
    if not train:
        return model.apply({"params": params, "batch_stats": statistics}, x, method=method, train=False), {}
    with reestimating():
        output, updated = model.apply({"params": params}, x, method=method, train=True, mutable=["batch_stats"])
    return output, updated.get("batch_stats", {})


def _pool_batch(params, moments, share, x, *, part, **kwargs):
    output, batch_stats = _forward(params, None, x, part=part, train=True, **kwargs)
    moments = _pool_moments(moments, _pool_devices(batch_stats), share)
    return moments if isinstance(part, SDPointInstance) else (moments, output)


def _advance(params, statistics, x, **kwargs):
    return _forward(params, statistics, x, train=False, **kwargs)[0]


def _add_metrics(params, statistics, sums, x, labels, mask, **kwargs):
    logits, _ = _forward(params, statistics, x, train=False, **kwargs)
    return jax.tree.map(jnp.add, sums, jax.lax.psum(_metric_sums(logits, labels, mask), AXIS))


def _zeros(shape):
    return np.zeros(shape.shape, shape.dtype)


def _zero_sums():
    return {name: np.float32(0) for name in ("loss", "top1", "top5", "count")}


def _metric_sums(logits, labels, mask):
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
    values = {"loss": cross_entropy(logits, labels), "top1": best[:, 0], "top5": best.any(-1), "count": 1.0}
    return {name: jnp.sum(jnp.where(mask > 0, value, 0.0)) for name, value in values.items()}


def _pool_devices(batch_stats):
    """Pools the moments of all devices: the moments {"mean", "var"} of each, which cover equally many values."""
    if "mean" not in batch_stats:
        return {name: _pool_devices(value) for name, value in batch_stats.items()}
    mean = jax.lax.pmean(batch_stats["mean"], AXIS)
    return {"mean": mean, "var": jax.lax.pmean(batch_stats["var"] + (batch_stats["mean"] - mean) ** 2, AXIS)}


def _pool_moments(moments, batch_stats, share):
    """Pools the moments of the batches so far with those of one more, which is `share` of them all.

    Stable in float32 (Chan, Golub & LeVeque 1979).
    """
    if "mean" not in moments:
        return {name: _pool_moments(moments[name], batch_stats[name], share) for name in moments}
    apart = batch_stats["mean"] - moments["mean"]
    within = (1 - share) * moments["var"] + share * batch_stats["var"]
    return {"mean": moments["mean"] + share * apart, "var": within + share * (1 - share) * apart**2}
