"""The parts of a residual net as Flax modules: stem, residual blocks, head."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models.architecture import Architecture, BlockSpec, ShortcutSpec
from sdpoint_jax.models.convolution import convolution

DEVICE_AXIS = "devices"  # Over which programs map devices, and BatchNorm can normalise.
NORM_EPSILON = 1e-5  # What BatchNorm adds to a variance.
Layer = Callable[..., nn.Module]  # Makes a convolution or a normalisation; see `layers`.


@functools.cache
def layers(dtype: Any, axis_name: str | None) -> tuple[Layer, Layer]:
    """Return constructors of the convolutions and normalisations; the same objects for the same arguments."""
    norm = functools.partial(nn.BatchNorm, epsilon=NORM_EPSILON, dtype=dtype, axis_name=axis_name)
    return functools.partial(convolution, dtype=dtype), norm


class PostActivationBlock(nn.Module):
    """ResNet block up to and including the addition: the caller applies the last ReLU."""

    spec: BlockSpec
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, h, w, in] to [B, h / stride, w / stride, out]."""
        y = x
        for index, spec in enumerate(self.spec.convolutions, 1):
            y = self.conv(*spec, name=f"conv{index}")(y)
            y = self.norm(use_running_average=not train, name=f"norm{index}")(y)
            if index < len(self.spec.convolutions):
                y = nn.relu(y)
        if self.spec.shortcut:
            x = _shortcut(self, self.spec.shortcut, x, train)
        return x + y


class PreActivationBlock(nn.Module):
    """PreResNet block (He et al. 2016); a projection works on the pre-activated input."""

    spec: BlockSpec
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, h, w, in] to [B, h / stride, w / stride, out]."""
        y = x
        for index, spec in enumerate(self.spec.convolutions, 1):
            y = nn.relu(self.norm(use_running_average=not train, name=f"norm{index}")(y))
            if index == 1 and self.spec.shortcut:
                x = _shortcut(self, self.spec.shortcut, y, train)
            y = self.conv(*spec, name=f"conv{index}")(y)
        return x + y


def _shortcut(block, spec: ShortcutSpec, x, train):
    """Brings the input of a block to the shape of its output, with submodules of `block`."""
    if spec.kind == "padded_identity":
        _, _, stride, _ = spec.convolution
        missing = spec.convolution.features - x.shape[-1]
        channels = (missing // 2, missing - missing // 2)
        return jnp.pad(x[:, ::stride, ::stride], [(0, 0), (0, 0), (0, 0), channels])
    x = block.conv(*spec.convolution, name="shortcut_conv")(x)
    if spec.kind == "projection":
        return x
    return block.norm(use_running_average=not train, name="shortcut_norm")(x)


class Stem(nn.Module):
    """The stem up to its max-pool."""

    architecture: Architecture
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to the input of the max-pool, or, where there is none, of the first block."""
        x = self.conv(*self.architecture.stem_convolution, name="conv")(images)
        if self.architecture.stem_has_norm:
            x = nn.relu(self.norm(use_running_average=not train, name="norm")(x))
        return x


class Head(nn.Module):
    """Global average pool and classifier, in float32 at least; a pre-activation net normalises first."""

    architecture: Architecture
    num_classes: int
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, h, w, C] to logits [B, K], float32."""
        if self.architecture.preactivation:
            x = nn.relu(self.norm(use_running_average=not train, name="norm")(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        # PyTorch's default for a linear layer: uniform in +-1 / sqrt(inputs).
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return nn.Dense(self.num_classes, kernel_init=init, name="dense")(x)
