"""Random access to the decoded examples of a split."""

import dataclasses
import functools
from typing import Protocol

import numpy as np

from sdpoint_jax.data.decode import BadImageError, decode

CACHE_BYTES = 2**30  # Splits that decode to no more than this are kept decoded: all of CIFAR, not ImageNet.


class Records(Protocol):
    """The encoded examples of one whole split, in a fixed order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """(image file's bytes, label); OSError where the file cannot be read."""

    def where(self, index: int) -> str:
        """The place of an example, for a person: a path where there is one."""


class DecodedSplit:
    """One whole split, decoded; what is small enough is decoded once, on first use, and kept.

    Args:
      records: the encoded examples.
      channels: 1 or 3.
      num_classes: labels must be in [0, num_classes).
      image_size: (height, width) of every image, or None where they vary.
    """

    def __init__(
        self,
        records: Records,
        *,
        channels: int,
        num_classes: int,
        image_size: tuple[int, int] | None,
    ):
        self.records = records
        self.channels = channels
        self.num_classes = num_classes
        self.image_size = image_size
        self.cached = image_size is not None and len(records) * image_size[0] * image_size[1] * channels <= CACHE_BYTES
        self._images = self._labels = None

    def __getstate__(self):
        return {
            **self.__dict__,
            "_images": None,
            "_labels": None,
        }  # Worker processes fill their own cache.

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(image uint8 [H, W, C], label); BadImageError names the example's place."""
        if not self.cached:
            return self.decode(index)
        if self._images is None:
            images = np.empty((len(self), *self.image_size, self.channels), np.uint8)
            self._labels = np.full(len(self), -1)  # -1: not yet decoded
            self._images = images
        if self._labels[index] < 0:
            self._images[index], label = self.decode(index)
            self._labels[index] = label  # Last, so that no thread sees a label before its image.
        return self._images[index], int(self._labels[index])

    def decode(self, index: int) -> tuple[np.ndarray, int]:
        """As `self[index]`, but always anew."""
        try:
            data, label = self.records.read(index)
            image = decode(data, self.channels)
            self._check(image, label)
        except (BadImageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.reason
            raise BadImageError(reason, self.records.where(index)) from None
        return image, label

    def _check(self, image, label):
        if not 0 <= label < self.num_classes:
            raise BadImageError(f"label {label} is not in [0, {self.num_classes})")
        if self.image_size is not None and image.shape[:2] != self.image_size:
            height, width = image.shape[:2]
            raise BadImageError(f"size {height}x{width} differs from the data set's {self.image_size}")


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """A split, a slice of one, or several joined, as a sequence.

    Its elements are {"image": uint8 [H, W, C], "label": int}.

    Attributes:
      parts: (decoded split, its first example, one past its last).
    """

    parts: tuple[tuple[DecodedSplit, int, int], ...]

    def __len__(self) -> int:
        return self._size

    @functools.cached_property
    def _size(self):
        return sum(end - start for _, start, end in self.parts)

    @property
    def cached(self) -> bool:
        """True where decoded images are kept in memory."""
        return all(split.cached for split, _, _ in self.parts)

    def __getitem__(self, index: int) -> dict:
        split, index = self._locate(index)
        image, label = split[index]
        return {"image": image, "label": label}

    def where(self, index: int) -> str:
        """The place of an example, for a person."""
        split, index = self._locate(index)
        return split.records.where(index)

    def _locate(self, index):
        for split, start, end in self.parts:
            if 0 <= index < end - start:
                return split, start + index
            index -= end - start
        raise IndexError(f"example beyond the {len(self)} there are")
