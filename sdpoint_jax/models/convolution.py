"""The convolutions of the nets, and the formulation that computes them fastest on the backend at hand."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sdpoint_jax.models import target


def he_fan_out_normal(key, shape, dtype=jnp.float32):
    """Draws a kernel [k, k, in, out] from normal(0, sqrt(2 / (k * k * out))), as the authors initialise."""
    height, width, _, features = shape
    return math.sqrt(2 / (height * width * features)) * jax.random.normal(key, shape, dtype)


def _pointwise_as_dot(x, kernel, strides, padding, **kwargs):
    """A 1x1 convolution as a matrix product, which XLA's CPU backend runs several times faster.

    Of two matrices: contracting several axes at once, as the kernel's gradient then would, transposes its operands.
    """
    if kernel.shape[:2] != (1, 1) or kwargs["feature_group_count"] != 1:
        return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    x = x[:, :: strides[0], :: strides[1]]
    product = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=kwargs["precision"])
    return product.reshape(*x.shape[:-1], -1)


def convolution(features: int, kernel: int, stride: int = 1, groups: int = 1, **kwargs) -> nn.Conv:
    """A square convolution without bias, zero-padded by kernel // 2 on every side as in PyTorch.

    Args:
        features: output channels.
        kernel: side of the kernel, odd.
        stride: in both directions.
        groups: of the channels, as in ResNeXt.
        **kwargs: of `nn.Conv`.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=[(kernel // 2, kernel // 2)] * 2,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=he_fan_out_normal,
        conv_general_dilated=_pointwise_as_dot if target.platform() == "cpu" else None,
        **kwargs,
    )
