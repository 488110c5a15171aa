"""Layers that several families share. Axes are [B, H, W, C]; parameters and statistics are float32."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models.convolution import convolution

Activation = Callable[[jax.Array], jax.Array]


def identity(x: jax.Array) -> jax.Array:
    """Return `x`."""
    return x


def gelu(x: jax.Array) -> jax.Array:
    """Return the exact GELU, as PyTorch's default is; Flax's default is an approximation."""
    return nn.gelu(x, approximate=False)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and an activation.

    Attributes:
        features: Number of output channels.
        kernel: Side of the kernel.
        stride: Stride in both directions.
        groups: Number of groups of channels.
        activation: Applied last.
        use_bias: Whether the convolution has a bias, which BatchNorm makes superfluous.
        epsilon: Added to variances.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: Activation = identity
    use_bias: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, in] to [B, ceil(h / stride), ceil(w / stride), features]."""
        shape = (self.features, self.kernel, self.stride, self.groups)
        x = convolution(*shape, use_bias=self.use_bias, dtype=self.dtype, name="conv")(x)
        norm = nn.BatchNorm(not train, epsilon=self.epsilon, dtype=self.dtype, axis_name=self.axis_name, name="norm")
        return self.activation(norm(x))


class SqueezeExcitation(nn.Module):
    """Channel attention from the global average (Hu et al. 2018).

    Attributes:
        features: Number of channels between the two layers.
        activation: Between the two layers.
        gate: After the second layer.
        dtype: Type of the computation.
    """

    features: int
    activation: Activation = nn.relu
    gate: Activation = nn.sigmoid
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x` [B, h, w, C], each channel scaled."""
        s = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        s = self.activation(convolution(self.features, 1, use_bias=True, dtype=self.dtype, name="reduce")(s))
        return x * self.gate(convolution(x.shape[-1], 1, use_bias=True, dtype=self.dtype, name="expand")(s))


class InvertedResidualSpec(NamedTuple):
    """Shape of an inverted residual block (Sandler et al. 2018).

    Attributes:
        features: Output channels.
        expanded: Channels of the convolution with the large kernel; no expansion where the input has as many.
        kernel: Side of that kernel.
        stride: Its stride.
        squeeze: Channels within the squeeze-and-excitation; 0 for none.
        fused: Whether the expansion has the large kernel, instead of a depthwise convolution (Tan & Le 2021).
        drop: Rate of stochastic depth.
    """

    features: int
    expanded: int
    kernel: int
    stride: int
    squeeze: int = 0
    fused: bool = False
    drop: float = 0.0


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, linear projection and addition.

    Attributes:
        spec: Shape of the block.
        activation: After the expansion and the depthwise convolution.
        squeeze_activation: Within the squeeze-and-excitation.
        gate: At its end.
        epsilon, dtype, axis_name: See `ConvNorm`.
    """

    spec: InvertedResidualSpec
    activation: Activation
    squeeze_activation: Activation = nn.relu
    gate: Activation = nn.sigmoid
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, in] to [B, h / stride, w / stride, features]."""
        spec, y = self.spec, x
        layer = functools.partial(ConvNorm, epsilon=self.epsilon, dtype=self.dtype, axis_name=self.axis_name)
        active = functools.partial(layer, activation=self.activation)
        expands = spec.expanded != x.shape[-1]
        if spec.fused:
            features = spec.expanded if expands else spec.features
            y = active(features, spec.kernel, spec.stride, name="expand")(y, train)
        else:
            if expands:
                y = active(spec.expanded, name="expand")(y, train)
            y = active(spec.expanded, spec.kernel, spec.stride, groups=spec.expanded, name="depthwise")(y, train)
        if spec.squeeze:
            y = SqueezeExcitation(spec.squeeze, self.squeeze_activation, self.gate, self.dtype, name="squeeze")(y)
        if expands or not spec.fused:
            y = layer(spec.features, name="project")(y, train)
        if spec.stride != 1 or x.shape[-1] != spec.features:
            return y
        return x + (stochastic_depth(spec.drop, train)(y) if spec.drop else y)


def stochastic_depth(rate: float, train: bool) -> nn.Dropout:
    """Return a layer that drops whole images' residuals in training (Huang et al. 2016)."""
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=not train)


def global_average(x: jax.Array) -> jax.Array:
    """Return the means [B, C] of a map [B, h, w, C], in float32 at least."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def dense(features: int, **kwargs: Any) -> nn.Dense:
    """Return a linear layer with PyTorch's initial weights: uniform in +-1 / sqrt(inputs)."""
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Dense(features, kernel_init=init, **kwargs)


def make_divisible(value: float, divisor: int = 8) -> int:
    """Return the multiple of `divisor` nearest to `value`, and not below 90 % of it (Sandler et al. 2018)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
