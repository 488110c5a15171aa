"""CIFAR-10 and CIFAR-100 from their official archives, the Python or the binary version of each.

The result has the features of TFDS's catalogue, so that `tfds.data_source("cifar10")` reads it too.
"""

import dataclasses
import functools
import pickle
import tarfile
from pathlib import PurePosixPath

import numpy as np

from sdpoint_jax.data.builder import ImageSet, Split

VERSION = "3.0.2"  # of TFDS's catalogue
URL = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where things are in a version of the archive.

    Attributes:
        files: split name -> files with images.
        names: label -> file with the names of its classes (binary), or key in `meta` (Python).
        labels: label -> place of its byte before each image's pixels (binary), or key beside them (Python).
        meta: the file with the class names (Python only).
    """

    files: dict[str, list[str]]
    names: dict[str, str]
    labels: dict[str, int | str]
    meta: str | None = None


# Archive -> MD5 checksum, as published beside it.
MD5 = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
ARCHIVES = {
    "cifar10": ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
}
LAYOUTS = {
    "cifar-10-binary.tar.gz": Layout(
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        {"label": "batches.meta.txt"},
        {"label": 0},
    ),
    "cifar-10-python.tar.gz": Layout(
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        {"label": "label_names"},
        {"label": "labels"},
        meta="batches.meta",
    ),
    "cifar-100-binary.tar.gz": Layout(
        {"train": ["train.bin"], "test": ["test.bin"]},
        {"label": "fine_label_names.txt", "coarse_label": "coarse_label_names.txt"},
        {"label": 1, "coarse_label": 0},
    ),
    "cifar-100-python.tar.gz": Layout(
        {"train": ["train"], "test": ["test"]},
        {"label": "fine_label_names", "coarse_label": "coarse_label_names"},
        {"label": "fine_labels", "coarse_label": "coarse_labels"},
        meta="meta",
    ),
}
NUM_EXAMPLES = {"train": 50_000, "test": 10_000}


def image_set(name: str, archive: str, version: str) -> ImageSet:
    """Describes CIFAR, to be written as a TFDS data set.

    Args:
        name: "cifar10" or "cifar100".
        archive: path of the archive; its contents are trusted, so its checksum must have been verified.
        version: which archive it is, a key of MD5.

    Raises:
        ValueError: the archive lacks a file.
    """
    layout = LAYOUTS[version]
    contents = _contents(archive, layout)
    read_names, read_images = (_names_python, _images_python) if layout.meta else (_names_binary, _images_binary)
    names = {label: read_names(contents, layout, label) for label in layout.names}
    return ImageSet(
        name=name,
        version=VERSION,
        description=f"{name}, from {version} of {URL}cifar.html.",
        class_names=names["label"],
        image_shape=(32, 32, 3),
        splits={
            split: Split(n, functools.partial(_examples, split, contents, layout, read_images))
            for split, n in NUM_EXAMPLES.items()
        },
        more_features=functools.partial(_more_features, names.get("coarse_label")),
    )


def _contents(archive, layout):
    """Returns file name -> bytes, of the files that matter."""
    wanted = [*sum(layout.files.values(), []), *([layout.meta] if layout.meta else layout.names.values())]
    with tarfile.open(archive) as tar:
        found = {PurePosixPath(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"{archive}: no file {missing[0]} in it; needs {', '.join(wanted)}")
    return {name: found[name] for name in wanted}


def _names_binary(contents, layout, label):
    return contents[layout.names[label]].decode().split()


def _names_python(contents, layout, label):
    return pickle.loads(contents[layout.meta], encoding="latin1")[layout.names[label]]


def _images_binary(contents, layout, file):
    """Yields (pixels uint8 [3072], {label: int}) of one file."""
    width = len(layout.labels) + PIXELS
    for row in np.frombuffer(contents[file], np.uint8).reshape(-1, width):
        yield row[-PIXELS:], {label: int(row[place]) for label, place in layout.labels.items()}


def _images_python(contents, layout, file):
    """Yields (pixels uint8 [3072], {label: int}) of one file."""
    batch = pickle.loads(contents[file], encoding="latin1")
    for index, pixels in enumerate(batch["data"]):
        yield pixels, {label: int(batch[key][index]) for label, key in layout.labels.items()}


def _examples(split, contents, layout, read_images):
    from PIL import Image

    count = 0
    for file in layout.files[split]:
        for pixels, labels in read_images(contents, layout, file):
            key = f"{split}_{count:05d}"
            image = Image.fromarray(np.ascontiguousarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)))
            yield key, {"id": key, "image": image, **labels}
            count += 1


def _more_features(coarse_names):
    import tensorflow_datasets as tfds

    features = {"id": tfds.features.Text()}
    if coarse_names:
        features["coarse_label"] = tfds.features.ClassLabel(names=coarse_names)
    return features
