"""The convolutions of the nets, and the formulation that computes them fastest on the backend at hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sdpoint_jax.models import target


def he_fan_out_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws a kernel [k, k, in, out] from normal(0, sqrt(2 / (k * k * out))), as the authors initialise."""
    height, width, _, features = shape
    return math.sqrt(2 / (height * width * features)) * jax.random.normal(key, shape, dtype)


def _pointwise_as_dot(x, kernel, strides, padding, **kwargs):
    """Computes a 1x1 convolution as a matrix product, which XLA's CPU backend runs several times faster.

    Of two matrices: contracting several axes at once, as the kernel's gradient then would, transposes its operands.
    """
    if not _is_pointwise(kernel, **kwargs):
        return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    x = x[:, :: strides[0], :: strides[1]]
    product = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=kwargs["precision"])
    return product.reshape(*x.shape[:-1], -1)


def _pointwise_per_platform(x, kernel, strides, padding, **kwargs):
    """Computes a 1x1 convolution as a matrix product on a CPU only, as the platform is when the program is lowered."""

    def as_dot(x, kernel):
        return _pointwise_as_dot(x, kernel, strides, padding, **kwargs)

    def as_convolution(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    if not _is_pointwise(kernel, **kwargs):
        return as_convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=as_dot, default=as_convolution)


def _is_pointwise(kernel, *, feature_group_count, **_):
    return kernel.shape[:2] == (1, 1) and feature_group_count == 1


def _formulation():
    return {"cpu": _pointwise_as_dot, target.ANY: _pointwise_per_platform}.get(target.platform())


def convolution(features: int, kernel: int, stride: int = 1, groups: int = 1, **kwargs: Any) -> nn.Conv:
    """Return a square convolution, by default without bias, zero-padded by kernel // 2 on every side as in PyTorch.

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
        conv_general_dilated=_formulation(),
        **{"use_bias": False, "kernel_init": he_fan_out_normal, **kwargs},
    )
