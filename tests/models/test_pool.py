"""Adaptive pooling has PyTorch's windows, for every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpoint_jax.models.pool import adaptive_avg_pool, adaptive_max_pool, downsampled_size, max_pool
from sdpoint_jax.models.target import Target, programs_for

# Input and output sides: divisible, periodic, irregular, unequal, to a single cell, and none at all.
SIZES = [
    ((8, 8), (4, 4)),
    ((56, 28), (42, 21)),
    ((14, 7), (10, 5)),
    ((13, 17), (7, 11)),
    ((9, 5), (1, 3)),
    ((23, 1), (22, 1)),
    ((3, 4), (3, 4)),
]


def _images(size):
    return np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)


def _brute_force(x, size, reduce):
    """Cell by cell, from the definition: floor(i * in / out) .. ceil((i + 1) * in / out) - 1."""
    (_, height, width, _), (rows, columns) = x.shape, size
    pooled = np.empty((x.shape[0], rows, columns, x.shape[3]), np.float64)
    for i in range(rows):
        for j in range(columns):
            down = slice(int(np.floor(i * height / rows)), int(np.ceil((i + 1) * height / rows)))
            right = slice(int(np.floor(j * width / columns)), int(np.ceil((j + 1) * width / columns)))
            pooled[:, i, j] = reduce(x[:, down, right].astype(np.float64), axis=(1, 2))
    return pooled


@pytest.mark.parametrize("before, after", SIZES)
def test_average_pool_equals_brute_force(before, after):
    x = _images(before)
    np.testing.assert_allclose(adaptive_avg_pool(jnp.asarray(x), after), _brute_force(x, after, np.mean), atol=2e-6)


@pytest.mark.parametrize("before, after", SIZES)
def test_max_pool_equals_brute_force(before, after):
    x = _images(before)
    np.testing.assert_array_equal(adaptive_max_pool(jnp.asarray(x), after), _brute_force(x, after, np.max))


@pytest.mark.parametrize("before, after", SIZES)
def test_pools_equal_pytorchs(before, after):
    torch = pytest.importorskip("torch")
    x = _images(before)
    theirs = torch.from_numpy(x).permute(0, 3, 1, 2)
    average = torch.nn.functional.adaptive_avg_pool2d(theirs, after).permute(0, 2, 3, 1).numpy()
    maximum = torch.nn.functional.adaptive_max_pool2d(theirs, after).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(adaptive_avg_pool(jnp.asarray(x), after), average, atol=2e-6)
    np.testing.assert_array_equal(adaptive_max_pool(jnp.asarray(x), after), maximum)


@pytest.mark.parametrize("before, after", [((8, 8), (4, 4)), ((13, 17), (7, 11))])
def test_the_gradient_of_the_average_spreads_over_each_window(before, after):
    x = jnp.asarray(_images(before))
    gradient = jax.grad(lambda x: adaptive_avg_pool(x, after).sum())(x)
    # The sum over cells is linear, so its gradient at a pixel is what a one there adds to it.
    ones = np.eye(before[0] * before[1], dtype=np.float32).reshape(-1, *before, 1)
    expected = _brute_force(ones, after, np.mean).sum((1, 2, 3)).reshape(before)
    np.testing.assert_allclose(gradient, np.broadcast_to(expected[None, :, :, None], x.shape), atol=1e-5)


@pytest.mark.parametrize("before, after", [((8, 8), (6, 6)), ((13, 17), (12, 11))])
def test_a_bfloat16_average_is_exact_but_for_its_last_rounding(before, after):
    x = jnp.asarray(_images(before), jnp.bfloat16)
    pooled = adaptive_avg_pool(x, after)
    assert pooled.dtype == jnp.bfloat16
    exact = _brute_force(np.asarray(x, np.float32), after, np.mean)
    # Rows, then columns: each rounds once, to 8 bits.
    np.testing.assert_allclose(np.asarray(pooled, np.float32), exact, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize(
    "size, ratio, expected", [(56, 0.5, 28), (14, 0.75, 10), (7, 0.5, 4), (7, 0.75, 5), (5, 0.5, 2), (1, 0.5, 1)]
)
def test_the_downsampled_size_rounds_half_to_even_and_is_at_least_one(size, ratio, expected):
    assert downsampled_size(size, ratio) == expected


# Windows that are alike and equally far apart in each period; the last ones would be but for the cells at its ends.
ALIKE = [
    ((8, 8), (4, 4)),
    ((56, 28), (28, 7)),
    ((9, 6), (3, 6)),
    ((4, 4), (4, 4)),
    ((56, 28), (42, 21)),
    ((9, 8), (8, 6)),
]
CUT = [((16, 16), (6, 6)), ((7, 10), (4, 6)), ((40, 12), (15, 9))]


def _operations(pool, before, after, platform):
    with programs_for(Target(platform)):
        equations = jax.make_jaxpr(lambda x: pool(x, after))(_images(before)).eqns
    return [equation.primitive.name for equation in equations]


@pytest.mark.parametrize("pool", [adaptive_avg_pool, adaptive_max_pool])
@pytest.mark.parametrize("before, after", list(dict.fromkeys(SIZES + ALIKE + CUT)))
def test_a_tpu_pools_by_one_operation_where_windows_are_regular_or_cells_few(pool, before, after):
    has_one = (before, after) in [*ALIKE, ((3, 4), (3, 4)), ((23, 1), (22, 1))]
    if pool is adaptive_max_pool:  # What lies beyond a period's end is no maximum; of an average it would be a part.
        has_one |= (before, after) in [*CUT, ((9, 5), (1, 3))]
    operations = _operations(pool, before, after, "tpu")
    assert sum(name.startswith("reduce_window") for name in operations) == has_one
    is_product = pool is adaptive_avg_pool and not has_one and before != (40, 12)  # Of few cells.
    assert operations.count("dot_general") == is_product
    # What would change the layers around it is kept apart from them: products, and windows that share cells.
    share_cells = pool is adaptive_avg_pool and has_one and any(size % out for size, out in zip(before, after))
    assert ("optimization_barrier" in operations) == (is_product or share_cells)
    for platform in ("cpu", "gpu"):
        assert not any(name.startswith("reduce_window") for name in _operations(pool, before, after, platform))


@pytest.mark.parametrize("pool, reduce, atol", [(adaptive_avg_pool, np.mean, 2e-6), (adaptive_max_pool, np.max, 0)])
@pytest.mark.parametrize("before, after", list(dict.fromkeys(SIZES + ALIKE + CUT)))
def test_a_tpus_pools_and_gradients_equal_those_of_a_cpu(pool, reduce, atol, before, after):
    x = _images(before)
    weights = np.random.default_rng(1).standard_normal((2, *after, 3), np.float32)

    def loss(x):
        return (pool(x, after) * weights).sum()

    gradient = jax.grad(loss)(x)
    with programs_for(Target("tpu")):
        np.testing.assert_allclose(pool(jnp.asarray(x), after), _brute_force(x, after, reduce), atol=atol)
        np.testing.assert_allclose(jax.grad(loss)(x), gradient, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (2, 3), (1, 1)])
def test_a_gpus_stem_pool_gives_the_values_and_gradients_of_xlas_own_without_its_operation(size, dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(-4, 4, (2, *size, 3)), dtype)  # Many cells are equal.
    expected, backward = jax.vjp(max_pool, x)
    weights = jnp.asarray(np.random.default_rng(1).integers(-9, 9, expected.shape), dtype)  # Whose sums are exact.
    with programs_for(Target("gpu")):
        pooled, backward_on_gpu = jax.vjp(max_pool, x)
        program = str(jax.make_jaxpr(lambda x: jax.vjp(max_pool, x)[1](weights))(x))
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(backward_on_gpu(weights)[0], backward(weights)[0])
    assert "scatter" not in program


def test_a_gpus_stem_pool_of_a_number_that_is_none_is_none():
    x = _images((6, 6))
    x[0, 3, 2, 1] = np.nan
    with programs_for(Target("gpu")):
        assert np.isnan(max_pool(jnp.asarray(x))).sum() == np.isnan(max_pool(x)).sum() > 0
