"""Data sets by name: the embedded digits, prepared TFDS sets, image folders."""

import atexit
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence

from sdpoint_jax.data import builder
from sdpoint_jax.data.examples import DecodedSplit, EncodedSet, Examples
from sdpoint_jax.data.sources import digits
from sdpoint_jax.data.sources.folder import open_folder
from sdpoint_jax.data.sources.given import Source, open_sources
from sdpoint_jax.data.sources.tfds import open_prepared
from sdpoint_jax.paths import check_local

ON_BAD_IMAGE = ("error", "skip")
FOLDER = "folder:"  # What the name of an image folder begins with.
_SLICE = re.compile(r"(?P<name>[\w-]+)(?:\[(?P<slice>(?:(?P<start>-?[\d_.]+)%?)?:(?:(?P<end>-?[\d_.]+)%?)?)\])?")
VALIDATION = ("validation", "val", "valid")  # One split: a set has it under any of these names.


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """An image classification data set, read on demand.

    Attributes:
        name: what it was loaded by.
        class_names: the classes, in order of their labels.
        channels: 1 (grey) or 3 (RGB).
        image_size: (height, width) of every image, or None where they vary.
        on_bad_image: what batches do with an example that cannot be used: "error" or "skip".
        decoded: split name -> its decoded examples.
        bad_images: place -> reason of the bad images that batches have met so far.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    on_bad_image: str
    decoded: Mapping[str, DecodedSplit] = dataclasses.field(repr=False)
    bad_images: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def num_classes(self) -> int:
        """Counts the classes."""
        return len(self.class_names)

    @property
    def splits(self) -> dict[str, int]:
        """Counts the examples of each split, by its name."""
        return {split: len(decoded) for split, decoded in self.decoded.items()}

    def find_split(self, name: str) -> str | None:
        """Return what the set calls the split `name`, which may be any of `VALIDATION`; None where it has none."""
        aliases = (name, *VALIDATION) if name in VALIDATION else (name,)
        return next((alias for alias in aliases if alias in self.decoded), None)

    def source(self, split: str) -> Examples:
        """Returns the examples of a split, by random access: {"image": uint8 [H, W, C], "label": int}.

        Args:
            split: a split's name, a slice in TFDS's notation ("train[:90%]", "train[1000:]"), or a sum of these. A
                validation split is found by any name of `VALIDATION`.

        Raises:
            ValueError: an unknown split, or one without examples.
        """
        parts = tuple((self.decoded[name], start, end) for name, start, end in self._parts(split))
        examples = Examples(parts, f"{self.name} {split}")
        if not len(examples):
            raise ValueError(f"split {split!r} of {self.name} holds no examples; splits: {self._sizes()}")
        return examples

    def _parts(self, split):
        """Return (name, first example, one past the last) of each part of a sum of splits and slices."""
        names = {name: name for name in self.splits}
        if validation := self.find_split("validation"):
            names = {alias: validation for alias in VALIDATION} | names
        wanted = list(self.splits) if split == "all" and "all" not in names else split.split("+")
        parts = [_slice(part.strip(), names, self.splits) for part in wanted]
        if None in parts:
            raise ValueError(f"unknown split {split!r} of {self.name}; valid: slices and sums of {self._sizes()}")
        return parts

    def _sizes(self):
        return ", ".join(f"{name} ({size})" for name, size in self.splits.items())


def load_dataset(name: str, data_dir: str | None = None, *, on_bad_image: str = "error") -> Dataset:
    """Opens a data set.

    Args:
        name: "digits", prepared on first use; a prepared TFDS image classification set, such as "cifar10" or
            "imagenet2012", with its config and version if need be ("name/config:1.0.0"); or "folder:/path" with
            train/CLASS/IMAGE and, both optional, val/CLASS/IMAGE and test/CLASS/IMAGE (splits "train", "validation",
            "test").
        data_dir: where prepared sets are. By default TFDS's: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        on_bad_image: what batches do with an example that cannot be used. "error" raises BadImageError, which names
            its place. "skip" warns, once for each; in training batches another image takes its place, in evaluation
            batches its mask is 0.

    Raises:
        ValueError: an unknown or unprepared name (lists the known ones), a folder or set of another form.
    """
    check_on_bad_image(on_bad_image)
    check_local(name)
    check_local(data_dir or default_data_dir(), "data_dir ")
    if name.startswith(FOLDER):
        return _dataset(name, open_folder(os.path.expanduser(name.removeprefix(FOLDER))), on_bad_image)
    if name == digits.NAME:
        data_dir = _prepare_digits(data_dir)
    data_dir = expand_data_dir(data_dir)
    return _dataset(name, open_prepared(name, data_dir), on_bad_image)


def from_sources(
    splits: Mapping[str, Source],
    class_names: Sequence[str] | None = None,
    *,
    name: str = "given",
    image_size: tuple[int, int] | None = None,
    on_bad_image: str = "error",
) -> Dataset:
    """Make a data set of objects with `__len__` and `__getitem__`, by split: train, validation, test.

    Args:
        splits: Each gives (image, label), or a dict with both; see `sources.given.Source`.
        class_names: The classes, in order of their labels; by default the attribute `classes` of the first split.
        name: For messages and records.
        image_size: (height, width) of every image; None where they vary. A small set of one size is cached in memory.
        on_bad_image: See `load_dataset`.

    Raises:
        ValueError: No splits, an empty one, no class names, or a first example of another form.
    """
    check_on_bad_image(on_bad_image)
    names, channels, decoded = open_sources(splits, class_names, name, image_size)
    return Dataset(name, names, channels, image_size, on_bad_image, decoded)


def expand_data_dir(data_dir: str | None) -> str:
    """Return the directory of prepared sets, TFDS's own by default; raise ValueError if that needs a home directory."""
    path = os.path.expanduser(data_dir or default_data_dir())
    if path.startswith("~"):  # A user without HOME and without an entry in the system's list of users.
        raise ValueError(f"{path}: there is no home directory; give --data-dir, or set TFDS_DATA_DIR")
    return path


def _prepare_digits(data_dir):
    """Prepare the digits, which the package has with it, and return where: elsewhere if it cannot be in `data_dir`."""
    try:
        builder.write(digits.image_set(), found := expand_data_dir(data_dir), quiet=True)
        return found
    except (OSError, ValueError):
        if data_dir:  # The user's choice; the default is nobody's.
            raise
    temporary = tempfile.mkdtemp(prefix="sdpoint_jax_")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    builder.write(digits.image_set(), temporary, quiet=True)
    return temporary


def _slice(text, names, sizes):
    """Return (name, start, end) of a split or a slice in TFDS's notation; None for what is neither."""
    found = _SLICE.fullmatch(text)
    if not found or found["name"] not in names:
        return None
    name = names[found["name"]]
    size = sizes[name]
    if found["slice"] == ":":
        return None
    # As in TFDS, one percent sign makes both ends percentages, which are rounded to the closest example.
    percent = "%" in (found["slice"] or "")
    number, whole = (float, 100) if percent else (int, size)
    try:
        start, end = number(found["start"] or 0), number(found["end"] or whole)
    except ValueError:
        return None
    if max(abs(start), abs(end)) > whole:
        return None
    start, end = (round(at * size / 100) if percent else at for at in (start, end))
    start, end = (size + at if at < 0 else at for at in (start, end))
    return name, start, max(start, end)


def check_on_bad_image(on_bad_image: str) -> None:
    """Raises ValueError unless `on_bad_image` is one of ON_BAD_IMAGE."""
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"unknown on_bad_image {on_bad_image!r}; valid: {', '.join(ON_BAD_IMAGE)}")


def default_data_dir() -> str:
    """Returns TFDS's own directory of prepared sets: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")


def _dataset(name: str, encoded: EncodedSet, on_bad_image: str) -> Dataset:
    channels, image_size = encoded.channels, encoded.image_size
    decoded = {
        split: DecodedSplit(records, num_classes=len(encoded.class_names), channels=channels, image_size=image_size)
        for split, records in encoded.records.items()
    }
    return Dataset(
        name,
        encoded.class_names,
        on_bad_image=on_bad_image,
        decoded=decoded,
        channels=channels,
        image_size=image_size,
    )
