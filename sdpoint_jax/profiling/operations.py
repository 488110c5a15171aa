"""Operations of a network, read off the equations of its trace.

A *layer* is a module that holds variables. Its name is the path of its variables, which are followed from the inputs of
the trace to the equation that uses them, so that no formulation, scope or shared trace changes a name. A *map* is an
activation in memory: the output of a product, a pool, a reduction, or a place where branches meet. Everything between
two maps is elementwise and belongs to the operation before it.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from sdpoint_jax.models.pool import SCOPE
from sdpoint_jax.models.trace import Constant, Equation, Program, Value, flatten

# Accelerators get plain convolutions; a CPU gets some as matrix products, whose shapes say less.
PLATFORM = "tpu"

Shape = tuple[int, ...]
Kind = Literal[
    "convolution", "dense", "product", "norm", "own_norm", "affine", "add", "multiply", "concatenate", "max_pool",
    "average_pool",
]  # fmt: skip
_PRODUCTS = ("conv_general_dilated", "dot_general")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")


class Operation(NamedTuple):
    """One operation on the activations of one image.

    Attributes:
        kind: What it does. A `product` multiplies two activations, as attention does. A `norm` has statistics among its
            variables, an `own_norm` (LayerNorm, softmax) takes its input's own. Any other layer without a product is
            `affine`.
        name: Path of its variables, as in `block_03/conv1`, or such a path for an operation without variables.
        input: Shape without the batch axis, of three axes at least: height, width and channels of a map.
        output: Shape in the same form; (1, 1, K) for the classifier.
        macs: Number of multiply-accumulates.
        params: Number of trainable parameters, where a layer is used for the first time.
        weights: Number of weights that take part in `macs`: those of a kernel, without biases.
        matrix: Kernel as matrices: groups, rows (the weights of one output channel) and columns of each.
        reads: Number of elements of activations that it reads.
        of_images: Whether it reads the images, which need no gradient.
        at_point: Whether it is the adaptive pool of a downsampling point.
    """

    kind: Kind
    name: str
    input: Shape
    output: Shape
    macs: int = 0
    params: int = 0
    weights: int = 0
    matrix: tuple[int, int, int] = (1, 1, 1)
    reads: int = 0
    of_images: bool = False
    at_point: bool = False


class Run(NamedTuple):
    """One call of a part of a network in a trace.

    Attributes:
        part: Name of its variables.
        before: Name of the part before it, after which a point acts; its own name for the first part.
        scope: Scope of its equations.
        output: Shapes of what it returns.
    """

    part: str
    before: str
    scope: str
    output: tuple[Shape, ...]


def read_operations(program: Program, variables: Any, runs: Sequence[Run]) -> list[tuple[Operation, ...]]:
    """Return the operations of each run of a part.

    Args:
        program: Trace of a function of (variables, images [1, H, W, C]).
        variables: Shapes of the variables.
        runs: The calls of parts in the trace.

    Raises:
        ValueError: A loop multiplies matrices an unknown number of times, or a part uses variables of another part.
    """
    return _Reader(program, variables, runs).read()


class _Layer(NamedTuple):
    """Name of a layer, its number of parameters, whether it holds statistics, and the shape of its first variable."""

    name: str
    params: int
    has_statistics: bool
    shape: Shape


class _Map:
    """An activation in memory.

    Attributes:
        reduced_from: Map whose statistic this map is; None for all others.
        record: Index of the operation that computes this statistic.
        layer: Layer whose product this map is; its bias belongs to it.
        is_images: Whether it is the images.
        normalised: Index of the operation that normalises it by its own statistics.
        layers: Names of the layers that have changed it elementwise.
    """

    def __init__(self, *, reduced_from=None, record=None, layer=None, is_images=False):
        self.reduced_from, self.record, self.layer, self.is_images = reduced_from, record, layer, is_images
        self.normalised, self.layers = None, set()

    @property
    def root(self):
        return self.reduced_from.root if self.reduced_from else self


class _Info(NamedTuple):
    """What a value is an elementwise function of: maps, or, if of none, layers' variables; and the run that made it."""

    maps: frozenset = frozenset()
    layers: tuple[_Layer, ...] = ()
    run: int | None = None


class _Pool(NamedTuple):
    """A pool whose equations are being read: its scope, the maps that it reads, its output, its operation's index."""

    scope: tuple[str, ...]
    sources: frozenset
    output: _Map
    record: int


class _Reader:
    """State of reading a trace: what each value is made of, and the operations found by run."""

    def __init__(self, program, variables, runs):
        layers, self._modules = _layers_of(variables)
        self._program, self._runs = program, runs
        self._infos = {value: _Info(layers=(layer,)) for value, layer in zip(program.inputs, layers)}
        self._infos[program.inputs[-1]] = _Info(frozenset({_Map(is_images=True)}), (), 0)
        self._layers = tuple(dict.fromkeys(layers))
        self._inputs: dict[tuple[Value, int], _Info] = {}
        self._operations: list[list[Operation | None]] = [[] for _ in runs]
        self._used: list[set[str]] = [set() for _ in runs]  # Names of layers whose parameters are counted.
        self._pool: _Pool | None = None

    def read(self):
        number_of = {run.scope: number for number, run in enumerate(self._runs)}
        for equation in self._program.equations:
            run = next((number_of[name] for name in equation.scope if name in number_of), None)
            if run is not None:
                self._read(equation, run)
            elif not any(self._info(value, None).maps for value in equation.inputs):
                self._keep(equation, _Info(layers=self._layers_in(equation.inputs)))
        for number in range(len(self._runs)):
            self._add_unused(number)
        return [tuple(one for one in operations if one) for operations in self._operations]

    def _info(self, value, run):
        """Return what a value is made of; a value of another run is a map by itself."""
        if isinstance(value, Constant):
            return _Info()
        info = self._infos.get(value, _Info())  # Of a part that failed half-way, nothing is known or used.
        if info.run in (None, run):
            return info
        return self._inputs.setdefault((value, run), _Info(frozenset({_Map()}), (), run))

    def _layers_in(self, values):
        return tuple(dict.fromkeys(layer for value in values for layer in self._info(value, None).layers))

    def _keep(self, equation, info):
        self._infos |= dict.fromkeys(equation.outputs, info)

    def _read(self, equation, run):
        infos = [self._info(value, run) for value in equation.inputs]
        maps = frozenset().union(*(info.maps for info in infos))
        layers = tuple(dict.fromkeys(layer for info in infos if not info.maps for layer in info.layers))
        for layer in layers:
            self._check_owner(layer, run)
        if not maps:
            self._keep(equation, _Info(layers=layers, run=run))
            return
        scope = _pool_scope(equation.scope)
        if scope:
            made = self._read_pool(equation, scope, maps, run)
        elif equation.primitive in _PRODUCTS:
            made = self._read_product(equation, infos, run)
        elif equation.primitive.startswith("reduce_window"):
            made = self._read_reduction(equation, maps, run, window=True)
        elif equation.primitive in _REDUCTIONS:
            made = self._read_reduction(equation, maps, run)
        elif equation.primitive in ("scan", "while", "cond"):
            self._read_control(equation, run)
            return
        else:
            made = self._read_elementwise(equation, maps, layers, run)
        if not scope:
            self._pool = None
        self._keep(equation, _Info(made, (), run))

    def _check_owner(self, layer, run):
        part, owner = self._runs[run].part, layer.name.partition("/")[0]
        if owner != part and owner in {other.part for other in self._runs}:
            raise ValueError(f"{part} uses variables of {owner} ({layer.name}): a part has variables of its own only")

    def _record(self, run, kind, equation, name="", layer=None, **fields):
        """Append an operation, from the equation's largest activation to its output; return its index."""
        operations, params = self._operations[run], 0
        if layer:
            name, params = layer.name, self._params(layer, run)
        else:
            same = sum(bool(one) and one.name.rstrip("0123456789") == name for one in operations)
            name = f"{name}{same + 1}" if same else name
        activations = [value.aval for value in equation.inputs if self._info(value, run).maps]
        largest = max(activations, key=lambda aval: aval.size)
        shapes = _per_image(largest.shape), _per_image(equation.outputs[0].aval.shape)
        fields = {"reads": largest.size} | fields
        operations.append(Operation(kind, name, *shapes, params=params, **fields))
        return len(operations) - 1

    def _params(self, layer, run):
        """Return the parameters to count for a use of a layer: none, but at the first use in a run of its part."""
        if layer.name in self._used[run]:
            return 0
        self._used[run].add(layer.name)
        return layer.params

    def _path(self, equation, run):
        """Return the path of the module that an equation is in, as far as the module holds variables."""
        path = [self._runs[run].part]
        node = self._modules.get(path[0], {})
        for name in equation.scope:
            if name in node:
                path.append(name)
                node = node[name]
        return "/".join(path)

    def _pool_name(self, equation, run):
        # The point before a part acts when the part is called, and is named by the part that it follows.
        at_point = any(name.endswith(("._pass_point", ".downsample")) for name in equation.scope)
        return f"{self._runs[run].before if at_point else self._path(equation, run)}/pool"

    def _read_pool(self, equation, scope, maps, run):
        """Read an equation of an adaptive pool, however many it takes: the last one gives the pool's output."""
        pool = self._pool
        sources = maps - {pool.output} if pool else maps
        if not pool or pool.scope != scope or (sources and sources != pool.sources):
            kind = "max_pool" if scope[-1].endswith("max") else "average_pool"
            record = self._record(run, kind, equation, self._pool_name(equation, run), at_point=True)
            self._pool = pool = _Pool(scope, maps, _Map(), record)
        operations, output = self._operations[run], _per_image(equation.outputs[0].aval.shape)
        operations[pool.record] = operations[pool.record]._replace(output=output)
        return frozenset({pool.output})

    def _read_product(self, equation, infos, run):
        left, right = infos
        kernel = next((value.aval for value, info in zip(equation.inputs, infos) if not info.maps), None)
        layers = () if kernel is None else (right if left.maps else left).layers
        layer = max(layers, key=lambda layer: layer.params, default=None)
        matrix, macs = _matrix(equation, kernel is equation.inputs[0].aval), count_product(equation)
        if kernel is None:
            kind = "product"
        else:
            kind = "convolution" if equation.primitive == "conv_general_dilated" else "dense"
        maps = left.maps | right.maps
        self._record(
            run, kind, equation, f"{self._path(equation, run)}/product", layer, macs=macs, matrix=matrix,
            weights=0 if kernel is None else kernel.size,
            reads=sum(value.aval.size for value, info in zip(equation.inputs, infos) if info.maps),
            of_images=all(one.is_images for one in maps),
        )  # fmt: skip
        return frozenset({_Map(layer=layer)})

    def _read_reduction(self, equation, maps, run, window=False):
        kind = "max_pool" if "max" in equation.primitive else "average_pool"
        record = self._record(run, kind, equation, self._pool_name(equation, run))
        roots = {one.root for one in maps}
        source = None if window or len(roots) > 1 else roots.pop()
        return frozenset({_Map(reduced_from=source, record=record)})

    def _read_elementwise(self, equation, maps, layers, run):
        roots = {one.root for one in maps}
        joins_token = equation.primitive == "concatenate" and layers
        if len(roots) > 1 or joins_token:
            kind = {"concatenate": "concatenate", "mul": "multiply"}.get(equation.primitive, "add")
            reads = equation.outputs[0].aval.size
            self._record(run, kind, equation, f"{self._path(equation, run)}/{kind}", reads=reads)
            return frozenset({_Map()})
        (root,) = roots
        if root in maps and len(maps) > 1:  # A map meets statistics of its own.
            self._normalise(equation, root, maps - {root}, run)
            maps = frozenset({root})
        for layer in layers:
            self._read_affine(equation, root, layer, run)
        return maps

    def _normalise(self, equation, root, statistics, run):
        operations = self._operations[run]
        reductions = [operations[one.record] for one in statistics]
        for one in statistics:  # Computing them is part of the normalisation.
            operations[one.record] = None
        if root.normalised is None:
            is_softmax = any(one and one.kind == "max_pool" for one in reductions)
            name = f"{self._path(equation, run)}/{'softmax' if is_softmax else 'norm'}"
            root.normalised = self._record(run, "own_norm", equation, name)

    def _read_affine(self, equation, root, layer, run):
        """Read an elementwise use of a layer: a bias, the scale or shift of a norm, or a layer of its own."""
        if layer == root.layer or layer.name in root.layers:
            return
        operations = self._operations[run]
        own = operations[root.normalised] if root.normalised is not None else None
        if own and not layer.has_statistics and not root.layers:
            operations[root.normalised] = own._replace(name=layer.name, params=self._params(layer, run))
        else:
            self._record(run, "norm" if layer.has_statistics else "affine", equation, layer=layer)
        root.layers.add(layer.name)

    def _read_control(self, equation, run):
        """Read a loop as often as it runs, or the dearest of several branches."""
        inputs, params = equation.inputs, equation.params
        if equation.primitive == "while":
            if any(count_macs_of(flatten(params[key], PLATFORM)) for key in ("cond_jaxpr", "body_jaxpr")):
                raise ValueError(
                    f"{self._runs[run].part}: the number of rounds of a while loop is not known; use a scan"
                )
            self._keep(equation, _Info(frozenset({_Map()}), (), run))
            return
        if equation.primitive == "cond":
            branches = [flatten(branch, PLATFORM) for branch in params["branches"]]
            outputs = self._call(max(branches, key=count_macs_of), inputs[1:], equation, run)
        else:
            consts, carried = params["num_consts"], params["num_carry"]
            outputs = inputs[consts : consts + carried]
            body = flatten(params["jaxpr"], PLATFORM)
            for _ in range(params["length"]):
                state = (*inputs[:consts], *outputs[:carried], *inputs[consts + carried :])
                outputs = self._call(body, state, equation, run)
        for value, output in zip(equation.outputs, outputs):
            self._infos[value] = self._info(output, run)

    def _call(self, program, inputs, equation, run):
        for value, given in zip(program.inputs, inputs, strict=True):
            self._infos[value] = self._info(given, run)
        for inner in program.equations:
            self._read(inner._replace(scope=(*equation.scope, *inner.scope)), run)
        # Of values that the next round overwrites, what they are made of is kept.
        results = tuple(Value(value.aval) for value in program.outputs)
        self._infos |= {result: self._info(value, run) for result, value in zip(results, program.outputs)}
        return results

    def _add_unused(self, run):
        """Add the layers of a part that no operation uses, such as a token that the stem hands on."""
        part, parts = self._runs[run].part, {other.part for other in self._runs}
        for layer in self._layers:
            owner = layer.name.partition("/")[0]
            is_own = owner == part or (run == 0 and owner not in parts)
            if is_own and layer.params and layer.name not in self._used[run]:
                shapes = [_per_image(layer.shape)] * 2
                self._operations[run].append(Operation("affine", layer.name, *shapes, params=layer.params))


def count_product(equation: Equation) -> int:
    """Return the multiply-accumulates of a convolution or a matrix product."""
    left, right = (value.aval for value in equation.inputs)
    output = equation.outputs[0].aval
    if equation.primitive == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return output.size * math.prod(left.shape[axis] for axis in contracted)
    features = right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    # A transposed convolution multiplies no zeros that it puts between the cells of its input.
    return output.size * right.size // features // math.prod(equation.params["lhs_dilation"])


def count_macs_of(program: Program) -> int:
    """Return the multiply-accumulates of all products in a program, in loops as well."""
    total = 0
    for equation in program.equations:
        params = equation.params
        if equation.primitive in _PRODUCTS:
            total += count_product(equation)
        elif equation.primitive == "scan":
            total += params["length"] * count_macs_of(flatten(params["jaxpr"], PLATFORM))
        elif equation.primitive == "cond":
            total += max(count_macs_of(flatten(branch, PLATFORM)) for branch in params["branches"])
        elif equation.primitive == "while":
            total += count_macs_of(flatten(params["body_jaxpr"], PLATFORM))
    return total


def _matrix(equation, kernel_is_left):
    """Return groups, rows and columns of a product's kernel, the right operand unless stated otherwise."""
    kernel = equation.inputs[0 if kernel_is_left else 1].aval
    if equation.primitive == "conv_general_dilated":
        groups = equation.params["feature_group_count"]
        features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
        return groups, kernel.size // features, features // groups
    contracted, batch = (axes[0 if kernel_is_left else 1] for axes in equation.params["dimension_numbers"])
    rows, groups = (math.prod(kernel.shape[axis] for axis in axes) for axes in (contracted, batch))
    return groups, rows, kernel.size // (rows * groups)


def _per_image(shape):
    """Return a shape without its batch axis of one image, with ones in front to have three axes."""
    shape = tuple(shape[1:] if shape[:1] == (1,) else shape)
    return (1,) * (3 - len(shape)) + shape


def _pool_scope(scope):
    """Return the scope up to the pool that an equation is part of; None outside of pools of points."""
    for index, name in enumerate(scope):
        if name.startswith(SCOPE):
            return scope[: index + 1]
    # A network's own way to downsample, whatever it computes.
    return next((scope[: index + 1] for index, name in enumerate(scope) if name.endswith(".downsample")), None)


def _layers_of(variables: Any) -> tuple[list[_Layer], dict[str, Any]]:
    """Return the layer of each variable, in the order of a trace's inputs, and nested dicts of the modules' names."""
    modules: dict[str, Any] = {}
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        collection, *names = (str(getattr(key, "key", key)) for key in path)
        leaves.append((collection, tuple(names), leaf))
        functools.reduce(lambda node, name: node.setdefault(name, {}), names[:-1], modules)
    names = [_layer_name(path, modules) for _, path, _ in leaves]
    layers: dict[str, _Layer] = {}
    for name, (collection, _, leaf) in zip(names, leaves):
        layer = layers.get(name, _Layer(name, 0, False, tuple(leaf.shape)))
        if collection == "params":
            layers[name] = layer._replace(params=layer.params + leaf.size)
        else:
            layers[name] = layer._replace(has_statistics=True)
    return [layers[name] for name in names], modules


def _layer_name(path: Iterable[str], modules: dict[str, Any]) -> str:
    """Return the path of a variable's module, or of the variable where its module holds other modules as well."""
    *parents, _ = path
    inside = functools.reduce(lambda node, name: node[name], parents, modules)
    return "/".join(path if inside or not parents else parents)
