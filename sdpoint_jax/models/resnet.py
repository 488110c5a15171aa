"""Residual networks: ResNet, PreResNet, WRN and ResNeXt, rows of one table.

He et al. 2016 (ResNet, PreResNet), Zagoruyko & Komodakis 2016 (WRN), Xie et al. 2017 (ResNeXt). The stride of a
bottleneck sits on its 3x3 convolution, as in torchvision.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models.architecture import Architecture, BlockSpec, ShortcutKind, ShortcutSpec
from sdpoint_jax.models.convolution import convolution
from sdpoint_jax.models.layers import dense, global_average
from sdpoint_jax.models.net import SDPointNet, TorchTensor

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
        return dense(self.num_classes, name="dense")(global_average(x))


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
        conv, norm = layers(self.dtype, self.axis_name)
        block = PreActivationBlock if self.architecture.preactivation else PostActivationBlock
        self.stem = Stem(self.architecture, conv, norm)
        specs = enumerate(self.architecture.blocks(), 1)
        self.blocks = [block(spec, conv, norm, name=f"block_{k:02d}") for k, spec in specs]
        self.head = Head(self.architecture, self.num_classes, norm)

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

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours; torchvision and timm agree. See `SDPointNet.torch_names`."""
        names: dict[str, str | TorchTensor] = {
            "stem/conv": "conv1",
            "stem/norm": "bn1",
            "head/norm": "bn2",
            "head/dense": "fc",
        }
        in_stages = ((stage, k) for stage, depth in enumerate(self.architecture.depths, 1) for k in range(depth))
        for (stage, k), block in zip(in_stages, self.part_names.blocks, strict=True):
            for layer in range(1, 4):
                names[f"{block}/conv{layer}"] = f"layer{stage}.{k}.conv{layer}"
                names[f"{block}/norm{layer}"] = f"layer{stage}.{k}.bn{layer}"
            names[f"{block}/shortcut_conv"] = f"layer{stage}.{k}.downsample.0"
            names[f"{block}/shortcut_norm"] = f"layer{stage}.{k}.downsample.1"
        return names


_IMAGENET_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def _imagenet(depth, **kwargs):
    bottleneck = depth >= 50
    return Architecture(_IMAGENET_DEPTHS[depth], 64, 256 if bottleneck else 64, bottleneck, **kwargs)


def _grouped(depth, groups, width):
    """Makes a net of torchvision's: `groups` groups, each `width` wide in the first stage."""
    return Architecture(_IMAGENET_DEPTHS[depth], groups * width, 256, bottleneck=True, groups=groups)


def _resnet(depth, width=16):
    """Makes the net of He et al. 2016, section 4.2: shortcuts without parameters, option A; theirs are 16 wide."""
    blocks = (depth - 2) // 6
    return Architecture((blocks,) * 3, width, width, stem=width, imagenet_stem=False, shortcut="padded_identity")


def _preresnet(depth, *, bottleneck=False):
    blocks, features = (depth - 2) // (9 if bottleneck else 6), 64 if bottleneck else 16
    return Architecture(
        (blocks,) * 3, 16, features, bottleneck, True, stem=16, imagenet_stem=False, shortcut="projection"
    )


def _wide(depth, width):
    blocks, features = (depth - 4) // 6, 16 * width
    return Architecture(
        (blocks,) * 3, features, features, False, True, stem=16, imagenet_stem=False, shortcut="projection"
    )


ARCHITECTURES = {
    **{f"resnet{depth}": _imagenet(depth) for depth in (18, 34, 50, 101, 152)},
    **{f"preresnet{depth}": _imagenet(depth, preactivation=True) for depth in (18, 34, 50, 101, 152, 200)},
    **{f"resnext{depth}": _grouped(depth, 32, 4) for depth in (50, 101, 152)},
    **{f"resnet{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110, 1202)},
    **{f"preresnet{depth}": _preresnet(depth) for depth in (20, 56, 110)},
    "preresnet164": _preresnet(164, bottleneck=True),
    # ResNet-18 with a 3x3 stem and no max-pool, as most CIFAR code bases have it.
    "resnet18_cifar": _imagenet(18, imagenet_stem=False),
    "resnext29_8x64d": Architecture((3, 3, 3), 512, 256, True, imagenet_stem=False, groups=8),
    "wrn28_10": _wide(28, 10),
}
# The names of torchvision and timm: of the same nets, and of more that differ in the width of their blocks alone.
ARCHITECTURES |= {
    **{f"resnext{depth}_32x4d": ARCHITECTURES[f"resnext{depth}"] for depth in (50, 101, 152)},
    "resnext101_32x8d": _grouped(101, 32, 8),
    "resnext101_64x4d": _grouped(101, 64, 4),
    "wide_resnet50_2": _grouped(50, 1, 128),
    "wide_resnet101_2": _grouped(101, 1, 128),
}

PATTERNS = (
    "wrn{depth}_{width}, depth 6n + 4",
    "resnet{depth}_w{width}, depth 6n + 2",
    *(f"any of them with _{kind} behind its name" for kind in get_args(ShortcutKind)),
)


def architecture(name: str) -> Architecture:
    """Return the row of the table called `name`.

    Args:
        name: a key of `ARCHITECTURES`; or `wrn{depth}_{width}`, a WRN of any depth 6n + 4 and width; or
            `resnet{depth}_w{width}`, a ResNet for small images of any depth 6n + 2 with `width` channels in its first
            stage instead of 16. With the ending `_` and a kind of shortcut, as in `resnet20_projection_norm`, it is
            the same net with that shortcut.

    Raises:
        ValueError: The table has no such row.
    """
    kind = next((kind for kind in get_args(ShortcutKind) if name.endswith(f"_{kind}")), None)
    known = name.removesuffix(f"_{kind}")
    wide = re.fullmatch(r"wrn([0-9]+)_([0-9]+)", known)
    narrow = re.fullmatch(r"resnet([0-9]+)_w([0-9]+)", known)
    if known in ARCHITECTURES:
        found = ARCHITECTURES[known]
    elif wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) >= 1:
        found = _wide(int(wide[1]), int(wide[2]))
    elif narrow and int(narrow[1]) >= 8 and int(narrow[1]) % 6 == 2 and int(narrow[2]) >= 1:
        found = _resnet(int(narrow[1]), int(narrow[2]))
    else:
        raise ValueError(f"model {name!r}: no residual net; {', '.join((*ARCHITECTURES, *PATTERNS))}")
    return dataclasses.replace(found, shortcut=kind) if kind else found


def create(name: str, **attributes: Any) -> ResNet | None:
    """Return the net called `name`, see `architecture`; None if it is of another family."""
    try:
        return ResNet(architecture=architecture(name), **attributes)
    except ValueError:
        return None


NAMES = tuple(ARCHITECTURES)
