"""Data sets of a user's own, from any objects with `__len__` and `__getitem__`."""

import numpy as np
import pytest
import tiny
from PIL import Image

from sdpoint_jax import data
from sdpoint_jax.experiment import Experiment

PIXELS = np.random.RandomState(0).randint(0, 256, (40, 8, 8)).astype(np.uint8)


class Pairs:
    """As torchvision's data sets: PIL images and labels in pairs, and the attribute `classes`."""

    classes = list("abcde")

    def __init__(self, pixels=PIXELS):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), index % 5


class Rows(Pairs):
    """As Hugging Face's: a dict for each example."""

    def __getitem__(self, index):
        return {"image": self.pixels[index], "label": np.int64(index % 5), "id": index}


class Odd(Pairs):
    """Examples of another form."""

    def __init__(self, example):
        super().__init__()
        self.example = example

    def __getitem__(self, index):
        return self.example if index == 3 else super().__getitem__(index)


@pytest.mark.parametrize("kind", [Pairs, Rows])
@pytest.mark.parametrize("image_size", [None, (8, 8)])
def test_examples_are_those_of_the_source(kind, image_size):
    dataset = data.from_sources({"train": kind(), "test": kind(PIXELS[:7])}, image_size=image_size)
    assert dataset.splits == {"train": 40, "test": 7} and dataset.channels == 1
    assert dataset.class_names == tuple("abcde")
    examples = dataset.source("train[50%:]+test")
    assert len(examples) == 27 and examples.cached == bool(image_size)
    for index, row in ((0, 20), (19, 39), (20, 0)):
        np.testing.assert_array_equal(examples[index]["image"], PIXELS[row][..., None])
        assert examples[index]["label"] == row % 5


def test_colours_are_kept():
    colours = np.stack([PIXELS] * 3, -1)
    dataset = data.from_sources({"train": Pairs(colours)})
    assert dataset.channels == 3
    np.testing.assert_array_equal(dataset.source("train")[4]["image"], colours[4])


def test_the_digest_tells_other_images_and_labels():
    def digest(source):
        return data.from_sources({"train": source}).source("train").digest

    class Relabelled(Pairs):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], 0

    digests = [digest(Pairs()), digest(Pairs(255 - PIXELS)), digest(Pairs(PIXELS[:39])), digest(Relabelled())]
    assert len(set(digests)) == 4 and digest(Pairs()) == digests[0]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((PIXELS[0] / 255, 1), r"image float64 \[8, 8, 1\]; needs uint8 \[H, W, 1\]"),
        ((np.zeros((8, 8, 3), np.uint8), 1), r"image uint8 \[8, 8, 3\]; needs uint8 \[H, W, 1\]"),
        ((PIXELS[0], 5), r"label 5 is not in \[0, 5\)"),
        ((PIXELS[0], 1.5), r"is tuple; needs \(image, label\)"),
        ({"img": PIXELS[0], "label": 1}, r"is keys img, label; needs \(image, label\), or a dict with image and label"),
        (PIXELS[0], r"is ndarray; needs \(image, label\)"),
    ],
)
def test_an_example_of_another_form_is_named(example, message):
    examples = data.from_sources({"train": Odd(example)}, name="mine").source("train")
    with pytest.raises(data.BadImageError, match=rf"mine train\[3\]: {message}"):
        examples[3]


def test_a_set_of_another_form_is_refused():
    with pytest.raises(ValueError, match="needs splits by name"):
        data.from_sources({})
    with pytest.raises(ValueError, match="needs splits by name, each with examples"):
        data.from_sources({"train": Pairs(PIXELS[:0])})
    with pytest.raises(ValueError, match="no attribute `classes`; give from_sources"):
        data.from_sources({"train": list(Pairs())})


def test_an_experiment_reads_it():
    config = tiny.config(batch_size=8, evaluation_batch_size=8)
    config.dataset.augmentation = "none"
    splits = {"train": Pairs(), "validation": Pairs(PIXELS[:12])}
    assert Experiment(config, dataset=splits).resize == (9, 9)  # As photographs, whose sizes vary.
    experiment = Experiment(config, dataset=data.from_sources(splits, image_size=(8, 8)))
    assert experiment.model.num_classes == 5 and experiment.config.dataset.name == "given"
    with experiment.training_batches(0) as batches:
        batch = next(iter(batches))
    for image, label in zip(batch["images"], batch["labels"], strict=True):
        (index,) = np.flatnonzero((PIXELS == image[..., 0]).all((1, 2)))
        assert index % 5 == label
    with experiment.evaluation_batches(experiment.validation_split) as batches:
        assert sum(batch["mask"].sum() for batch in batches) == 12
