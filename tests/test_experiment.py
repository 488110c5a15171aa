"""An experiment finds the splits that its purposes need, opens them at once, and says which they are."""

import pytest
import tiny
from folders import make_folder

from sdpoint_jax import data
from sdpoint_jax.experiment import Experiment


def experiment_of(folder, **dataset):
    config = tiny.config()
    values = {"name": f"folder:{folder}", "mean": (0.5,) * 3, "std": (0.3,) * 3, "image_size": (8, 8)}
    config.dataset.update(values | dataset)
    return Experiment(config)


@pytest.mark.parametrize(
    ("splits", "validation", "test"),
    [
        (("train", "val"), "validation", "validation"),
        (("train", "valid"), "validation", "validation"),
        (("train", "validation", "test"), "validation", "test"),
        (("train", "test"), "test", "test"),
    ],
)
def test_the_splits_that_are_there_are_used(tmp_path, splits, validation, test):
    found = experiment_of(make_folder(tmp_path, 1, splits))
    assert (found.validation_split, found.test_split) == (validation, test)
    said = found.describe_data(training="train", validation=validation, sweep=test)
    assert said == (
        f"images of folder:{tmp_path}: training train (3), validation {validation} (3), sweep {test} (3); "
        "3 classes: cat, dog, fox"
    )


def test_training_images_alone_say_how_to_hold_some_out(tmp_path):
    make_folder(tmp_path, 20, ["train"])
    with pytest.raises(ValueError, match=r"neither validation nor test images, only train \(60\); .*=train\[90%:\]"):
        experiment_of(tmp_path).validation_split  # noqa: B018
    found = experiment_of(tmp_path, train_split="train[:90%]", validation_split="train[90%:]")
    assert found.num_training_images == 54 and found.test_split == found.validation_split == "train[90%:]"


def test_a_test_split_that_is_named_is_the_validation_split_too_where_there_is_none(tmp_path):
    found = experiment_of(make_folder(tmp_path, 20, ["train"]), test_split="train[90%:]")
    assert found.validation_split == found.test_split == "train[90%:]"


@pytest.mark.parametrize("key", ["train_split", "validation_split", "test_split"])
def test_a_split_that_cannot_be_read_is_found_at_once(tmp_path, key):
    splits = {"train_split": "train", "validation_split": "val", "test_split": "test"}
    make_folder(tmp_path, 1, splits.values())
    for path in (tmp_path / splits[key]).rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(data.BadImageError, match=f"{tmp_path}/{splits[key]}/"):
        found = experiment_of(tmp_path, image_size=(8, 8))
        getattr(found, key)
