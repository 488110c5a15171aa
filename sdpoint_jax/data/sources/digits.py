"""The embedded data set: scikit-learn's 1,797 handwritten digits.

The images are 8x8, grey, with values 0..16, stored here as PNG with values 0..255. The split is fixed. Sort the images
by class, keeping scikit-learn's order within a class; of this list, 400 evenly spaced images are the test split; of the
others, 200 evenly spaced ones are the validation split; the remaining 1,197 are the training split. So each split has
every class in proportion, to within two images.
"""

import functools

import numpy as np

from sdpoint_jax.data.builder import ImageSet, Split

NAME, VERSION = "digits", "1.0.0"
NUM_EXAMPLES = {"train": 1197, "validation": 200, "test": 400}


def image_set() -> ImageSet:
    """Describes the digits, to be written as a TFDS data set."""
    return ImageSet(
        name=NAME,
        version=VERSION,
        description="scikit-learn's handwritten digits, 8x8 (UCI Optical Recognition of Digits).",
        class_names=[str(digit) for digit in range(10)],
        image_shape=(8, 8, 1),
        splits={split: Split(n, functools.partial(_examples, split)) for split, n in NUM_EXAMPLES.items()},
    )


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns split -> indices int [n] into scikit-learn's order, by the rule above; `labels` is int [1797]."""
    by_class = np.argsort(labels, kind="stable")
    others, test = _take_evenly(by_class, NUM_EXAMPLES["test"])
    train, validation = _take_evenly(others, NUM_EXAMPLES["validation"])
    return {"train": train, "validation": validation, "test": test}


def _take_evenly(indices, count):
    """Returns (the others, `count` evenly spaced ones)."""
    quota = np.arange(len(indices) + 1) * count // len(indices)
    taken = np.diff(quota) == 1
    return indices[~taken], indices[taken]


def _examples(split):
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for index in split_indices(digits.target)[split].tolist():
        yield index, {"image": Image.fromarray(images[index]), "label": int(digits.target[index])}
