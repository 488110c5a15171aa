"""The flat form of a trace has the equations that run, in order, whatever functions they are written in."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sdpoint_jax.models.trace import Constant, flatten

X = jax.ShapeDtypeStruct((2, 2), jnp.float32)


def _nested(x, k):
    with jax.named_scope("outer"):
        x = jax.nn.relu(x)  # A custom gradient of a jitted function.
        return jax.checkpoint(jax.named_scope("inner")(lambda x: jnp.sin(x) @ k))(x)


def test_calls_are_inlined_and_keep_their_scopes():
    program = flatten(jax.make_jaxpr(jax.jit(_nested))(X, X), "cpu")
    relu, sine, product = program.equations
    assert [one.primitive for one in program.equations] == ["max", "sin", "dot_general"]
    assert (relu.scope, product.scope) == (("outer",), ("outer", "inner"))
    assert relu.inputs[0] is program.inputs[0] and isinstance(relu.inputs[1], Constant)
    assert sine.inputs == relu.outputs and product.inputs == (*sine.outputs, program.inputs[1])
    assert program.outputs == product.outputs and product.outputs[0].aval.shape == (2, 2)


def test_a_function_that_is_called_twice_has_values_of_its_own_each_time():
    double = jax.jit(lambda x: x + x)
    first, second = flatten(jax.make_jaxpr(lambda x: double(double(x)))(X), "cpu").equations
    assert second.inputs == (*first.outputs, *first.outputs) and second.outputs != first.outputs


@pytest.mark.parametrize("platform, primitive", [("cpu", "sin"), ("cuda", "cos"), ("tpu", "cos")])
def test_of_formulations_by_platform_there_is_the_one_asked_for(platform, primitive):
    jaxpr = jax.make_jaxpr(lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos))(X)
    assert [one.primitive for one in flatten(jaxpr, platform).equations] == [primitive]


def test_loops_and_branches_stay_as_they_are():
    def loop(x):
        y, _ = lax.scan(lambda carry, _: (carry @ x, None), x, None, length=3)
        return lax.cond(y[0, 0] > 0, jnp.sin, jnp.cos, y)

    primitives = [one.primitive for one in flatten(jax.make_jaxpr(loop)(X), "cpu").equations]
    assert "scan" in primitives and primitives[-1] == "cond"


def test_constants_of_the_trace_are_there_with_their_values():
    table = jnp.arange(4.0).reshape(2, 2)
    (equation,) = flatten(jax.make_jaxpr(lambda x: x + table)(X), "cpu").equations
    assert equation.inputs[1].value.tolist() == [[0, 1], [2, 3]] and equation.inputs[1].aval.shape == (2, 2)
