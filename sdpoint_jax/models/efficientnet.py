"""EfficientNet B0 to B7 (Tan & Le 2019) and V2 S, M and L (Tan & Le 2021), as torchvision and timm define them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.layers import ConvNorm, InvertedResidual, InvertedResidualSpec
from sdpoint_jax.models.mobilenet import timm_block, torchvision_block
from sdpoint_jax.models.net import SDPointNet, TorchTensor

# Fused, expansion, kernel, stride, output channels, blocks.
_B0 = (
    *((0, 1, 3, 1, 16, 1), (0, 6, 3, 2, 24, 2), (0, 6, 5, 2, 40, 2), (0, 6, 3, 2, 80, 3)),
    *((0, 6, 5, 1, 112, 3), (0, 6, 5, 2, 192, 4), (0, 6, 3, 1, 320, 1)),
)
_V2 = {
    "s": (
        *((1, 1, 3, 1, 24, 2), (1, 4, 3, 2, 48, 4), (1, 4, 3, 2, 64, 4), (0, 4, 3, 2, 128, 6)),
        *((0, 6, 3, 1, 160, 9), (0, 6, 3, 2, 256, 15)),
    ),
    "m": (
        *((1, 1, 3, 1, 24, 3), (1, 4, 3, 2, 48, 5), (1, 4, 3, 2, 80, 5), (0, 4, 3, 2, 160, 7)),
        *((0, 6, 3, 1, 176, 14), (0, 6, 3, 2, 304, 18), (0, 6, 3, 1, 512, 5)),
    ),
    "l": (
        *((1, 1, 3, 1, 32, 4), (1, 4, 3, 2, 64, 7), (1, 4, 3, 2, 96, 7), (0, 4, 3, 2, 192, 10)),
        *((0, 6, 3, 1, 224, 19), (0, 6, 3, 2, 384, 25), (0, 6, 3, 1, 640, 7)),
    ),
}
# Factors of width and depth, dropout; table of the paper's code.
_SCALES = (
    *((1.0, 1.0, 0.2), (1.0, 1.1, 0.2), (1.1, 1.2, 0.3), (1.2, 1.4, 0.3)),
    *((1.4, 1.8, 0.4), (1.6, 2.2, 0.4), (1.8, 2.6, 0.5), (2.0, 3.1, 0.5)),
)


class Row(NamedTuple):
    """One net.

    Attributes:
        stages: See the tables above, with the factors applied.
        stem: Channels of the stem.
        last: Channels of the last 1x1 convolution.
        dropout: Rate before the classifier.
        epsilon: Added to variances.
    """

    stages: tuple[tuple[int, ...], ...]
    stem: int
    last: int
    dropout: float
    epsilon: float


def _b(number, width, depth, dropout):
    def channels(value):
        return layers.make_divisible(value * width)

    stages = tuple((*rest, channels(features), math.ceil(depth * count)) for *rest, features, count in _B0)
    return Row(stages, channels(32), 4 * stages[-1][4], dropout, 1e-3 if number >= 5 else 1e-5)


TABLE = {
    **{f"efficientnet_b{number}": _b(number, *scales) for number, scales in enumerate(_SCALES)},
    **{
        f"efficientnet_v2_{size}": Row(stages, stages[0][4], 1280, dropout, 1e-3)
        for (size, stages), dropout in zip(_V2.items(), (0.2, 0.3, 0.4))
    },
}


class Head(nn.Module):
    """1x1 convolution, global average pool, dropout and classifier."""

    num_classes: int
    row: Row
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to logits [B, K]."""
        settings = dict(epsilon=self.row.epsilon, dtype=self.dtype, axis_name=self.axis_name)
        x = ConvNorm(self.row.last, activation=nn.silu, name="last", **settings)(x, train)
        x = nn.Dropout(self.row.dropout, deterministic=not train)(layers.global_average(x))
        return layers.dense(self.num_classes, name="dense")(x)


class EfficientNet(SDPointNet):
    """EfficientNet; a block is one (fused) inverted residual.

    Attributes:
        row: The net.
        drop: Rate of stochastic depth at the last block; it grows from 0 at the first one.
        epsilon: Added to variances; None for torchvision's, 1e-3 from B5 on and in V2, where timm has 1e-5.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    row: Row
    drop: float = 0.2
    epsilon: float | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Create the layers."""
        row = self.row if self.epsilon is None else self.row._replace(epsilon=self.epsilon)
        settings = dict(epsilon=row.epsilon, dtype=self.dtype, axis_name=self.axis_name)
        self.stem = ConvNorm(self.row.stem, 3, 2, activation=nn.silu, **settings)
        self.blocks = [
            InvertedResidual(spec, nn.silu, nn.silu, name=f"block_{k:02d}", **settings)
            for k, spec in enumerate(_blocks(self.row, self.drop), 1)
        ]
        self.head = Head(self.num_classes, row, self.dtype, self.axis_name)

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours."""
        timm, stages = dialect == "timm", len(self.row.stages)
        stem = ("conv_stem", "bn1") if timm else ("features.0.0", "features.0.1")
        last = ("conv_head", "bn2") if timm else (f"features.{stages + 1}.0", f"features.{stages + 1}.1")
        names: dict[str, str | TorchTensor] = {"stem/conv": stem[0], "stem/norm": stem[1]}
        names |= {"head/last/conv": last[0], "head/last/norm": last[1]}
        names["head/dense"] = "classifier" if timm else "classifier.1"
        in_stages = ((s, k) for s, (*_, count) in enumerate(self.row.stages) for k in range(count))
        specs = _blocks(self.row, self.drop)
        for (s, k), block, spec in zip(in_stages, self.part_names.blocks, specs, strict=True):
            expands = self.row.stages[s][1] != 1
            if timm:
                names |= timm_block(block, spec, f"blocks.{s}.{k}", expands=expands)
            else:
                names |= torchvision_block(block, spec, f"features.{s + 1}.{k}.block", expands=expands)
        return names


def _blocks(row, drop):
    total, features_in, specs = sum(count for *_, count in row.stages), row.stem, []
    for fused, expansion, kernel, stride, features, count in row.stages:
        for k in range(count):
            expanded = features_in * expansion if expansion == 1 else layers.make_divisible(features_in * expansion)
            squeeze = 0 if fused else max(1, features_in // 4)
            rate = drop * len(specs) / total
            strided = stride if k == 0 else 1
            specs.append(InvertedResidualSpec(features, expanded, kernel, strided, squeeze, bool(fused), rate))
            features_in = features
    return specs


NAMES = tuple(TABLE)


def create(name: str, **attributes: Any) -> EfficientNet | None:
    """Return the net called `name`, as `efficientnet_b0`; None if it is of another family."""
    return EfficientNet(row=TABLE[name], **attributes) if name in TABLE else None
