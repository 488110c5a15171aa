"""ViT S, B and L (Dosovitskiy et al. 2021; S of Touvron et al. 2021), as torchvision and timm define them.

The tokens stay a map [B, h, w, D], so that a downsampling point shrinks them like any other map; the class token stands
beside it. It has no BatchNorm, so nothing to re-estimate.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import layers
from sdpoint_jax.models.net import SDPointNet, TorchTensor

_EPSILON = 1e-6
_INIT = nn.initializers.truncated_normal(0.02)
State = tuple[jax.Array, jax.Array]  # The map of tokens [B, h, w, D] and the class token [B, 1, D].


class Row(NamedTuple):
    """One net.

    Attributes:
        patch: Side of a patch, in pixels.
        width: Channels of a token, D.
        depth: Blocks.
        heads: Heads of the attention.
    """

    patch: int
    width: int
    depth: int
    heads: int


_SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
TABLE = {
    **{f"vit_{size[0]}_{patch}": Row(patch, *shape) for size, shape in _SIZES.items() for patch in (16, 32)},
    **{f"vit_{size}_patch{p}_224": Row(p, *shape) for size, shape in _SIZES.items() for p in (16, 32)},
    "vit_tiny_patch16_224": Row(16, 192, 12, 3),
}


class Stem(nn.Module):
    """Patches to tokens, with position embeddings; and the class token.

    Attributes:
        row: The net.
        grid: Side of the map of tokens that the position embeddings are for; for others they are interpolated.
        dtype: Type of the computation.
    """

    row: Row
    grid: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> State:
        """Map images [B, H, W, C] to the first state."""
        row = self.row
        x = nn.Conv(row.width, (row.patch,) * 2, (row.patch,) * 2, "VALID", dtype=self.dtype, name="patches")(images)
        positions = self.param("positions", _INIT, (1, 1 + self.grid**2, row.width))
        token = self.param("class_token", nn.initializers.zeros, (1, 1, row.width))
        of_map = positions[:, 1:].reshape(1, self.grid, self.grid, row.width)
        if x.shape[1:3] != (self.grid, self.grid):
            of_map = jax.image.resize(of_map, (1, *x.shape[1:]), "bicubic")
        token = jnp.broadcast_to(token + positions[:, :1], (len(x), 1, row.width))
        return x + of_map.astype(x.dtype), token.astype(x.dtype)


class Block(nn.Module):
    """Self-attention over all tokens and two linear layers, each after LayerNorm and added to its input.

    Attributes:
        row: The net.
        dtype: Type of the computation.
    """

    row: Row
    dtype: Any

    @nn.compact
    def __call__(self, x: State, train: bool) -> State:
        """Map a state to a state of the same shapes."""
        tokens, (_, height, width, channels) = _join(x), x[0].shape
        y = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="norm1")(tokens)
        tokens = tokens + self._attend(y)
        y = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="norm2")(tokens)
        y = layers.gelu(nn.Dense(4 * channels, kernel_init=_INIT, dtype=self.dtype, name="dense1")(y))
        tokens = tokens + nn.Dense(channels, kernel_init=_INIT, dtype=self.dtype, name="dense2")(y)
        return tokens[:, 1:].reshape(-1, height, width, channels), tokens[:, :1]

    def _attend(self, x):
        batch, count, channels = x.shape
        heads = self.row.heads
        # One product for queries, keys and values, in PyTorch's order, so that its weights fit.
        qkv = nn.Dense(3 * channels, kernel_init=_INIT, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, count, 3, heads, channels // heads), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (channels // heads) ** -0.5
        weights = nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, count, channels)
        return nn.Dense(channels, kernel_init=_INIT, dtype=self.dtype, name="projection")(y)


def _join(x: State) -> jax.Array:
    tokens, class_token = x
    return jnp.concatenate([class_token, tokens.reshape(len(tokens), -1, tokens.shape[-1])], axis=1)


class Head(nn.Module):
    """LayerNorm and classifier of the class token."""

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: State, train: bool) -> jax.Array:
        """Map a state to logits [B, K]."""
        token = nn.LayerNorm(_EPSILON, dtype=self.dtype, name="norm")(x[1][:, 0])
        return nn.Dense(self.num_classes, kernel_init=_INIT, name="dense")(token.astype(jnp.float32))


class ViT(SDPointNet):
    """Vision transformer; a block is one encoder layer.

    Attributes:
        row: The net.
        image_size: Side of the images that the position embeddings are for, in pixels.
        patch: Side of a patch, in pixels; None for the row's.
        dtype: Type of the computation.
    """

    row: Row
    image_size: int = 224
    patch: int | None = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the layers."""
        self.stem = Stem(self.row._replace(patch=self._patch), self._grid, self.dtype)
        self.blocks = [Block(self.row, self.dtype, name=f"block_{k:02d}") for k in range(1, self.row.depth + 1)]
        self.head = Head(self.num_classes, self.dtype)

    def downsample(self, x: State, ratio: float) -> State:
        """Shrink the map of tokens, and leave the class token."""
        return super().downsample(x[0], ratio), x[1]

    @property
    def _grid(self):
        return self.image_size // self._patch

    @property
    def _patch(self):
        return self.row.patch if self.patch is None else self.patch

    @property
    def min_image_size(self) -> int:
        """Side of one patch."""
        return self._patch

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours."""
        timm = dialect == "timm"
        positions = (1, 1 + self._grid**2, self.row.width)
        names: dict[str, str | TorchTensor] = {
            "stem/patches": "patch_embed.proj" if timm else "conv_proj",
            "stem/class_token": TorchTensor("cls_token" if timm else "class_token", (1, 1, self.row.width)),
            "stem/positions": TorchTensor("pos_embed" if timm else "encoder.pos_embedding", positions),
            "head/norm": "norm" if timm else "encoder.ln",
            "head/dense": "head" if timm else "heads.head",
        }
        inner = {
            "norm1": "norm1",
            "projection": "attn.proj",
            "norm2": "norm2",
            "dense1": "mlp.fc1",
            "dense2": "mlp.fc2",
        }
        if not timm:
            inner = {"norm1": "ln_1", "projection": "self_attention.out_proj", "norm2": "ln_2", "dense1": "mlp.0"}
            inner["dense2"] = "mlp.3"
        for k, block in enumerate(self.part_names.blocks):
            place = f"blocks.{k}" if timm else f"encoder.layers.encoder_layer_{k}"
            names |= {f"{block}/{ours}": f"{place}.{theirs}" for ours, theirs in inner.items()}
            if timm:
                names[f"{block}/qkv"] = f"{place}.attn.qkv"
                continue
            names[f"{block}/qkv/kernel"] = f"{place}.self_attention.in_proj_weight"
            names[f"{block}/qkv/bias"] = f"{place}.self_attention.in_proj_bias"
        return names


NAMES = tuple(TABLE)


def create(name: str, **attributes: Any) -> ViT | None:
    """Return the net called `name`, as `vit_s_16` or `vit_small_patch16_224`; None if it is of another family."""
    return ViT(row=TABLE[name], **attributes) if name in TABLE else None
