"""DenseNet (Huang et al. 2017): the ImageNet nets as torchvision defines them, and DenseNet-BC for small images.

A block is one dense layer: its state is the concatenated map, which the layer extends by `growth` channels. A
transition belongs to the first layer after it. Small images: section 4.2 of the paper, k = 12 and 40.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.convolution import convolution
from sdpoint_jax.models.net import SDPointNet, TorchTensor

# Layers of each dense block, growth and channels of the stem.
IMAGENET = {
    "densenet121": ((6, 12, 24, 16), 32, 64),
    "densenet161": ((6, 12, 36, 24), 48, 96),
    "densenet169": ((6, 12, 32, 32), 32, 64),
    "densenet201": ((6, 12, 48, 32), 32, 64),
}
_BOTTLENECK = 4


class Stem(nn.Module):
    """The first convolution; for ImageNet with BatchNorm and ReLU, up to the max-pool."""

    features: int
    imagenet: bool
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images [B, H, W, C] to [B, h, w, features]."""
        if not self.imagenet:
            return convolution(self.features, 3, dtype=self.dtype, name="conv")(images)
        x = convolution(self.features, 7, 2, dtype=self.dtype, name="conv")(images)
        return nn.relu(_norm(self, "norm", train)(x))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1 and 3x3 convolution, appended to the input; a transition first where a block begins."""

    growth: int
    transition: int  # Its output channels; 0 for none.
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to [B, h, w, C + growth], or half the sides and the channels first."""
        if self.transition:
            x = nn.relu(_norm(self, "transition_norm", train)(x))
            x = convolution(self.transition, 1, dtype=self.dtype, name="transition_conv")(x)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        y = nn.relu(_norm(self, "norm1", train)(x))
        y = convolution(_BOTTLENECK * self.growth, 1, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(_norm(self, "norm2", train)(y))
        return jnp.concatenate([x, convolution(self.growth, 3, dtype=self.dtype, name="conv2")(y)], axis=-1)


class Head(nn.Module):
    """BatchNorm, ReLU, global average pool and classifier."""

    num_classes: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to logits [B, K]."""
        x = nn.relu(_norm(self, "norm", train)(x))
        return layers.dense(self.num_classes, name="dense")(layers.global_average(x))


def _norm(module, name, train):
    return nn.BatchNorm(not train, epsilon=1e-5, dtype=module.dtype, axis_name=module.axis_name, name=name)


class DenseNet(SDPointNet):
    """DenseNet with bottlenecks; a transition halves the channels.

    Attributes:
        depths: Layers of each dense block.
        growth: Channels that a layer adds.
        stem_features: Channels of the stem.
        imagenet: Whether the stem is a 7x7/2 convolution and a max-pool.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    depths: tuple[int, ...]
    growth: int
    stem_features: int
    imagenet: bool
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Create the layers."""
        self.stem = Stem(self.stem_features, self.imagenet, self.dtype, self.axis_name)
        features = self.stem_features
        blocks: list[nn.Module] = []
        for stage, depth in enumerate(self.depths):
            for k in range(depth):
                transition = features // 2 if stage and k == 0 else 0
                name = f"block_{len(blocks) + 1:02d}"
                blocks.append(DenseLayer(self.growth, transition, self.dtype, self.axis_name, name=name))
                features = (transition or features) + self.growth
        self.blocks = blocks
        self.head = Head(self.num_classes, self.dtype, self.axis_name)

    @property
    def has_stem_point(self) -> bool:
        """Whether the stem ends in a max-pool."""
        return self.imagenet

    @property
    def min_image_size(self) -> int:
        """Smallest side that every transition still halves."""
        return 2 ** (len(self.depths) - 1) * (4 if self.imagenet else 1)

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours; torchvision and timm agree."""
        names: dict[str, str | TorchTensor] = {"stem/conv": "features.conv0", "stem/norm": "features.norm0"}
        names |= {"head/norm": "features.norm5", "head/dense": "classifier"}
        in_blocks = ((stage, k) for stage, depth in enumerate(self.depths, 1) for k in range(1, depth + 1))
        for (stage, k), block in zip(in_blocks, self.part_names.blocks, strict=True):
            for layer in ("norm1", "conv1", "norm2", "conv2"):
                names[f"{block}/{layer}"] = f"features.denseblock{stage}.denselayer{k}.{layer}"
            for layer in ("norm", "conv"):
                names[f"{block}/transition_{layer}"] = f"features.transition{stage - 1}.{layer}"
        return names


NAMES = (*IMAGENET, "densenet_bc_40_12", "densenet_bc_100_12", "densenet_bc_190_40")
PATTERNS = ("densenet_bc_{depth}_{growth}, depth 6n + 4",)


def create(name: str, **attributes: Any) -> DenseNet | None:
    """Return the net called `name`, as `densenet121` or `densenet_bc_100_12`; None if it is of another family."""
    if name in IMAGENET:
        depths, growth, features = IMAGENET[name]
        return DenseNet(depths=depths, growth=growth, stem_features=features, imagenet=True, **attributes)
    small = re.fullmatch(r"densenet_bc_([0-9]+)_([0-9]+)", name)
    if not small or int(small[1]) < 10 or int(small[1]) % 6 != 4 or int(small[2]) < 1:
        return None
    depth, growth = int(small[1]), int(small[2])
    return DenseNet(
        depths=((depth - 4) // 6,) * 3, growth=growth, stem_features=2 * growth, imagenet=False, **attributes
    )
