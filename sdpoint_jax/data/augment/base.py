"""What an augmentation is: the random numbers that it takes, and what it does to an image with them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np

Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random change of training images.

    Attributes:
        numbers: how many uniform random numbers in [0, 1) an image takes.
        apply: (image uint8 [h, w, C], row float64 [numbers], size) -> uint8 [*size, C]. It leaves its argument as it
            is, and may return it. An augmentation that does not bring images to `size` is given images that have it.
    """

    numbers: int
    apply: Callable[[np.ndarray, np.ndarray, Size], np.ndarray]

    def draw(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draws the random numbers of a batch: float64 [batch_size, numbers]."""
        return rng.random((batch_size, self.numbers))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several augmentations, one after the other; as one.

    Attributes:
        parts: in their order; the first one brings any image to the wanted size.
    """

    parts: tuple[Augmentation, ...]

    @functools.cached_property
    def numbers(self) -> int:
        """Counts the uniform random numbers that an image takes."""
        return sum(part.numbers for part in self.parts)

    def draw(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Draws the random numbers of a batch: float64 [batch_size, numbers].

        Each part draws after those before it: a further part at the end leaves the numbers of the others as they are.
        """
        return np.concatenate([part.draw(rng, batch_size) for part in self.parts], axis=1)

    def apply(self, image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
        """Applies the parts to one image; see `Augmentation`."""
        for part, own in self._own_numbers:
            image = part.apply(image, row[own], size)
        return image

    @functools.cached_property
    def _own_numbers(self):
        ends = list(itertools.accumulate(part.numbers for part in self.parts))
        return [(part, slice(end - part.numbers, end)) for part, end in zip(self.parts, ends, strict=True)]
