"""Parts of a network (stem, blocks, head) as each SDPoint instance runs them, read off one trace.

Nothing is compiled or run. The trace holds every part once for each shape that the instances of a ratio give it: up to
its point an instance runs the parts of full resolution, and after it often the parts of an earlier point.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.models.trace import Program, flatten
from sdpoint_jax.profiling.operations import PLATFORM, Operation, Run, Shape, read_operations


class Part(NamedTuple):
    """A stem, block or head on one shape, together with the point before it.

    Attributes:
        name: Name of its variables.
        operations: Its operations, in order.
        output: Shapes of the state that it returns, or of the logits, without the batch axis.
        macs: Number of multiply-accumulates of the operations.
    """

    name: str
    operations: tuple[Operation, ...]
    output: tuple[Shape, ...]
    macs: int


def list_parts(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> tuple[Part, ...]:
    """Return the parts of one instance of a network, from the stem to the head.

    Args:
        model: The network, without variables.
        instance: One that the network has.
        image_size: Side, or (height, width), in pixels.
        channels: Number of channels of the images.

    Raises:
        ValueError: The network does not have the instance, the images are too small for it, `channels` is below 1, or
            a part fails; the message names the part and its input's shape.
    """
    size = _checked(model, image_size, channels)
    model.check_instance(instance)
    found = _hashed(_traces, model, instance.ratio, size, channels)[instance.point]
    if isinstance(found, ValueError):
        raise found
    return found


def list_operations(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> tuple[Operation, ...]:
    """Return the operations of `model` from the input to the output, as `instance` runs them; see `list_parts`."""
    parts = list_parts(model, instance, image_size, channels)
    return tuple(operation for part in parts for operation in part.operations)


def variables_of(model: SDPointNet, image_size: int | tuple[int, int], channels: int = 3) -> Any:
    """Return the shapes of a network's variables, by collection."""
    return _hashed(_variables, model, _checked(model, image_size, channels), channels)


def compute_dtype(model: SDPointNet, image_size: int | tuple[int, int], channels: int = 3) -> np.dtype:
    """Return the type of a network's computation: of the state that its stem returns."""
    return _hashed(_state_dtype, model, _checked(model, image_size, channels), channels)


def trace_whole(model: SDPointNet, image_size: int | tuple[int, int], channels: int = 3) -> Program:
    """Return the trace of `model(images)` at full resolution, a function of (variables, image)."""
    return _trace(model, functools.partial(model.apply, train=False), _checked(model, image_size, channels), channels)


def trace_halves(model: SDPointNet, point: int, image_size: int | tuple[int, int], channels: int = 3) -> Program:
    """Return the trace of the prefix up to `point` and the suffix after it, at full resolution."""

    def halves(variables, images):
        x = model.apply(variables, images, point, train=False, method="prefix")
        return model.apply(variables, x, point, instance=FULL_RESOLUTION, train=False, method="suffix")

    return _trace(model, halves, _checked(model, image_size, channels), channels)


def _checked(model, image_size, channels):
    """Return (height, width) of images that the network takes."""
    height, width = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
    if channels < 1:
        raise ValueError(f"channels {channels}: at least 1")
    model.check_image_size((height, width))
    return int(height), int(width)


def _image(size, channels):
    return jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)


def _hashed(cached, model, *args):
    """Call a cached function; a network with an attribute that has no hash is traced every time."""
    try:
        hash(model)
    except TypeError:
        return cached.__wrapped__(model, *args)
    return cached(model, *args)


@functools.lru_cache(64)
def _variables(model, size, channels):
    # By parts, so that an error names the part.
    walk = _Walk()
    follow = functools.partial(_follow, walk=walk, names=_names(model), instances=())
    variables = jax.eval_shape(functools.partial(model.init, method=follow), jax.random.key(0), _image(size, channels))
    found = walk.instances[FULL_RESOLUTION.point]
    if isinstance(found, ValueError):
        raise found
    return variables


@functools.lru_cache(64)
def _state_dtype(model, size, channels):
    stem = functools.partial(model.apply, point=STEM, train=False, method="prefix")
    state = jax.eval_shape(stem, _hashed(_variables, model, size, channels), _image(size, channels))
    return np.dtype(jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(state))))


def _trace(model, function, size, channels):
    with programs_for(Target(PLATFORM)):
        jaxpr = jax.make_jaxpr(function)(variables_of(model, size, channels), _image(size, channels))
    return flatten(jaxpr, PLATFORM)


@functools.lru_cache(64)
def _traces(model, ratio, size, channels):
    """Return by point the parts of each instance of a ratio, or the ValueError that tracing it ends in."""
    # All points in one trace: setting up a deep network takes longer than tracing one of its blocks.
    instances = () if ratio == 1.0 else model.instances((ratio,))[1:]
    walk = _Walk()
    follow = functools.partial(_follow, walk=walk, names=_names(model), instances=instances)
    program = _trace(model, functools.partial(model.apply, method=follow), size, channels)
    operations = read_operations(program, variables_of(model, size, channels), walk.runs)
    parts = [
        Part(run.part, found, tuple(shape[1:] for shape in run.output), sum(one.macs for one in found))
        for run, found in zip(walk.runs, operations)
    ]
    return {
        point: runs if isinstance(runs, ValueError) else tuple(parts[run] for run in runs)
        for point, runs in walk.instances.items()
    }


def _names(model):
    return *model.prefix_modules(model.num_blocks), model.suffix_modules(model.num_blocks)[-1]


class _Walk:
    """Runs of parts in a trace.

    Attributes:
        runs: One for each part and shape.
        instances: By point, the indices of an instance's runs, or the error that one of them ends in.
    """

    def __init__(self):
        self.runs, self.instances = [], {}
        self._known, self._numbers = {}, itertools.count()

    def run(self, key, part, before, x, compute):
        """Return the index and the output of a part's run, of an earlier one if there is one on these shapes."""
        key = (*key, _shapes_of(x))
        if key not in self._known:
            scope = f"sdpoint_part_{next(self._numbers)}"  # A part that fails leaves equations of its scope.
            try:
                with jax.named_scope(scope):
                    # A variable that is handed on, as a class token is, becomes a value of this part.
                    y = jax.tree.map(jax.lax.optimization_barrier, compute(x))
            except Exception as error:
                shapes = " and ".join("x".join(map(str, shape[1:])) for shape in _shapes_of(x))
                raise ValueError(f"{part} on {shapes}: {_first_line(error)}") from error
            self._known[key] = len(self.runs), y
            self.runs.append(Run(part, before, scope, _shapes_of(y)))
        return self._known[key]


def _follow(model, images, *, walk, names, instances):
    """Run the parts of a bound network as each of the instances does, every part once for each shape."""
    states, prefix = [images], []  # What each part takes at full resolution, and its run.
    for instance in (FULL_RESOLUTION, *instances):
        # Up to its point, an instance is full resolution.
        first = max(instance.point, 0) + 1 if instance.point else 0
        if first > len(prefix):
            walk.instances[instance.point] = walk.instances[FULL_RESOLUTION.point]
            continue
        x, runs = states[first], prefix[:first]
        try:
            for number in range(first, len(names)):
                start = number - 1 or STEM  # The point before the part.
                here = instance if number and instance.point == start else FULL_RESOLUTION
                compute = functools.partial(_run_part, model, number, number == len(names) - 1, start, here)
                run, x = walk.run((number, here.ratio), names[number], names[max(number - 1, 0)], x, compute)
                runs.append(run)
                if instance == FULL_RESOLUTION:
                    states.append(x)
                    prefix.append(run)
        except ValueError as error:
            error.args = (f"{type(model).__name__}, instance {instance.name}: {error}",)
            walk.instances[instance.point] = error
        else:
            walk.instances[instance.point] = runs


def _run_part(model, number, is_head, start, instance, x):
    if number == 0:
        return model.prefix(x, STEM, train=False)
    if is_head:
        return model.suffix(x, start, instance=instance, train=False)
    return model.between(x, start, number, instance=instance, train=False)


def _shapes_of(tree):
    return tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))


def _first_line(error):
    """Return the first line of an error's text, without Flax's link, after its type unless it is a ValueError."""
    text = str(error).strip().partition("\n")[0].partition(" (https://")[0]
    return text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
