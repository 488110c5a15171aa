"""Bringing images to one size: evaluation's central part, and the random crops of training; uint8 in, uint8 out."""

import functools
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sdpoint_jax.data.augment.base import Augmentation, Size
from sdpoint_jax.data.opencv import opencv

# Evaluation.


def resize_and_center_crop(image: np.ndarray, resize_to: Size, size: Size) -> np.ndarray:
    """Preprocesses an image for evaluation, as torchvision's `Resize` and `CenterCrop` do on a PIL image.

    The image is resized, its aspect kept, until it just covers `resize_to`; of that the central `size` is kept. Where
    `resize_to` is square, that is a resize of the shorter side. Both steps are done as one, which saves resizing what
    is then cropped away and gives the same pixels.

    Args:
        image: uint8 [h, w, C].
        resize_to: (height, width), at least `size`.
        size: of the result.

    Returns:
        uint8 [*size, C]; a view of `image` where nothing has to be resized.
    """
    height, width = image.shape[:2]
    if resize_to[0] * width >= resize_to[1] * height:
        full = resize_to[0], max(resize_to[1], int(resize_to[0] * width / height))
    else:
        full = max(resize_to[0], int(resize_to[1] * height / width)), resize_to[1]
    top, left = round((full[0] - size[0]) / 2), round((full[1] - size[1]) / 2)
    if full == (height, width):
        return image[top : top + size[0], left : left + size[1]]
    y, x = height / full[0], width / full[1]
    right, bottom = min((left + size[1]) * x, width), min((top + size[0]) * y, height)
    return resize(image, size, (left * x, top * y, right, bottom))


def resize(image: np.ndarray, size: Size, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Resizes as PIL does, bilinear and antialiased where it shrinks: uint8 [h, w, C] -> [*size, C].

    Args:
        image: uint8 [h, w, C].
        size: of the result.
        box: (left, top, right, bottom), the part of the image to show; by default all of it.
    """
    plane = image[..., 0] if image.shape[-1] == 1 else image
    resized = Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(*size, image.shape[-1])


# Training.


def quick_resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes as `resize` does, to about one grey level on average, and faster where OpenCV is installed.

    The image is smoothed as much as PIL would, then interpolated without antialiasing.
    """
    cv2 = opencv()
    if cv2 is None:
        return resize(image, size)
    height, width = image.shape[:2]
    if height > size[0] or width > size[1]:
        across, down = _smoothing(width / size[1]), _smoothing(height / size[0])
        image = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return resized.reshape(*size, -1)


def _smoothing(scale: float) -> np.ndarray:
    """Returns PIL's antialiasing kernel for shrinking `scale` times: a triangle at whole pixels, float32, of sum 1."""
    reach = max(math.ceil(scale) - 1, 0)
    kernel = 1 - np.abs(np.arange(-reach, reach + 1, dtype=np.float32)) / max(scale, 1)
    return kernel / kernel.sum()


def fit(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes the largest central part that has the aspect of `size`: uint8 [h, w, C] -> [*size, C]."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    top, left = (height - h) // 2, (width - w) // 2
    return quick_resize(image[top : top + h, left : left + w], size)


def pad_and_crop(image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
    """Fits the image to `size`, pads each side with black by an eighth, and crops `size` anywhere.

    An eighth is the 4 pixels of CIFAR's 32, and 1 pixel of the digits' 8.

    Args:
        image: uint8 [h, w, C].
        row: uniform numbers [2]: the vertical and the horizontal place.
        size: of the result.
    """
    image = fit(image, size)
    top, bottom, from_top, from_bottom = _shift(row[0], size[0])
    left, right, from_left, from_right = _shift(row[1], size[1])
    shifted = np.zeros_like(image)
    shifted[top:bottom, left:right] = image[from_top:from_bottom, from_left:from_right]
    return shifted


def _shift(number: float, side: int) -> tuple[int, int, int, int]:
    """Returns start and end in the shifted side, start and end in the original one, for a uniform number in [0, 1)."""
    pad = side // 8
    offset = int(number * (2 * pad + 1)) - pad
    if offset < 0:
        return -offset, side, 0, side + offset
    return 0, side - offset, offset, side


def flip(image: np.ndarray, number: float) -> np.ndarray:
    """Mirrors the image left to right where `number` is under a half."""
    if number >= 0.5:
        return image
    cv2 = opencv()
    return image[:, ::-1] if cv2 is None else cv2.flip(image, 1).reshape(image.shape)


CROP_TRIES = 10
CROP_AREA = 0.08, 1.0
CROP_ASPECT = 3 / 4, 4 / 3


def tried_sides(
    area: int, row: np.ndarray, shares: tuple[float, float], aspects: tuple[float, float]
) -> Iterator[tuple[int, int, float, float]]:
    """Yields rectangles to try, as (side, other side, number, other number), the numbers as they were drawn.

    Args:
        area: of the image, in pixels.
        row: uniform numbers [4 * tries]: share of the area, aspect, and two more, for each try.
        shares: range of the share, which is uniform in it.
        aspects: range of side / other side, which is uniform in the logarithm.
    """
    low, high = math.log(aspects[0]), math.log(aspects[1])
    for share, aspect, number, other in row.reshape(-1, 4).tolist():
        pixels = area * (shares[0] + (shares[1] - shares[0]) * share)
        aspect = math.exp(low + (high - low) * aspect)
        yield round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect)), number, other


def random_crop_box(image_size: Size, row: np.ndarray) -> tuple[int, int, int, int]:
    """Returns (top, left, height, width) of a random-resized crop, with torchvision's distribution.

    A share of the area uniform in CROP_AREA and a width/height uniform in the logarithm over CROP_ASPECT, at a uniform
    place; tried CROP_TRIES times, then the largest central crop of an allowed aspect.

    Args:
        image_size: of the whole image.
        row: uniform numbers [4 * CROP_TRIES]: area, aspect, top and left of each try.
    """
    height, width = image_size
    for w, h, top, left in tried_sides(height * width, row, CROP_AREA, CROP_ASPECT):
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    aspect = min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
    """Resizes a random part of the image (see `random_crop_box`): uint8 [h, w, C] -> [*size, C]."""
    top, left, height, width = random_crop_box(image.shape[:2], row)
    return quick_resize(image[top : top + height, left : left + width], size)


def with_flip(crop: Augmentation) -> Augmentation:
    """Returns the augmentation that mirrors every other image, at random, after `crop`."""
    return Augmentation(crop.numbers + 1, functools.partial(_crop_and_flip, crop))


def _crop_and_flip(crop: Augmentation, image: np.ndarray, row: np.ndarray, size: Size) -> np.ndarray:
    return flip(crop.apply(image, row[:-1], size), row[-1])
