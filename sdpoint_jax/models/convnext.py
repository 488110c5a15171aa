"""ConvNeXt T, S, B and L (Liu et al. 2022), as torchvision and timm define them.

It has no BatchNorm, so nothing to re-estimate. A downsampling layer belongs to the block after it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.convolution import convolution
from sdpoint_jax.models.net import SDPointNet, TorchTensor

_EPSILON = 1e-6
_INIT = nn.initializers.truncated_normal(0.02)


class Row(NamedTuple):
    """One net.

    Attributes:
        depths: Blocks of each stage.
        widths: Channels of each stage.
        drop: Rate of stochastic depth at the last block.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    drop: float


TABLE = {
    "convnext_tiny": Row((3, 3, 9, 3), (96, 192, 384, 768), 0.1),
    "convnext_small": Row((3, 3, 27, 3), (96, 192, 384, 768), 0.4),
    "convnext_base": Row((3, 3, 27, 3), (128, 256, 512, 1024), 0.5),
    "convnext_large": Row((3, 3, 27, 3), (192, 384, 768, 1536), 0.5),
    # For small images. timm's net of this name has these depths and widths, and convolutions for its linear layers.
    "convnext_atto": Row((2, 2, 6, 2), (40, 80, 160, 320), 0.0),
}


def _norm(name, dtype):
    return nn.LayerNorm(_EPSILON, dtype=dtype, name=name)


def _patches(features, side, name, dtype):
    """Return a convolution over patches that do not overlap."""
    return nn.Conv(features, (side, side), (side, side), "VALID", kernel_init=_INIT, dtype=dtype, name=name)


class Stem(nn.Module):
    """Convolution over patches and LayerNorm."""

    features: int
    patch: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images [B, H, W, C] to [B, H / patch, W / patch, features]."""
        return _norm("norm", self.dtype)(_patches(self.features, self.patch, "conv", self.dtype)(images))


class Block(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, two linear layers, layer scale and addition.

    Attributes:
        features: Channels.
        downsamples: Whether LayerNorm and a 2x2/2 convolution come first, at the beginning of a stage.
        drop: Rate of stochastic depth.
        dtype: Type of the computation.
    """

    features: int
    downsamples: bool
    drop: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, in] to [B, h, w, features], or half the sides."""
        if self.downsamples:
            x = _patches(self.features, 2, "downsample_conv", self.dtype)(_norm("downsample_norm", self.dtype)(x))
        y = convolution(
            self.features, 7, groups=self.features, use_bias=True, kernel_init=_INIT, dtype=self.dtype, name="conv"
        )(x)
        y = _norm("norm", self.dtype)(y)
        y = nn.Dense(4 * self.features, kernel_init=_INIT, dtype=self.dtype, name="dense1")(y)
        y = nn.Dense(self.features, kernel_init=_INIT, dtype=self.dtype, name="dense2")(layers.gelu(y))
        scale = self.param("layer_scale", nn.initializers.constant(1e-6), (self.features,))
        y = y * scale.astype(y.dtype)[None, None, None]
        return x + (layers.stochastic_depth(self.drop, train)(y) if self.drop else y)


class Head(nn.Module):
    """Global average pool, LayerNorm and classifier."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to logits [B, K]."""
        x = _norm("norm", jnp.float32)(layers.global_average(x))
        return nn.Dense(self.num_classes, kernel_init=_INIT, name="dense")(x)


class ConvNeXt(SDPointNet):
    """ConvNeXt.

    Attributes:
        row: The net.
        patch: Side of the stem's patches.
        dtype: Type of the computation.
    """

    row: Row
    patch: int = 4
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the layers."""
        total = sum(self.row.depths)
        blocks: list[nn.Module] = []
        for stage, (depth, features) in enumerate(zip(self.row.depths, self.row.widths, strict=True)):
            for k in range(depth):
                drop = self.row.drop * len(blocks) / max(1, total - 1)
                name = f"block_{len(blocks) + 1:02d}"
                blocks.append(Block(features, stage > 0 and k == 0, drop, self.dtype, name=name))
        self.stem = Stem(self.row.widths[0], self.patch, self.dtype)
        self.blocks = blocks
        self.head = Head(self.num_classes)

    @property
    def min_image_size(self) -> int:
        """Smallest side that the patches still divide."""
        return self.patch * 2 ** (len(self.row.depths) - 1)

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours."""
        timm = dialect == "timm"
        stem, head = ("stem", ("head.norm", "head.fc")) if timm else ("features.0", ("classifier.0", "classifier.2"))
        names: dict[str, str | TorchTensor] = {"stem/conv": f"{stem}.0", "stem/norm": f"{stem}.1"}
        names |= {"head/norm": head[0], "head/dense": head[1]}
        inner = {"conv": "block.0", "norm": "block.2", "dense1": "block.3", "dense2": "block.5"}
        if timm:
            inner = {"conv": "conv_dw", "norm": "norm", "dense1": "mlp.fc1", "dense2": "mlp.fc2"}
        in_stages = ((s, k) for s, depth in enumerate(self.row.depths) for k in range(depth))
        for (s, k), block in zip(in_stages, self.part_names.blocks, strict=True):
            place = f"stages.{s}.blocks.{k}" if timm else f"features.{2 * s + 1}.{k}"
            names |= {f"{block}/{ours}": f"{place}.{theirs}" for ours, theirs in inner.items()}
            width = self.row.widths[s]
            scale = (
                TorchTensor(f"{place}.gamma", (width,)) if timm else TorchTensor(f"{place}.layer_scale", (width, 1, 1))
            )
            names[f"{block}/layer_scale"] = scale
            down = f"stages.{s}.downsample" if timm else f"features.{2 * s}"
            names |= {f"{block}/downsample_norm": f"{down}.0", f"{block}/downsample_conv": f"{down}.1"}
        return names


NAMES = tuple(TABLE)


def create(name: str, **attributes: Any) -> ConvNeXt | None:
    """Return the net called `name`, as `convnext_tiny`; None if it is of another family."""
    return ConvNeXt(row=TABLE[name], **attributes) if name in TABLE else None
