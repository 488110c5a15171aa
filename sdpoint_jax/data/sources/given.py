"""Data sets of a user's own: any objects with `__len__` and `__getitem__`, as torchvision's or Hugging Face's."""

import dataclasses
import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.data.examples import DecodedSplit

_DIGESTED = 64  # Examples of a split whose contents are part of its digest; each of them is decoded for it.


class Source(Protocol):
    """A split: an example is (image, label) or {"image": image, "label": label}.

    An image is uint8 [H, W] or [H, W, C], or a PIL image. A label is an integer.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class GivenRecords:
    """A split as the user gives it; see `examples.Records`, of which it has all but the encoded images.

    Attributes:
        source: The split.
        title: Names of the set and of the split, for messages.
    """

    source: Source
    title: str

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        """Raise TypeError: there are no encoded images."""
        raise TypeError(f"{self.where(index)}: has no encoded image")

    def where(self, index: int) -> str:
        """Return the place of an example, for a person."""
        return f"{self.title}[{index}]"

    def digest(self) -> str:
        """Return a digest of the number of examples and of evenly spaced ones."""
        hashed = hashlib.sha256(str(len(self)).encode())
        for index in range(0, len(self), -(-len(self) // _DIGESTED)):
            image, label = _example(self.source[index])
            pixels = np.ascontiguousarray(image)
            hashed.update(f"\0{label} {pixels.dtype} {pixels.shape}\0".encode() + pixels.tobytes())
        return hashed.hexdigest()[:16]


class GivenSplit(DecodedSplit):
    """The examples of a split as the user gives it, checked."""

    records: GivenRecords

    def decode(self, index: int) -> tuple[np.ndarray, int]:
        """Return (image uint8 [H, W, C], label), never from memory; raise BadImageError with the example's place."""
        try:
            image, label = _example(self.records.source[index])
            pixels = _pixels(image, self.channels)
            self._check(pixels, label)
        except (BadImageError, OSError) as error:
            raise BadImageError(getattr(error, "reason", str(error)), self.records.where(index)) from None
        return pixels, label


def open_sources(
    splits: Mapping[str, Source],
    class_names: Sequence[str] | None,
    name: str,
    image_size: tuple[int, int] | None,
) -> tuple[tuple[str, ...], int, dict[str, DecodedSplit]]:
    """Return (class names, channels, splits by name); see `dataset.from_sources`."""
    first = next(iter(splits.values()), None)
    if first is None or not all(hasattr(split, "__getitem__") and len(split) for split in splits.values()):
        raise ValueError(f"data set {name}: {dict.fromkeys(splits)}; needs splits by name, each with examples")
    names = class_names or getattr(first, "classes", None)
    if not names:
        raise ValueError(f"data set {name}: has no attribute `classes`; give from_sources(splits, class_names=...)")
    image, _ = _example(first[0])
    channels = _pixels(image, None).shape[-1]
    found: dict[str, DecodedSplit] = {
        split: GivenSplit(
            GivenRecords(source, f"{name} {split}"), channels=channels, num_classes=len(names), image_size=image_size
        )
        for split, source in splits.items()
    }
    return tuple(map(str, names)), channels, found


def _example(item):
    try:
        image, label = (item["image"], item["label"]) if isinstance(item, Mapping) else item
        return image, operator.index(label)
    except (TypeError, ValueError, KeyError):
        shown = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise BadImageError(f"is {shown}; needs (image, label), or a dict with image and label") from None


def _pixels(image, channels):
    """Return uint8 [H, W, channels]; of an image that says how many it has if `channels` is None."""
    if hasattr(image, "convert"):  # A PIL image.
        grey = image.mode in ("1", "L") if channels is None else channels == 1
        image = image.convert("L" if grey else "RGB")
    pixels = np.asarray(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    valid = (1, 3) if channels is None else (channels,)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in valid:
        needed = " or ".join(f"[H, W, {count}]" for count in valid)
        raise BadImageError(f"image {pixels.dtype} {list(pixels.shape)}; needs uint8 {needed}")
    return pixels
