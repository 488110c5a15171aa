"""MobileNetV2 (Sandler et al. 2018) and V3 (Howard et al. 2019), as torchvision and timm define them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.layers import ConvNorm, InvertedResidual, InvertedResidualSpec
from sdpoint_jax.models.net import SDPointNet, TorchTensor

# Expansion, output channels, blocks, stride; table 2 of the V2 paper.
_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# Kernel, expanded and output channels, squeeze-and-excitation, hard swish, stride; tables 1 and 2 of the V3 paper.
_V3_LARGE = (
    *((3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1)),
    *((5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1)),
    *((3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2)),
    *((5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1)),
)
_V3_SMALL = (
    *((3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1)),
    *((5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2)),
    *((5, 576, 96, 1, 1, 1), (5, 576, 96, 1, 1, 1)),
)


class Row(NamedTuple):
    """One net.

    Attributes:
        version: 2 or 3.
        width: Factor of all channels.
        blocks: See the tables above.
        last: Channels of the last 1x1 convolution.
        hidden: Channels of the linear layer before the classifier; 0 for none.
        epsilon: Added to variances.
    """

    version: int
    width: float
    blocks: tuple[tuple[int, ...], ...]
    last: int
    hidden: int
    epsilon: float = 1e-5


def _v2(width):
    last = layers.make_divisible(1280 * max(1.0, width))
    return Row(2, width, _V2, last, 0)


TABLE = {
    "mobilenet_v2": _v2(1.0),
    **{f"mobilenetv2_{percent:03d}": _v2(percent / 100) for percent in (35, 50, 75, 100, 140)},
    "mobilenet_v3_large": Row(3, 1.0, _V3_LARGE, 960, 1280, 1e-3),
    "mobilenet_v3_small": Row(3, 1.0, _V3_SMALL, 576, 1024, 1e-3),
}
# timm's names; it adds PyTorch's default to variances.
TABLE |= {
    f"mobilenetv3_{size}_100": TABLE[f"mobilenet_v3_{size}"]._replace(epsilon=1e-5) for size in ("large", "small")
}


class Head(nn.Module):
    """1x1 convolution, global average pool, in V3 a linear layer, dropout and classifier."""

    num_classes: int
    last: int
    hidden: int
    activation: layers.Activation
    dropout: float
    epsilon: float
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to logits [B, K]."""
        settings = dict(epsilon=self.epsilon, dtype=self.dtype, axis_name=self.axis_name)
        x = ConvNorm(self.last, activation=self.activation, name="last", **settings)(x, train)
        x = layers.global_average(x)
        if self.hidden:
            x = self.activation(layers.dense(self.hidden, name="hidden")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.dense(self.num_classes, name="dense")(x)


class MobileNet(SDPointNet):
    """MobileNetV2 or V3; a block is one inverted residual.

    Attributes:
        row: The net.
        dropout: Rate before the classifier.
        small_images: Whether the stem and the first strided block keep the resolution, as usual for 32x32 pixels.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    row: Row
    dropout: float = 0.2
    small_images: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Create the layers."""
        row = self.row
        third = row.version == 3
        settings = dict(epsilon=row.epsilon, dtype=self.dtype, axis_name=self.axis_name)
        active = nn.hard_swish if third else nn.relu6
        first = layers.make_divisible((16 if third else 32) * row.width)
        self.stem = ConvNorm(first, 3, 1 if self.small_images else 2, activation=active, **settings)
        specs = list(_v3_blocks(row) if third else _v2_blocks(row, first))
        if self.small_images:
            strided = next(k for k, (spec, _) in enumerate(specs) if spec.stride == 2)
            specs[strided] = specs[strided][0]._replace(stride=1), specs[strided][1]
        self.blocks = [
            InvertedResidual(spec, activation, gate=nn.hard_sigmoid, name=f"block_{k:02d}", **settings)
            for k, (spec, activation) in enumerate(specs, 1)
        ]
        self.head = Head(self.num_classes, row.last, row.hidden, active, self.dropout, **settings)

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours."""
        names: dict[str, str | TorchTensor] = {}
        specs = [block.spec for block in self.bind({}).blocks]
        if dialect == "timm":
            names |= {"stem/conv": "conv_stem", "stem/norm": "bn1", "head/dense": "classifier"}
            last = "blocks.6.0.conv" if self.row.version == 3 and len(specs) == 15 else "blocks.5.0.conv"
            last = last if self.row.version == 3 else "conv_head"
            names["head/last/conv"] = last
            names["head/last/norm"] = last.replace(".conv", ".bn1") if "." in last else "bn2"
            if self.row.hidden:  # A convolution there, after the pool.
                names["head/hidden/kernel"] = TorchTensor("conv_head.weight", (self.row.hidden, self.row.last, 1, 1))
                names["head/hidden/bias"] = "conv_head.bias"
            for block, spec, place in zip(self.part_names.blocks, specs, _stages(self.row), strict=True):
                names |= timm_block(block, spec, f"blocks.{place}", expands=_expands(self.row, block))
            return names
        end = len(specs) + 1
        names |= {"stem/conv": "features.0.0", "stem/norm": "features.0.1"}
        names |= {"head/last/conv": f"features.{end}.0", "head/last/norm": f"features.{end}.1"}
        names |= {
            "head/hidden": "classifier.0",
            "head/dense": "classifier.1" if self.row.version == 2 else "classifier.3",
        }
        for k, (block, spec) in enumerate(zip(self.part_names.blocks, specs, strict=True), 1):
            inner = "conv" if self.row.version == 2 else "block"
            names |= torchvision_block(
                block, spec, f"features.{k}.{inner}", expands=_expands(self.row, block), flat=self.row.version == 2
            )
        return names


def _v2_blocks(row, features_in):
    for expansion, channels, count, stride in row.blocks:
        features = layers.make_divisible(channels * row.width)
        for k in range(count):
            yield InvertedResidualSpec(features, features_in * expansion, 3, stride if k == 0 else 1), nn.relu6
            features_in = features


def _v3_blocks(row):
    for kernel, expanded, features, squeezes, swishes, stride in row.blocks:
        squeeze = layers.make_divisible(expanded // 4) if squeezes else 0
        spec = InvertedResidualSpec(features, expanded, kernel, stride, squeeze)
        yield spec, nn.hard_swish if swishes else nn.relu


def _expands(row, block):
    """Whether a block expands its input: all but the first do."""
    return block != "block_01"


def _stages(row):
    """Return timm's places of the blocks, as "1.0": a stage ends before a stride or where the channels change."""
    if row.version == 2:
        return [f"{stage}.{k}" for stage, (_, _, count, _) in enumerate(row.blocks) for k in range(count)]
    places, stage, index, before = [], -1, 0, None
    for _, _, features, _, _, _ in row.blocks:
        stage, index = (stage, index + 1) if features == before else (stage + 1, 0)
        places.append(f"{stage}.{index}")
        before = features
    return places


def torchvision_block(
    ours: str, spec: InvertedResidualSpec, theirs: str, *, expands: bool, flat: bool = False
) -> dict[str, str]:
    """Return torchvision's names of an inverted residual's layers.

    Args:
        ours: Our name of the block.
        spec: Its shape.
        theirs: Name of its sequence of layers.
        expands: Whether it has an expansion.
        flat: Whether the projection's convolution and BatchNorm stand in the sequence itself, as in MobileNetV2.
    """
    names: dict[str, str] = {}
    index = 0
    for layer in (["expand"] if spec.fused or expands else []) + ([] if spec.fused else ["depthwise"]):
        names |= {f"{ours}/{layer}/conv": f"{theirs}.{index}.0", f"{ours}/{layer}/norm": f"{theirs}.{index}.1"}
        index += 1
    if spec.squeeze:
        names |= {f"{ours}/squeeze/reduce": f"{theirs}.{index}.fc1"}
        names |= {f"{ours}/squeeze/expand": f"{theirs}.{index}.fc2"}
        index += 1
    conv, norm = (
        (f"{theirs}.{index}", f"{theirs}.{index + 1}") if flat else (f"{theirs}.{index}.0", f"{theirs}.{index}.1")
    )
    return names | {f"{ours}/project/conv": conv, f"{ours}/project/norm": norm}


def timm_block(ours: str, spec: InvertedResidualSpec, theirs: str, *, expands: bool) -> dict[str, str]:
    """Return timm's names of an inverted residual's layers; arguments as of `torchvision_block`."""
    if spec.fused:
        kinds = (
            [("expand", "conv_exp", "bn1"), ("project", "conv_pwl", "bn2")] if expands else [("expand", "conv", "bn1")]
        )
    elif expands:
        kinds = [("expand", "conv_pw", "bn1"), ("depthwise", "conv_dw", "bn2"), ("project", "conv_pwl", "bn3")]
    else:
        kinds = [("depthwise", "conv_dw", "bn1"), ("project", "conv_pw", "bn2")]
    names: dict[str, str] = {}
    for layer, conv, norm in kinds:
        names |= {f"{ours}/{layer}/conv": f"{theirs}.{conv}", f"{ours}/{layer}/norm": f"{theirs}.{norm}"}
    squeeze = {f"{ours}/squeeze/{layer}": f"{theirs}.se.conv_{layer}" for layer in ("reduce", "expand")}
    return names | (squeeze if spec.squeeze else {})


NAMES = tuple(TABLE)


def create(name: str, **attributes: Any) -> MobileNet | None:
    """Return the net called `name`, as `mobilenet_v2`; None if it is of another family."""
    return MobileNet(row=TABLE[name], **attributes) if name in TABLE else None
