"""Random access to the decoded examples of a split."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from sdpoint_jax.data.decode import BadImageError, decode

CACHE_BYTES = 2**30  # Splits that decode to no more than this are kept decoded: all of CIFAR, not ImageNet.


class Records(Protocol):
    """The encoded examples of one whole split, in a fixed order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns (image file's bytes, label); raises OSError where the file cannot be read."""

    def where(self, index: int) -> str:
        """Returns the place of an example, for a person: a path where there is one."""

    def digest(self) -> str:
        """Return a digest that changes when examples are added, removed or replaced, wherever the files lie."""


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """An image classification set as it lies on disk.

    Attributes:
        class_names: the classes, in order of their labels.
        channels: 1 (grey) or 3 (RGB).
        image_size: (height, width) of every image, or None where they vary.
        records: split name -> its encoded examples.
        description: of the set, where it has one.
    """

    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    records: Mapping[str, Records]
    description: str = ""


class DecodedSplit:
    """Decodes the examples of one whole split; a split that is small enough is decoded once, on first use, and kept."""

    def __init__(self, records: Records, *, channels: int, num_classes: int, image_size: tuple[int, int] | None):
        """Reads nothing yet.

        Args:
            records: the encoded examples.
            channels: 1 or 3.
            num_classes: labels must be in [0, num_classes).
            image_size: (height, width) of every image, or None where they vary.
        """
        self.records = records
        self.channels = channels
        self.num_classes = num_classes
        self.image_size = image_size
        self.cached = image_size is not None and len(records) * image_size[0] * image_size[1] * channels <= CACHE_BYTES
        self._cache: tuple[np.ndarray, np.ndarray] | None = None  # Images and labels; in one, as threads share them.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # Worker processes fill their own cache.

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns (image uint8 [H, W, C], label); raises BadImageError with the example's place."""
        if not self.cached:
            return self.decode(index)
        if self._cache is None:
            assert self.image_size is not None
            images = np.empty((len(self), *self.image_size, self.channels), np.uint8)
            self._cache = images, np.full(len(self), -1)  # -1: not yet decoded
        images, labels = self._cache
        if labels[index] < 0:
            images[index], label = self.decode(index)
            labels[index] = label  # Last, so that no thread sees a label before its image.
        return images[index], int(labels[index])

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the records; see `Records.digest`."""
        return self.records.digest()

    def decode(self, index: int) -> tuple[np.ndarray, int]:
        """Returns the same as `self[index]`, but decodes always anew."""
        try:
            data, label = self.records.read(index)
            image = decode(data, self.channels)
            self._check(image, label)
        except (BadImageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.reason
            raise BadImageError(reason or "cannot be read", self.records.where(index)) from None
        return image, label

    def _check(self, image, label):
        if not 0 <= label < self.num_classes:
            raise BadImageError(f"label {label} is not in [0, {self.num_classes})")
        if self.image_size is not None and image.shape[:2] != self.image_size:
            (height, width), valid = image.shape[:2], "x".join(map(str, self.image_size))
            raise BadImageError(f"size {height}x{width} differs from the data set's {valid}")


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split, a slice of one, or several joined, as a sequence of {"image": uint8 [H, W, C], "label": int}.

    Attributes:
        parts: (decoded split, its first example, one past its last).
        title: data set and split, for messages.
    """

    parts: tuple[tuple[DecodedSplit, int, int], ...]
    title: str

    def __len__(self) -> int:
        return self._size

    @functools.cached_property
    def _size(self):
        return sum(end - start for _, start, end in self.parts)

    @property
    def cached(self) -> bool:
        """Tells whether decoded images are kept in memory."""
        return all(split.cached for split, _, _ in self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        split, index = self._locate(index)
        image, label = split[index]
        return {"image": image, "label": label}

    @property
    def digest(self) -> str:
        """A digest of which examples these are, in which order; the path of the files and the name do not matter."""
        parts = [(split.digest, start, end) for split, start, end in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def where(self, index: int) -> str:
        """Returns the place of an example, for a person."""
        split, index = self._locate(index)
        return split.records.where(index)

    def _locate(self, index):
        for split, start, end in self.parts:
            if 0 <= index < end - start:
                return split, start + index
            index -= end - start
        raise IndexError(f"example beyond the {len(self)} there are")
