"""ImageNet (ILSVRC 2012) from the two tar files of its site, without TensorFlow.

The image files are taken as they are: the PNG and the CMYK images among them are `decode`'s business. The result has
the features of TFDS's catalogue, so that `tfds.data_source("imagenet2012")` reads it too.
"""

import contextlib
import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpoint_jax.data.builder import ImageSet, Split

NAME, VERSION = "imagenet2012", "5.1.0"  # of TFDS's catalogue
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
NUM_EXAMPLES = {"train": 1_281_167, "validation": 50_000}


def image_set(archives: dict[str, str]) -> ImageSet:
    """Describes ImageNet, to be written as a TFDS data set.

    Args:
        archives: "train" and "validation" -> path of the tar file.
    """
    class_names = _lines("labels.txt")
    examples = {
        "train": functools.partial(_train_examples, archives["train"], class_names),
        "validation": functools.partial(_validation_examples, archives["validation"], class_names),
    }
    return ImageSet(
        name=NAME,
        version=VERSION,
        description="ILSVRC 2012, from the tar files of https://image-net.org.",
        class_names=class_names,
        image_shape=(None, None, 3),
        splits={split: Split(NUM_EXAMPLES[split], examples[split]) for split in examples},
        more_features=_more_features,
    )


def _lines(file):
    """Returns the class names, or those of the validation images in order of their files: TFDS has both."""
    import tensorflow_datasets as tfds

    return Path(tfds.core.tfds_path("datasets/imagenet2012")).joinpath(file).read_text().split()


@contextlib.contextmanager
def _opened(archive):
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(f"{archive}: damaged ({str(error).splitlines()[-1]})") from None


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, Any]]:
    for member in tar:
        if member.isfile():
            yield member.name, tar.extractfile(member)


def _train_examples(archive, class_names):
    """Yields the images of an archive that holds a tar file for each class."""
    labels = {name: label for label, name in enumerate(class_names)}
    with _opened(archive) as outer:
        for class_file, content in _files(outer):
            class_name = class_file.removesuffix(".tar")
            if class_name not in labels:
                raise ValueError(
                    f"{archive}: {class_file} in it is no class; valid: names such as {class_names[0]}.tar"
                )
            with tarfile.open(fileobj=content) as inner:
                for name, image in _files(inner):
                    yield name, {"file_name": name, "image": image.read(), "label": labels[class_name]}


def _validation_examples(archive, class_names):
    labels = {name: label for label, name in enumerate(class_names)}
    with _opened(archive) as tar:
        names, classes = sorted(member.name for member in tar if member.isfile()), _lines("validation_labels.txt")
        if len(names) != len(classes):
            raise ValueError(f"{archive}: {len(names)} images in it, {len(classes)} expected")
        class_of = dict(zip(names, classes, strict=True))
        for name, image in _files(tar):
            yield name, {"file_name": name, "image": image.read(), "label": labels[class_of[name]]}


def _more_features():
    import tensorflow_datasets as tfds

    return {"file_name": tfds.features.Text()}
