"""Data sets by name: the embedded digits, prepared TFDS sets, image folders."""

import dataclasses
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path

from sdpoint_jax.data.examples import DecodedSplit, Examples

PREPARE = "python -m sdpoint_jax.data.prepare"
ON_BAD_IMAGE = ("error", "skip")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """An image classification data set, read on demand.

    Attributes:
      name: what it was loaded by.
      class_names: the classes, in order of their labels.
      splits: split name -> number of examples.
      channels: 1 (grey) or 3 (RGB).
      image_size: (height, width) of every image, or None where they vary.
      on_bad_image: what batches do with an example that cannot be used: "error" or "skip".
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
        return len(self.class_names)

    @property
    def splits(self) -> dict[str, int]:
        return {split: len(decoded) for split, decoded in self.decoded.items()}

    def source(self, split: str) -> Examples:
        """The examples of a split, by random access: {"image": uint8 [H, W, C], "label": int}.

        Args:
          split: a split's name, a slice in TFDS's notation ("train[:90%]", "train[1000:]"), or a
            sum of these.

        Raises:
          ValueError: an unknown split, or one without examples.
        """
        examples = Examples(tuple((self.decoded[name], start, end) for name, start, end in self._parts(split)))
        if not len(examples):
            raise ValueError(f"split {split!r} of {self.name} holds no examples; splits: {self._sizes()}")
        return examples

    def _parts(self, split):
        import tensorflow_datasets as tfds

        sizes = {name: types.SimpleNamespace(num_examples=size) for name, size in self.splits.items()}
        try:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
            ends = [sizes[part.splitname].num_examples if part.to is None else part.to for part in parts]
            return [(part.splitname, part.from_ or 0, end) for part, end in zip(parts, ends, strict=True)]
        except Exception:
            message = f"unknown split {split!r} of {self.name}; valid: slices and sums of {self._sizes()}"
            raise ValueError(message) from None

    def _sizes(self):
        return ", ".join(f"{name} ({size})" for name, size in self.splits.items())


def load_dataset(name: str, data_dir: str | None = None, *, on_bad_image: str = "error") -> Dataset:
    """Opens a data set.

    Args:
      name: "digits", prepared on first use; a prepared TFDS image classification set, such as
        "cifar10" or "imagenet2012", with its config and version if need be ("name/config:1.0.0");
        or "folder:/path" with train/CLASS/IMAGE and, both optional, val/CLASS/IMAGE and
        test/CLASS/IMAGE (splits "train", "validation", "test").
      data_dir: where prepared sets are. By default TFDS's: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      on_bad_image: what batches do with an example that cannot be used. "error" raises
        BadImageError, which names its place. "skip" warns, once for each; in training batches
        another image takes its place, in evaluation batches its mask is 0.

    Raises:
      ValueError: an unknown or unprepared name (lists the known ones), a folder or set of another
        form.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"unknown on_bad_image {on_bad_image!r}; valid: {', '.join(ON_BAD_IMAGE)}")
    if name.startswith("folder:"):
        return _folder_dataset(name, on_bad_image)
    data_dir = os.path.expanduser(data_dir or default_data_dir())
    if name == "digits":
        from sdpoint_jax.data import builder, digits

        builder.write(digits.image_set(), data_dir, quiet=True)
    return _tfds_dataset(name, data_dir, on_bad_image)


def default_data_dir() -> str:
    """TFDS's own: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")


def _folder_dataset(name, on_bad_image):
    from sdpoint_jax.data import folder

    class_names, records = folder.read_folder(os.path.expanduser(name.removeprefix("folder:")))
    return _dataset(name, class_names, records, 3, folder.common_image_size(records), on_bad_image)


def _dataset(name, class_names, records, channels, image_size, on_bad_image):
    decoded = {
        split: DecodedSplit(part, channels=channels, num_classes=len(class_names), image_size=image_size)
        for split, part in records.items()
    }
    return Dataset(name, class_names, channels, image_size, on_bad_image, decoded)


class TfdsRecords:
    """The encoded examples of one split of a TFDS set; see `examples.Records`."""

    def __init__(self, builder, split: str):
        import tensorflow_datasets as tfds

        self.place = f"{builder.info.full_name} {split}"
        self.source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        example = self.source[index]
        return example["image"], int(example["label"])

    def where(self, index: int) -> str:
        file_name = self.source[index].get("file_name", b"").decode()
        return f"{self.place}[{index}] {file_name}".rstrip()


def _tfds_dataset(name, data_dir, on_bad_image):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(_prepared_directory(name, data_dir))
    features = dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    is_image, is_label = tfds.features.Image, tfds.features.ClassLabel
    if not (isinstance(image, is_image) and isinstance(label, is_label)):
        raise ValueError(f"{name} is no image classification set: its features are {', '.join(features)}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_dir}: a {builder.info.file_format.value} set, without random access; "
            f"prepare it as array_record: {PREPARE} {name} --data-dir=DIR"
        )
    height, width, channels = image.shape
    image_size = (height, width) if height and width else None
    records = {split: TfdsRecords(builder, split) for split, info in builder.info.splits.items() if info.num_examples}
    return _dataset(name, tuple(label.names), records, channels or 3, image_size, on_bad_image)


def prepared_sets(data_dir: str) -> dict[str, Path]:
    """The whole TFDS sets in `data_dir`: "name" or "name/config" -> newest version's directory."""
    found = {}
    for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json"):
        for path in Path(data_dir).glob(pattern):
            version = _version(path.parent.name)
            key = path.parent.parent.relative_to(data_dir).as_posix()
            if version and (key not in found or version > _version(found[key].name)):
                found[key] = path.parent
    return found


def _version(name):
    """(1, 2, 3) of "1.2.3"; None for other names, such as those of sets that are being written."""
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
    import tensorflow_datasets as tfds

    there = ", ".join(sorted(set(found) - {"digits"})) or "none"
    known = f"known: digits, folder:PATH, and in {data_dir}: {there}"
    if re.split("[/:]", name)[0] in tfds.list_builders(with_community_datasets=False):
        command = f"{PREPARE} {name} --data-dir={data_dir}"
        return f"data set {name!r} is not prepared in {data_dir}: {command}; {known}"
    return (
        f"unknown data set {name!r}; {known}; "
        f"{PREPARE} makes cifar10, cifar100, imagenet2012, and other sets of TFDS's catalogue"
    )
