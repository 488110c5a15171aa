"""Functions of Flax and JAX for which ONNX has one operator, recognised in a trace that spells them as primitives.

Each pattern is the library's own function, traced here: a later version of the library spells both alike.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sdpoint_jax.models.trace import Constant, Equation, Program, Value, flatten

Atom = Value | Constant


class Found(NamedTuple):
    """A function that a trace contains.

    Attributes:
        name: Of the pattern.
        operands: Of the function, in order.
    """

    name: str
    operands: tuple[Atom, ...]


class _Pattern(NamedTuple):
    """What to look for.

    Attributes:
        name: Of the pattern; variants share one.
        anchor: Primitive without which the function is nowhere in the trace.
        function: Called with an array of the result's shape and with one of each of `others`.
        others: By a shape, those of the other operands.
    """

    name: str
    anchor: str
    function: Callable[..., jax.Array]
    others: Callable[[tuple[Any, ...]], Sequence[tuple[Any, ...]]] = lambda shape: ()


def _layer_norm(x, epsilon, *affine, fast, **leaves):
    norm = nn.LayerNorm(epsilon, use_fast_variance=fast, **leaves)
    names = [name for name in ("scale", "bias") if leaves[f"use_{name}"]]
    return norm.apply({"params": dict(zip(names, affine))}, x)


def _layer_norms():
    """Yield the variants, those with more operands first: the others are a part of them."""
    for scale, bias in ((True, True), (True, False), (False, True), (False, False)):
        for fast in (True, False):
            name = "layer_norm" + "_scale" * scale + "_bias" * bias
            function = functools.partial(_layer_norm, fast=fast, use_scale=scale, use_bias=bias)
            yield _Pattern(name, "rsqrt", function, lambda shape, vectors=scale + bias: [(), *[shape[-1:]] * vectors])


_PATTERNS = (
    *_layer_norms(),
    _Pattern("softmax", "exp", functools.partial(jax.nn.softmax, axis=-1)),
    _Pattern("gelu", "erfc", functools.partial(jax.nn.gelu, approximate=False)),
    _Pattern("gelu_tanh", "tanh", functools.partial(jax.nn.gelu, approximate=True)),
    _Pattern("hard_swish", "min", jax.nn.hard_swish),
    _Pattern("hard_sigmoid", "min", jax.nn.hard_sigmoid),
    _Pattern("clip", "min", lambda x, low, high: jnp.minimum(jnp.maximum(x, low), high), lambda shape: [(), ()]),
)


def find_patterns(program: Program, computed: Sequence[Equation]) -> dict[Value, Found]:
    """Return the functions in a trace, each by its result; the outermost ones, where one contains another.

    Args:
        program: The trace.
        computed: Those of its equations, in order, whose results are not known before it runs.
    """
    producers = _producers(program)
    primitives = {equation.primitive for equation in computed}
    patterns = [pattern for pattern in _PATTERNS if pattern.anchor in primitives]
    found: dict[Value, Found] = {}
    inside: set[Value] = set()  # Results of equations that are a part of a function.
    for equation in reversed(computed):
        if equation.outputs[0] in inside:
            continue
        for pattern in patterns:
            if match := _match(pattern, equation, producers):
                operands, parts = match
                found[equation.outputs[0]] = Found(pattern.name, operands)
                inside |= parts
                break
    return found


def _match(pattern, equation, producers) -> tuple[tuple[Atom, ...], set[Value]] | None:
    """Compare the pattern with what ends in `equation`; return its operands and the values within."""
    aval = equation.outputs[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.floating) or not aval.shape:
        return None
    wanted = _traced(pattern, aval.shape, np.dtype(aval.dtype))
    bound: dict[Value, Atom] = {}
    inputs, by_output = set(wanted.inputs), _producers(wanted)
    pairs: list[tuple[Atom, Atom]] = [(wanted.outputs[0], equation.outputs[0])]
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, Constant):
            if not isinstance(other, Constant) or not np.array_equal(one.value, other.value):
                return None
        elif one in bound:
            if bound[one] is not other and not _are_equal(bound[one], other):
                return None
        else:
            bound[one] = other
            if one in inputs:
                continue
            theirs, ours = by_output[one], producers.get(other) if isinstance(other, Value) else None
            if ours is None or ours.primitive != theirs.primitive or dict(ours.params) != dict(theirs.params):
                return None
            if len(ours.inputs) != len(theirs.inputs):
                return None
            pairs += zip(theirs.inputs, ours.inputs)
    operands = tuple(bound[value] for value in wanted.inputs)
    if any(tuple(one.aval.shape) != tuple(value.aval.shape) for one, value in zip(operands, wanted.inputs)):
        return None
    parts = {other for one, other in bound.items() if one not in inputs and isinstance(other, Value)}
    return operands, parts


def _are_equal(one, other):
    constants = isinstance(one, Constant) and isinstance(other, Constant)
    return constants and np.array_equal(one.value, other.value)


def _producers(program: Program) -> Mapping[Value, Equation]:
    return {output: equation for equation in program.equations for output in equation.outputs}


@functools.lru_cache(1024)
def _traced(pattern, shape, dtype) -> Program:
    shapes = [shape, *pattern.others(shape)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return flatten(jax.make_jaxpr(pattern.function)(*arguments), "onnx")
