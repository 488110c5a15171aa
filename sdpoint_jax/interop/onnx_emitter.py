"""ONNX nodes for the primitives of a trace, laid out and folded so that a runtime has little to do.

A trace is channels-last, ONNX's convolutions and pools are channels-first. So each value has a *layout*: the order of
its axes in the graph. Transposing a value changes its layout and adds no node; a node that needs another layout adds
one `Transpose`, which all users of the value share. What is known before the graph runs is computed here.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdpoint_jax.interop.inference_trace import InferenceTrace, Known, affine_step, constant, symbolic_batch
from sdpoint_jax.interop.onnx_patterns import Found, find_patterns
from sdpoint_jax.models.trace import Constant, Equation, Value

Layout = tuple[int, ...]  # For each axis in the graph, the axis of the trace.
Shape = tuple[Any, ...]  # As the trace has it; the batch size is symbolic.


class _Tensor:
    """Array that the graph computes.

    Attributes:
        shape: As in the trace.
        dtype: As in the trace.
        layout: That costs no node.
        names: In the graph, by layout.
        exclusive: Whether the trace uses it once, so that its node may be changed.
    """

    def __init__(self, shape: Shape, dtype: Any, name: str, layout: Layout | None = None):
        self.shape, self.dtype, self.exclusive = tuple(shape), np.dtype(dtype), True
        self.layout = layout or _natural(len(shape))
        self.names = {self.layout: name}


class _Affine(_Tensor):
    """`base * scale + shift`, computed when used: by then several such steps may have become one.

    Attributes:
        base: Another tensor, not of this class.
        scale, shift: Float64, of as many axes as the base; only one of these has more than one element.
    """

    def __init__(self, base: _Tensor, scale: np.ndarray, shift: np.ndarray):
        super().__init__(base.shape, base.dtype, "", base.layout)
        self.names = {}
        self.base, self.scale, self.shift = base, scale, shift


Operand = Known | _Tensor


class Emitter:
    """Nodes and tensors of a graph."""

    def __init__(self) -> None:
        """Create an empty graph."""
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.weights: dict[str, np.ndarray] = {}  # Arrays of the tensors that have no data here.
        self._names: collections.Counter[str] = collections.Counter()
        self._constants: dict[Any, str] = {}
        self._producers: dict[str, onnx.NodeProto] = {}

    def emit(self, trace: InferenceTrace, output: str) -> None:
        """Add the nodes that compute the output of a trace from `images`.

        Args:
            trace: With one output.
            output: Its name in the graph.

        Raises:
            ValueError: A primitive has no form in ONNX; names it and the module.
        """
        images = _Tensor(trace.images.aval.shape, trace.images.aval.dtype, "images")
        values: dict[Value, Operand] = {**trace.known, trace.images: images}
        found = find_patterns(trace.program, trace.computed)
        live, uses = _live(trace.computed, found, trace.program.outputs)

        def operand(atom) -> Operand:
            return constant(atom) if isinstance(atom, Constant) else values[atom]

        for equation in live:
            result = equation.outputs[0]
            if result in found:
                name, atoms = found[result]
                emitted: Sequence[Operand] = [_PATTERNS[name](self, *map(operand, atoms))]
            else:
                emitted = self._emit(equation, [operand(atom) for atom in equation.inputs])
            for value, tensor in zip(equation.outputs, emitted, strict=True):
                if isinstance(tensor, _Tensor):
                    tensor.exclusive &= uses[value] == 1  # It may be an operand.
                values[value] = tensor
        self._name_output(operand(trace.program.outputs[0]), output)

    def _emit(self, equation: Equation, operands: list[Operand]) -> Sequence[Operand]:
        handler = _HANDLERS.get(equation.primitive)
        known = [operand for operand in operands if isinstance(operand, Known)]
        if known and len(known) == len(operands):
            # The result has them as often as the batch size says.
            operands = [_Tensor(one.shape, _dtype(one.array.dtype), self.name(one)) for one in known]
        try:
            if handler is None:
                raise _NoForm
            emitted = handler(self, equation, *operands)
        except _NoForm as error:
            where = "/".join(name for name in equation.scope if "." not in name) or "the network"
            detail = f" ({error})" if str(error) else ""
            raise ValueError(f"ONNX has no form of the primitive {equation.primitive}{detail}, in {where}") from None
        return emitted if isinstance(emitted, list) else [emitted]

    def _name_output(self, value: Operand, output: str) -> None:
        name = self.name(value)
        producer = self._producers.get(name)
        if producer is None:
            name = self.node("Identity", name)
            producer = self._producers[name]
        for node in self.nodes:
            node.input[:] = [output if one == name else one for one in node.input]
        producer.output[:] = [output if one == name else one for one in producer.output]

    # Names, nodes, constants.

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output; return the output's name, which is `name` where that is free."""
        return self.nodes_of(kind, *inputs, outputs=[name or kind], **attributes)[0]

    def nodes_of(self, kind: str, *inputs: str, outputs: Iterable[str], **attributes: Any) -> list[str]:
        """Add a node; return the names of its outputs."""
        names = [self._unique(name) for name in outputs]
        node = helper.make_node(kind, inputs, names, name=names[0], **attributes)
        self.nodes.append(node)
        self._producers |= dict.fromkeys(names, node)
        return names

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """Add a tensor; return its name, which is `name` where that is free. Equal tensors are added once."""
        array = np.asarray(array, _dtype(array.dtype))
        is_weight = sum(side > 1 for side in array.shape) > 1
        if is_weight:
            key: Any = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str)
        else:
            key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self._constants:
            tensor_name = self._constants[key] = self._unique(name or "constant")
            if is_weight:
                self.weights[tensor_name] = array
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                self.tensors.append(TensorProto(name=tensor_name, data_type=kind, dims=array.shape))
            else:
                self.tensors.append(numpy_helper.from_array(array, tensor_name))
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """Add a vector of integers, such as axes; return its name."""
        return self.constant(np.array(values, np.int64))

    def name(self, value: Operand, layout: Layout | None = None) -> str:
        """Return the name of a value in the graph in a layout, by default that of the trace; add what it takes."""
        layout = layout or _natural(len(value.shape))
        if isinstance(value, Known):
            return self.constant(value.array.transpose(layout) if value.shape else value.array, value.name)
        if layout not in value.names:
            if isinstance(value, _Affine):
                value.names[layout] = self._materialize(value, layout)
            else:
                source = value.names[value.layout]
                order = [value.layout.index(axis) for axis in layout]
                value.names[layout] = self.node("Transpose", source, perm=order)
        return value.names[layout]

    def _materialize(self, value: _Affine, layout: Layout) -> str:
        if value.names:  # In another layout.
            there, name = next(iter(value.names.items()))
            return self.node("Transpose", name, perm=[there.index(axis) for axis in layout])
        name = self.name(value.base, layout)
        scale, shift = (array.astype(np.float32).transpose(layout) for array in (value.scale, value.shift))
        short_scale, short_shift = map(_without_leading_ones, (scale, shift))  # As onnxruntime expects biases.
        if np.all(scale == 1):
            if np.all(shift == 0):
                return name
            return self._add_bias(value.base, name, shift) or self.node("Add", name, self.constant(short_shift))
        if np.all(shift == 0):
            return self.node("Mul", name, self.constant(short_scale))
        channels = max(scale.size, shift.size)
        if len(layout) >= 3 and channels > 1 and max(scale.shape[1], shift.shape[1]) == channels:
            # Runtimes make this a part of the convolution before it, and otherwise need one pass for it.
            vectors = [np.broadcast_to(array.reshape(-1), (channels,)) for array in (scale, shift)]
            vectors += [np.zeros(channels, np.float32), np.ones(channels, np.float32)]
            return self.node("BatchNormalization", name, *map(self.constant, vectors), epsilon=0.0)
        return self.node("Add", self.node("Mul", name, self.constant(short_scale)), self.constant(short_shift))

    def _add_bias(self, base: _Tensor, name: str, shift: np.ndarray) -> str | None:
        """Give the node of `base` a bias, if it can have one and nothing else uses its result without."""
        node = self._producers.get(name)
        if node is None or node.op_type not in ("Conv", "Gemm") or len(node.input) > 2 or not base.exclusive:
            return None
        axis = 1 if node.op_type == "Conv" else -1
        if shift.ndim < 2 or shift.shape[axis] != shift.size or len(base.names) > 1:
            return None
        features = base.shape[base.layout[axis]]
        bias = np.broadcast_to(shift.reshape(-1), (features,))
        node.input.append(self.constant(bias))
        return name

    def same(self, value: _Tensor, kind: str, *inputs: str, dtype: Any = None, **attributes: Any) -> _Tensor:
        """Add a node that maps each element of a value, whose name is its first input; return the result."""
        layout = value.layout
        name = self.node(kind, self.name(value, layout), *inputs, **attributes)
        return _Tensor(value.shape, dtype or value.dtype, name, layout)

    def batch(self) -> str:
        """Return the name of the batch size, a vector of one integer."""
        key = "the batch size"
        if key not in self._constants:
            shape = self.node("Shape", "images")
            self._constants[key] = self.node("Slice", shape, self.integers(0), self.integers(1))
        return self._constants[key]

    def dimensions(self, shape: Shape) -> str:
        """Return the name of a vector of a shape, in which the batch size may be."""
        if all(isinstance(side, int) for side in shape):
            return self.integers(*shape)
        parts = [self.integers(side) if isinstance(side, int) else self._dimension(side) for side in shape]
        return self.node("Concat", *parts, axis=0)

    def _dimension(self, side):
        factor = side // symbolic_batch()
        if not isinstance(factor, int) or factor * symbolic_batch() != side:
            raise _NoForm(f"a dimension of {side}")
        return self.batch() if factor == 1 else self.node("Mul", self.batch(), self.integers(factor))

    # What handlers have in common.

    def affine(self, value: _Tensor, scale: Any, shift: Any) -> _Tensor:
        """Return `value * scale + shift`; both are scalars or have as many axes as the value."""
        rank = len(value.shape)
        scale, shift = (_of_rank(np.asarray(array, np.float64), rank) for array in (scale, shift))
        if isinstance(value, _Affine) and value.exclusive:
            both_scale, both_shift = value.scale * scale, value.shift * scale + shift
            if _is_vector(both_scale, both_shift):
                return _Affine(value.base, both_scale, both_shift)
        return _Affine(self.settled(value), scale, shift)

    def settled(self, value: _Tensor) -> _Tensor:
        """Return the value itself as a node's result."""
        if not isinstance(value, _Affine):
            return value
        result = _Tensor(value.shape, value.dtype, self.name(value, value.layout), value.layout)
        result.exclusive = value.exclusive and value.base.exclusive
        return result

    def common_layout(self, values: Sequence[Operand]) -> Layout:
        """Choose the layout for an operation on values of as many axes: the largest one's, rather not the trace's."""
        tensors = [value for value in values if isinstance(value, _Tensor)]
        if not tensors:
            return _natural(len(values[0].shape))

        def weight(value):
            sides = [side for side in value.shape if isinstance(side, int)]
            return math.prod(sides), value.layout != _natural(len(value.shape))

        return max(tensors, key=weight).layout

    def reshape(self, value: Operand, shape: Shape) -> Operand:
        """Return a value with another shape; of the same elements in the trace's order."""
        shape = tuple(shape)
        if isinstance(value, Known):
            return Known(value.array.reshape(shape), value.name)
        if shape == value.shape:
            return value
        groups = _reshape_groups(value.shape, shape)
        layout = value.layout if _keeps_order(groups, value.layout, value.shape) else _natural(len(value.shape))
        starts = {_lead(old, value.shape): new for old, new in groups if old}
        order = [axis for old in layout for axis in starts.get(old, ())]
        # Axes of one element, which no axis before stands for.
        order += [axis for axis in range(len(shape)) if axis not in order]
        sides = [shape[axis] if isinstance(shape[axis], int) else -1 for axis in order]
        if sides.count(-1) > 1:
            raise _NoForm(f"a reshape to {shape}")
        name = self.node("Reshape", self.name(value, layout), self.integers(*sides))
        return _Tensor(shape, value.dtype, name, tuple(order))

    def transpose(self, value: Operand, order: Sequence[int]) -> Operand:
        """Return a value whose axis i is the axis `order[i]` of the one given; adds no node."""
        order = list(order)
        if isinstance(value, Known):
            return Known(value.array.transpose(order), value.name)
        if order == sorted(order):
            return value
        value = self.settled(value)
        result = _Tensor(tuple(value.shape[axis] for axis in order), value.dtype, "")
        result.names = {tuple(order.index(axis) for axis in layout): name for layout, name in value.names.items()}
        result.layout = tuple(order.index(axis) for axis in value.layout)
        result.exclusive = value.exclusive
        return result


class _NoForm(Exception):
    """There is no form in ONNX, or none here; says why."""


def _natural(rank: int) -> Layout:
    return tuple(range(rank))


def _dtype(dtype) -> np.dtype:
    """Return the type of an array in the graph: floats are float32 whatever the network computes in."""
    return np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def _of_rank(array, rank):
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _without_leading_ones(array):
    return array.reshape(array.shape[next((i for i, side in enumerate(array.shape) if side > 1), array.ndim) :])


def _is_vector(*arrays):
    return sum(side > 1 for side in np.broadcast_shapes(*(array.shape for array in arrays))) <= 1


def _live(computed: Sequence[Equation], found: Mapping[Value, Found], outputs):
    """Return the equations that the outputs need, and how often each value is used."""
    uses = collections.Counter(output for output in outputs if isinstance(output, Value))
    live = []
    for equation in reversed(computed):
        if any(output in uses for output in equation.outputs):
            result = equation.outputs[0]
            uses.update(
                atom
                for atom in (found[result].operands if result in found else equation.inputs)
                if isinstance(atom, Value)
            )
            live.append(equation)
    return live[::-1], uses


def _reshape_groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Match axes before and after a reshape, in the smallest groups of equally many elements."""
    start, stop = 0, 0  # Axes that are the same at both ends, which may be symbolic.
    shorter = min(len(before), len(after))
    while start < shorter and before[start] == after[start]:
        start += 1
    while stop < shorter - start and before[-1 - stop] == after[-1 - stop]:
        stop += 1
    groups = [([axis], [axis]) for axis in range(start)]
    old, new = collections.deque(range(start, len(before) - stop)), collections.deque(range(start, len(after) - stop))
    if any(not isinstance(before[axis], int) for axis in old):
        groups.append((list(old), list(new)))
        old.clear()
        new.clear()
    while old or new:
        group: tuple[list[int], list[int]] = ([], [])
        if old:
            group[0].append(old.popleft())
        if new:
            group[1].append(new.popleft())
        while (a := math.prod(before[axis] for axis in group[0])) != (b := math.prod(after[axis] for axis in group[1])):
            axes, rest = (group[0], old) if (a < b and old) or not new else (group[1], new)
            axes.append(rest.popleft())
        groups.append(group)
    return groups + [([len(before) - i], [len(after) - i]) for i in range(stop, 0, -1)]


def _lead(axes, shape):
    """Return the first of some axes that has more than one element; the first one if none has."""
    return next((axis for axis in axes if not _is_one(shape[axis])), axes[0])


def _is_one(side):
    return isinstance(side, int) and side == 1


def _keeps_order(groups, layout, shape):
    """Whether the axes of each group are one after the other in a layout, but for axes of one element."""
    order = [axis for axis in layout if not _is_one(shape[axis])]
    for old, _ in groups:
        positions = [order.index(axis) for axis in old if not _is_one(shape[axis])]
        if positions != [positions[0] + i for i in range(len(positions))] if positions else False:
            return False
    return True


# Handlers: each takes the emitter, the equation and its operands, and returns the results.


def _unary(kind, **attributes):
    return lambda graph, equation, x: graph.same(x, kind, **attributes)


def _same(graph, equation, *operands):
    return list(operands)


def _is_float(value):
    return jnp.issubdtype(value.dtype if isinstance(value, _Tensor) else value.array.dtype, jnp.floating)


def _binary(kind, **attributes):
    """Return the handler of an operation on two values, of which one may be broadcast."""

    def handler(graph, equation, *operands):
        output = equation.outputs[0].aval
        ranked = [one for one in operands if len(one.shape) == len(output.shape)]
        layout = graph.common_layout(ranked)
        name = graph.node(kind, *(graph.name(one, layout if one.shape else None) for one in operands), **attributes)
        return _Tensor(output.shape, output.dtype, name, layout)

    return handler


def _linear(kind):
    """Return the handler of an operation that may be affine in one operand, where the other is a known vector."""

    def handler(graph, equation, first, second):
        known, x = (first, second) if isinstance(first, Known) else (second, first)
        output = equation.outputs[0].aval
        if isinstance(known, Known) and isinstance(x, _Tensor) and _is_float(x) and x.shape == tuple(output.shape):
            step = affine_step(equation.primitive, known.array, known is first) if _is_vector(known.array) else None
            if step is not None:
                return graph.affine(x, *step)
        return _binary(kind)(graph, equation, first, second)

    return handler


def _negative(graph, equation, x):
    return graph.affine(x, -1, 0) if _is_float(x) else graph.same(x, "Neg")


def _maximum(graph, equation, *operands):
    known, x = sorted(operands, key=lambda one: isinstance(one, _Tensor))
    if isinstance(known, Known) and known.array.size == 1 and known.array.item() == 0 and _is_float(x):
        return graph.same(x, "Relu")
    return _binary("Max")(graph, equation, *operands)


def _comparison(kind, negate=False):
    def handler(graph, equation, *operands):
        result = _binary(kind)(graph, equation, *operands)
        return graph.same(result, "Not") if negate else result

    return handler


def _power(graph, equation, x):
    exponent = equation.params["y"]
    if exponent == 2:
        return _square(graph, equation, x)
    return graph.same(x, "Pow", graph.constant(np.array(exponent, np.float32)))


def _square(graph, equation, x):
    return graph.same(x, "Mul", graph.name(x, x.layout))


def _reciprocal_root(graph, equation, x):
    return graph.same(graph.same(x, "Sqrt"), "Reciprocal")


def _erfc(graph, equation, x):
    return graph.affine(graph.same(x, "Erf"), -1, 1)


def _log1p(graph, equation, x):
    return graph.same(graph.affine(x, 1, 1), "Log")


def _expm1(graph, equation, x):
    return graph.affine(graph.same(x, "Exp"), 1, -1)


def _exp2(graph, equation, x):
    return graph.same(graph.affine(x, math.log(2), 0), "Exp")


def _is_finite(graph, equation, x):
    infinite, invalid = graph.same(x, "IsInf", dtype=np.bool_), graph.same(x, "IsNaN", dtype=np.bool_)
    return graph.same(graph.same(infinite, "Or", graph.name(invalid, x.layout)), "Not")


def _convert(graph, equation, x):
    before, after = _dtype(x.dtype), _dtype(equation.params["new_dtype"])
    if before == after:
        return x
    return graph.same(x, "Cast", dtype=after, to=helper.np_dtype_to_tensor_dtype(after))


def _clamp(graph, equation, low, x, high):
    if low.shape or high.shape:
        return _binary("Min")(graph, equation, _binary("Max")(graph, equation, x, low), high)
    return _clip(graph, x, low, high)


def _clip(graph, x, low, high):
    return graph.same(x, "Clip", graph.name(low), graph.name(high))


def _select(graph, equation, which, *cases):
    if len(cases) != 2 or which.shape != () and which.shape != tuple(equation.outputs[0].aval.shape):
        raise _NoForm(f"{len(cases)} cases")
    output = equation.outputs[0].aval
    if isinstance(which, _Tensor) and which.dtype != bool:
        which = graph.same(which, "Cast", dtype=np.bool_, to=TensorProto.BOOL)
    ranked = [one for one in (which, *cases) if len(one.shape) == len(output.shape)]
    layout = graph.common_layout(ranked)
    names = [graph.name(one, layout if one.shape else None) for one in (which, cases[1], cases[0])]
    return _Tensor(output.shape, output.dtype, graph.node("Where", *names), layout)


def _reduction(kind, axes_are_input=False):
    def handler(graph, equation, x):
        axes = equation.params["axes"]
        inside = [x.layout.index(axis) for axis in axes]
        name = graph.name(x, x.layout)
        extra, attributes = ((graph.integers(*inside),), {}) if axes_are_input else ((), {"axes": inside})
        name = graph.node(kind, name, *extra, keepdims=0, **attributes)
        return _Tensor(*_without(x, axes), name, _layout_without(x.layout, axes))

    return handler


def _without(x, axes):
    return [side for axis, side in enumerate(x.shape) if axis not in axes], x.dtype


def _layout_without(layout, axes):
    left = [axis for axis in layout if axis not in axes]
    return tuple(sorted(left).index(axis) for axis in left)


def _sum(graph, equation, x):
    """Emit a mean and a factor, as what follows is mostly a division by the same number, which cancels it."""
    axes = equation.params["axes"]
    sides = [x.shape[axis] for axis in axes]
    if not all(isinstance(side, int) for side in sides) or not _is_float(x) or not axes:
        return _reduction("ReduceSum", axes_are_input=True)(graph, equation, x)
    if len(x.shape) == 4 and {x.layout.index(axis) for axis in axes} == {2, 3}:
        pooled = graph.node("GlobalAveragePool", graph.name(x, x.layout))
        mean = _Tensor(*_without(x, axes), graph.node("Flatten", pooled), _layout_without(x.layout, axes))
    else:
        mean = _reduction("ReduceMean")(graph, equation, x)
    return graph.affine(mean, math.prod(sides), 0)


def _logical_reduction(kind):
    def handler(graph, equation, x):
        numbers = graph.same(x, "Cast", dtype=np.int32, to=TensorProto.INT32)
        found = _reduction(kind)(graph, equation, numbers)
        return graph.same(found, "Cast", dtype=np.bool_, to=TensorProto.BOOL)

    return handler


def _arg(kind):
    def handler(graph, equation, x):
        (axis,) = equation.params["axes"]
        name = graph.node(kind, graph.name(x, x.layout), axis=x.layout.index(axis), keepdims=0)
        shape, _ = _without(x, (axis,))
        dtype = np.dtype(equation.params["index_dtype"])
        found = _Tensor(shape, np.int64, name, _layout_without(x.layout, (axis,)))
        return graph.same(found, "Cast", dtype=dtype, to=helper.np_dtype_to_tensor_dtype(dtype))

    return handler


def _cumulative_sum(graph, equation, x):
    axis = graph.constant(np.array(x.layout.index(equation.params["axis"]), np.int64))
    return graph.same(x, "CumSum", axis, reverse=int(equation.params["reverse"]))


def _reshaped(graph, equation, x):
    return graph.reshape(x, equation.outputs[0].aval.shape)


def _transposed(graph, equation, x):
    return graph.transpose(x, equation.params["permutation"])


def _broadcast(graph, equation, x):
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    shape = tuple(equation.outputs[0].aval.shape)
    sides = tuple(x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(shape)))
    x = graph.reshape(x, sides)
    if sides == shape:
        return x
    name = graph.node("Expand", graph.name(x, x.layout), graph.dimensions([shape[axis] for axis in x.layout]))
    return _Tensor(shape, x.dtype, name, x.layout)


def _tile(graph, equation, x):
    reps, output = equation.params["reps"], equation.outputs[0].aval
    name = graph.node("Tile", graph.name(x, x.layout), graph.dimensions([reps[axis] for axis in x.layout]))
    return _Tensor(output.shape, x.dtype, name, x.layout)


def _concatenate(graph, equation, *operands):
    output, axis = equation.outputs[0].aval, equation.params["dimension"]
    operands = [one for one in operands if not (isinstance(one, Known) and one.array.size == 0)]
    if len(operands) == 1:
        return operands[0]
    layout = graph.common_layout(operands)
    names = [graph.name(one, layout) for one in operands]
    return _Tensor(output.shape, output.dtype, graph.node("Concat", *names, axis=layout.index(axis)), layout)


def _stack(graph, equation, *operands):
    output, axis = equation.outputs[0].aval, equation.params["axis"]
    parts = [graph.reshape(one, (*one.shape[:axis], 1, *one.shape[axis:])) for one in operands]
    layout = graph.common_layout(parts)
    name = graph.node("Concat", *(graph.name(one, layout) for one in parts), axis=layout.index(axis))
    return _Tensor(output.shape, output.dtype, name, layout)


def _split(graph, equation, x):
    axis = x.layout.index(equation.params["axis"])
    sizes = graph.integers(*equation.params["sizes"])
    outputs = ["Split"] * len(equation.outputs)
    names = graph.nodes_of("Split", graph.name(x, x.layout), sizes, outputs=outputs, axis=axis)
    return [_Tensor(out.aval.shape, x.dtype, name, x.layout) for out, name in zip(equation.outputs, names)]


def _unstack(graph, equation, x):
    axis = equation.params["axis"]
    return [
        graph.reshape(_cut(graph, x, {axis: (i, i + 1, 1)}), output.aval.shape)
        for i, output in enumerate(equation.outputs)
    ]


_END = np.iinfo(np.int64).max


def _cut(graph, x, ranges):
    """Slice a value along axes, each from a start to a stop by a step; a negative step goes to the first element."""
    shape = list(x.shape)
    for axis, (start, stop, step) in ranges.items():
        first = start % shape[axis]
        shape[axis] = first // -step + 1 if step < 0 else -(-(stop - start) // step)
    axes = [x.layout.index(axis) for axis in ranges]
    parts = zip(
        *((start, -_END if step < 0 else stop, axis, step) for axis, (start, stop, step) in zip(axes, ranges.values()))
    )
    name = graph.node("Slice", graph.name(x, x.layout), *(graph.integers(*part) for part in parts))
    return _Tensor(shape, x.dtype, name, x.layout)


def _slice(graph, equation, x):
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    steps = equation.params["strides"] or (1,) * len(starts)
    ranges = {
        axis: one
        for axis, one in enumerate(zip(starts, stops, steps))
        if not (one[0] == 0 and one[1] == x.shape[axis] and one[2] == 1)
    }
    if not ranges:
        return x
    if not all(isinstance(number, int | np.integer) for one in ranges.values() for number in one):
        raise _NoForm("a slice of the batch")
    return _cut(graph, x, ranges)


def _dynamic_slice(graph, equation, x, *starts):
    if not isinstance(x, _Tensor) or not all(isinstance(start, Known) for start in starts):
        raise _NoForm("starts that are computed")
    sizes = equation.params["slice_sizes"]
    ranges = {}
    for axis, (start, size) in enumerate(zip(starts, sizes)):
        if size != x.shape[axis]:
            first = min(max(int(start.array), 0), x.shape[axis] - size)
            ranges[axis] = (first, first + size, 1)
    return _cut(graph, x, ranges) if ranges else x


def _reverse(graph, equation, x):
    return _cut(graph, x, {axis: (-1, 0, -1) for axis in equation.params["dimensions"]})


def _pad(graph, equation, x, value):
    config = equation.params["padding_config"]
    if any(interior for _, _, interior in config):
        raise _NoForm("padding between elements")
    if not isinstance(value, Known):
        raise _NoForm("a padding value that is computed")
    x = _cropped(graph, x, {axis: (low, high) for axis, (low, high, _) in enumerate(config)})
    pads = [[max(0, int(config[axis][end])) for axis in x.layout] for end in (0, 1)]
    if not any(pads[0] + pads[1]):
        return x
    fill = graph.constant(value.array.astype(_dtype(x.dtype)))
    name = graph.node("Pad", graph.name(x, x.layout), graph.integers(*pads[0], *pads[1]), fill)
    return _Tensor(equation.outputs[0].aval.shape, x.dtype, name, x.layout)


def _cropped(graph, x, pads):
    """Return a value without what negative padding takes away."""
    ranges = {
        axis: (max(0, -int(low)), x.shape[axis] - max(0, -int(high)), 1)
        for axis, (low, high) in pads.items()
        if low < 0 or high < 0
    }
    return _cut(graph, x, ranges) if ranges else x


def _gather(graph, equation, x, indices):
    """Emit what indexing makes: with a symbolic batch size, JAX writes every `x[...]` as a gather."""
    if isinstance(x, _Tensor) and isinstance(indices, Known):
        return _taken_by_known(graph, equation, x, indices.array)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    axes = tuple(numbers.start_index_map)
    others = [axis for axis in range(len(x.shape)) if axis not in axes]
    if (
        len(axes) != 1
        or numbers.collapsed_slice_dims != axes
        or [sizes[i] for i in others] != [x.shape[i] for i in others]
    ):
        raise _NoForm("computed indices into several axes")
    indices = graph.reshape(indices, indices.shape[:-1])
    name = graph.node("Gather", graph.name(x), graph.name(indices), axis=axes[0])
    output = equation.outputs[0].aval
    dims = [dim for dim in range(len(output.shape)) if dim not in numbers.offset_dims]
    # In the graph, the axes of the indices take the place of the axis.
    offsets = iter(numbers.offset_dims)
    layout = [dim for axis in range(len(x.shape)) for dim in (dims if axis in axes else [next(offsets)])]
    return _Tensor(output.shape, output.dtype, name, tuple(layout))


def _taken_by_known(graph, equation, x, indices):
    """Take elements along each axis by itself, as slices where they are equally far apart."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if numbers.operand_batching_dims:
        raise _NoForm("indices by batch")
    along: dict[int, int] = {}  # For each dimension of the indices, the axis that it runs along.
    for axis, size in enumerate(sizes):
        starts = np.zeros(indices.shape[:-1], np.int64)
        if axis in numbers.start_index_map:
            starts = indices[..., numbers.start_index_map.index(axis)].astype(np.int64)
        varying = [dim for dim, side in enumerate(starts.shape) if np.any(starts != starts.take([0], dim))]
        if size == x.shape[axis] and not varying and not np.any(starts):
            if axis not in numbers.collapsed_slice_dims:
                continue
        if len(varying) > 1 or (varying and (varying[0] in along or size != 1)):
            raise _NoForm("indices into several axes at once")
        line = starts[tuple(slice(None) if dim in varying else 0 for dim in range(starts.ndim))].reshape(-1)
        if line.min() < 0 or line.max() + size > x.shape[axis]:
            raise _NoForm("indices out of bounds")
        if varying:
            along[varying[0]] = axis
        x = _taken(graph, x, axis, line if size == 1 else np.arange(line[0], line[0] + size))
    # A dimension along which nothing varies has one element, or repeats them.
    if any(side != 1 for dim, side in enumerate(indices.shape[:-1]) if dim not in along):
        raise _NoForm("indices that repeat")
    kept = [axis for axis in range(len(x.shape)) if axis not in numbers.collapsed_slice_dims]
    run = [along[dim] for dim in sorted(along)]
    dropped = [axis for axis in numbers.collapsed_slice_dims if axis not in run]
    output = equation.outputs[0].aval
    offsets = iter(kept)
    lines = iter(run)
    dims = [dim for dim in range(len(output.shape)) if dim not in numbers.offset_dims]
    from_line = {dims[dim] for dim in along}
    order = [
        next(offsets) if dim in numbers.offset_dims else next(lines)
        for dim in range(len(output.shape))
        if dim in numbers.offset_dims or dim in from_line
    ]
    return graph.reshape(graph.transpose(x, [*dropped, *order]), output.shape)


def _taken(graph, x, axis, line):
    step = int(line[1] - line[0]) if len(line) > 1 else 1
    if step and np.array_equal(line, line[0] + step * np.arange(len(line))) and (step > 0 or line[-1] == 0):
        return _cut(graph, x, {axis: (int(line[0]), int(line[-1]) + 1, step)})
    name = graph.node("Gather", graph.name(x, x.layout), graph.integers(*line), axis=x.layout.index(axis))
    shape = [len(line) if other == axis else side for other, side in enumerate(x.shape)]
    return _Tensor(shape, x.dtype, name, x.layout)


def _parent(value):
    """Return the module of a parameter, as a name for the node that uses it."""
    return value.name.rpartition("/")[0] if isinstance(value, Known) else ""


def _convolution(graph, equation, x, kernel):
    params = equation.params
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise _NoForm("groups of the batch")
    if any(step != 1 for step in params["lhs_dilation"]):
        return _transposed_convolution(graph, equation, x, kernel)
    spatial = numbers.lhs_spec[2:]
    x = _cropped(graph, x, dict(zip(spatial, params["padding"]))) if isinstance(x, _Tensor) else x
    pads = [[max(0, int(pad[end])) for pad in params["padding"]] for end in (0, 1)]
    name = graph.node(
        "Conv",
        graph.name(x, tuple(numbers.lhs_spec)),
        graph.name(kernel, tuple(numbers.rhs_spec)),
        name=_parent(kernel),
        kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
        strides=list(params["window_strides"]),
        pads=pads[0] + pads[1],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
    )
    output = equation.outputs[0].aval
    return _Tensor(output.shape, output.dtype, name, tuple(numbers.out_spec))


def _transposed_convolution(graph, equation, x, kernel):
    params, output = equation.params, equation.outputs[0].aval
    numbers = params["dimension_numbers"]
    features_out, features_in, *spatial = numbers.rhs_spec
    reach = [d * (kernel.shape[axis] - 1) for d, axis in zip(params["rhs_dilation"], spatial)]
    pads = [[r - int(pad[end]) for r, pad in zip(reach, params["padding"])] for end in (0, 1)]
    if (
        not isinstance(kernel, Known)
        or params["feature_group_count"] != 1
        or any(step != 1 for step in params["window_strides"])
        or min(pads[0]) < 0
    ):
        raise _NoForm("a transposed convolution of this kind")
    flipped = Known(np.flip(kernel.array, spatial), kernel.name)
    name = graph.node(
        "ConvTranspose",
        graph.name(x, tuple(numbers.lhs_spec)),
        graph.name(flipped, (features_in, features_out, *spatial)),
        name=_parent(kernel),
        kernel_shape=[kernel.shape[axis] for axis in spatial],
        strides=list(params["lhs_dilation"]),
        pads=pads[0] + [max(0, pad) for pad in pads[1]],
        output_padding=[max(0, -pad) for pad in pads[1]],
        dilations=list(params["rhs_dilation"]),
    )
    return _Tensor(output.shape, output.dtype, name, tuple(numbers.out_spec))


def _product(graph, equation, left, right):
    """Emit a product of matrices, whose axes are brought to (batch, free, contracted) by layouts alone if possible."""
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    output = equation.outputs[0].aval
    left_free, right_free = (
        [axis for axis in range(len(one.shape)) if axis not in (*contracted, *batch)]
        for one, contracted, batch in ((left, left_axes, left_batch), (right, right_axes, right_batch))
    )
    left = graph.transpose(left, [*left_batch, *left_free, *left_axes])
    right = graph.transpose(right, [*right_batch, *right_axes, *right_free])
    depth = math.prod(left.shape[len(left.shape) - len(left_axes) :])
    left = graph.reshape(left, (*left.shape[: len(left.shape) - len(left_axes)], depth))
    batch = left.shape[: len(left_batch)]
    right = graph.reshape(right, (*batch, depth, *right.shape[len(right_batch) + len(right_axes) :]))
    free, right_free = left.shape[len(batch) : -1], right.shape[len(batch) + 1 :]
    if batch:
        left = graph.reshape(left, (*batch, math.prod(free), depth))
        right = graph.reshape(right, (*batch, depth, math.prod(right_free)))
        name = graph.node("MatMul", graph.name(left), graph.name(right))
        result = _Tensor((*batch, left.shape[-2], right.shape[-1]), output.dtype, name)
    elif isinstance(left, Known) and isinstance(right, _Tensor):
        # (K, N) by (M, K): the result has the axes of the known matrix last.
        right = graph.transpose(right, [*range(1, len(right.shape)), 0])
        left = graph.reshape(left, (math.prod(free), depth))
        result = _times_matrix(graph, right, graph.transpose(left, (1, 0)), output.dtype)
        result = graph.transpose(result, [len(result.shape) - 1, *range(len(result.shape) - 1)])
    else:
        result = _times_matrix(graph, left, graph.reshape(right, (depth, math.prod(right_free))), output.dtype)
    return graph.reshape(result, output.shape)


def _times_matrix(graph, x, matrix, dtype):
    """Multiply the last axis of a value by a matrix, in the layout that the value has."""
    rank, width = len(x.shape), matrix.shape[1]
    shape, name = (*x.shape[:-1], width), _parent(matrix)
    layout = x.layout if isinstance(x, _Tensor) else _natural(rank)
    place = layout.index(rank - 1)
    if rank == 2 and isinstance(matrix, Known):
        product = graph.node("Gemm", graph.name(x), graph.name(matrix), name=name)
        return _Tensor(shape, dtype, product)
    if rank == 4 and place == 1 and isinstance(matrix, Known):
        kernel = Known(matrix.array.T.reshape(width, -1, 1, 1), matrix.name)
        product = graph.node("Conv", graph.name(x, layout), graph.name(kernel), name=name, kernel_shape=[1, 1])
        return _Tensor(shape, dtype, product, layout)
    if place == rank - 2:
        product = graph.node("MatMul", graph.name(matrix, (1, 0)), graph.name(x, layout), name=name)
        return _Tensor(shape, dtype, product, layout)
    if place != rank - 1:
        layout = (*(axis for axis in layout if axis != rank - 1), rank - 1)
    product = graph.node("MatMul", graph.name(x, layout), graph.name(matrix), name=name)
    return _Tensor(shape, dtype, product, layout)


def _pool(kind):
    """Return the handler of a pool: largest, smallest or sum of the elements in each window."""

    def handler(graph, equation, x):
        params, rank = equation.params, len(x.shape)
        windows = zip(
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            params["window_dilation"],
        )
        if any(step != 1 for step in params["base_dilation"]):
            raise _NoForm("elements apart")
        pooled = {axis: one for axis, one in enumerate(windows) if one[0] > 1 or one[1] > 1 or any(one[2])}
        if not pooled:
            return x
        others = [axis for axis in range(rank) if axis not in pooled]
        if len(others) < 2:
            raise _NoForm(f"windows of {len(pooled)} of {rank} axes")
        if not set(x.layout[:2]) <= set(others):
            lead = (others[0], others[-1])
            layout = (*lead, *(axis for axis in range(rank) if axis not in lead))
        else:
            layout = x.layout
        axes = layout[2:]
        x = _cropped(graph, x, {axis: params["padding"][axis] for axis in axes})
        pads = [[max(0, int(params["padding"][axis][end])) for axis in axes] for end in (0, 1)]
        attributes = dict(
            kernel_shape=[params["window_dimensions"][axis] for axis in axes],
            strides=[params["window_strides"][axis] for axis in axes],
            pads=pads[0] + pads[1],
        )
        dilations = [params["window_dilation"][axis] for axis in axes]
        if any(step != 1 for step in dilations):
            if kind == "sum":
                raise _NoForm("a dilated window")
            attributes["dilations"] = dilations
        output = equation.outputs[0].aval
        if kind == "sum":
            name = graph.node("AveragePool", graph.name(x, layout), count_include_pad=1, **attributes)
            mean = _Tensor(output.shape, output.dtype, name, layout)
            return graph.affine(mean, math.prod(params["window_dimensions"]), 0)
        if kind == "min":
            x = graph.affine(x, -1, 0)
        name = graph.node("MaxPool", graph.name(x, layout), **attributes)
        pooled_x = _Tensor(output.shape, output.dtype, name, layout)
        return graph.affine(pooled_x, -1, 0) if kind == "min" else pooled_x

    return handler


def _dimension_as_value(graph, equation):
    name = graph.node("Cast", graph._dimension(equation.params["dim"]), to=TensorProto.INT32)
    return graph.reshape(_Tensor((1,), np.int32, name), ())


_HANDLERS: dict[str, Callable[..., Any]] = {
    "abs": _unary("Abs"),
    "add": _linear("Add"),
    "add_any": _binary("Add"),
    "and": _binary("And"),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "broadcast_in_dim": _broadcast,
    "ceil": _unary("Ceil"),
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "convert_element_type": _convert,
    "copy": _same,
    "cos": _unary("Cos"),
    "cosh": _unary("Cosh"),
    "cumsum": _cumulative_sum,
    "dim_as_value": _dimension_as_value,
    "div": _linear("Div"),
    "dot_general": _product,
    "dynamic_slice": _dynamic_slice,
    "eq": _comparison("Equal"),
    "erf": _unary("Erf"),
    "erfc": _erfc,
    "exp": _unary("Exp"),
    "exp2": _exp2,
    "expand_dims": _reshaped,
    "expm1": _expm1,
    "floor": _unary("Floor"),
    "gather": _gather,
    "ge": _comparison("GreaterOrEqual"),
    "gt": _comparison("Greater"),
    "integer_pow": _power,
    "is_finite": _is_finite,
    "le": _comparison("LessOrEqual"),
    "log": _unary("Log"),
    "log1p": _log1p,
    "logistic": _unary("Sigmoid"),
    "lt": _comparison("Less"),
    "max": _maximum,
    "min": _binary("Min"),
    "mul": _linear("Mul"),
    "name": _same,
    "ne": _comparison("Equal", negate=True),
    "neg": _negative,
    "not": _unary("Not"),
    "optimization_barrier": _same,
    "or": _binary("Or"),
    "pad": _pad,
    "pow": _binary("Pow"),
    "reduce_and": _logical_reduction("ReduceMin"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_or": _logical_reduction("ReduceMax"),
    "reduce_precision": _same,
    "reduce_prod": _reduction("ReduceProd"),
    "reduce_sum": _sum,
    "reduce_window_max": _pool("max"),
    "reduce_window_min": _pool("min"),
    "reduce_window_sum": _pool("sum"),
    "rem": _binary("Mod", fmod=1),
    "reshape": _reshaped,
    "rev": _reverse,
    "round": _unary("Round"),
    "rsqrt": _reciprocal_root,
    "select_n": _select,
    "sharding_constraint": _same,
    "sign": _unary("Sign"),
    "sin": _unary("Sin"),
    "sinh": _unary("Sinh"),
    "slice": _slice,
    "split": _split,
    "sqrt": _unary("Sqrt"),
    "square": _square,
    "squeeze": _reshaped,
    "stack": _stack,
    "stop_gradient": _same,
    "sub": _linear("Sub"),
    "tan": _unary("Tan"),
    "tanh": _unary("Tanh"),
    "tile": _tile,
    "transpose": _transposed,
    "unstack": _unstack,
    "xor": _binary("Xor"),
}


def _last_axis(graph, x):
    """Return a layout of a value in which its last axis is the last."""
    rank = len(x.shape)
    return x.layout if x.layout[-1] == rank - 1 else (*(axis for axis in x.layout if axis != rank - 1), rank - 1)


def _softmax(graph, x):
    layout = _last_axis(graph, x)
    return _Tensor(x.shape, x.dtype, graph.node("Softmax", graph.name(x, layout), axis=-1), layout)


def _layer_norm(graph, x, epsilon, *vectors, scale, bias):
    layout, side = _last_axis(graph, x), x.shape[-1]
    arrays = [np.asarray(vector.array, np.float32) for vector in vectors]
    if not scale:
        arrays.insert(0, np.ones(side, np.float32))
    name = graph.node(
        "LayerNormalization",
        graph.name(x, layout),
        *map(graph.constant, arrays),
        epsilon=float(epsilon.array),
    )
    return _Tensor(x.shape, x.dtype, name, layout)


# Both in the order of operations in which onnxruntime knows them.
def _gelu(graph, x):
    x = graph.settled(x)
    inner = graph.same(x, "Div", graph.constant(np.array(math.sqrt(2), np.float32)))
    y = graph.same(graph.same(inner, "Erf"), "Add", graph.constant(np.array(1, np.float32)))
    y = graph.same(x, "Mul", graph.name(y, x.layout))
    return graph.same(y, "Mul", graph.constant(np.array(0.5, np.float32)))


def _gelu_tanh(graph, x):
    def number(value):
        return graph.constant(np.array(value, np.float32))

    x = graph.settled(x)
    cubic = graph.same(graph.same(x, "Pow", number(3)), "Mul", number(0.044715))
    inner = graph.same(graph.same(x, "Add", graph.name(cubic, x.layout)), "Mul", number(math.sqrt(2 / math.pi)))
    y = graph.same(graph.same(inner, "Tanh"), "Add", number(1))
    return graph.same(graph.same(x, "Mul", number(0.5)), "Mul", graph.name(y, x.layout))


def _hard_sigmoid(graph, x):
    return graph.same(x, "HardSigmoid", alpha=1 / 6, beta=0.5)


_PATTERNS: dict[str, Callable[..., _Tensor]] = {
    "clip": _clip,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda graph, x: graph.same(x, "HardSwish"),
    "layer_norm": functools.partial(_layer_norm, scale=False, bias=False),
    "layer_norm_bias": functools.partial(_layer_norm, scale=False, bias=True),
    "layer_norm_scale": functools.partial(_layer_norm, scale=True, bias=False),
    "layer_norm_scale_bias": functools.partial(_layer_norm, scale=True, bias=True),
    "softmax": _softmax,
}
