"""The computation of a traced function as one flat list of equations, for whoever reads a network off its trace.

JAX nests what a function calls: jitted functions, custom gradients, rematerialised blocks, formulations by platform.
`flatten` puts the equations of all these in the order in which they run. Loops and branches stay as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.extend.core as jex

# Primitives that compute what their inner jaxpr does, with the key under which each holds it.
_CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}


class Value:
    """Result of an equation, or an input; values are equal only if they are the same object.

    Attributes:
        aval: Shape and dtype.
    """

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval


class Constant(NamedTuple):
    """Array or scalar that the trace contains.

    Attributes:
        value: Array, or a Python or NumPy scalar.
        aval: Shape and dtype.
    """

    value: Any
    aval: Any


class Equation(NamedTuple):
    """One primitive operation.

    Attributes:
        primitive: Name of the JAX primitive, as in `dot_general`.
        inputs: Operands.
        outputs: Results.
        params: Parameters of the primitive.
        scope: Names of the modules and `jax.named_scope`s around it, outermost first.
        bind: Computes the primitive: `bind(*operands, **params)`.
    """

    primitive: str
    inputs: tuple[Value | Constant, ...]
    outputs: tuple[Value, ...]
    params: Mapping[str, Any]
    scope: tuple[str, ...]
    bind: Callable[..., Any]


class Program(NamedTuple):
    """Flat form of a jaxpr.

    Attributes:
        inputs: One value for each flattened argument.
        equations: In the order in which they run.
        outputs: One for each flattened result.
    """

    inputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Value | Constant, ...]


def flatten(closed: jex.ClosedJaxpr, platform: str) -> Program:
    """Return the flat form of a jaxpr, as `jax.make_jaxpr` gives it.

    Args:
        closed: The jaxpr.
        platform: Which formulation to take where the trace has one for each platform: cpu, cuda, rocm or tpu.
    """
    inputs = tuple(Value(variable.aval) for variable in closed.jaxpr.invars)
    equations: list[Equation] = []
    outputs = _inline(closed, inputs, (), platform, equations)
    return Program(inputs, tuple(equations), outputs)


def _inline(jaxpr, inputs, scope, platform, equations):
    """Append the equations of `jaxpr`, which is called with `inputs` within `scope`; return its outputs."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known: dict[Any, Value | Constant] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {variable: Constant(const, variable.aval) for variable, const in zip(jaxpr.constvars, consts)}

    def read(atom):
        return Constant(atom.val, atom.aval) if isinstance(atom, jex.Literal) else known[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner_scope = (*scope, *_names(equation))
        operands = tuple(map(read, equation.invars))
        if name == "platform_index":
            chosen = _index_of(platform, params["platforms"])
            known[equation.outvars[0]] = Constant(chosen, equation.outvars[0].aval)
            continue
        called = params[_CALLS[name]] if name in _CALLS else None
        # The index is known where it chooses the platform.
        if name == "cond" and isinstance(operands[0], Constant):
            called, operands = params["branches"][int(operands[0].value)], operands[1:]
        if called is not None:
            results = _inline(called, operands, inner_scope, platform, equations)
        else:
            results = tuple(Value(variable.aval) for variable in equation.outvars)
            equations.append(Equation(name, operands, results, params, inner_scope, equation.primitive.bind))
        known |= zip(equation.outvars, results)
    return tuple(map(read, jaxpr.outvars))


def _names(equation):
    text = str(equation.source_info.name_stack)
    return tuple(text.split("/")) if text else ()


def _index_of(platform, choices):
    """Return which of the `choices`, each some platforms or None for all others, is for `platform`."""
    return next(index for index, names in enumerate(choices) if names is None or platform in names)
