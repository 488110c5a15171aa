"""Re-estimates BatchNorm statistics and evaluates, for many SDPoint instances in one pass over the data.

Up to its point, an instance does just what full resolution does. So each batch walks the layers once, block by
block, along the *trunk*; at each position (see `models.resnet`) the instances that downsample there run what is
left of the net, their *suffix*. Full resolution is the suffix of the last position.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.programs.devices import AXIS, REPLICATED, SHARDED, Switch, parallel, prefetch, replicate, shapes_of
from sdpoint_jax.training.step import cross_entropy

_REESTIMATE, _EVALUATE = "reestimate", "evaluate"  # What a program does.


class Evaluator:
    """Re-estimates and evaluates some instances of a net; compiled once, it serves any parameters.

    A part of the net is an instance, for its suffix, or k = 0, 1, ... for the module of the trunk that leads to
    position k. Each part has two programs, to re-estimate and to evaluate.
    """

    def __init__(self, model, instances: Sequence[SDPointInstance], *, image_shape, batch_size: int, preprocess):
        """Builds from shapes; compiles nothing yet.

        Args:
            model: the net.
            instances: those of the net to serve.
            image_shape: (H, W, C) of the uint8 images.
            batch_size: images of one batch of this host, over all its devices.
            preprocess: uint8 images to the net's input.

        Raises:
            ValueError: no instances, or one that the net does not have.
        """
        if not instances:
            raise ValueError("no instances to evaluate")
        for instance in instances:
            model.check_instance(instance)
        self._model = model.clone(norm_momentum=0.0)  # A batch leaves its own statistics, nothing of the ones before.
        self._preprocess = preprocess
        self._suffixes = collections.defaultdict(list)
        for instance in dict.fromkeys(instances):
            self._suffixes[model.position_of(instance)].append(instance)
        self._last = max(self._suffixes)
        self._parts = [*range(self._last + 1), *(i for k in self._suffixes for i in self._suffixes[k])]

        images = jax.ShapeDtypeStruct((batch_size // jax.local_device_count(), *image_shape), np.uint8)
        self._infer_shapes(images, jax.device_count())
        self._programs = Switch(self._build, self._shapes)

    def compile(self, workers: int) -> Iterator[tuple[str, float]]:
        """Compiles all programs in `workers` threads; yields (what it does, seconds) of each."""
        keys = itertools.product((_REESTIMATE, _EVALUATE), self._parts)
        for (does, part), seconds in self._programs.compile(keys, workers):
            yield f"{does} {part}", seconds

    @property
    def num_programs(self) -> int:
        """Programs that `compile` compiles."""
        return 2 * len(self._parts)

    def reestimate(self, params, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[SDPointInstance, Any]:
        """BatchNorm statistics of each instance: exact moments pooled over all images of `batches`.

        Each batch is normalised by its own statistics, as in training; then the first and second moments of every
        layer's input are pooled over batches, devices and hosts (the authors keep a running average instead).

        Args:
            params: of the net.
            batches: host batches with `images` [b, H, W, C] uint8, all of the same size.

        Returns:
            `batch_stats` on the host, by instance.
        """
        params = replicate(params)
        moments = {part: replicate(jax.tree.map(_zeros, self._statistics_shapes[part])) for part in self._parts}
        count = 0
        for batch in prefetch({"images": batch["images"]} for batch in batches):
            count += 1
            share = np.float32(1 / count)
            x, done = batch["images"], list(moments.values())
            for k in range(self._last + 1):
                moments[k], x = self._programs[_REESTIMATE, k](self._of(k, params), moments[k], share, x)
                for instance in self._suffixes.get(k, ()):
                    moments[instance] = self._programs[_REESTIMATE, instance](
                        self._of(instance, params), moments[instance], share, x
                    )
            jax.block_until_ready(done)  # Stay at most one batch ahead of the devices.
        if not count:
            raise ValueError("no batches to re-estimate statistics from")
        moments = {key: jax.device_get(value) for key, value in moments.items()}
        return {instance: self._assemble(moments, instance) for k in self._suffixes for instance in self._suffixes[k]}

    def evaluate(self, params, statistics: Mapping[SDPointInstance, Any], batches) -> dict[SDPointInstance, dict]:
        """Metrics of each instance with its own statistics.

        Args:
            params: of the net.
            statistics: `batch_stats` of each instance, from `reestimate`.
            batches: host batches with `images` [b, H, W, C] uint8, `labels` [b] and `mask` [b], 1 for examples and
                0 for padding.

        Returns:
            By instance: mean `loss`, `top1`, `top5` (None for less than six classes) in 0..1, and `count`.
        """
        missing = [
            instance.name for k in self._suffixes for instance in self._suffixes[k] if instance not in statistics
        ]
        if missing:
            raise ValueError(f"no re-estimated statistics for {', '.join(missing)}")
        params = replicate(params)
        deepest = self._suffixes[self._last][0]
        statistics = {k: statistics[deepest] for k in range(self._last + 1)} | dict(statistics)
        statistics = {part: replicate(self._of(part, statistics[part])) for part in self._parts}
        sums = {part: replicate(_zero_sums()) for part in self._parts if isinstance(part, SDPointInstance)}
        for batch in prefetch(batches):
            x, done = batch["images"], list(sums.values())
            for k in range(self._last + 1):
                x = self._programs[_EVALUATE, k](self._of(k, params), statistics[k], x)
                for instance in self._suffixes.get(k, ()):
                    sums[instance] = self._programs[_EVALUATE, instance](
                        self._of(instance, params),
                        statistics[instance],
                        sums[instance],
                        x,
                        batch["labels"],
                        batch["mask"],
                    )
            jax.block_until_ready(done)
        return {instance: self._means(jax.device_get(total)) for instance, total in sums.items()}

    def _of(self, part, tree):
        """What a part of the net uses of parameters or statistics."""
        if isinstance(part, SDPointInstance):
            modules = self._model.modules[self._model.position_of(part) + 1 :]
        else:
            modules = self._model.modules[part : part + 1]
        return {module: tree[module] for module in modules if module in tree}

    def _assemble(self, moments, instance):
        trunk = (moments[k] for k in range(self._model.position_of(instance) + 1))
        return functools.reduce(lambda merged, part: merged | part, trunk, {}) | moments[instance]

    def _means(self, total):
        count = int(total.pop("count"))
        means = {name: float(value) / count for name, value in total.items()}
        if self._model.num_classes <= 5:
            means["top5"] = None
        return means | {"count": count}

    def _infer_shapes(self, images, devices):
        variables = jax.eval_shape(
            lambda x: self._model.init(jax.random.key(0), self._preprocess(x), train=False), images
        )
        self._params_shapes, self._activation_shapes, self._statistics_shapes = shapes_of(variables["params"]), {}, {}
        x = images
        for part in self._parts:
            self._statistics_shapes[part] = self._of(part, variables["batch_stats"])
        for k in range(self._last + 1):
            self._activation_shapes[k] = x
            forward = functools.partial(_forward, train=False, **self._net(k))
            x, _ = jax.eval_shape(forward, self._of(k, variables["params"]), self._statistics_shapes[k], x)
            for instance in self._suffixes.get(k, ()):
                self._activation_shapes[instance] = x
        self._activation_shapes = {
            part: jax.ShapeDtypeStruct((devices, *x.shape), x.dtype) for part, x in self._activation_shapes.items()
        }

    def _shapes(self, key):
        does, part = key
        params, statistics = self._of(part, self._params_shapes), self._statistics_shapes[part]
        x = self._activation_shapes[part]
        if does == _REESTIMATE:
            return params, statistics, jax.ShapeDtypeStruct((), np.float32), x
        if not isinstance(part, SDPointInstance):
            return params, statistics, x
        labels, mask = (jax.ShapeDtypeStruct(x.shape[:2], dtype) for dtype in (np.int32, np.float32))
        return params, statistics, shapes_of(_zero_sums()), x, labels, mask

    def _build(self, key):
        does, part = key
        is_suffix = isinstance(part, SDPointInstance)
        if does == _REESTIMATE:
            step = functools.partial(_pool_batch, **self._net(part))
            out_axes = REPLICATED if is_suffix else (REPLICATED, SHARDED)
            return parallel(step, in_axes=(REPLICATED, REPLICATED, REPLICATED, SHARDED), out_axes=out_axes)
        if not is_suffix:
            step = functools.partial(_advance, **self._net(part))
            return parallel(step, in_axes=(REPLICATED, REPLICATED, SHARDED), out_axes=SHARDED)
        in_axes = (REPLICATED, REPLICATED, REPLICATED, SHARDED, SHARDED, SHARDED)
        return parallel(functools.partial(_add_metrics, **self._net(part)), in_axes=in_axes, out_axes=REPLICATED)

    def _net(self, part):
        """The static arguments of `_forward` for a part."""
        return dict(model=self._model, preprocess=self._preprocess, part=part)


def _forward(params, statistics, x, *, model, preprocess, part, train):
    """Runs a part of the net; returns its output and the statistics of the batch, if training."""
    net = type(model)
    if isinstance(part, SDPointInstance):
        method = functools.partial(net.from_position, k=model.position_of(part), instance=part)
    elif part == 0:
        method, x = net.to_first_position, preprocess(x)
    else:
        method = functools.partial(net.next_position, k=part - 1)
    variables = {"params": params, "batch_stats": statistics}
    if train:
        del variables["batch_stats"]
    output, updated = model.apply(variables, x, method=method, train=train, mutable=["batch_stats"] if train else [])
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
    """Moments over all devices of the moments {"mean", "var"} of each, which cover equally many values."""
    if "mean" not in batch_stats:
        return {name: _pool_devices(value) for name, value in batch_stats.items()}
    mean = jax.lax.pmean(batch_stats["mean"], AXIS)
    return {"mean": mean, "var": jax.lax.pmean(batch_stats["var"] + (batch_stats["mean"] - mean) ** 2, AXIS)}


def _pool_moments(moments, batch_stats, share):
    """Moments over the batches so far and one more, which is `share` of them all; stable in float32 (Chan 1979)."""
    if "mean" not in moments:
        return {name: _pool_moments(moments[name], batch_stats[name], share) for name in moments}
    apart = batch_stats["mean"] - moments["mean"]
    within = (1 - share) * moments["var"] + share * batch_stats["var"]
    return {"mean": moments["mean"] + share * apart, "var": within + share * (1 - share) * apart**2}
