"""The nets by name: `create_model("preresnet101", num_classes=1000)`."""

import re
from typing import Any

import jax.numpy as jnp

from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.resnet import ResNet

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


def _resnext(depth):
    return Architecture(_IMAGENET_DEPTHS[depth], 128, 256, bottleneck=True, groups=32)


def _small(depth, *, bottleneck=False, preactivation):
    blocks = (depth - 2) // (9 if bottleneck else 6)
    return Architecture((blocks,) * 3, 16, 64 if bottleneck else 16, bottleneck, preactivation, 16, imagenet_stem=False)


def _wide(depth, width):
    return Architecture(
        ((depth - 4) // 6,) * 3, 16 * width, 16 * width, preactivation=True, stem=16, imagenet_stem=False
    )


ARCHITECTURES = {
    **{f"resnet{depth}": _imagenet(depth) for depth in (18, 34, 50, 101, 152)},
    **{f"preresnet{depth}": _imagenet(depth, preactivation=True) for depth in (18, 34, 50, 101, 152, 200)},
    **{f"resnext{depth}": _resnext(depth) for depth in (50, 101, 152)},
    **{f"resnet{depth}": _small(depth, preactivation=False) for depth in (20, 56, 110)},
    **{f"preresnet{depth}": _small(depth, preactivation=True) for depth in (20, 56, 110)},
    "preresnet164": _small(164, bottleneck=True, preactivation=True),
    "resnext29_8x64d": Architecture((3, 3, 3), 512, 256, True, imagenet_stem=False, groups=8),
    "wrn28_10": _wide(28, 10),
}
# torchvision's names of the same nets.
ARCHITECTURES |= {f"resnext{depth}_32x4d": ARCHITECTURES[f"resnext{depth}"] for depth in (50, 101, 152)}

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def architecture(name: str) -> Architecture:
    """Returns the row of the table called `name`; WRNs of any depth 6n + 4 and width are `wrn{depth}_{width}`.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    wide = re.fullmatch(r"wrn([0-9]+)_([0-9]+)", name)
    if wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) >= 1:
        return _wide(int(wide[1]), int(wide[2]))
    raise ValueError(
        f"model {name!r}: known are {', '.join(ARCHITECTURES)} and wrn{{depth}}_{{width}} of depth 6n + 4 >= 10"
    )


def create_model(name: str, num_classes: int, *, dtype: Any = jnp.float32, **kwargs) -> ResNet:
    """Makes the net called `name`.

    Args:
        name: a key of `ARCHITECTURES`, or `wrn{depth}_{width}`.
        num_classes: K, at least 1.
        dtype: of the computation, float32 or bfloat16 (also as a string); parameters and statistics are float32.
        **kwargs: attributes of `ResNet`.

    Raises:
        ValueError: unknown name, number of classes or dtype.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes}: at least 1")
    if str(dtype) not in _DTYPES and dtype not in _DTYPES.values():
        raise ValueError(f"dtype {dtype!r}: valid are {', '.join(_DTYPES)}")
    return ResNet(architecture(name), num_classes, dtype=_DTYPES.get(str(dtype), dtype), **kwargs)
