"""Small networks with what the families that people use have, and ResNets have not; all are the class `Family`."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models.net import SDPointNet


def norm(train, **kwargs):
    return nn.BatchNorm(use_running_average=not train, **kwargs)


def classify(module, x, train):
    return nn.Dense(5)(x.mean((1, 2)) if x.ndim == 4 else x)


def vgg_stem(module, x, train):
    x = nn.relu(norm(train, epsilon=1e-3, name="renamed")(nn.Conv(8, (3, 3))(x)))
    return nn.max_pool(x, (2, 2), (2, 2))


def vgg_block(module, x, train):
    x = nn.relu(norm(train)(nn.Conv(8, (3, 3), padding="VALID")(x)))
    return nn.max_pool(x, (3, 3), (2, 2), padding="SAME")


def vgg_head(module, x, train):
    x = nn.relu(norm(train)(nn.Dense(8)(x.reshape(x.shape[0], -1, 8).max(1))))
    return nn.Dense(5)(nn.Dropout(0.5, deterministic=not train)(x))


def dense_layer(module, x, train):
    y = nn.Conv(4, (1, 1), use_bias=False)(nn.relu(norm(train)(x)))
    y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(norm(train)(y)))
    return jnp.concatenate([x, y], axis=-1)


def transition(module, x, train):
    x = dense_layer(module, nn.avg_pool(x, (2, 2), (2, 2)), train)
    return nn.avg_pool(x, (3, 3), (2, 2), padding="SAME", count_include_pad=False)


def hard_stem(module, x, train):
    return nn.hard_swish(norm(train)(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))


def inverted(act, gate):
    """An inverted residual block with squeeze-excitation by 1x1 convolutions."""

    def block(module, x, train):
        y = act(norm(train)(nn.Conv(16, (1, 1), use_bias=False)(x)))
        y = act(norm(train)(nn.Conv(16, (5, 5), use_bias=False, feature_group_count=16)(y)))
        squeezed = nn.relu(nn.Conv(4, (1, 1))(y.mean((1, 2), keepdims=True)))
        y = y * gate(nn.Conv(16, (1, 1))(squeezed))
        return x + norm(train)(nn.Conv(8, (1, 1), use_bias=False)(y))

    return block


def dense_gate(module, x, train):
    """Squeeze-excitation by dense layers, on a block of groups."""
    y = nn.silu(norm(train)(nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False)(x)))
    gate = nn.sigmoid(nn.Dense(8)(nn.silu(nn.Dense(2)(y.mean((1, 2))))))
    return x + y * gate[:, None, None, :]


def patches(module, x, train):
    return nn.LayerNorm(epsilon=1e-6)(nn.Conv(8, (2, 2), (2, 2), padding="VALID")(x))


def convnext_block(approximate):
    def block(module, x, train):
        y = nn.LayerNorm(epsilon=1e-6)(nn.Conv(8, (7, 7), feature_group_count=8)(x))
        y = nn.Dense(8)(nn.gelu(nn.Dense(16)(y), approximate=approximate))
        return x + y * module.param("layer_scale", nn.initializers.ones, (8,))

    return block


def convnext_head(module, x, train):
    x = nn.Conv(8, (2, 2), (2, 2), padding="VALID")(nn.LayerNorm(use_bias=False, use_fast_variance=False)(x))
    return nn.Dense(5)(nn.LayerNorm()(x.mean((1, 2))))


def embed(module, x, train):
    embedding = module.param("position", nn.initializers.normal(1), (1, 4, 6, 8))
    return x + jax.image.resize(embedding, (1, *x.shape[1:]), "bicubic")


def encoder(module, x, train):
    """A transformer's block on a map, with a token of its own."""
    batch, height, width, features = x.shape
    token = module.param("token", nn.initializers.normal(1), (1, 1, features))
    tokens = x.reshape(batch, height * width, features)
    tokens = jnp.concatenate([jnp.tile(token, (batch, 1, 1)), tokens], axis=1)
    y = nn.LayerNorm()(tokens)
    tokens = tokens + nn.MultiHeadDotProductAttention(2)(y, y)
    tokens = tokens + nn.Dense(features)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(tokens))))
    return tokens[:, 1:].reshape(x.shape) + tokens[:, :1, None]


def grouped_stem(module, x, train):
    x = nn.swish(nn.GroupNorm(num_groups=2)(nn.Conv(8, (3, 3))(x)))
    kernel = module.param("standardised", nn.initializers.normal(1), (3, 3, 8, 8))
    kernel = (kernel - kernel.mean((0, 1, 2))) / jnp.sqrt(kernel.var((0, 1, 2)) + 1e-5)
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=numbers)
    return nn.PReLU()(nn.InstanceNorm()(x / math.sqrt(72)))


def odd_block(module, x, train):
    x = x[:, ::2, ::-2, :4] + nn.tanh(x[:, ::2, ::-2, 4:]) + 1
    x = nn.RMSNorm()(jnp.pad(x, ((0, 0), (1, 0), (0, 2), (2, 2)), constant_values=0.5))
    return jnp.where(x > 0, nn.softplus(x), nn.elu(x)) + nn.leaky_relu(x) ** 3 / 9


def odd_head(module, x, train):
    x = nn.log_softmax(x.max((1, 2))) + x.std((1, 2)) + jnp.linalg.norm(x, axis=(1, 2))
    return nn.Dense(5)(x)


KINDS = {
    "vgg": (vgg_stem, [vgg_block], vgg_head),
    "densenet": (grouped_stem, [dense_layer, transition], classify),
    "mobilenet": (hard_stem, [inverted(nn.relu6, nn.hard_sigmoid), inverted(nn.hard_swish, nn.hard_sigmoid)], classify),
    "efficientnet": (hard_stem, [inverted(nn.silu, nn.sigmoid), dense_gate], classify),
    "convnext": (patches, [convnext_block(False), convnext_block(True)], convnext_head),
    "vit": (patches, [embed, embed, encoder], classify),
    "others": (grouped_stem, [odd_block], odd_head),
}


class Part(nn.Module):
    """Part of a network, by the name of the family and its number."""

    kind: str
    index: int

    @nn.compact
    def __call__(self, x, train):
        stem, blocks, head = KINDS[self.kind]
        with jax.numpy_rank_promotion("allow"):  # As users' networks do.
            return (stem, *blocks, head)[self.index](self, x, train)


class Family(SDPointNet):
    kind: str = "vgg"

    def setup(self):
        _, blocks, _ = KINDS[self.kind]
        self.stem = Part(self.kind, 0)
        self.blocks = [Part(self.kind, k + 1) for k in range(len(blocks))]
        self.head = Part(self.kind, len(blocks) + 1)
