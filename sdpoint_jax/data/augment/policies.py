"""Augmentation by randomly chosen operations: TrivialAugment and RandAugment, as torchvision defines them."""

import functools
from collections.abc import Callable

import numpy as np

from sdpoint_jax.data.augment import operations
from sdpoint_jax.data.augment.base import Augmentation, Size

BINS = 31  # How many magnitudes an operation has.
Choice = tuple[Callable[[np.ndarray, float], np.ndarray], tuple[float, ...], bool]


def magnitudes(first: float, last: float) -> tuple[float, ...]:
    """Returns BINS evenly spaced magnitudes, to the bit those of `torch.linspace` on a CPU with fused multiply-add.

    Bits matter: TranslateX by 15.999999 moves an image by 15 pixels.
    """
    start, stop = np.float32(first), np.float32(last)
    step = np.float64((stop - start) / np.float32(BINS - 1))
    bins = np.arange(BINS)
    spaced = np.where(bins < BINS // 2, start + step * bins, stop - step * (BINS - 1 - bins))
    return tuple(spaced.astype(np.float32).tolist())


def _choices(
    shear: float, translate: tuple[float, float], rotate: float, enhance: float, bits: int
) -> tuple[Choice, ...]:
    """Returns what a policy chooses from: (operation, its magnitudes, whether their sign is random).

    Args:
        shear: largest magnitude of a shear.
        translate: largest vertical and horizontal shift, in pixels.
        rotate: largest rotation in degrees.
        enhance: largest magnitude of brightness, colour, contrast and sharpness.
        bits: how many bits posterizing drops at most.
    """
    none = (0.0,) * BINS
    enhancing = magnitudes(0.0, enhance)
    kept_bits = 8 - (np.arange(BINS) / ((BINS - 1) / bits)).round()
    return (
        (operations.keep, none, False),
        (operations.shear_x, magnitudes(0.0, shear), True),
        (operations.shear_y, magnitudes(0.0, shear), True),
        (operations.translate_x, magnitudes(0.0, translate[1]), True),
        (operations.translate_y, magnitudes(0.0, translate[0]), True),
        (operations.rotate, magnitudes(0.0, rotate), True),
        (operations.adjust_brightness, enhancing, True),
        (operations.adjust_color, enhancing, True),
        (operations.adjust_contrast, enhancing, True),
        (operations.adjust_sharpness, enhancing, True),
        (operations.posterize, tuple(kept_bits.tolist()), False),
        (operations.solarize, magnitudes(255.0, 0.0), False),
        (operations.autocontrast, none, False),
        (operations.equalize, none, False),
    )


def _operate(image: np.ndarray, choice: Choice, magnitude_bin: int, sign: float) -> np.ndarray:
    """Applies a choice; where the magnitude's sign is random, it is negative for `sign` under a half."""
    operation, magnitudes, signed = choice
    magnitude = magnitudes[magnitude_bin]
    return operation(image, -magnitude if signed and sign < 0.5 else magnitude)


# TrivialAugment.

TRIVIAL_CHOICES = _choices(shear=0.99, translate=(32, 32), rotate=135.0, enhance=0.99, bits=6)


def trivial_augment() -> Augmentation:
    """Returns torchvision's `TrivialAugmentWide`: one operation, of a magnitude that is random as well."""
    return Augmentation(3, _apply_trivial)


def _apply_trivial(image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
    del size
    choice, magnitude, sign = row.tolist()
    return _operate(image, TRIVIAL_CHOICES[int(choice * len(TRIVIAL_CHOICES))], int(magnitude * BINS), sign)


# RandAugment.


@functools.cache
def rand_choices(size: Size) -> tuple[Choice, ...]:
    """Returns what RandAugment chooses from, for images of that size."""
    translate = 150.0 / 331.0 * size[0], 150.0 / 331.0 * size[1]
    return _choices(shear=0.3, translate=translate, rotate=30.0, enhance=0.9, bits=4)


def rand_augment(num_ops: int = 2, magnitude: int = 9) -> Augmentation:
    """Returns torchvision's `RandAugment`: some operations, one after the other, all of one magnitude.

    Args:
        num_ops: how many operations.
        magnitude: which of the BINS magnitudes, from 0, the weakest.

    Raises:
        ValueError: no operation, or a magnitude that there is not.
    """
    if num_ops < 1:
        raise ValueError(f"num_ops {num_ops}: at least 1")
    if not 0 <= magnitude < BINS:
        raise ValueError(f"magnitude {magnitude}: valid are 0 to {BINS - 1}")
    return Augmentation(2 * num_ops, functools.partial(_apply_rand, magnitude))


def _apply_rand(magnitude: int, image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
    choices = rand_choices(size)
    for choice, sign in row.reshape(-1, 2).tolist():
        image = _operate(image, choices[int(choice * len(choices))], magnitude, sign)
    return image
