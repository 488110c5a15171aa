"""The operations of TrivialAugment and RandAugment, with the pixels of torchvision's on PIL images.

Each takes (image uint8 [H, W, C] of 1 or 3 channels, magnitude) and returns an image of that form. Magnitudes are those
of torchvision's `autoaugment`: a geometric operation takes the nearest pixel and fills with black, an enhancing one
blends by 1 + magnitude.

Where an operation maps each grey level to another one, whatever the place, PIL makes a table of the 256 levels, once
for each magnitude, and the table is looked up: several times faster than PIL on a small image.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVELS = bytes(range(256))


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _with_pil(image: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.asarray(change(_to_pil(image))).reshape(image.shape)


def _look_up(image: np.ndarray, table: bytes) -> np.ndarray:
    """Replaces each grey level by its entry in `table`; `image` may have any shape."""
    return np.frombuffer(image.tobytes().translate(table), np.uint8).reshape(image.shape)


def _look_up_by_channel(image: np.ndarray, make_table: Callable[[np.ndarray], bytes]) -> np.ndarray:
    """Looks up each channel in a table that is made from its own levels, uint8 [H * W]."""
    changed = np.empty_like(image)
    for channel, levels in enumerate(image.reshape(-1, image.shape[-1]).T.copy()):
        changed[..., channel] = _look_up(levels, make_table(levels)).reshape(image.shape[:2])
    return changed


def _table(change: Callable[[Image.Image], Image.Image], levels: bytes = LEVELS) -> bytes:
    """Returns what PIL makes of the 256 grey levels."""
    return change(Image.frombytes("L", (256, 1), levels)).tobytes()


def keep(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Returns the image as it is; has no magnitude."""
    del magnitude
    return image


# Geometric operations.


def _affine(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Takes the pixel at (x, y) from (a x + b y + c, d x + e y + f), with `matrix` (a, b, c, d, e, f)."""
    size = image.shape[1::-1]
    return _with_pil(image, lambda pil: pil.transform(size, Image.Transform.AFFINE, matrix, fillcolor=0))


def shear_x(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Shears along the rows, about the upper left corner, by `magnitude` pixels a row."""
    return _affine(image, (1, magnitude, 0, 0, 1, 0))


def shear_y(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Shears along the columns, about the upper left corner, by `magnitude` pixels a column."""
    return _affine(image, (1, 0, 0, magnitude, 1, 0))


def translate_x(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Moves the image to the right by the whole pixels in `magnitude`."""
    return _affine(image, (1, 0, -int(magnitude), 0, 1, 0))


def translate_y(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Moves the image down by the whole pixels in `magnitude`."""
    return _affine(image, (1, 0, 0, 0, 1, -int(magnitude)))


def rotate(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Rotates the image counterclockwise, about its centre, by `magnitude` degrees."""
    return _with_pil(image, lambda pil: pil.rotate(magnitude, fillcolor=0))


# Operations on colours and sharpness.


def adjust_color(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Moves the colours away from grey by `magnitude`, or towards it where that is negative."""
    return _with_pil(image, lambda pil: ImageEnhance.Color(pil).enhance(1.0 + magnitude))


def adjust_sharpness(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Sharpens the image by `magnitude`, or smooths it where that is negative."""
    return _with_pil(image, lambda pil: ImageEnhance.Sharpness(pil).enhance(1.0 + magnitude))


def adjust_brightness(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Moves the image away from black by `magnitude`, or towards it where that is negative."""
    return _look_up(image, _blend_table(0, 1.0 + magnitude))


def adjust_contrast(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Moves the image away from its mean grey level by `magnitude`, or towards it where that is negative."""
    grey = image if image.shape[-1] == 1 else np.asarray(_to_pil(image).convert("L"))
    mean = int(int(grey.sum()) / grey.size + 0.5)
    return _look_up(image, _blend_table(mean, 1.0 + magnitude))


@functools.lru_cache(maxsize=2**14)
def _blend_table(level: int, factor: float) -> bytes:
    return _table(lambda levels: Image.blend(Image.new("L", levels.size, level), levels, factor))


def posterize(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Keeps the first `magnitude` bits of each value."""
    return _look_up(image, _posterize_table(int(magnitude)))


@functools.cache
def _posterize_table(bits: int) -> bytes:
    return _table(lambda levels: ImageOps.posterize(levels, bits))


def solarize(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Inverts the values that are not less than `magnitude`."""
    return _look_up(image, _solarize_table(magnitude))


@functools.cache
def _solarize_table(threshold: float) -> bytes:
    return _table(lambda levels: ImageOps.solarize(levels, threshold))  # type: ignore[arg-type]  # A float will do.


def autocontrast(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Stretches the values of each channel to 0..255; has no magnitude."""
    del magnitude
    return _look_up_by_channel(image, lambda levels: _stretch_table(int(levels.min()), int(levels.max())))


@functools.lru_cache(maxsize=2**14)
def _stretch_table(low: int, high: int) -> bytes:
    return _table(ImageOps.autocontrast, bytes(min(max(level, low), high) for level in LEVELS))


def equalize(image: np.ndarray, magnitude: float) -> np.ndarray:
    """Makes the values of each channel about equally frequent; has no magnitude."""
    del magnitude
    return _look_up_by_channel(image, _equalize_table)


def _equalize_table(levels: np.ndarray) -> bytes:
    """Returns the table that PIL's `ImageOps.equalize` makes, in the same integers."""
    histogram = np.bincount(levels, minlength=256)
    below = np.cumsum(histogram) - histogram
    step = int(below[levels.max()]) // 255
    if not step:
        return LEVELS
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8).tobytes()
