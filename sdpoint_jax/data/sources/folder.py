"""Image folders in ImageNet's layout: train/CLASS/IMAGE, and val|test/CLASS/IMAGE.

As in torchvision's `ImageFolder`, classes are the sorted names of the folders in `train`, images are found by their
extensions at any depth, and other files are passed over; here with a warning, and hidden and service files without one
(see `listing`). Unlike there, the order of the images is shuffled (by a hash of their names, so always the same), so
that a slice such as `train[:90%]` holds every class.
"""

import dataclasses
import functools
import hashlib
import os
import typing
from concurrent import futures

from absl import logging

from sdpoint_jax.data.builder import ImageSet, Split
from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.data.examples import CACHE_BYTES, DecodedSplit, EncodedSet
from sdpoint_jax.data.listing import is_service, list_files
from sdpoint_jax.data.sources.tfds import TfdsRecords

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_SIZES = 4096  # Files of a split whose sizes are part of its digest.
FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """The image files of one split; see `examples.Records`.

    Attributes:
        root: the split's folder.
        files: CLASS/IMAGE paths below it.
        labels: the classes of the files.
        passed_over: the paths below it that are no images, by their extensions or places.
    """

    root: str
    files: list[str]
    labels: list[int]
    passed_over: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns (image file's bytes, label); raises OSError where the file cannot be read."""
        with open(self.where(index), "rb") as file:
            return file.read(), self.labels[index]

    def where(self, index: int) -> str:
        """Returns the path of an example."""
        return os.path.join(self.root, self.files[index])

    def digest(self) -> str:
        """Return a digest of the names of all files and the sizes in bytes of evenly spaced ones."""
        hashed = hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape"))
        # All sizes of ImageNet would take minutes on a network disk.
        for index in range(0, len(self), -(-len(self) // _SIZES)):
            try:
                size = os.path.getsize(self.where(index))
            except OSError:  # Reported when the file is read.
                size = -1
            hashed.update(f"\0{size}".encode())
        return hashed.hexdigest()[:16]


def open_folder(root: str) -> EncodedSet:
    """Opens an image folder as a data set of RGB images; see `read_folder` for what it raises."""
    class_names, records = read_folder(root)
    return EncodedSet(class_names, channels=3, image_size=common_image_size(records), records=records)


def read_folder(root: str) -> tuple[tuple[str, ...], dict[str, FolderRecords]]:
    """Lists the images of a folder.

    Returns:
        (class names, split name -> records). The splits are those of FOLDERS that are there.

    Raises:
        ValueError: no folder, no training split, fewer than two classes, a class without training images, another
            split with a class that training lacks or without any images.
    """
    if not root:
        raise ValueError("folder: give the folder of the images after the colon, as folder:/path/to/images")
    if not os.path.isdir(root):
        raise ValueError(f"folder:{root}: there is no such folder")
    places = {split: _first_folder(root, names) for split, names in FOLDERS.items()}
    if places["train"] is None:
        raise ValueError(f"folder:{root}: no 'train' folder; valid: train/CLASS/IMAGE, val|test/CLASS/IMAGE")
    class_names = tuple(_subfolders(places["train"]))
    if len(class_names) < 2:
        raise ValueError(f"{places['train']}: {len(class_names)} class folders in it, a classifier needs at least 2")
    records = {split: _records(place, class_names) for split, place in places.items() if place}
    _check_classes(records["train"], class_names)
    return class_names, records


def common_image_size(splits: dict[str, FolderRecords]) -> tuple[int, int] | None:
    """Returns the (height, width) of all images, or None where they vary or are too many to be kept decoded.

    Only file headers are read, and mostly a few: the first two photographs rarely have the same size. A file without
    a readable header counts as of the common size: it is reported when it is decoded.
    """
    paths = [records.where(index) for records in splits.values() for index in range(len(records))]
    size = next(filter(None, map(_image_size, paths)), None)
    if size is None or len(paths) * size[0] * size[1] * 3 > CACHE_BYTES:
        return None
    with futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 256):
            if set(pool.map(_image_size, paths[start : start + 256])) - {size, None}:
                return None
    return size


def image_set(root: str, name: str, on_bad_image: str) -> ImageSet:
    """Describes an image folder, to be written as a TFDS data set; every image is decoded then, to check it.

    Args:
        root: the folder.
        name: what the written set is loaded by.
        on_bad_image: "error", or "skip": images that cannot be decoded are reported and left out.

    Raises:
        ValueError: see `read_folder`.
    """
    class_names, records = read_folder(root)
    size = common_image_size(records)
    return ImageSet(
        name=name,
        version="1.0.0",
        description=f"The image folder {root}, {_state(records)}.",
        class_names=class_names,
        image_shape=(*(size or (None, None)), 3),
        splits={
            split: Split(len(part), functools.partial(_checked_examples, part, size, on_bad_image))
            for split, part in records.items()
        },
        more_features=_more_features,
    )


def find_difference(root: str, prepared: EncodedSet, on_bad_image: str) -> str | None:
    """Find a difference between an image folder and the set that was prepared from it: in words, or None.

    Args:
        root: the folder.
        prepared: the set.
        on_bad_image: "error", or "skip": images that cannot be decoded may be missing in the set.

    Raises:
        ValueError: see `read_folder`.
    """
    class_names, records = read_folder(root)
    if class_names != prepared.class_names:
        return f"it has the classes {_some(prepared.class_names)}, the folder {_some(class_names)}"
    if records.keys() != prepared.records.keys():
        return f"it has the splits {', '.join(prepared.records)}, the folder {', '.join(records)}"
    for split, part in records.items():
        written = typing.cast(TfdsRecords, prepared.records[split])
        there = {name: index for index, name in enumerate(written.file_names())}
        for index, file in enumerate(part.files):
            if file in there:
                if part.read(index) != written.read(there.pop(file)):
                    return f"{part.where(index)} has changed"
            elif on_bad_image == "error" or _is_image(part, index):
                return f"{part.where(index)} is not in it"
        if there:
            return f"{os.path.join(part.root, next(iter(there)))} is in it, but no longer in the folder"
    return None


def _is_image(records, index):
    decoded = DecodedSplit(records, channels=3, num_classes=max(records.labels) + 1, image_size=None)
    try:
        decoded.decode(index)
    except BadImageError:
        return False
    return True


def _state(records):
    """Return a digest of the names, sizes and times of all files: equal only if nothing has changed."""
    found = hashlib.sha256()
    for split, part in records.items():
        for index, file in enumerate(part.files):
            stat = os.stat(part.where(index))
            found.update(f"{split} {file!r} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"state {found.hexdigest()}"


def _checked_examples(records, image_size, on_bad_image):
    num_classes = max(records.labels) + 1
    decoded = DecodedSplit(records, channels=3, num_classes=num_classes, image_size=image_size)
    for index, file in enumerate(records.files):
        try:
            decoded.decode(index)
        except BadImageError as error:
            if on_bad_image == "error":
                raise
            logging.warning("left out: %s", error)
            yield file, None
        else:
            data, label = records.read(index)
            yield file, {"file_name": file, "image": data, "label": label}


def _more_features():
    import tensorflow_datasets as tfds

    return {"file_name": tfds.features.Text()}


def _image_size(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # PIL raises nearly every type there is.
        return None


def _first_folder(root, names):
    places = [place for name in names if os.path.isdir(place := os.path.join(root, name))]
    if len(places) > 1:
        logging.warning("%s is used, and %s not: both are validation images", places[0], _some(places[1:]))
    return places[0] if places else None


def _subfolders(folder):
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_service(entry.name))


def _records(folder, class_names):
    labels = {name: label for label, name in enumerate(class_names)}
    files = [entry.name for entry in os.scandir(folder) if entry.is_file() and not is_service(entry.name)]
    for name in _subfolders(folder):  # Each by itself: links may lead from one class to the images of another.
        found = [os.path.join(name, file) for file in list_files(os.path.join(folder, name))]
        if found and name not in labels:
            place = os.path.join(folder, name)
            raise ValueError(f"{place}: no such class in train, which has {_some(class_names)}")
        files += found
    files.sort(key=_scrambled)
    images = [file for file in files if os.sep in file and file.lower().endswith(EXTENSIONS)]
    if not images:
        raise ValueError(f"{folder}: no images in it; valid: CLASS/IMAGE ({' '.join(EXTENSIONS)})")
    passed_over = sorted(set(files) - set(images))
    if passed_over:
        logging.warning("%s: passed over, being no images: %s", folder, _some(passed_over))
    return FolderRecords(folder, images, [labels[file.split(os.sep, 1)[0]] for file in images], passed_over)


def _scrambled(file):
    return hashlib.blake2b(os.fsencode(file)).digest()


def _check_classes(train, class_names):
    empty = sorted(set(range(len(class_names))) - set(train.labels))
    if empty:
        place = os.path.join(train.root, class_names[empty[0]])
        raise ValueError(f"{place}: no images in this class; valid: {' '.join(EXTENSIONS)}")


def _some(names):
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown}, ... ({len(names)} in all)"
