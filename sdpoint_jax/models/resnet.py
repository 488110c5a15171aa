"""Residual networks: ResNet, PreResNet, WRN and ResNeXt are rows of one table (see `registry`)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import blocks
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.net import SDPointNet


class ResNet(SDPointNet):
    """A residual network.

    Attributes:
        architecture: Row of the table.
        dtype: Type of the computation; parameters and statistics are float32.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    architecture: Architecture
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Create the stem, the residual blocks and the head."""
        conv, norm = blocks.layers(self.dtype, self.axis_name)
        block = blocks.PreActivationBlock if self.architecture.preactivation else blocks.PostActivationBlock
        self.stem = blocks.Stem(self.architecture, conv, norm)
        specs = enumerate(self.architecture.blocks(), 1)
        self.blocks = [block(spec, conv, norm, name=f"block_{k:02d}") for k, spec in specs]
        self.head = blocks.Head(self.architecture, self.num_classes, norm)

    def after_point(self, x: jax.Array) -> jax.Array:
        """Apply the last ReLU of a post-activation block, which follows the point."""
        return x if self.architecture.preactivation else nn.relu(x)

    @property
    def has_stem_point(self) -> bool:
        """Whether the stem ends in a max-pool."""
        return self.architecture.imagenet_stem

    @property
    def min_image_size(self) -> int:
        """Smallest image side that every stride still halves."""
        return self.architecture.min_image_size
