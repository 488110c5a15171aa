"""The training step: an ordinary SGD step of one SDPoint instance or of a set of them, each a program of its own."""

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdpoint_jax.instance import SDPointInstance, set_name
from sdpoint_jax.models import target
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.norm_parameters import with_own_norms
from sdpoint_jax.programs.devices import (
    AXIS,
    REPLICATED,
    SHARDED,
    Compilation,
    Switch,
    device_count,
    parallel,
    quick_compiler_options,
    replicate,
    shapes_of,
    shard,
)
from sdpoint_jax.training.mixing import mix
from sdpoint_jax.training.objective import Distillation, Loss, forward_set, label_loss, mean

PyTree = Any
KEY_TYPE = "threefry2x32"  # Of random keys: the same numbers on every platform, whatever JAX's default.
_UPDATE = "update"  # The key of the program that all instances share.


@flax.struct.dataclass
class TrainState:
    """What a training step changes. It has no BatchNorm statistics: those are re-estimated, for each instance.

    Attributes:
        step: number of the next step, int32 scalar.
        params: float32 parameters of the net, and of single instances; see `models.norm_parameters`.
        opt_state: of the optimiser.
        ema: exponential moving average of the parameters; None without one.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


class Control(NamedTuple):
    """What a host says to the program of a step, and hears from it once all hosts agree.

    Attributes:
        step: the host's number of the step.
        stop: whether to stop after it; any host may ask for that.
        save: whether to save after it; the main host may ask for that.
    """

    step: Any
    stop: Any = False
    save: Any = False

    def shard(self) -> "Control":
        """Puts it on this host's devices: each field int32 [devices]."""
        fields = {name: np.full(jax.local_device_count(), value, np.int32) for name, value in self._asdict().items()}
        return Control(**shard(fields))

    @classmethod
    def shapes(cls) -> "Control":
        """Returns the shapes of what `shard` makes."""
        return cls(*[jax.ShapeDtypeStruct((device_count(), 1), np.int32)] * 3)


def device_keys(seed: int, step: int, devices: Sequence[int]) -> np.ndarray:
    """Return random keys, uint32 [len(devices), 2]: a pure function of the seed, the step and the device's index."""
    bits = seed.to_bytes(16, "little", signed=True)  # NumPy's generator takes no negative numbers.
    generators = [np.random.default_rng((*bits, step, device)) for device in devices]
    return np.stack([generator.integers(2**32, size=2, dtype=np.uint32) for generator in generators])


def create_state(
    model: SDPointNet,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, int, int],
    *,
    ema: bool = False,
    own_norms: Sequence[SDPointInstance] = (),
) -> TrainState:
    """Makes the state before step 0, on the host.

    Args:
        model: the net.
        optimizer: see `update_step`.
        seed: of the parameters.
        image_shape: (H, W, C).
        ema: whether to keep an average of the parameters, which begins with them.
        own_norms: instances that have scales and shifts of their own; see `models.norm_parameters`.
    """
    init = jax.jit(functools.partial(_init, model, optimizer, image_shape, own_norms))
    key = jax.random.key(seed)
    state = jax.device_get(init.lower(key).compile(quick_compiler_options())(key))
    if own_norms:  # They may be the shared arrays, and a step writes its state where that of the one before was.
        state = jax.tree.map(np.copy, state)
    return state.replace(ema=jax.tree.map(np.copy, state.params)) if ema else state


def shapes_of_state(
    model: SDPointNet,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    *,
    ema: bool = False,
    own_norms: Sequence[SDPointInstance] = (),
) -> TrainState:
    """Returns the shapes of what `create_state` makes, by the same arguments."""
    state = jax.eval_shape(functools.partial(_init, model, optimizer, image_shape, own_norms), jax.random.key(0))
    return state.replace(ema=state.params) if ema else state


def _init(model, optimizer, image_shape, own_norms, key):
    params = model.init(key, jnp.zeros((1, *image_shape)), train=False)["params"]
    params = with_own_norms(model, params, own_norms)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def gradient_step(
    params: PyTree,
    control: Control,
    batch: Mapping[str, jax.Array],
    teacher: PyTree | None = None,
    *,
    model: SDPointNet,
    instances: Sequence[SDPointInstance],
    preprocess: Callable[[jax.Array], jax.Array],
    label_smoothing: float = 0.0,
    microbatches: int = 1,
    distillation: Distillation | None = None,
    loss: Loss | None = None,
) -> tuple[PyTree, dict[str, Any]]:
    """Runs forward and backward of some instances on one device of `AXIS`: all that differs between them.

    Args:
        params: replicated.
        control: each field int32 [1].
        batch: this device's `images` [b, H, W, C] uint8 and `labels` [b]; and `mixes`, see `mixing.Mixing.rows`, where
            images are mixed with their neighbours; and `keys` uint32 [1, 2], see `device_keys`, where the network
            draws random numbers.
        teacher: variables of `distillation.teacher`, replicated, if it has one.
        model: the net; with its `axis_name` None, each device (and microbatch) normalises by itself.
        instances: static; those that the step trains. Their losses are averaged, and layers that they share, those
            before a point, run once.
        preprocess: maps uint8 images to the net's input.
        label_smoothing: see `cross_entropy`.
        microbatches: passes over which the batch is split, to save memory.
        distillation: None for labels alone.
        loss: What to minimise, see `objective`; None for `label_loss` with these settings.

    Returns:
        (grads, metrics): both means over all devices; metrics are `loss` and `accuracy`, the mean over the instances;
        those of `loss`; `agreed`, the control in which all hosts see what any of them asks for; and, where there are
        several instances, `instances` with the `accuracy` of each by its name, and its `loss` where that is known.
    """
    minimised = loss or functools.partial(label_loss, label_smoothing=label_smoothing, distillation=distillation)

    def loss_and_metrics(params, images, labels, mixes=None, key=None):
        x, others, shares = mix(preprocess(images), labels, mixes)
        # Linen takes the stream "params" for every stream that is not given, whatever the network calls its own.
        rngs = None if key is None else {"params": jax.random.wrap_key_data(key, impl=KEY_TYPE)}
        logits = forward_set(model, params, x, instances, rngs)
        seen = {"images": x, "labels": labels, "step": control.step[0]}
        if others is not None:
            seen |= {"other_labels": others, "label_shares": shares}
        if teacher is not None:
            seen["teacher_logits"] = distillation.teacher.apply(teacher, x, train=False)
        value, metrics = minimised(logits, seen)
        accuracies = {instance: (own.argmax(-1) == labels).mean() for instance, own in logits.items()}
        metrics = {**metrics, "accuracy": mean(accuracies)}
        if len(instances) > 1:
            known = metrics.get("instances", {})
            metrics["instances"] = {i.name: {**known.get(i.name, {}), "accuracy": accuracies[i]} for i in instances}
        return value, metrics

    value_and_grad = jax.value_and_grad(loss_and_metrics, has_aux=True)

    examples = {name: value for name, value in batch.items() if name != "keys"}
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), examples)
    if "keys" in batch:
        keys = jax.random.split(jax.random.wrap_key_data(batch["keys"][0], impl=KEY_TYPE), microbatches)
        parts["key"] = jax.random.key_data(keys)
    result = _mean_over(functools.partial(value_and_grad, params), parts, microbatches)
    (value, metrics), grads = jax.lax.pmean(result, AXIS)
    agreed = jax.lax.pmax(jax.tree.map(lambda x: x[0], control), AXIS)
    return grads, {"loss": value, "agreed": agreed, **metrics}


def _mean_over(function, parts, count):
    """Averages `function(**part)` over the parts, one after the other."""
    if count == 1:
        return function(**jax.tree.map(lambda x: x[0], parts))

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(**part)), None

    shapes = jax.eval_shape(function, **jax.tree.map(lambda x: x[0], parts))
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if target.platform() == "cpu":  # XLA's kernel gradients there are tens of times slower inside a loop.
        for part in (jax.tree.map(operator.itemgetter(i), parts) for i in range(count)):
            total, _ = add(*jax.lax.optimization_barrier((total, part)))
    else:
        total, _ = jax.lax.scan(add, total, parts)
    return jax.tree.map(lambda x: x / count, total)


def update_step(
    state: TrainState,
    control: Control,
    grads: PyTree,
    metrics: dict[str, Any],
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    skip_nonfinite: bool = False,
    ema_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Any]]:
    """Applies gradients, on one device: the same program for every instance.

    Args:
        state: before the step.
        control, grads, metrics: see `gradient_step`.
        optimizer: without the learning rate, see `optimizer.SGD`.
        schedule: learning rate at a step.
        skip_nonfinite: whether a step whose loss or gradients are not finite counts, without an effect. Otherwise
            the state stays as it was before that step, also through later steps.
        ema_decay: share of the average of the parameters that a step keeps, where `state` has one.

    Returns:
        (state, metrics), with the global norm of the gradients, whether that and the loss are finite, and the
        learning rate added.
    """
    learning_rate = jnp.float32(schedule(state.step))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda param, update: param - learning_rate * update, state.params, updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    applies = finite & (state.step == control.step[0])
    ema = state.ema and jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, state.ema, params)
    params, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(applies, new, old),
        (params, opt_state, ema),
        (state.params, state.opt_state, state.ema),
    )
    step = state.step + (1 if skip_nonfinite else applies)
    metrics |= {"gradient_norm": norm, "finite": finite, "learning_rate": learning_rate}
    return TrainState(step, params, opt_state, ema), metrics


class TrainPrograms:
    """The training steps: `programs[instances](state, control, batch)` returns (state, metrics) and donates the state.

    A step is two programs: one for the gradients of a set of instances, from the switch, and a shared one for the
    update. The key is a tuple of instances, or one of them alone.
    """

    def __init__(
        self,
        state: TrainState,
        batch: Mapping[str, Any],
        *,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        skip_nonfinite: bool = False,
        ema_decay: float = 0.0,
        teacher: PyTree | None = None,
        **kwargs: Any,
    ):
        """Builds from shapes; compiles nothing yet.

        Args:
            state: `TrainState` or its shapes.
            batch: sharded, or its shapes; see `devices.shard` and `devices.shape_of_shards`.
            optimizer, schedule, skip_nonfinite, ema_decay: see `update_step`.
            teacher: variables of a teacher, on the host.
            **kwargs: of `gradient_step`, without the instances.
        """
        state, batch, control = *shapes_of((state, batch)), Control.shapes()
        self._teacher = () if teacher is None else (replicate(teacher),)
        update = functools.partial(
            update_step, optimizer=optimizer, schedule=schedule, skip_nonfinite=skip_nonfinite, ema_decay=ema_decay
        )

        metrics = {
            "loss": jax.ShapeDtypeStruct((), np.float32),
            "accuracy": jax.ShapeDtypeStruct((), np.float32),
            "agreed": Control(*[jax.ShapeDtypeStruct((), np.int32)] * 3),
        }

        def build(key):
            if key == _UPDATE:
                in_axes = (REPLICATED, SHARDED, REPLICATED, REPLICATED)
                return parallel(update, in_axes=in_axes, out_axes=REPLICATED, donate=(0,))
            step = functools.partial(gradient_step, instances=key, **kwargs)
            in_axes = (REPLICATED, SHARDED, SHARDED, *[REPLICATED] * len(self._teacher))
            return parallel(step, in_axes=in_axes, out_axes=REPLICATED)

        def shapes(key):
            if key == _UPDATE:
                return state, control, state.params, metrics
            return state.params, control, batch, *shapes_of(self._teacher)

        self._programs = Switch(build, shapes)

    def compile(
        self, sets: Iterable[SDPointInstance | tuple[SDPointInstance, ...]], workers: int = 0
    ) -> Iterator[tuple[Hashable, float]]:
        """Compiles ahead of time; see `Switch.compile`."""
        return self._programs.compile([_UPDATE, *map(_as_set, sets)], workers)

    def compile_behind(
        self, sets: Iterable[SDPointInstance | tuple[SDPointInstance, ...]], workers: int = 0
    ) -> Compilation[Hashable]:
        """Starts to compile, in the order in which steps will need the programs; see `Switch.compile_behind`."""
        keys = list(map(_as_set, sets))
        ordered = [*keys[:1], _UPDATE, *keys[1:]] if keys else []
        return self._programs.compile_behind(ordered, workers, name=_program_name, urgent=2)

    def keys_of(self, instances: SDPointInstance | tuple[SDPointInstance, ...]) -> tuple[Hashable, ...]:
        """Returns the keys, in a `Compilation`, of the programs that the step of `instances` runs."""
        return _as_set(instances), _UPDATE

    def gradients(self, instances: SDPointInstance | tuple[SDPointInstance, ...]) -> Callable:
        """Returns the first of the two programs alone: (params, control, batch) to what `gradient_step` returns."""
        program = self._programs[_as_set(instances)]
        if not self._teacher:
            return program
        return lambda params, control, batch: program(params, control, batch, *self._teacher)

    def __getitem__(
        self, instances: SDPointInstance | tuple[SDPointInstance, ...]
    ) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
        """Returns the step of `instances`, its programs compiled now if they are not."""
        gradients, update = self.gradients(instances), self._programs[_UPDATE]

        def step(state, control, batch):
            grads, metrics = gradients(state.params, control, batch)
            # The update is one program for all instances and losses: it sees the metrics that all of them have.
            others = {name: metrics.pop(name) for name in set(metrics) - {"loss", "accuracy", "agreed"}}
            state, metrics = update(state, control, grads, metrics)
            return state, {"instances": {}} | metrics | others

        return step

    def __len__(self) -> int:
        """Counts the programs that are compiled."""
        return len(self._programs)


def _program_name(key):
    return "the update" if key == _UPDATE else f"the step of instance {set_name(key)}"


def _as_set(instances):
    return instances if isinstance(instances, tuple) else (instances,)
