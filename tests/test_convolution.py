import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sdpoint_jax.models import convolution

# Image side, input and output channels, kernel side, stride; batches of 6 images, taken one, some or all at a time.
SHAPES = [
    (20, 3, 4, 7, 2),  # The stem of an ImageNet net: 100 positions.
    (40, 2, 3, 3, 1),  # More positions than a part: image by image.
    (17, 4, 5, 3, 2),  # An odd side.
    (12, 4, 4, 3, 1),
    (3, 4, 4, 3, 1),
    (1, 4, 4, 3, 1),
    (7, 4, 6, 1, 2),
    (7, 4, 6, 1, 1),
]


def plain(x, kernel, stride):
    padding = [(kernel.shape[0] // 2, kernel.shape[0] // 2)] * 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def random_arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("side, features_in, features, kernel_side, stride", SHAPES)
@pytest.mark.parametrize("width", [0, 2])
def test_every_formulation_gives_the_convolution_and_its_gradients(
    side, features_in, features, kernel_side, stride, width
):
    x, kernel = random_arrays((6, side, side + width, features_in), (kernel_side, kernel_side, features_in, features))
    module = convolution.convolution(features, kernel_side, stride)
    expected, plain_pull_back = jax.vjp(lambda x, kernel: plain(x, kernel, stride), x, kernel)
    found, pull_back = jax.vjp(lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x), x, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    (gradient,) = random_arrays(expected.shape)
    for ours, theirs in zip(pull_back(gradient), plain_pull_back(gradient), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_gradients_are_those_of_float32_but_for_rounding(groups):
    x, kernel = random_arrays((4, 12, 12, 4), (3, 3, 4 // groups, 8))
    module = convolution.convolution(8, 3, groups=groups)

    def gradients(dtype):
        def total(x, kernel):
            y = module.clone(dtype=dtype).apply({"params": {"kernel": kernel}}, x)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(total, argnums=(0, 1))(x, kernel)

    for half, single in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert half.dtype == jnp.float32
        assert jnp.abs(half - single).max() < 0.03 * jnp.abs(single).max()
