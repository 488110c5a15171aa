"""Random erasing, as torchvision defines it, on uint8 images."""

import functools

import numpy as np

from sdpoint_jax.data.augment.base import Augmentation, Size
from sdpoint_jax.data.augment.crop import tried_sides

ERASE_TRIES = 10
ERASE_AREA = 0.02, 0.33
ERASE_ASPECT = 0.3, 3.3
VALUES = ("zero", "random")


def random_erasing(p: float = 0.5, value: str = "zero") -> Augmentation:
    """Returns torchvision's `RandomErasing`: overwrites a random rectangle of the image.

    Args:
        p: probability that an image is changed.
        value: what a rectangle is filled with: "zero", black; or "random", uniform noise in 0..255 (where torchvision
            draws normal numbers, for images that are normalised already).

    Raises:
        ValueError: a `p` that is no probability, or an unknown `value`.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p {p}: a probability from 0 to 1")
    if value not in VALUES:
        raise ValueError(f"value {value!r}: valid are {', '.join(VALUES)}")
    return Augmentation(2 + 4 * ERASE_TRIES, functools.partial(_apply, p, value))


def erased_box(image_size: Size, row: np.ndarray) -> tuple[int, int, int, int] | None:
    """Returns (top, left, height, width) of the rectangle to erase, with torchvision's distribution.

    A share of the area uniform in ERASE_AREA and a height/width uniform in the logarithm over ERASE_ASPECT, at a
    uniform place; tried ERASE_TRIES times, then there is none.

    Args:
        image_size: of the image.
        row: uniform numbers [4 * ERASE_TRIES]: area, aspect, top and left of each try.
    """
    height, width = image_size
    for h, w, top, left in tried_sides(height * width, row, ERASE_AREA, ERASE_ASPECT):
        if h < height and w < width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None


def _apply(p: float, value: str, image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
    del size
    if row[0] >= p or (box := erased_box(image.shape[:2], row[2:])) is None:
        return image
    top, left, height, width = box
    erased = image.copy()
    erased[top : top + height, left : left + width] = 0 if value == "zero" else _noise(row[1], erased, height, width)
    return erased


def _noise(number: float, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns uniform noise that depends on `number` in [0, 1) alone, however many pixels it is for."""
    rng = np.random.Generator(np.random.Philox(key=int(number * 2**53)))
    return rng.integers(0, 256, (height, width, image.shape[-1]), np.uint8)
