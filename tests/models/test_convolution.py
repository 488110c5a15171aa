"""Convolutions have the same values and gradients in every form that a CPU computes them in."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpoint_jax.models.convolution import conv_general_dilated, convolution
from sdpoint_jax.models.target import Target, programs_for

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
# Input channels, output channels, groups.
DENSE, GROUPED, DEPTHWISE, TWO_EACH = (3, 5, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)
# Where the forms begin and end: batch, sides, channels, kernel, stride, padding.
CASES = [
    (2, (1, 1), DENSE, 3, 1, 1),
    (2, (2, 2), DENSE, 3, 1, 1),
    (16, (2, 2), DENSE, 3, 1, 1),
    (2, (2, 4), DENSE, 3, 1, 1),
    (16, (1, 7), DENSE, 3, 1, 1),
    (2, (3, 3), DENSE, 3, 2, 1),
    (16, (4, 3), DENSE, 3, 2, 1),
    (2, (4, 5), DENSE, 5, 1, 2),
    (16, (2, 3), DENSE, 5, 2, 2),
    (2, (2, 3), DENSE, 2, 1, 1),
    (2, (3, 2), DENSE, 2, 2, 0),
    (2, (4, 5), DENSE, 4, 4, 0),
    (2, (7, 9), DENSE, 1, 2, 0),
    (2, (1, 1), DENSE, 1, 2, 0),
    (2, (7, 6), DEPTHWISE, 3, 1, 1),
    (2, (6, 7), DEPTHWISE, 3, 2, 1),
    (2, (1, 1), DEPTHWISE, 3, 2, 1),
    (2, (7, 6), DEPTHWISE, 5, 2, 2),
    (2, (2, 2), DEPTHWISE, 5, 1, 2),
    (2, (5, 8), DEPTHWISE, 7, 1, 3),
    (2, (8, 9), DEPTHWISE, 4, 3, 1),
    (2, (7, 6), GROUPED, 3, 2, 1),
    (2, (2, 1), GROUPED, 3, 1, 1),
    (2, (3, 3), GROUPED, 1, 1, 0),
    (2, (4, 4), TWO_EACH, 3, 1, 1),
    (2, (3, 3), (64, 64, 4), 3, 1, 1),
]


def _operands(batch, sides, channels, kernel):
    inputs, features, groups = channels
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *sides, inputs), np.float32)
    return x, rng.standard_normal((kernel, kernel, inputs // groups, features), np.float32)


def _convolve(channels, stride, padding):
    return functools.partial(
        conv_general_dilated,
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels[2],
        precision=None,
    )


def _value_and_gradients(convolve, x, kernel):
    y, transpose = jax.vjp(convolve, x, kernel)
    return y, *transpose(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


def _reference(x, kernel, stride, padding, groups):
    """Value and gradients in float64, by one cell of the kernel and one group after the other."""
    x, kernel = np.float64(x), np.float64(kernel)
    height, width, inputs, features = kernel.shape
    padded = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = ((side - cells) // stride + 1 for side, cells in zip(padded.shape[1:3], (height, width)))
    y = np.zeros((x.shape[0], rows, columns, features))
    gradient = np.cos(np.arange(y.size)).reshape(y.shape)
    of_padded, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j, group in itertools.product(range(height), range(width), range(groups)):
        where = np.s_[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        where = (*where, np.s_[group * inputs : (group + 1) * inputs])
        out = np.s_[..., group * (features // groups) : (group + 1) * (features // groups)]
        y[out] += padded[where] @ kernel[i, j][out]
        of_padded[where] += gradient[out] @ kernel[i, j][out].T
        of_kernel[i, j][out] = np.einsum("bhwi,bhwo->io", padded[where], gradient[out])
    inside = np.s_[padding : padding + x.shape[1], padding : padding + x.shape[2]]
    return y, of_padded[:, *inside], of_kernel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_the_convolutions(case):
    batch, sides, channels, kernel, stride, padding = case
    operands = _operands(batch, sides, channels, kernel)
    run = functools.partial(_value_and_gradients, _convolve(channels, stride, padding))
    results = jax.jit(run, compiler_options=QUICK_TO_COMPILE)(*operands)
    for actual, expected in zip(results, _reference(*operands, stride, padding, channels[2]), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("channels, sides", [(DENSE, (2, 2)), (DEPTHWISE, (5, 5)), (GROUPED, (5, 5))], ids=str)
@pytest.mark.parametrize("batch", [2, 16])
def test_bfloat16_is_rounded_once(batch, channels, sides):
    operands = [jnp.asarray(array, jnp.bfloat16) for array in _operands(batch, sides, channels, 3)]
    run = functools.partial(_value_and_gradients, _convolve(channels, 1, 1))
    results = jax.jit(run, compiler_options=QUICK_TO_COMPILE)(*operands)
    for actual, expected in zip(results, _reference(*operands, 1, 1, channels[2]), strict=True):
        assert actual.dtype == jnp.bfloat16
        # Half a unit of the last of 8 bits is 0.002 of the value; the incoming gradient is rounded as well.
        np.testing.assert_allclose(np.float64(actual), expected, rtol=0.004, atol=0.004 * np.abs(expected).max())


def _leaves_to_xla(sides, channels, kernel, stride, batch=16):
    """Whether the program holds a convolution of XLA's own, forward or in a gradient."""
    run = functools.partial(_value_and_gradients, _convolve(channels, stride, kernel // 2))
    return "conv_general_dilated" in str(jax.make_jaxpr(run)(*_operands(batch, sides, channels, kernel)))


@pytest.mark.parametrize("batch", [2, 16])
def test_a_cpu_leaves_no_convolution_to_xla_that_xla_computes_by_its_naive_loop(batch):
    # Fewer cells of the map than of the kernel, forward; fewer cells of the result, in the gradient of the input.
    for sides, kernel, stride in [((2, 4), 3, 1), ((1, 1), 3, 1), ((4, 4), 3, 2), ((4, 6), 5, 1), ((8, 8), 5, 2)]:
        assert not _leaves_to_xla(sides, DENSE, kernel, stride, batch)
    for sides in ((2, 2), (5, 5), (30, 30)):
        assert not _leaves_to_xla(sides, DEPTHWISE, 3, 2, batch)


def test_what_eigen_computes_is_left_to_xla():
    for sides, kernel, stride in [((3, 3), 3, 1), ((5, 5), 3, 2), ((5, 5), 5, 1), ((32, 32), 7, 2)]:
        assert _leaves_to_xla(sides, DENSE, kernel, stride)


def test_other_platforms_compute_every_convolution_by_xla():
    for channels, sides, kernel in [
        (DENSE, (2, 2), 3),
        (DENSE, (5, 5), 1),
        (DEPTHWISE, (5, 5), 3),
        (GROUPED, (5, 5), 3),
    ]:
        with programs_for(Target("tpu")):
            jaxpr = str(jax.make_jaxpr(_convolve(channels, 1, kernel // 2))(*_operands(2, sides, channels, kernel)))
        assert jaxpr.count("conv_general_dilated[") == 1 and "dot_general" not in jaxpr and "mul" not in jaxpr


def test_rare_arguments_are_xlas():
    x, kernel = _operands(2, (2, 2), DENSE, 3)
    convolve = _convolve(DENSE, 1, 2)
    for settings in ({"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 2)}):
        assert "conv_general_dilated[" in str(jax.make_jaxpr(functools.partial(convolve, **settings))(x, kernel))
    of_1d = functools.partial(conv_general_dilated, window_strides=(1,), padding="SAME")
    assert "conv_general_dilated[" in str(
        jax.make_jaxpr(functools.partial(of_1d, dimension_numbers=("NWC", "WIO", "NWC")))(x[:, 0], kernel[0])
    )


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"kernel": 3}, (11, 8)),
        ({"kernel": 3, "stride": 2}, (6, 4)),
        ({"kernel": 7, "stride": 2}, (6, 4)),
        ({"kernel": 4, "stride": 4, "padding": 0}, (2, 2)),
        ({"kernel": 2, "stride": 2, "padding": 0}, (5, 4)),
        ({"kernel": 4}, (12, 9)),
    ],
    ids=str,
)
def test_padding_is_pytorchs_unless_given(settings, expected):
    layer = convolution(6, **settings)
    shape = jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), jnp.zeros((2, 11, 8, 4)))[0]).shape
    assert shape == (2, *expected, 6)


@pytest.mark.parametrize("use_bias", [False, True])
def test_a_bias_is_added_if_asked_for(use_bias):
    x, kernel = _operands(2, (2, 2), DEPTHWISE, 3)
    layer = convolution(4, 3, groups=4, use_bias=use_bias)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    assert shapes.keys() == ({"kernel", "bias"} if use_bias else {"kernel"})
    params = {"kernel": kernel, "bias": np.ones(4, np.float32)}
    y = jax.jit(layer.apply)({"params": {name: params[name] for name in shapes}}, x)
    np.testing.assert_allclose(y, _convolve(DEPTHWISE, 1, 1)(x, kernel) + use_bias, rtol=1e-5, atol=1e-6)
