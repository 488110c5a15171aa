"""What a predictor takes as images, made into one batch as in evaluation."""

import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from sdpoint_jax.data.augment.crop import resize_and_center_crop
from sdpoint_jax.data.decode import BadImageError, decode, from_pil

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray
Shape = tuple[int, int, int]


def to_batch(images: Any, image_shape: Shape, resize: tuple[int, int] | None) -> np.ndarray:
    """Makes a batch of uint8 images.

    Args:
        images: an array [B, H, W, C] of `image_shape`: uint8, or floats in 0..1, which are rounded to 8 bits as the
            training images were (the net normalises by itself); or one image, or several in a list: each a path, the
            bytes of an image file, a PIL image, or a uint8 array [h, w, C] of any size. These are resized and cropped
            as in evaluation.
        image_shape: (H, W, C) that the net takes.
        resize: (height, width) that such an image just covers before its centre is cut out; None for (H, W).

    Returns:
        uint8 [B, H, W, C].

    Raises:
        ValueError: an array of another shape, type or range.
        BadImageError: a file that is no image; names the path, or the place in the list.
        OSError: a file that cannot be opened.
    """
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        images = [images]
    if isinstance(images, list | tuple):
        batch = [_read(image, index, image_shape, resize or image_shape[:2]) for index, image in enumerate(images)]
        return np.stack(batch) if batch else np.zeros((0, *image_shape), np.uint8)
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[1:] != image_shape or array.dtype.kind not in "uf":
        raise _unfit(array, image_shape)
    return _to_uint8(array, image_shape)


def _read(image: Any, index: int, image_shape: Shape, resize: tuple[int, int]) -> np.ndarray:
    channels = image_shape[-1]
    place = os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index}"
    try:
        if isinstance(image, str | os.PathLike):
            pixels = decode(pathlib.Path(image).read_bytes(), channels)
        elif isinstance(image, bytes | bytearray | memoryview):
            pixels = decode(bytes(image), channels)
        elif isinstance(image, Image.Image):
            pixels = from_pil(image, channels)
        else:
            pixels = _check_single(np.asarray(image), index, image_shape)
    except BadImageError as error:
        raise BadImageError(error.reason, place) from None
    return resize_and_center_crop(pixels, resize, image_shape[:2])


def _check_single(array, index, image_shape):
    if array.ndim != 3 or array.shape[-1] != image_shape[-1] or array.dtype != np.uint8 or not array.size:
        raise ValueError(
            f"image {index}, {array.dtype} {list(array.shape)}: needs a path, bytes, a PIL image or a uint8 array "
            f"[height, width, {image_shape[-1]}]"
        )
    return array


def _to_uint8(array, image_shape):
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u":
        raise _unfit(array, image_shape)
    if array.size and not (array.min() >= 0 and array.max() <= 1):  # Also where there is a NaN.
        raise ValueError(
            f"images {array.dtype} from {array.min():g} to {array.max():g}: floats must lie in 0..1, not normalised"
        )
    return np.rint(array * np.float32(255)).astype(np.uint8)


def _unfit(array, image_shape):
    wanted = ", ".join(map(str, image_shape))
    return ValueError(f"images {array.dtype} {list(array.shape)}: needs uint8 [B, {wanted}], or floats in 0..1")
