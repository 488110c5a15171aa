"""Data sets by name, and their splits."""

import itertools
import subprocess
import sys
import types
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from sdpoint_jax import data
from sdpoint_jax.data import builder
from sdpoint_jax.data.sources import digits

SPLITS = {"train": 1197, "validation": 200, "test": 400}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def dataset(data_dir):
    return data.load_dataset("digits", data_dir)


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, sdpoint_jax.data; "
        "print({'jax', 'grain', 'tensorflow_datasets', 'cv2', 'sklearn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_digits_have_the_documented_form(dataset):
    assert dataset.name == "digits"
    assert dataset.splits == SPLITS
    assert dataset.class_names == tuple("0123456789") and dataset.num_classes == 10
    assert dataset.channels == 1 and dataset.image_size == (8, 8)


def test_processes_that_race_to_prepare_the_digits_all_get_them(tmp_path):
    code = (
        "import sys; from sdpoint_jax import data; print(len(data.load_dataset('digits', sys.argv[1]).source('test')))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)]
    run = lambda _: subprocess.run(command, capture_output=True, text=True)  # noqa: E731
    with futures.ThreadPoolExecutor() as pool:
        results = list(pool.map(run, range(2)))
    assert [(result.returncode, result.stdout.strip()) for result in results] == [(0, "400")] * 2
    assert [path.name for path in (tmp_path / "digits").iterdir() if path.is_dir()] == ["1.0.0"]


def test_a_set_that_was_left_half_written_is_not_taken_for_one(tmp_path):
    half = tmp_path / "digits" / "incomplete.ABCDEF_1.0.0"  # Of another program, which may be at work.
    half.mkdir(parents=True)
    (half / "dataset_info.json").write_text("{}")
    assert data.load_dataset("digits", str(tmp_path)).splits == SPLITS
    assert half.exists()


def test_a_failing_preparation_leaves_no_set(tmp_path):
    good = digits.image_set()
    split = builder.Split(401, good.splits["test"].examples)
    short = builder.ImageSet(**{**vars(good), "splits": {"test": split}})
    with pytest.raises(ValueError, match="digits test: 400 examples found, 401 expected"):
        builder.write(short, str(tmp_path), quiet=True)
    assert not [path for path in (tmp_path / "digits").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "split, length",
    [("train[:90%]", 1077), ("train[1000:]", 197), ("train[-7:]", 7), ("validation+test", 600)],
)
def test_a_split_may_be_sliced_and_joined(dataset, split, length):
    assert len(dataset.source(split)) == length


@pytest.mark.parametrize("split", ["val", "valid", "validation", "val[:100]+valid[100:]"])
def test_the_validation_split_has_three_names(dataset, split):
    labels = [example["label"] for example in dataset.source(split)]
    assert labels == [example["label"] for example in dataset.source("validation")]


def test_slices_join_to_the_whole(dataset):
    whole, head, tail = (dataset.source(split) for split in ("test", "test[:30%]", "test[30%:]"))
    joined = [*head, *tail]
    assert len(joined) == len(whole)
    for one, other in zip(whole, joined, strict=True):
        assert one["label"] == other["label"]
        np.testing.assert_array_equal(one["image"], other["image"])


@pytest.mark.parametrize("split", ["dev", "train[:", "train[:10%", "", "train[5:5]"])
def test_an_impossible_split_names_the_valid_ones(dataset, split):
    with pytest.raises(ValueError, match=r"digits.*train \(1197\)") as error:
        dataset.source(split)
    assert repr(split) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_lists_the_known_ones(dataset, data_dir):
    with pytest.raises(ValueError, match="'no_such'.*digits, folder:PATH.*prepare") as error:
        data.load_dataset("no_such", data_dir)
    assert "\n" not in str(error.value)


def test_a_set_that_is_not_prepared_comes_with_the_command_that_does_it(data_dir):
    command = f"python -m sdpoint_jax prepare cifar10 --data-dir={data_dir}"
    with pytest.raises(ValueError, match=f"'cifar10' is not prepared.*{command}"):
        data.load_dataset("cifar10", data_dir)


def test_a_version_may_be_asked_for(dataset, data_dir):
    assert data.load_dataset("digits:1.0.0", data_dir).splits == SPLITS
    with pytest.raises(ValueError, match="digits:2.0.0"):
        data.load_dataset("digits:2.0.0", data_dir)


def test_the_data_dir_of_tfds_is_the_default(dataset, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert data.load_dataset("digits").splits == SPLITS


def test_an_unknown_treatment_of_bad_images_names_the_known_ones(data_dir):
    with pytest.raises(ValueError, match="'ignore'.*error, skip"):
        data.load_dataset("digits", data_dir, on_bad_image="ignore")


@pytest.mark.parametrize("size", [7, 50, 1197])
def test_slices_are_those_of_tfds(size):
    import tensorflow_datasets as tfds

    info = {"train": types.SimpleNamespace(num_examples=size)}
    dataset = data.from_sources({"train": [(np.zeros((1, 1), np.uint8), 0)] * size}, ["only"])
    ends = ["", "0", "5", "7", "-3", "10%", "33%", "-25%", "12.5%", "100%", "101%", "1_0", "1.5", "%", "x"]
    for start, end in itertools.product(ends, ends):
        split = f"train[{start}:{end}]"
        try:
            (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(info)
            expected = range(size)[part.from_ : part.to]
        except (ValueError, AssertionError):
            expected = range(0)
        try:
            ((_, first, last),) = dataset.source(split).parts
        except ValueError:
            first = last = 0
        assert len(range(first, last)) == len(expected) and (not expected or first == expected[0]), split


def test_an_image_folder_needs_no_tfds(tmp_path):
    for path in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    code = (
        "import sys; from sdpoint_jax import data; "
        f"dataset = data.load_dataset('folder:{tmp_path}'); "
        "batches = data.training_batches(dataset, 'train[:100%]', batch_size=2, image_size=8, "
        "seed=0, augmentation='none'); "
        "print(next(iter(batches))['images'].shape, 'tensorflow_datasets' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "(2, 8, 8, 3) False"
