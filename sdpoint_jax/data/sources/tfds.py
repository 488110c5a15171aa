"""TFDS data sets that lie ready on disk, read without TensorFlow."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpoint_jax.data.examples import EncodedSet

PREPARE = "python -m sdpoint_jax prepare"


class TfdsRecords:
    """The encoded examples of one split of a TFDS set; see `examples.Records`."""

    def __init__(self, builder: Any, split: str):
        """Opens the split's files.

        Args:
            builder: the set's TFDS builder.
            split: one of its splits.
        """
        import tensorflow_datasets as tfds

        self.place = f"{builder.info.full_name} {split}"
        self._info = builder.info.splits[split]
        self.source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns (image file's bytes, label)."""
        example = self.source[index]
        return example["image"], int(example["label"])

    def digest(self) -> str:
        """Return a digest of the sizes that TFDS recorded when the set was prepared."""
        sizes = [self._info.num_examples, self._info.num_bytes, self._info.shard_lengths]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]

    def file_names(self) -> Iterator[str]:
        """Yield the name that the file of each example had; an empty one if the set has not kept it."""
        return (self.source[index].get("file_name", b"").decode() for index in range(len(self)))

    def where(self, index: int) -> str:
        """Returns set, split and index of an example, and the name that its file had, if the set has kept it."""
        file_name = self.source[index].get("file_name", b"").decode()
        return f"{self.place}[{index}] {file_name}".rstrip()


def open_prepared(name: str, data_dir: str) -> EncodedSet:
    """Opens a prepared set.

    Args:
        name: "NAME", "NAME/CONFIG", either with ":VERSION" if it should not be the newest one.
        data_dir: where prepared sets are.

    Raises:
        ValueError: no such set (lists those there are), one without images and classes, or without random access.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_prepared_directory(name, data_dir))
    features = dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        found = ", ".join(features)
        raise ValueError(f"{name} is no image classification set: its features are {found}; needs image and label")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_dir}: a {builder.info.file_format.value} set, without random access; "
            f"prepare it as array_record: {PREPARE} {name} --data-dir=DIR"
        )
    height, width, channels = image.shape
    return EncodedSet(
        class_names=tuple(label.names),
        channels=channels or 3,
        image_size=(height, width) if height and width else None,
        records={
            split: TfdsRecords(builder, split) for split, info in builder.info.splits.items() if info.num_examples
        },
        description=builder.info.description,
    )


def prepared_sets(data_dir: str) -> dict[str, Path]:
    """Finds the whole TFDS sets in `data_dir`: "name" or "name/config" -> directory of the newest version."""
    found: dict[str, Path] = {}
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for path in Path(data_dir).glob(pattern):
            version = _version(path.parent.name)
            key = path.parent.parent.relative_to(data_dir).as_posix()
            if version and (key not in found or version > _version(found[key].name)):
                found[key] = path.parent
    return found


def is_in_catalogue(name: str) -> bool:
    """Tells whether TFDS's catalogue has a set of that name; "/CONFIG" and ":VERSION" do not matter."""
    import tensorflow_datasets as tfds

    return re.split("[/:]", name)[0] in tfds.list_builders(with_community_datasets=False)


def _version(name):
    """Returns (1, 2, 3) for "1.2.3"; None for other names, such as those of sets that are being written."""
    match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", name)
    return tuple(map(int, match.groups())) if match else None


def _prepared_directory(name, data_dir):
    name, _, version = name.partition(":")
    found = prepared_sets(data_dir)
    if name in found and version and (found[name].parent / version / "dataset_info.json").exists():
        return found[name].parent / version
    if name in found and not version:
        return found[name]
    raise ValueError(_unknown(name + ":" * bool(version) + version, data_dir, found))


def _unknown(name, data_dir, found):
    there = ", ".join(sorted(set(found) - {"digits"})) or "none"
    known = f"known: digits, folder:PATH, and in {data_dir}: {there}"
    if is_in_catalogue(name):
        command = f"{PREPARE} {name} --data-dir={data_dir}"
        return f"data set {name!r} is not prepared in {data_dir}: {command}; {known}"
    return (
        f"unknown data set {name!r}; {known}; "
        f"{PREPARE} makes cifar10, cifar100, imagenet2012, and other sets of TFDS's catalogue"
    )
