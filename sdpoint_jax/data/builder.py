"""Writing image sets as TFDS data sets of array_record files: whole, or not at all."""

import contextlib
import dataclasses
import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TEMPORARY = ".sdpoint_jax"  # What the names of temporary folders end in.


@dataclasses.dataclass(frozen=True)
class Split:
    """What a split is made of.

    Attributes:
        num_examples: how many times `examples` must yield.
        examples: yields (key, {"image": ..., "label": int, ...}), with a unique key (an int or string) for each; the
            image as an image file's bytes or as a PIL image. (key, None) stands for an example that was left out.
    """

    num_examples: int
    examples: Callable[[], Iterator[tuple[int | str, dict[str, Any] | None]]]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """An image classification set, ready to be written.

    Attributes:
        name, version: where it goes: DATA_DIR/NAME/VERSION.
        description: one line.
        class_names: the classes, in order of their labels.
        image_shape: (height, width, channels), None where they vary.
        splits: by name.
        more_features: function that returns further TFDS features, by name.
    """

    name: str
    version: str
    description: str
    class_names: Sequence[str]
    image_shape: tuple[int | None, int | None, int]
    splits: Mapping[str, Split]
    more_features: Callable[[], dict[str, Any]] = dict


def is_written(directory: str | os.PathLike) -> bool:
    """Tells whether a whole set is there. TFDS writes elsewhere, and renames when all is written."""
    return (Path(directory) / "dataset_info.json").exists()


def write(image_set: ImageSet, data_dir: str, *, quiet: bool = False) -> Path:
    """Writes a set, if it is not there yet, and returns its directory.

    The examples are shuffled on the way, always in the same way. A process that finds another one writing the set waits
    for it; what a killed process has left is removed.

    Args:
        image_set: what to write.
        data_dir: where prepared sets go.
        quiet: whether to show no progress.

    Raises:
        ValueError: a split does not have as many examples as it should, or something else is where the set belongs.
    """
    directory = Path(os.path.expanduser(data_dir)) / image_set.name / image_set.version
    if is_written(directory):
        return directory
    with _locked(directory.parent):
        if not is_written(directory):
            _write(image_set, directory, quiet)
    return directory


def _write(image_set, directory, quiet):
    """Write a set in a temporary folder, then rename it; the lock of `directory.parent` is held."""
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: exists and is not a prepared data set; move it")
    for leftover in directory.parent.glob(f".{directory.name}.*{_TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)  # The process is dead, as it held the lock.
    with tempfile.TemporaryDirectory(
        dir=directory.parent, prefix=f".{directory.name}.", suffix=_TEMPORARY, ignore_cleanup_errors=True
    ) as temporary:
        with _silence():
            _builder(image_set, temporary, quiet).download_and_prepare()
        Path(temporary, image_set.name, image_set.version).rename(directory)


@contextlib.contextmanager
def _locked(directory: Path):
    """Holds the directory's lock; the system frees it if the process dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as file:  # Whose content does not matter, if it is somebody else's.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _silence():
    """Keeps TFDS from printing, and from showing its progress bars, which do not know an end."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _builder(image_set, data_dir, quiet):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = image_set.name
            VERSION = tfds.core.Version(image_set.version)

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=image_set.image_shape),
                    "label": tfds.features.ClassLabel(names=list(image_set.class_names)),
                    **image_set.more_features(),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=image_set.description,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager):
                del dl_manager
                return {name: self._generate_examples(name, split) for name, split in image_set.splits.items()}

            def _generate_examples(self, name, split):
                return _examples(f"{image_set.name} {name}", split, quiet)

    return Builder(data_dir=data_dir, file_format="array_record")


def _examples(title, split, quiet):
    """Yields the split's examples, counts them, and shows a progress bar."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    tfds.disable_progress_bar()
    count = 0
    for key, example in tqdm(split.examples(), title, split.num_examples, unit=" images", disable=quiet):
        count += 1
        if example is not None:
            yield key, example
    if count != split.num_examples:
        raise ValueError(f"{title}: {count} examples found, {split.num_examples} expected")
    if not quiet:
        tfds.enable_progress_bar()  # The shuffle that comes next has an end that TFDS knows.
