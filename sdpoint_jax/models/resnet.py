"""Residual networks with downsampling points: ResNet, PreResNet, WRN and ResNeXt are rows of one table.

A net is a stem, blocks 1..N and a head. *Position* k is the activation at downsampling point k: right after the
addition of block k, or, for k = 0, right before the stem's max-pool. The full forward is the stem and then
`from_position(0)`; whoever keeps the activation of a position runs only what comes after it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax import instance as sdpoint
from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.convolution import convolution
from sdpoint_jax.models.pool import adaptive_avg_pool, adaptive_max_pool, downsampled_size


class ConvolutionSpec(NamedTuple):
    """Shape of one convolution; see `convolution.convolution`."""

    features: int
    kernel: int
    stride: int = 1
    groups: int = 1


class BlockSpec(NamedTuple):
    """Convolutions of one residual block, in order, and of its shortcut where that is no identity."""

    convolutions: tuple[ConvolutionSpec, ...]
    shortcut: ConvolutionSpec | None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the table of nets.

    Attributes:
        depths: residual blocks per stage; from the second on, a stage halves the resolution and doubles the width.
        inner: width inside the blocks of the first stage.
        features: width of their output.
        bottleneck: 1x1, 3x3, 1x1 convolutions instead of 3x3, 3x3; the stride sits on the (first) 3x3.
        preactivation: BatchNorm and ReLU before each convolution (He et al. 2016) instead of after it.
        stem: width of the stem.
        imagenet_stem: 7x7/2 convolution, BatchNorm, ReLU and 3x3/2 max-pool, instead of a 3x3 convolution.
        groups: of the 3x3 convolution of a bottleneck.
    """

    depths: tuple[int, ...]
    inner: int
    features: int
    bottleneck: bool = False
    preactivation: bool = False
    stem: int = 64
    imagenet_stem: bool = True
    groups: int = 1

    @property
    def num_blocks(self) -> int:
        """N, the number of residual blocks and so of points after them."""
        return sum(self.depths)

    @property
    def stem_convolution(self) -> ConvolutionSpec:
        return ConvolutionSpec(self.stem, 7, 2) if self.imagenet_stem else ConvolutionSpec(self.stem, 3)

    @property
    def min_image_size(self) -> int:
        """The smallest image side that every stride still halves."""
        return 2 ** (len(self.depths) - 1) * (4 if self.imagenet_stem else 1)

    def blocks(self) -> Iterator[BlockSpec]:
        """The blocks from the input to the output."""
        features_in = self.stem
        for stage, depth in enumerate(self.depths):
            inner, features = self.inner * 2**stage, self.features * 2**stage
            for stride in [2 if stage else 1] + [1] * (depth - 1):
                projects = stride != 1 or features_in != features
                yield BlockSpec(
                    self._bottleneck(inner, features, stride) if self.bottleneck else self._basic(features, stride),
                    ConvolutionSpec(features, 1, stride) if projects else None,
                )
                features_in = features

    def _basic(self, features, stride):
        return ConvolutionSpec(features, 3, stride), ConvolutionSpec(features, 3)

    def _bottleneck(self, inner, features, stride):
        middle = ConvolutionSpec(inner, 3, stride, self.groups)
        return ConvolutionSpec(inner, 1), middle, ConvolutionSpec(features, 1)


class PostActivationBlock(nn.Module):
    """ResNet block up to and including the addition: the caller applies the last ReLU."""

    spec: BlockSpec
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x, train: bool):
        y = x
        for index, spec in enumerate(self.spec.convolutions, 1):
            y = self.conv(*spec, name=f"conv{index}")(y)
            y = self.norm(use_running_average=not train, name=f"norm{index}")(y)
            if index < len(self.spec.convolutions):
                y = nn.relu(y)
        if self.spec.shortcut:
            x = self.conv(*self.spec.shortcut, name="shortcut_conv")(x)
            x = self.norm(use_running_average=not train, name="shortcut_norm")(x)
        return x + y


class PreActivationBlock(nn.Module):
    """PreResNet block (He et al. 2016); a projection works on the pre-activated input."""

    spec: BlockSpec
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x, train: bool):
        y = x
        for index, spec in enumerate(self.spec.convolutions, 1):
            y = nn.relu(self.norm(use_running_average=not train, name=f"norm{index}")(y))
            if index == 1 and self.spec.shortcut:
                x = self.conv(*self.spec.shortcut, name="shortcut_conv")(y)
                x = self.norm(use_running_average=not train, name="shortcut_norm")(x)
            y = self.conv(*spec, name=f"conv{index}")(y)
        return x + y


class Stem(nn.Module):
    """The stem up to its max-pool."""

    architecture: Architecture
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, images, train: bool):
        x = self.conv(*self.architecture.stem_convolution, name="conv")(images)
        # A pre-activation net on small images normalises in its first block.
        if self.architecture.imagenet_stem or not self.architecture.preactivation:
            x = nn.relu(self.norm(use_running_average=not train, name="norm")(x))
        return x


class Head(nn.Module):
    """Global average pool and classifier, in float32; a pre-activation net normalises first."""

    architecture: Architecture
    num_classes: int
    norm: Any

    @nn.compact
    def __call__(self, x, train: bool):
        if self.architecture.preactivation:
            x = nn.relu(self.norm(use_running_average=not train, name="norm")(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        # PyTorch's default for a linear layer: uniform in +-1 / sqrt(inputs).
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return nn.Dense(self.num_classes, kernel_init=init, name="dense")(x)


@functools.cache
def _layers(dtype, axis_name, norm_momentum):
    """The convolutions and normalisations of a net."""
    norm = functools.partial(nn.BatchNorm, momentum=norm_momentum, epsilon=1e-5, dtype=dtype, axis_name=axis_name)
    return functools.partial(convolution, dtype=dtype), norm


@functools.cache
def _block_by_itself(block, spec, layers, remat, train):
    """(variables, x) to (y, updates), traced once for each shape: nets repeat their blocks, and so do instances."""
    module = block(spec, *layers, parent=None)

    def apply(variables, x):
        return module.apply(variables, x, train, mutable=["batch_stats"] if train else [])

    # Inline, as XLA treats a program in parts worse than a whole one.
    return jax.jit(jax.checkpoint(apply) if remat else apply, inline=True)


class ResNet(nn.Module):
    """A residual net that can be downsampled at any of its points.

    Attributes:
        architecture: the row of the table.
        num_classes: K.
        dtype: of the computation; parameters and statistics are float32.
        axis_name: devices over which training normalises; None for each device by itself.
        norm_momentum: how much of the running statistics a training forward keeps.
        remat: recompute the activations inside blocks in the backward pass instead of keeping them.
    """

    architecture: Architecture
    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None
    norm_momentum: float = 0.9
    remat: bool = False

    def setup(self):
        conv, norm = _layers(self.dtype, self.axis_name, self.norm_momentum)
        block = PreActivationBlock if self.architecture.preactivation else PostActivationBlock
        self.stem = Stem(self.architecture, conv, norm)
        self.block = {f"{k:02d}": block(spec, conv, norm) for k, spec in enumerate(self.architecture.blocks(), 1)}
        self.head = Head(self.architecture, self.num_classes, norm)

    def __call__(self, images, *, instance: SDPointInstance = FULL_RESOLUTION, train: bool):
        """Classifies.

        Args:
            images: [B, H, W, C], normalised, of any size from `architecture.min_image_size` on.
            instance: static; each one is a program of its own.
            train: static; normalise by the batch's own statistics, not by the running ones.

        Returns:
            logits [B, K], float32.

        Raises:
            ValueError: an instance that the net does not have, or images too small for the net.
        """
        return self.from_position(self.to_first_position(images, train=train), 0, instance=instance, train=train)

    def to_first_position(self, images, *, train: bool):
        """Images [B, H, W, C] to the activation at position 0."""
        self.check_image_size(images.shape[1:3])
        return self.stem(images.astype(self.dtype), train)

    def next_position(self, x, k: int, *, instance: SDPointInstance = FULL_RESOLUTION, train: bool):
        """The activation at position k to that at position k + 1."""
        x, block = self._pass_point(x, k, instance), self.block[f"{k + 1:02d}"]
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return block(x, train)
        apply = _block_by_itself(type(block), block.spec, (block.conv, block.norm), self.remat, train)
        y, updates = apply(block.variables, x)
        for name, value in updates.get("batch_stats", {}).items():
            block.put_variable("batch_stats", name, value)
        return y

    def from_position(self, x, k: int, *, instance: SDPointInstance, train: bool):
        """The activation at position k to logits [B, K]: the only loop over the blocks."""
        self.check_instance(instance)
        for position in range(k, self.num_blocks):
            x = self.next_position(x, position, instance=instance, train=train)
        return self.head(self._pass_point(x, self.num_blocks, instance), train)

    def _pass_point(self, x, k, instance):
        """From position k, before its pool, to the input of what follows: the only place where a point acts."""
        if k == 0:
            return self._stem_pool(x, instance) if self.has_stem_point else x
        if k == instance.point:
            x = adaptive_avg_pool(x, tuple(downsampled_size(side, instance.ratio) for side in x.shape[1:3]))
        return x if self.architecture.preactivation else nn.relu(x)

    def _stem_pool(self, x, instance):
        if instance.point == STEM:
            sizes = (downsampled_size(-(-side // 2), instance.ratio) for side in x.shape[1:3])
            return adaptive_max_pool(x, tuple(sizes))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    @property
    def num_blocks(self) -> int:
        """N, the number of residual blocks."""
        return self.architecture.num_blocks

    @property
    def modules(self) -> tuple[str, ...]:
        """Top-level names of the variables in order: module k, of 0..N + 1, leads from position k - 1 to k."""
        return ("stem", *(f"block_{k:02d}" for k in range(1, self.num_blocks + 1)), "head")

    def position_of(self, instance: SDPointInstance) -> int:
        """Where `instance` downsamples: up to there it is as full resolution, which goes up to the last position."""
        return {STEM: 0, 0: self.num_blocks}.get(instance.point, instance.point)

    @property
    def has_stem_point(self) -> bool:
        """Whether the net has the point `STEM`."""
        return self.architecture.imagenet_stem

    def instances(
        self, ratios: Iterable[float] = sdpoint.DEFAULT_RATIOS, points: Iterable[int] | None = None
    ) -> tuple[SDPointInstance, ...]:
        """The net's instances in order of depth; see `instance.list_instances`."""
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
