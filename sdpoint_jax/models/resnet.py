"""Residual networks with downsampling points: a stem, blocks 1..N, a head, and one place where a point acts.

ResNet, PreResNet, WRN and ResNeXt are rows of one table (`registry`). The *activation at a point* is what the pool of
that point shrinks: at point k it leaves the addition of block k; at `STEM` it leaves the stem's convolution (a net
without a max-pool has that activation too, though no instance downsamples it). The layers before it are the *prefix*,
those after it the *suffix*. An instance computes the same as full resolution up to its point, so whoever keeps the
activation at a point runs only suffixes.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax import instance as sdpoint
from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models import blocks
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.pool import adaptive_avg_pool, adaptive_max_pool, downsampled_size, max_pool
from sdpoint_jax.models.shared_trace import apply_block


class ResNet(nn.Module):
    """A residual net that can be downsampled at any of its points.

    Attributes:
        architecture: the row of the table.
        num_classes: K.
        dtype: of the computation; parameters and statistics are float32.
        axis_name: devices over which training normalises; None for each device by itself.
        norm_momentum: how much of the running statistics a training forward keeps.
        remat: recompute the activations inside blocks in the backward pass instead of keeping them.
        portable: choose how to compute convolutions for each platform that a program is lowered for, as an export needs
            it, not for the backend at hand.
    """

    architecture: Architecture
    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    norm_momentum: float = 0.9
    remat: bool = False
    portable: bool = False

    def setup(self) -> None:
        """Makes the parts of the net."""
        conv, norm = blocks.layers(self.dtype, self.axis_name, self.norm_momentum, self.portable)
        block = blocks.PreActivationBlock if self.architecture.preactivation else blocks.PostActivationBlock
        self.stem = blocks.Stem(self.architecture, conv, norm)
        self.block = {f"{k:02d}": block(spec, conv, norm) for k, spec in enumerate(self.architecture.blocks(), 1)}
        self.head = blocks.Head(self.architecture, self.num_classes, norm)

    def __call__(self, images: jax.Array, *, instance: SDPointInstance = FULL_RESOLUTION, train: bool) -> jax.Array:
        """Classifies images.

        Args:
            images: [B, H, W, C], normalised, of any size from `architecture.min_image_size` on.
            instance: static; each one is a program of its own.
            train: static; normalise by the batch's own statistics, not by the running ones.

        Returns:
            logits [B, K], float32.

        Raises:
            ValueError: an instance that the net does not have, or images too small for the net.
        """
        return self.suffix(self.prefix(images, STEM, train=train), STEM, instance=instance, train=train)

    def prefix(self, images: jax.Array, point: int, *, train: bool) -> jax.Array:
        """Computes the activation at `point` (`STEM` or a block) from images [B, H, W, C]."""
        self.check_image_size((images.shape[1], images.shape[2]))
        x = self.stem(images.astype(self.dtype), train)
        return self.between(x, STEM, point, train=train)

    def between(
        self, x: jax.Array, start: int, end: int, *, instance: SDPointInstance = FULL_RESOLUTION, train: bool
    ) -> jax.Array:
        """Computes the activation at point `end` from that at the point `start` before it: the loop over the blocks."""
        for k in range(max(start, 0) + 1, end + 1):
            x = self._pass_point(x, k - 1 or STEM, instance)
            x = apply_block(self.block[f"{k:02d}"], x, remat=self.remat, train=train)
        return x

    def suffix(self, x: jax.Array, start: int, *, instance: SDPointInstance, train: bool) -> jax.Array:
        """Computes the logits [B, K] of `instance` from the activation at the point `start`, its own or one before.

        Raises:
            ValueError: an instance that the net does not have, or that downsamples before `start`.
        """
        self.check_instance(instance)
        if start > self.last_shared_point(instance):
            raise ValueError(f"instance {instance.name} downsamples before point {start}: no suffix of it starts there")
        x = self.between(x, start, self.num_blocks, instance=instance, train=train)
        return self.head(self._pass_point(x, self.num_blocks, instance), train)

    def _pass_point(self, x, point, instance):
        """Leads the activation at a point to the input of the next layer: the only place where a point acts."""
        if point == STEM:
            return self._stem_pool(x, instance) if self.has_stem_point else x
        if point == instance.point:
            x = adaptive_avg_pool(x, tuple(downsampled_size(side, instance.ratio) for side in x.shape[1:3]))
        return x if self.architecture.preactivation else nn.relu(x)

    def _stem_pool(self, x, instance):
        if instance.point == STEM:
            sizes = (downsampled_size(-(-side // 2), instance.ratio) for side in x.shape[1:3])
            return adaptive_max_pool(x, tuple(sizes))
        return max_pool(x)

    @property
    def num_blocks(self) -> int:
        """Counts the residual blocks, N."""
        return self.architecture.num_blocks

    @property
    def has_stem_point(self) -> bool:
        """Tells whether the net has the point `STEM`."""
        return self.architecture.imagenet_stem

    def prefix_modules(self, point: int) -> tuple[str, ...]:
        """Names the variables of the layers before the point (top level, in order); the last one ends at the point."""
        return ("stem", *(f"block_{k:02d}" for k in range(1, point + 1)))

    def suffix_modules(self, point: int) -> tuple[str, ...]:
        """Names the variables of the layers after the point (top level, in order)."""
        return (*(f"block_{k:02d}" for k in range(max(point, 0) + 1, self.num_blocks + 1)), "head")

    def last_shared_point(self, instance: SDPointInstance) -> int:
        """Returns the last point whose activation `instance` shares with full resolution: its own."""
        return instance.point or self.num_blocks

    def instances(
        self, ratios: Iterable[float] = sdpoint.DEFAULT_RATIOS, points: Iterable[int] | None = None
    ) -> tuple[SDPointInstance, ...]:
        """Lists the net's instances in order of depth; see `instance.list_instances`."""
        return sdpoint.list_instances(self.num_blocks, has_stem_point=self.has_stem_point, ratios=ratios, points=points)

    def check_instance(self, instance: SDPointInstance) -> None:
        """Raises ValueError if the net does not have the point of `instance`."""
        if instance.point > self.num_blocks or (instance.point == STEM and not self.has_stem_point):
            points = sdpoint.describe_points(self.num_blocks, self.has_stem_point)
            raise ValueError(f"instance {instance.name}: the net has no point {instance.point}; it has {points}")

    def check_image_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError if images of `size` (height, width) are too small for the net."""
        smallest = self.architecture.min_image_size
        if min(size) < smallest:
            raise ValueError(
                f"image size {size[0]}x{size[1]}: too small for the net, which needs sides of at least {smallest}"
            )
