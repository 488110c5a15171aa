"""VGG with BatchNorm (Simonyan & Zisserman 2015, configurations A, B, D and E), as torchvision defines it.

A block is one convolution with BatchNorm and ReLU; a max-pool between stages belongs to the block after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.net import SDPointNet, TorchTensor
from sdpoint_jax.models.pool import adaptive_avg_pool

_WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2,) * 5, "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_POOLED = 7  # Side of the map that the classifier takes.


def _halve(x):
    return nn.max_pool(x, (2, 2), strides=(2, 2))


class Layer(nn.Module):
    """Convolution, BatchNorm and ReLU, after a max-pool if it is the first of a stage."""

    features: int
    pools: bool
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, in] to [B, h, w, features], or half the sides."""
        settings = dict(dtype=self.dtype, axis_name=self.axis_name)
        conv = layers.ConvNorm(self.features, 3, activation=nn.relu, use_bias=True, name="layer", **settings)
        return conv(_halve(x) if self.pools else x, train)


class Head(nn.Module):
    """The last max-pool, an average pool to 7x7 cells, and three linear layers with dropout."""

    num_classes: int
    hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map [B, h, w, C] to logits [B, K]."""
        x = adaptive_avg_pool(_halve(x), (_POOLED, _POOLED))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # PyTorch's order, so that its weights fit.
        for name in ("dense1", "dense2"):
            x = nn.relu(layers.dense(self.hidden, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.dense(self.num_classes, name="dense")(x.astype(jnp.float32))


class VGG(SDPointNet):
    """VGG with BatchNorm.

    Attributes:
        depths: Convolutions of each stage.
        widths: Channels of each stage.
        hidden: Width of the hidden linear layers.
        dropout: Rate after each of them.
        dtype: Type of the computation.
        axis_name: Axis of devices over which training normalises; None for each device by itself.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = _WIDTHS
    hidden: int = 4096
    dropout: float = 0.5
    dtype: Any = jnp.float32
    axis_name: str | None = None

    def setup(self) -> None:
        """Create the layers."""
        kinds = [(width, k == 0) for width, depth in zip(self.widths, self.depths, strict=True) for k in range(depth)]
        self.stem = Layer(self.widths[0], False, self.dtype, self.axis_name)
        self.blocks = [
            Layer(features, pools, self.dtype, self.axis_name, name=f"block_{k:02d}")
            for k, (features, pools) in enumerate(kinds[1:], 1)
        ]
        self.head = Head(self.num_classes, self.hidden, self.dropout, self.dtype)

    @property
    def min_image_size(self) -> int:
        """Smallest side that every max-pool still halves."""
        return 2 ** len(self.depths)

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours; timm's classifier is made of convolutions."""
        names: dict[str, str | TorchTensor] = {}
        index = 0
        parts = iter((self.part_names.stem, *self.part_names.blocks))
        for depth in self.depths:
            for _ in range(depth):
                part = next(parts)
                names[f"{part}/layer/conv"], names[f"{part}/layer/norm"] = f"features.{index}", f"features.{index + 1}"
                index += 3
            index += 1
        if dialect == "torchvision":
            return names | {"head/dense1": "classifier.0", "head/dense2": "classifier.3", "head/dense": "classifier.6"}
        shapes = {
            "dense1": (self.hidden, self.widths[-1], _POOLED, _POOLED),
            "dense2": (self.hidden, self.hidden, 1, 1),
        }
        for layer, (ours, shape) in enumerate(shapes.items(), 1):
            names[f"head/{ours}/kernel"] = TorchTensor(f"pre_logits.fc{layer}.weight", shape)
            names[f"head/{ours}/bias"] = f"pre_logits.fc{layer}.bias"
        return names | {"head/dense": "head.fc"}


NAMES = tuple(f"{name}_bn" for name in DEPTHS)


def create(name: str, **attributes: Any) -> VGG | None:
    """Return the net called `name`, as `vgg16_bn`; None if it is of another family."""
    depths = DEPTHS.get(name.removesuffix("_bn")) if name.endswith("_bn") else None
    return VGG(depths=depths, **attributes) if depths else None
