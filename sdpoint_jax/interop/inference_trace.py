"""The trace of an instance's inference, with what is known before it runs: parameters, and what follows from them."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.models.trace import Constant, Equation, Program, Value, flatten
from sdpoint_jax.storage.artefact import Artefact

BATCH = "batch"  # Name of the batch size, which is symbolic.
_STATISTICS = "batch_stats"


class Known(NamedTuple):
    """Array that is known before the program runs.

    Attributes:
        array: As in the trace.
        name: Of the variable whose elements these are, in any order; empty for what is computed.
        sources: Names of the variables that it follows from.
    """

    array: np.ndarray
    name: str = ""
    sources: frozenset[str] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape


class InferenceTrace(NamedTuple):
    """Trace from uint8 images of a symbolic batch size to logits.

    Attributes:
        program: Inputs are the variables and the images.
        images: The last input.
        known: Arrays by value: those of variables and what follows from them.
        computed: The other equations of the program, in order.
    """

    program: Program
    images: Value
    known: dict[Value, Known]
    computed: list[Equation]


def trace_inference(swept: Artefact, instance: SDPointInstance) -> InferenceTrace:
    """Trace the inference of an instance, computed in float32.

    Variables are named as in `stem/conv/kernel`; names of statistics start with `batch_stats/`.
    """
    model = model_of(dataclasses.replace(swept, dtype="float32"))
    variables = {"params": params_for(swept.params, instance), _STATISTICS: swept.batch_stats[instance]}
    flat = traverse_util.flatten_dict(variables)
    paths = {"/".join(path).removeprefix("params/"): path for path in flat}
    arrays = {name: np.asarray(flat[path]) for name, path in paths.items()}

    def infer(arrays, images):
        variables = traverse_util.unflatten_dict({paths[name]: array for name, array in arrays.items()})
        return model.apply(variables, normalize(images, swept.mean, swept.std), instance=instance, train=False)

    images = jax.ShapeDtypeStruct((symbolic_batch(), *swept.image_shape), np.uint8)
    # A target of its own: convolutions are convolutions, and pools are pools.
    with programs_for(Target("onnx")):
        program = flatten(jax.make_jaxpr(infer)(arrays, images), "onnx")
    *inputs, given = program.inputs
    names = sorted(arrays)  # As JAX sorts the keys of a dict.
    known = {value: Known(arrays[name], name, frozenset([name])) for value, name in zip(inputs, names, strict=True)}
    return fold(program, given, known)


@functools.cache
def symbolic_batch() -> Any:
    """Return the batch size of every trace; sizes of different origin cannot be compared."""
    return jax.export.symbolic_shape(BATCH)[0]


def fold(program: Program, images: Value, known: Mapping[Value, Known]) -> InferenceTrace:
    """Compute what is known before the program runs; scans are unrolled."""
    program = program._replace(equations=tuple(_without_scans(program.equations)))
    values, computed = dict(known), []
    for equation in program.equations:
        operands = [constant(atom) if isinstance(atom, Constant) else values.get(atom) for atom in equation.inputs]
        sides = [side for output in equation.outputs for side in output.aval.shape]
        is_static = equation.primitive != "dim_as_value" and all(isinstance(side, int) for side in sides)
        if all(_is_empty(output.aval.shape) for output in equation.outputs):  # jnp.pad concatenates such.
            values |= {output: Known(_no_elements(output.aval)) for output in equation.outputs}
        elif is_static and all(operand is not None for operand in operands):
            values |= zip(equation.outputs, _compute(equation, operands), strict=True)
        else:
            computed.append(equation)
    return InferenceTrace(program, images, values, computed)


def _without_scans(equations) -> Iterator[Equation]:
    for equation in equations:
        if equation.primitive != "scan":
            yield equation
            continue
        shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.inputs]
        inner = flatten(jax.make_jaxpr(functools.partial(_unroll, equation.params))(*shapes), "onnx")
        outer = dict(zip(inner.inputs, equation.inputs, strict=True))

        def read(atom, outer=outer):
            return outer.get(atom, atom) if isinstance(atom, Value) else atom

        for one in _without_scans(inner.equations):
            yield one._replace(inputs=tuple(map(read, one.inputs)), scope=(*equation.scope, *one.scope))
        for output, result in zip(inner.outputs, equation.outputs, strict=True):
            yield Equation("copy", (read(output),), (result,), {}, equation.scope, lambda x: x)


def _unroll(params, *operands):
    """Compute what a scan does, step by step."""
    body, num_consts, num_carry = params["jaxpr"], params["num_consts"], params["num_carry"]
    consts, carry = operands[:num_consts], list(operands[num_consts : num_consts + num_carry])
    columns = operands[num_consts + num_carry :]
    steps = range(params["length"])
    rows = []
    for i in reversed(steps) if params["reverse"] else steps:
        parts = [jax.lax.index_in_dim(column, i, keepdims=False) for column in columns]
        results = jax.extend.core.jaxpr_as_fun(body)(*consts, *carry, *parts)
        carry, row = list(results[:num_carry]), results[num_carry:]
        rows.append(row)
    rows = rows[::-1] if params["reverse"] else rows
    return [*carry, *(jnp.stack(column) for column in zip(*rows))]


def _is_empty(shape):
    return any(isinstance(side, int) and side == 0 for side in shape)


def _no_elements(aval):
    return np.zeros([side if isinstance(side, int) else 1 for side in aval.shape], aval.dtype)


def constant(atom: Constant) -> Known:
    """Return a constant of a trace as an array."""
    return Known(np.asarray(atom.value, atom.aval.dtype))


def _compute(equation: Equation, operands) -> list[Known]:
    params, arrays = equation.params, [operand.array for operand in operands]
    sources = frozenset().union(*(operand.sources for operand in operands))
    output = equation.outputs[0].aval
    if equation.primitive in ("reshape", "squeeze", "expand_dims"):  # NumPy copies nothing.
        return [operands[0]._replace(array=arrays[0].reshape(output.shape))]
    if equation.primitive == "transpose":
        return [operands[0]._replace(array=arrays[0].transpose(params["permutation"]))]
    if equation.primitive == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        sides = [arrays[0].shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(output.shape))]
        array = arrays[0].reshape(sides)
        if array.shape == output.shape:
            return [operands[0]._replace(array=array)]
        return [Known(np.broadcast_to(array, output.shape), sources=sources)]
    if equation.primitive in ("convert_element_type", *_NUMPY) and not (
        equation.primitive == "div" and not jnp.issubdtype(output.dtype, jnp.floating)
    ):
        found = _NUMPY.get(equation.primitive, np.asarray)(*arrays)
        return [Known(found.astype(output.dtype, copy=False), sources=sources)]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        results = equation.bind(*map(jnp.asarray, arrays), **params)
    results = results if isinstance(results, list | tuple) else [results]
    return [Known(jax.device_get(result), sources=sources) for result in results]


# What normalisations and resized embeddings are computed by: JAX would compile each for every shape.
_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "div": np.true_divide,
    "eq": np.equal,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(which, cases),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}

Step = tuple[Any, Any]  # Scale and shift.


def affine_step(primitive: str, array: np.ndarray, is_first: bool) -> Step | None:
    """Return the scale and the shift that an operation with a known array is; None where it is not affine.

    Args:
        primitive: Of the operation.
        array: The known one of two operands.
        is_first: Whether it is the first.
    """
    array = array.astype(np.float64)
    if primitive == "add":
        return 1.0, array
    if primitive == "sub":
        return (-1.0, array) if is_first else (1.0, -array)
    if primitive == "mul":
        return array, 0.0
    if primitive == "div" and not is_first and np.all(array):
        return 1 / array, 0.0
    return None


class FoldedNorm(NamedTuple):
    """BatchNorm whose only input is the output of a convolution.

    Attributes:
        norm: Path of its variables.
        scale: What the convolution's kernel is to be multiplied by, by output feature.
        shift: What its bias is to be.
    """

    norm: str
    scale: np.ndarray
    shift: np.ndarray


def norms_after_convolutions(found: InferenceTrace) -> dict[str, FoldedNorm]:
    """Return each BatchNorm that could be a part of the convolution before it, by the convolution's path."""
    uses: collections.defaultdict[Value, list[Equation]] = collections.defaultdict(list)
    for equation in found.computed:
        for atom in equation.inputs:
            if isinstance(atom, Value):
                uses[atom].append(equation)
    norms: dict[str, FoldedNorm] = {}
    for equation in found.computed:
        if equation.primitive != "conv_general_dilated" or not isinstance(weights := equation.inputs[1], Value):
            continue
        kernel = found.known.get(weights)
        if kernel and kernel.name and len(uses[weights]) == 1:
            layer = kernel.name.rpartition("/")[0]
            if norm := _norm_after(equation, layer, found, uses):
                norms[layer] = norm
    return norms


def _norm_after(convolution, layer, found, uses) -> FoldedNorm | None:
    """Follow the output of a convolution through affine steps whose variables are its own or one BatchNorm's."""
    axis = convolution.params["dimension_numbers"].out_spec[1]
    value = convolution.outputs[0]
    shape = value.aval.shape
    scale, shift, norm = np.ones(shape[axis]), np.zeros(shape[axis]), ""
    for equation, known, is_first in _affine_chain(value, found, uses):
        layers = {source.removeprefix(f"{_STATISTICS}/").rpartition("/")[0] for source in known.sources} - {layer}
        norm = norm or next(iter(layers), "")
        if layers - {norm} or known.array.size not in (1, shape[axis]):
            break
        step = affine_step(equation.primitive, known.array, is_first)
        if step is None:
            break
        a, b = step
        scale, shift = scale * np.ravel(a), shift * np.ravel(a) + np.ravel(b)
    if not norm or not any(name.startswith(f"{_STATISTICS}/{norm}/") for name in _names(found)):
        return None
    return FoldedNorm(norm, scale.astype(np.float32), shift.astype(np.float32))


def _names(found):
    return [known.name for known in found.known.values()]


def _affine_chain(value: Value, found: InferenceTrace, uses) -> Iterator[tuple[Equation, Known, bool]]:
    """Yield the operations with known arrays that follow a value, as long as each is the only use of the one before."""
    while len(uses[value]) == 1 and value not in found.program.outputs:
        (equation,) = uses[value]
        if equation.primitive not in ("add", "sub", "mul", "div") or equation.inputs[0] is equation.inputs[1]:
            return
        is_first = equation.inputs[1] is value
        other = equation.inputs[0] if is_first else equation.inputs[1]
        known = constant(other) if isinstance(other, Constant) else found.known.get(other)
        if known is None:
            return
        yield equation, known, is_first
        value = equation.outputs[0]
