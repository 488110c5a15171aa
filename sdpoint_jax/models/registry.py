"""The nets by name: `create_model("preresnet101", num_classes=1000)`."""

import dataclasses
import re
from typing import Any, get_args

import jax.numpy as jnp

from sdpoint_jax.models.architecture import Architecture, ShortcutKind
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

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def architecture(name: str) -> Architecture:
    """Returns the row of the table called `name`.

    Args:
        name: a key of `ARCHITECTURES`; or `wrn{depth}_{width}`, a WRN of any depth 6n + 4 and width; or
            `resnet{depth}_w{width}`, a ResNet for small images of any depth 6n + 2 with `width` channels in its first
            stage instead of 16. With the ending `_` and a kind of shortcut, as in `resnet20_projection_norm`, it is
            the same net with that shortcut. What follows a dot is timm's name for the weights, as in
            `resnet50.a1_in1k`, and means nothing here.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    known = name.partition(".")[0]
    kind = next((kind for kind in get_args(ShortcutKind) if known.endswith(f"_{kind}")), None)
    known = known.removesuffix(f"_{kind}")
    wide = re.fullmatch(r"wrn([0-9]+)_([0-9]+)", known)
    narrow = re.fullmatch(r"resnet([0-9]+)_w([0-9]+)", known)
    if known in ARCHITECTURES:
        found = ARCHITECTURES[known]
    elif wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4 and int(wide[2]) >= 1:
        found = _wide(int(wide[1]), int(wide[2]))
    elif narrow and int(narrow[1]) >= 8 and int(narrow[1]) % 6 == 2 and int(narrow[2]) >= 1:
        found = _resnet(int(narrow[1]), int(narrow[2]))
    else:
        raise ValueError(
            f"model {name!r}: known are {', '.join(ARCHITECTURES)}, wrn{{depth}}_{{width}} of depth 6n + 4 >= 10 and "
            f"resnet{{depth}}_w{{width}} of depth 6n + 2 >= 8; with another shortcut after an underscore, "
            f"{' or '.join(get_args(ShortcutKind))}"
        )
    return dataclasses.replace(found, shortcut=kind) if kind else found


def create_model(name: str, num_classes: int, *, dtype: Any = jnp.float32, **kwargs: Any) -> ResNet:
    """Makes the net called `name`.

    Args:
        name: see `architecture`.
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
    return ResNet(
        architecture=architecture(name), num_classes=num_classes, dtype=_DTYPES.get(str(dtype), dtype), **kwargs
    )
