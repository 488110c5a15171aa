"""The training step: an ordinary SGD step of one SDPoint instance, a program of its own."""

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.programs.devices import AXIS, REPLICATED, SHARDED, Switch, parallel, shapes_of

_UPDATE = "update"  # The key of the program that all instances share.


@flax.struct.dataclass
class TrainState:
    """What a training step changes. It has no BatchNorm statistics: those are re-estimated, for each instance.

    Attributes:
        step: number of the next step, int32 scalar.
        params: float32 parameters of the net.
        opt_state: of the optimiser.
    """

    step: Any
    params: Any
    opt_state: Any


def create_state(
    model, optimizer: optax.GradientTransformation, seed: int, image_shape: tuple[int, int, int]
) -> TrainState:
    """The state before step 0, on the host, with parameters drawn from `seed`; `image_shape` is (H, W, C)."""

    @jax.jit
    def init(key):
        params = model.init(key, jnp.zeros((1, *image_shape)), train=False)["params"]
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    return jax.device_get(init(jax.random.key(seed)))


def sgd(momentum: float, nesterov: bool, weight_decay: float, clip_norm: float = 0.0) -> optax.GradientTransformation:
    """SGD as PyTorch defines it, but for the learning rate, which the training step applies.

    Args:
        momentum: of the gradients, weight decay included.
        nesterov: whether to look ahead by it.
        weight_decay: L2 coefficient on every parameter.
        clip_norm: the largest global norm of the gradients; 0 for no limit.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov),
    )


def normalize(images, mean: tuple[float, ...], std: tuple[float, ...]):
    """uint8 images [..., C] to float32, less `mean` and over `std`, one each per channel on the scale 0..1."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = jnp.asarray(mean, jnp.float32).reshape(shape), jnp.asarray(std, jnp.float32).reshape(shape)
    return (images.astype(jnp.float32) / 255 - mean) / std


def cross_entropy(logits, labels, label_smoothing: float = 0.0):
    """Cross-entropy [B] of logits [B, K] and labels [B]; smoothing moves that share to the uniform distribution."""
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def gradient_step(
    params,
    control,
    batch,
    *,
    model,
    instance: SDPointInstance,
    preprocess,
    label_smoothing: float = 0.0,
    microbatches: int = 1,
):
    """Forward and backward of one instance on one device of `AXIS`: all that differs between instances.

    Args:
        params: replicated.
        control: int32 [1 + flags]: the host's number of the step, then flags of which all hosts see the largest.
        batch: this device's `images` [b, H, W, C] uint8 and `labels` [b].
        model: the net; with its `axis_name` None, each device (and microbatch) normalises by itself.
        instance: static.
        preprocess: uint8 images to the net's input.
        label_smoothing: see `cross_entropy`.
        microbatches: passes over which the batch is split, to save memory.

    Returns:
        (grads, metrics): both means over all devices; metrics are `loss`, `accuracy` and the `flags`.
    """

    def loss_and_accuracy(params, images, labels):
        logits, _ = model.apply(
            {"params": params}, preprocess(images), instance=instance, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels, label_smoothing).mean(), (logits.argmax(-1) == labels).mean()

    value_and_grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)

    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
    result = _mean_over(functools.partial(value_and_grad, params), parts, microbatches)
    (loss, accuracy), grads = jax.lax.pmean(result, AXIS)
    return grads, {"loss": loss, "accuracy": accuracy, "flags": jax.lax.pmax(control[1:], AXIS)}


def _mean_over(function, parts, count):
    """The mean of `function(**part)` over the parts, one after the other."""
    if count == 1:
        return function(**jax.tree.map(lambda x: x[0], parts))

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(**part)), None

    shapes = jax.eval_shape(function, **jax.tree.map(lambda x: x[0], parts))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if jax.default_backend() == "cpu":  # XLA's kernel gradients there are tens of times slower inside a loop.
        for part in (jax.tree.map(operator.itemgetter(i), parts) for i in range(count)):
            total, _ = add(*jax.lax.optimization_barrier((total, part)))
    else:
        total, _ = jax.lax.scan(add, total, parts)
    return jax.tree.map(lambda x: x / count, total)


def update_step(
    state: TrainState,
    control,
    grads,
    metrics,
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    skip_nonfinite: bool = False,
):
    """Applies gradients, on one device: the same program for every instance.

    Args:
        state: before the step.
        control, grads, metrics: see `gradient_step`.
        optimizer: see `sgd`.
        schedule: learning rate at a step.
        skip_nonfinite: whether a step whose loss or gradients are not finite counts, without an effect. Otherwise
            the state stays as it was before that step, also through later steps.

    Returns:
        (state, metrics), with the global norm of the gradients, whether that and the loss are finite, and the
        learning rate added.
    """
    learning_rate = jnp.float32(schedule(state.step))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda param, update: param - learning_rate * update, state.params, updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    applies = finite & (state.step == control[0])
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(applies, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    step = state.step + (1 if skip_nonfinite else applies)
    metrics |= {"gradient_norm": norm, "finite": finite, "learning_rate": learning_rate}
    return TrainState(step, params, opt_state), metrics


class TrainPrograms:
    """The training steps: `programs[instance](state, control, batch)` returns (state, metrics) and donates the state.

    A step is two programs: an instance's own for the gradients, from the switch, and a shared one for the update.
    """

    def __init__(self, state: TrainState, control, batch, *, optimizer, schedule, skip_nonfinite=False, **kwargs):
        """Builds from shapes; compiles nothing yet.

        Args:
            state: `TrainState` or its shapes.
            control: sharded, or its shape: [devices, 1 + flags].
            batch: sharded, or its shapes; see `devices.shard`.
            optimizer, schedule, skip_nonfinite: see `update_step`.
            **kwargs: of `gradient_step`, without the instance.
        """
        state, control, batch = shapes_of((state, control, batch))
        update = functools.partial(update_step, optimizer=optimizer, schedule=schedule, skip_nonfinite=skip_nonfinite)

        metrics = {
            "loss": jax.ShapeDtypeStruct((), np.float32),
            "accuracy": jax.ShapeDtypeStruct((), np.float32),
            "flags": jax.ShapeDtypeStruct((control.shape[-1] - 1,), np.int32),
        }

        def build(key):
            if key == _UPDATE:
                in_axes = (REPLICATED, SHARDED, REPLICATED, REPLICATED)
                return parallel(update, in_axes=in_axes, out_axes=REPLICATED, donate=(0,))
            step = functools.partial(gradient_step, instance=key, **kwargs)
            return parallel(step, in_axes=(REPLICATED, SHARDED, SHARDED), out_axes=REPLICATED)

        def shapes(key):
            return (state, control, state.params, metrics) if key == _UPDATE else (state.params, control, batch)

        self._programs = Switch(build, shapes)

    def compile(self, instances: Iterable[SDPointInstance], workers: int) -> Iterator[tuple[Hashable, float]]:
        """Compiles ahead of time; see `Switch.compile`."""
        return self._programs.compile([_UPDATE, *instances], workers)

    def gradients(self, instance: SDPointInstance) -> Callable:
        """The first of the two alone; see `gradient_step`."""
        return self._programs[instance]

    def __getitem__(self, instance: SDPointInstance) -> Callable:
        gradient, update = self._programs[instance], self._programs[_UPDATE]

        def step(state, control, batch):
            return update(state, control, *gradient(state.params, control, batch))

        return step

    def __len__(self) -> int:
        """How many programs have been compiled."""
        return len(self._programs)
