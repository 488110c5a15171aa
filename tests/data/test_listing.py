"""Image folders as people have them: service files and folders are passed over, links to themselves end."""

import os
import shutil

import pytest
from folders import make_folder

from sdpoint_jax import data
from sdpoint_jax.data.listing import list_files
from sdpoint_jax.serving.offline import list_images


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", 2)


def splits_of(folder):
    found = data.load_dataset(f"folder:{folder}")
    assert found.class_names == ("cat", "dog", "fox")
    for split in found.splits:
        list(found.source(split))  # All can be decoded.
    return found.splits


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"]
)
@pytest.mark.parametrize("place", ["train", "test", "train/cat"])
def test_service_folders_are_no_classes_and_hold_no_images(folder, name, place):
    (folder / place / name).mkdir()
    shutil.copy(folder / "train/cat/000.png", folder / place / name / "000.png")
    assert splits_of(folder) == {"train": 6, "test": 6}
    assert len(list_images([str(folder)])[0]) == 12


@pytest.mark.parametrize("name", ["._000.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"])
def test_service_files_are_passed_over_without_a_warning(folder, name, caplog):
    for place in ("train", "train/cat"):
        (folder / place / name).write_bytes(b"\0\5\26\7")
    assert splits_of(folder) == {"train": 6, "test": 6} and not caplog.records
    images, passed_over = list_images([str(folder)])
    assert len(images) == 12 and not passed_over


@pytest.mark.parametrize("target", [".", "..", "../..", "../cat"])
def test_links_that_lead_back_end(folder, target):
    os.symlink(target, folder / "train/cat/loop")
    assert splits_of(folder) == {"train": 6, "test": 6}


def test_a_folder_that_is_reached_twice_counts_once(folder):
    (folder / "train/cat/real").mkdir()
    (folder / "train/cat/000.png").rename(folder / "train/cat/real/000.png")
    os.symlink("real", folder / "train/cat/0link")
    assert sorted(list_files(str(folder / "train/cat"))) == ["001.png", "real/000.png"]


def test_links_to_other_folders_are_followed(folder, tmp_path):
    (folder / "train/cat").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "train/cat")
    assert splits_of(folder) == {"train": 6, "test": 6}


def test_an_empty_folder_of_a_split_is_no_class(folder):
    (folder / "test/new").mkdir()
    assert splits_of(folder) == {"train": 6, "test": 6}


def test_two_folders_of_validation_images_are_told(folder, caplog):
    shutil.copytree(folder / "test", folder / "val")
    shutil.copytree(folder / "test", folder / "valid")
    assert set(splits_of(folder)) == {"train", "validation", "test"}
    assert f"{folder}/val is used, and {folder}/valid not" in caplog.text
