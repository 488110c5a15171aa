"""RegNet X and Y (Radosavovic et al. 2020), as torchvision and timm define them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.layers import ConvNorm
from sdpoint_jax.models.net import SDPointNet, TorchTensor

_STEM = 32

# Blocks, initial width, slope, quantisation and group width; tables 5 to 8 of the paper's appendix. Y adds
# squeeze-and-excitation.
_X = {
    "400mf": (22, 24, 24.48, 2.54, 16),
    "800mf": (16, 56, 35.73, 2.28, 16),
    "1_6gf": (18, 80, 34.01, 2.25, 24),
    "3_2gf": (25, 88, 26.31, 2.25, 48),
    "8gf": (23, 80, 49.56, 2.88, 120),
    "16gf": (22, 216, 55.59, 2.1, 128),
    "32gf": (23, 320, 69.86, 2.0, 168),
}
_Y = {
    "400mf": (16, 48, 27.89, 2.09, 8),
    "800mf": (14, 56, 38.84, 2.4, 16),
    "1_6gf": (27, 48, 20.71, 2.65, 24),
    "3_2gf": (21, 80, 42.63, 2.66, 24),
    "8gf": (17, 192, 76.82, 2.19, 56),
    "16gf": (18, 200, 106.23, 2.48, 112),
    "32gf": (20, 232, 115.89, 2.53, 232),
}


class Row(NamedTuple):
    """One net.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        groups: Channels of a group of each stage.
        squeezes: Whether blocks have squeeze-and-excitation.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    squeezes: bool


def _row(parameters, squeezes):
    """Return the widths that the linear rule quantises (equations 2 to 4), made multiples of the group width."""
    depth, initial, slope, factor, group = parameters
    steps = np.round(np.log((np.arange(depth) * slope + initial) / initial) / np.log(factor))
    widths = (np.round(initial * factor**steps / 8) * 8).astype(int)
    stages, depths = np.unique(widths, return_counts=True)
    groups = [min(group, int(width)) for width in stages]
    rounded = [layers.make_divisible(int(width), own) for width, own in zip(stages, groups)]
    return Row(tuple(map(int, depths)), tuple(rounded), tuple(groups), squeezes)


TABLE = {
    **{f"regnet_x_{name}": _row(parameters, False) for name, parameters in _X.items()},
    **{f"regnet_y_{name}": _row(parameters, True) for name, parameters in _Y.items()},
}
_TIMM = {"400mf": "004", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "8gf": "080", "16gf": "160", "32gf": "320"}
TABLE |= {f"regnet{kind}_{_TIMM[name]}": TABLE[f"regnet_{kind}_{name}"] for kind in "xy" for name in _TIMM}


class Block(nn.Module):
    """Bottleneck with a grouped convolution, up to and including the addition: the caller applies the last ReLU.

    Attributes:
        features: Output channels, and those inside the block.
        stride: Of the grouped convolution.
        group: Channels of a group.
        squeeze: Channels within the squeeze-and-excitation; 0 for none.
        reshapes: Whether the shortcut is a 1x1 convolution with BatchNorm.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    features: int
    stride: int
    group: int
    squeeze: int
    reshapes: bool
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, in] to [B, h / stride, w / stride, features]."""
        settings = dict(dtype=self.dtype, axis_name=self.axis_name)
        y = ConvNorm(self.features, activation=nn.relu, name="layer1", **settings)(x, train)
        groups = self.features // self.group
        middle = ConvNorm(self.features, 3, self.stride, groups, activation=nn.relu, name="layer2", **settings)
        y = middle(y, train)
        if self.squeeze:
            y = layers.SqueezeExcitation(self.squeeze, dtype=self.dtype, name="squeeze")(y)
        y = ConvNorm(self.features, name="layer3", **settings)(y, train)
        if self.reshapes:
            x = ConvNorm(self.features, stride=self.stride, name="shortcut", **settings)(x, train)
        return x + y


class Head(nn.Module):
    """Global average pool and classifier."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to logits [B, K]."""
        return layers.dense(self.num_classes, name="dense")(layers.global_average(x))


class RegNet(SDPointNet):
    """RegNet X or Y; the point of a block precedes its last ReLU, as in ResNet.

    Attributes:
        row: The net.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    row: Row
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Create the layers."""
        settings = dict(dtype=self.dtype, axis_name=self.axis_name)
        self.stem = ConvNorm(_STEM, 3, 2, activation=nn.relu, **settings)
        features_in = _STEM
        blocks: list[nn.Module] = []
        for depth, features, group in zip(self.row.depths, self.row.widths, self.row.groups, strict=True):
            for k in range(depth):
                squeeze = round(features_in / 4) if self.row.squeezes else 0
                name = f"block_{len(blocks) + 1:02d}"
                block = Block(features, 1 if k else 2, group, squeeze, k == 0, self.dtype, self.axis_name, name=name)
                blocks.append(block)
                features_in = features
        self.blocks = blocks
        self.head = Head(self.num_classes)

    def after_point(self, x: jax.Array) -> jax.Array:
        """Apply the last ReLU of a block, which follows the point."""
        return nn.relu(x)

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours."""
        timm = dialect == "timm"
        names: dict[str, str | TorchTensor] = {
            "stem/conv": "stem.conv" if timm else "stem.0",
            "stem/norm": "stem.bn" if timm else "stem.1",
            "head/dense": "head.fc" if timm else "fc",
        }
        conv, norm = ("conv", "bn") if timm else ("0", "1")
        in_stages = ((s, k) for s, depth in enumerate(self.row.depths, 1) for k in range(depth))
        for (s, k), block in zip(in_stages, self.part_names.blocks, strict=True):
            place = f"s{s}.b{k + 1}" if timm else f"trunk_output.block{s}.block{s}-{k}"
            theirs = {f"layer{i}": f"conv{i}" if timm else f"f.{'abc'[i - 1]}" for i in (1, 2, 3)}
            theirs["shortcut"] = "downsample" if timm else "proj"
            for layer, name in theirs.items():
                names |= {
                    f"{block}/{layer}/conv": f"{place}.{name}.{conv}",
                    f"{block}/{layer}/norm": f"{place}.{name}.{norm}",
                }
            squeeze = f"{place}.se" if timm else f"{place}.f.se"
            names |= {f"{block}/squeeze/reduce": f"{squeeze}.fc1", f"{block}/squeeze/expand": f"{squeeze}.fc2"}
        return names


NAMES = tuple(TABLE)


def create(name: str, **attributes: Any) -> RegNet | None:
    """Return the net called `name`, as `regnet_y_400mf`; None if it is of another family."""
    return RegNet(row=TABLE[name], **attributes) if name in TABLE else None
