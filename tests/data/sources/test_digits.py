"""The embedded digits: scikit-learn's images, split in proportion."""

import numpy as np

from sdpoint_jax import data
from sdpoint_jax.data.sources import digits


def test_digits_are_scikit_learns_each_in_one_split(tmp_path):
    from sklearn.datasets import load_digits

    dataset = data.load_dataset("digits", str(tmp_path))
    expected = load_digits()
    found = [example for split in digits.NUM_EXAMPLES for example in dataset.source(split)]
    key = lambda image, label: (image.tobytes(), int(label))  # noqa: E731
    scaled = np.rint(expected.images * 255 / 16).astype(np.uint8)
    assert sorted(key(example["image"], example["label"]) for example in found) == sorted(
        map(key, scaled, expected.target)
    )
    assert max(example["image"].max() for example in found) == 255


def test_every_digit_split_has_every_class_in_proportion():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    splits = digits.split_indices(labels)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1797))
    for split, indices in splits.items():
        share = digits.NUM_EXAMPLES[split] / 1797
        counts = np.bincount(labels[indices], minlength=10)
        assert np.abs(counts - share * np.bincount(labels)).max() < 2, split
