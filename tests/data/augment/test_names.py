"""Augmentations by name: what a config may ask for, and that the parts of one do not disturb each other."""

import numpy as np
import pytest

from sdpoint_jax import data
from sdpoint_jax.data import augment

NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
EVERYTHING = "+rand_augment:3,30+trivial_augment+random_erasing:1,random"
NAMES = [*augment.CROPS, *(crop + EVERYTHING for crop in augment.CROPS), "shift+random_erasing:1"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("shape", [(32, 32, 3), (50, 70, 1), (7, 300, 3), (1, 1, 3)])
def test_every_augmentation_takes_any_image_to_any_size_and_leaves_it_as_it_was(name, size, shape):
    augmentation = augment.augmentation_named(name, size)
    image = NOISE[: shape[0], : shape[1], : shape[2]].copy()
    before = image.copy()
    for row in augmentation.draw(np.random.default_rng(0), 20):
        assert row.shape == (augmentation.numbers,)
        result = augmentation.apply(image, row, size)
        assert result.shape == (*size, shape[-1]) and result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_a_name_alone_draws_and_crops_as_its_augmentation():
    crop, named = augment.AUGMENTATIONS["pad_crop_flip"], augment.augmentation_named("pad_crop_flip", (32, 32))
    rows = crop.draw(np.random.default_rng(5), 20)
    np.testing.assert_array_equal(named.draw(np.random.default_rng(5), 20), rows)
    for row in rows:
        image = NOISE[:32, :32]
        np.testing.assert_array_equal(named.apply(image, row, (32, 32)), crop.apply(image, row, (32, 32)))


def test_a_further_part_leaves_the_others_as_they_are():
    size = (32, 32)
    one, two, three = (
        augment.augmentation_named(name, size)
        for name in (
            "pad_crop_flip", "pad_crop_flip+trivial_augment", "pad_crop_flip+trivial_augment+random_erasing:0"
        )
    )  # fmt: skip
    draws = [chain.draw(np.random.default_rng(7), 64) for chain in (one, two, three)]
    np.testing.assert_array_equal(draws[1][:, : one.numbers], draws[0])
    np.testing.assert_array_equal(draws[2][:, : two.numbers], draws[1])
    trivial = augment.AUGMENTATIONS["trivial_augment"]
    for first, second, third in zip(*draws):
        cropped = one.apply(NOISE[:32, :32], first, size)
        expected = trivial.apply(cropped, second[one.numbers :], size)
        np.testing.assert_array_equal(two.apply(NOISE[:32, :32], second, size), expected)
        np.testing.assert_array_equal(three.apply(NOISE[:32, :32], third, size), expected)


def test_settings_reach_the_augmentation():
    named = augment.augmentation_named("none + rand_augment:5,0 + random_erasing:1,random", (32, 32))
    assert named.numbers == 0 + 2 * 5 + augment.AUGMENTATIONS["random_erasing"].numbers
    black = np.zeros((32, 32, 3), np.uint8)
    row = named.draw(np.random.default_rng(0), 1)[0]
    assert len(np.unique(named.apply(black, row, (32, 32)))) > 20
    grey = np.full((32, 32, 3), 77, np.uint8)
    weakest, strongest = (
        augment.augmentation_named(f"none+rand_augment:1,{magnitude}", (32, 32)) for magnitude in (0, 30)
    )
    rows = weakest.draw(np.random.default_rng(0), 100)
    assert all((weakest.apply(grey, row, (32, 32)) == grey).all() for row in rows)
    assert any((strongest.apply(grey, row, (32, 32)) != grey).any() for row in rows)


VALID = (
    "valid: none, shift, pad_crop_flip, random_resized_crop_flip; then, each after a \\+: "
    "trivial_augment, rand_augment:NUM_OPS,MAGNITUDE, random_erasing:P,VALUE"
)


@pytest.mark.parametrize(
    "name, message",
    [
        ("cutout", f"unknown 'cutout' at the beginning; {VALID}"),
        ("", f"unknown '' at the beginning; {VALID}"),
        ("trivial_augment", f"unknown 'trivial_augment' at the beginning; {VALID}"),
        ("pad_crop_flip:4", f"unknown 'pad_crop_flip:4' at the beginning; {VALID}"),
        ("shift+cutout:1", rf"unknown 'cutout' after a \+; {VALID}"),
        ("shift+pad_crop_flip", r"unknown 'pad_crop_flip' after a \+"),
        ("shift+", r"unknown '' after a \+"),
        ("shift+trivial_augment:2", "trivial_augment: 1 settings, 0 at most"),
        ("shift+rand_augment:2,9,31", "rand_augment:NUM_OPS,MAGNITUDE: 3 settings, 2 at most"),
        ("shift+rand_augment:2.5", "rand_augment:NUM_OPS,MAGNITUDE: num_ops '2.5': not of type int"),
        ("shift+rand_augment:2,31", "magnitude 31: valid are 0 to 30"),
        ("shift+random_erasing:2", "random_erasing:P,VALUE: p 2.0: a probability from 0 to 1"),
        ("shift+random_erasing:0.5,mean", "value 'mean': valid are zero, random"),
    ],
)
def test_a_wrong_name_or_setting_is_one_line_that_says_what_is_valid(name, message):
    with pytest.raises(ValueError, match=f"^augmentation '{name.replace('+', '[+]')}': .*{message}") as error:
        data.check_augmentation(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_right_name_passes_the_check(name):
    data.check_augmentation(name)
