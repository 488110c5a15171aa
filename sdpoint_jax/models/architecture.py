"""The shape of a residual net as data: its convolutions, its blocks, and the row of the table of nets. No JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

ShortcutKind = Literal["projection_norm", "projection", "padded_identity"]


class ConvolutionSpec(NamedTuple):
    """Shape of one convolution; see `convolution.convolution`."""

    features: int
    kernel: int
    stride: int = 1
    groups: int = 1


class ShortcutSpec(NamedTuple):
    """What a block's input goes through before the addition, where the block changes its shape.

    Attributes:
        kind: `projection_norm`, a 1x1 convolution and BatchNorm; `projection`, the convolution alone; or
            `padded_identity`, every `stride`-th pixel, with channels of zeros added before and after (He et al. 2016,
            option A), which has no parameters.
        convolution: of a projection; of an identity, the features and the stride that one would have.
    """

    kind: ShortcutKind
    convolution: ConvolutionSpec


class BlockSpec(NamedTuple):
    """Convolutions of one residual block, in order, and its shortcut where that is no plain identity."""

    convolutions: tuple[ConvolutionSpec, ...]
    shortcut: ShortcutSpec | None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the table of nets.

    Attributes:
        depths: residual blocks per stage; from the second on, a stage halves the resolution and doubles the width.
        inner: width inside the blocks of the first stage.
        features: width of their output.
        bottleneck: 1x1, 3x3, 1x1 convolutions instead of 3x3, 3x3; the stride sits on the (first) 3x3.
        preactivation: BatchNorm and ReLU before each convolution (He et al. 2016) instead of after it.
        stem: width of the stem.
        imagenet_stem: 7x7/2 convolution, BatchNorm, ReLU and 3x3/2 max-pool, instead of a 3x3 convolution.
        groups: of the 3x3 convolution of a bottleneck.
        shortcut: where a block changes the shape of its input; see `ShortcutSpec`.
    """

    depths: tuple[int, ...]
    inner: int
    features: int
    bottleneck: bool = False
    preactivation: bool = False
    stem: int = 64
    imagenet_stem: bool = True
    groups: int = 1
    shortcut: ShortcutKind = "projection_norm"

    @property
    def num_blocks(self) -> int:
        """Counts the residual blocks, N, and so the points after them."""
        return sum(self.depths)

    @property
    def stem_convolution(self) -> ConvolutionSpec:
        """Returns the convolution of the stem."""
        return ConvolutionSpec(self.stem, 7, 2) if self.imagenet_stem else ConvolutionSpec(self.stem, 3)

    @property
    def stem_has_norm(self) -> bool:
        """Tells whether BatchNorm follows the stem's convolution; else the first block, pre-activation, has it."""
        return self.imagenet_stem or not self.preactivation

    @property
    def min_image_size(self) -> int:
        """Returns the smallest image side that every stride still halves."""
        return 2 ** (len(self.depths) - 1) * (4 if self.imagenet_stem else 1)

    def blocks(self) -> Iterator[BlockSpec]:
        """Lists the blocks from the input to the output."""
        features_in = self.stem
        for stage, depth in enumerate(self.depths):
            inner, features = self.inner * 2**stage, self.features * 2**stage
            for stride in [2 if stage else 1] + [1] * (depth - 1):
                reshapes = stride != 1 or features_in != features
                yield BlockSpec(
                    self._bottleneck(inner, features, stride) if self.bottleneck else self._basic(features, stride),
                    ShortcutSpec(self.shortcut, ConvolutionSpec(features, 1, stride)) if reshapes else None,
                )
                features_in = features

    def _basic(self, features, stride):
        return ConvolutionSpec(features, 3, stride), ConvolutionSpec(features, 3)

    def _bottleneck(self, inner, features, stride):
        middle = ConvolutionSpec(inner, 3, stride, self.groups)
        return ConvolutionSpec(inner, 1), middle, ConvolutionSpec(features, 1)
