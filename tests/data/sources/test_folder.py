"""Image folders: read as torchvision's ImageFolder would, and nothing is lost without a word."""

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpoint_jax import data
from sdpoint_jax.data.sources import folder

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def image_bytes(seed=0, size=(20, 30), mode="RGB", format="PNG", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def write(root, files):
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return f"folder:{root}"


def small_folder(root, splits=("train", "val", "test"), size=(20, 30)):
    return write(
        root,
        {
            f"{split}/{name}/{index}.png": image_bytes(index, size)
            for split in splits
            for name in ("cat", "dog", "Zebra")
            for index in range(6)
        },
    )


def test_a_folder_is_a_data_set(tmp_path):
    dataset = data.load_dataset(small_folder(tmp_path))
    assert dataset.class_names == ("Zebra", "cat", "dog")  # sorted as torchvision sorts
    assert dataset.splits == {"train": 18, "validation": 18, "test": 18}
    assert dataset.channels == 3 and dataset.image_size == (20, 30)
    for example in dataset.source("train"):
        assert example["image"].shape == (20, 30, 3) and example["image"].dtype == np.uint8


def test_labels_and_pixels_are_those_of_the_files(tmp_path):
    dataset = data.load_dataset(small_folder(tmp_path))
    source = dataset.source("validation")
    for index in range(len(source)):
        path = Path(source.where(index))
        example = source[index]
        assert dataset.class_names[example["label"]] == path.parent.name
        with Image.open(path) as image:
            np.testing.assert_array_equal(example["image"], np.asarray(image))


def test_the_order_is_fixed_and_mixes_the_classes(tmp_path):
    first = data.load_dataset(small_folder(tmp_path / "a")).source("train")
    again = data.load_dataset(small_folder(tmp_path / "b")).source("train")
    labels = [example["label"] for example in first]
    assert labels == [example["label"] for example in again] != sorted(labels)


@pytest.mark.parametrize("name, split", [("val", "validation"), ("validation", "validation")])
def test_the_validation_folder_has_two_names(tmp_path, name, split):
    assert split in data.load_dataset(small_folder(tmp_path, ("train", name))).splits


def test_a_folder_without_val_says_so_when_it_is_asked_for(tmp_path):
    dataset = data.load_dataset(small_folder(tmp_path, ("train",)))
    with pytest.raises(ValueError, match=rf"'validation' of folder:{tmp_path}.*train \(18\)"):
        dataset.source("validation")
    assert len(dataset.source("train[15:]")) == 3


def test_images_of_several_sizes_have_no_common_one(tmp_path):
    small_folder(tmp_path)
    write(tmp_path, {"val/cat/other.png": image_bytes(size=(21, 30))})
    assert data.load_dataset(f"folder:{tmp_path}").image_size is None


def test_images_below_a_class_are_of_that_class(tmp_path):
    small_folder(tmp_path)
    write(tmp_path, {"train/dog/puppies/cat/1.JPG": image_bytes(format="JPEG")})
    source = data.load_dataset(f"folder:{tmp_path}").source("train")
    (index,) = (i for i in range(len(source)) if "puppies" in source.where(i))
    assert source[index]["label"] == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "no 'train' folder"),
        (lambda root: small_folder(root, ("val",)), "no 'train' folder"),
        (lambda root: write(root, {"train/a.png": image_bytes()}), "train: 0 class folders"),
        (lambda root: write(root, {"train/a/1.png": image_bytes()}), "train: 1 class folders"),
        (lambda root: (small_folder(root), (root / "train/ant").mkdir()), "train/ant: no images"),
        (lambda root: (small_folder(root), (root / "val/cat").rename(root / "val/ant")), "val/ant: no such class"),
        (lambda root: (small_folder(root), shutil.rmtree(root / "val"), (root / "val").mkdir()),
         "val: no images"),
    ],
)  # fmt: skip
def test_an_unusable_folder_is_refused_in_one_line_with_its_path(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message.split('/')[-1]}") as error:
        data.load_dataset(f"folder:{tmp_path}")
    assert "\n" not in str(error.value) and message in str(error.value)


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="folder:/no/such/place: there is no such folder"):
        data.load_dataset("folder:/no/such/place")


JPEG, PNG = image_bytes(format="JPEG"), image_bytes()
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
READABLE = {
    "grey.jpg": image_bytes(mode="L", format="JPEG"),
    "cmyk.jpg": image_bytes(mode="CMYK", format="JPEG"),
    "rotated.jpg": image_bytes(format="JPEG", exif=ROTATED),
    "progressive.jpg": image_bytes(format="JPEG", progressive=True),
    "png_called.jpg": PNG,
    "jpeg_called.png": JPEG,
    "webp_called.jpg": image_bytes(format="WEBP"),
    "gif_called.png": image_bytes(mode="P", format="GIF"),
    "rubbish_after.jpg": JPEG + b"rubbish",
    "palette.png": image_bytes(mode="P"),
    "see_through_palette.png": image_bytes(mode="P", transparency=bytes(range(99))),
    "alpha.png": image_bytes(mode="RGBA"),
    "grey_alpha.png": image_bytes(mode="LA"),
    "bits.png": image_bytes(mode="1"),
    "deep.png": image_bytes(mode="I;16"),
    "float.tiff": image_bytes(mode="F", format="TIFF"),
    "lossless.webp": image_bytes(format="WEBP", lossless=True),
    "alpha.webp": image_bytes(mode="RGBA", format="WEBP"),
    "bitmap.bmp": image_bytes(format="BMP"),
    "map.ppm": image_bytes(format="PPM"),
    "UPPER.JPEG": JPEG,
    "name with spaces, ümlaut.png": PNG,
    "pixel.png": image_bytes(size=(1, 1)),
    "long.png": image_bytes(size=(1, 3000)),
    "tall.jpg": image_bytes(size=(2000, 2), format="JPEG"),
    "large.jpg": image_bytes(size=(900, 1200), format="JPEG"),
}
UNREADABLE = {
    "empty.jpg": b"",
    "empty.png": b"",
    "text.jpg": b"Not an image.",
    "html.png": b"<!DOCTYPE html><title>404</title>",
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "only_a_header.jpg": JPEG[:30],
    "start.jpg": b"\xff\xd8",
    "truncated.png": PNG[: len(PNG) // 2],
    "broken_checksum.png": PNG[:45] + bytes([PNG[45] ^ 255]) + PNG[46:],
    "truncated.webp": image_bytes(format="WEBP")[:60],
    "zeros.jpg": bytes(1000),
}
PASSED_OVER = {"picture.xcf": b"x", "notes.txt": b"x"}
# Hidden, or left by a system: not a word is lost on them.
SERVICE = {"Thumbs.db": b"x", "._resource.jpg": b"\0\5\x16\7" + bytes(90)}
assert len(READABLE) + len(UNREADABLE) + len(PASSED_OVER) == 39


@pytest.fixture
def hostile(tmp_path):
    files = {**READABLE, **UNREADABLE, **PASSED_OVER, **SERVICE}
    for split in ("train", "val"):
        write(tmp_path, {f"{split}/{i % 2}/{name}": files[name] for i, name in enumerate(files)})
    return tmp_path


def test_of_hostile_files_every_one_is_read_or_reported(hostile, caplog):
    dataset = data.load_dataset(f"folder:{hostile}", on_bad_image="skip")
    with data.evaluation_batches(dataset, "validation", batch_size=8, image_size=24) as batches:
        read = int(sum(batch["mask"].sum() for batch in batches))
    skipped = {os.path.basename(place) for place in dataset.bad_images}
    refused = {name for name in PASSED_OVER if name in caplog.text}
    assert skipped == set(UNREADABLE)
    assert refused == set(PASSED_OVER)
    assert read + len(skipped) + len(refused) == 39
    assert not any(name in caplog.text for name in SERVICE)
    for place, reason in dataset.bad_images.items():
        assert os.path.exists(place) and f"{place}: {reason}" in caplog.text and "\n" not in reason


def test_hostile_files_do_not_stop_training(hostile):
    dataset = data.load_dataset(f"folder:{hostile}", on_bad_image="skip")
    with data.training_batches(
        dataset, "train", batch_size=19, seed=0, image_size=24,
        augmentation="random_resized_crop_flip",
    ) as batches:  # fmt: skip
        images = [next(batches)["images"] for _ in range(4)]  # two epochs
    assert all(batch.shape == (19, 24, 24, 3) for batch in images)
    assert {os.path.basename(place) for place in dataset.bad_images} == set(UNREADABLE)


def test_without_skipping_a_hostile_file_is_an_error_with_its_path(hostile):
    dataset = data.load_dataset(f"folder:{hostile}")
    with (
        data.evaluation_batches(dataset, "validation", batch_size=8, image_size=24) as batches,
        pytest.raises(data.BadImageError) as error,
    ):
        list(batches)
    place, _, reason = str(error.value).partition(": ")
    assert os.path.basename(place) in UNREADABLE and os.path.exists(place) and reason


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_readable_hostile_files_look_as_torchvision_shows_them(hostile):
    source = data.load_dataset(f"folder:{hostile}").source("train")
    seen = set()
    for index in range(len(source)):
        path = source.where(index)
        if os.path.basename(path) in READABLE:
            with Image.open(path) as image:
                expected = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(source[index]["image"], expected, path)
            seen.add(os.path.basename(path))
    assert seen == set(READABLE)


def test_an_image_of_another_size_in_a_set_of_one_size_is_reported(tmp_path, monkeypatch):
    small_folder(tmp_path)
    write(tmp_path, {"train/cat/other.png": image_bytes(size=(21, 30))})
    monkeypatch.setattr(folder, "common_image_size", lambda _: (20, 30))
    dataset = data.load_dataset(f"folder:{tmp_path}")
    with pytest.raises(data.BadImageError, match="other.png: size 21x30 differs"):
        list(dataset.source("train"))


def test_a_file_that_vanishes_is_reported(tmp_path):
    dataset = data.load_dataset(small_folder(tmp_path))
    (tmp_path / "train/cat/3.png").unlink()
    with pytest.raises(data.BadImageError, match="train/cat/3.png: No such file"):
        list(dataset.source("train"))


def test_real_photographs_flow_through(tmp_path):
    photographs = sorted((SHARED / "jpeg").glob("*.JPEG"))[:12]
    if not photographs:
        pytest.skip(f"{SHARED} is not there")
    write(tmp_path, {f"train/{i % 2}/{p.name}": p.read_bytes() for i, p in enumerate(photographs)})
    dataset = data.load_dataset(f"folder:{tmp_path}")
    assert dataset.image_size is None
    with data.training_batches(
        dataset, "train", batch_size=12, seed=0, image_size=(64, 96),
        augmentation="random_resized_crop_flip",
    ) as batches:  # fmt: skip
        batch = next(batches)
    assert batch["images"].shape == (12, 64, 96, 3) and batch["images"].std() > 30
