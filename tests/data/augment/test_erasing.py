"""Random erasing: torchvision's rectangles, on uint8 images."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from sdpoint_jax.data.augment import erasing

IMAGE = np.random.default_rng(0).integers(1, 256, (32, 40, 3), np.uint8)  # Nowhere black.
SIZES = [(32, 32), (20, 60), (60, 20), (4, 200)]


def rows(times, seed=1):
    return erasing.random_erasing().draw(np.random.default_rng(seed), times)


def defined_box(height, width, rng):
    """torchvision's RandomErasing.get_params, on Python's random numbers."""
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


@pytest.fixture(params=["definition", "torchvision"])
def draw_box(request):
    """(height, width) -> (top, left, height, width), or None for no rectangle."""
    if request.param == "definition":
        rng = random.Random(2)
        return lambda height, width: defined_box(height, width, rng)
    get_params = request.getfixturevalue("torchvision").RandomErasing.get_params
    import torch

    torch.manual_seed(2)

    def box(height, width):
        *found, _ = get_params(torch.zeros(1, height, width), (0.02, 0.33), (0.3, 3.3), [0.0])
        return None if tuple(found[2:]) == (height, width) else tuple(found)

    return box


@pytest.mark.parametrize("height, width", SIZES)
def test_rectangles_have_torchvisions_distribution(height, width, draw_box):
    ours = [erasing.erased_box((height, width), row[2:]) for row in rows(3000)]
    theirs = [draw_box(height, width) for _ in range(3000)]
    none = [sum(box is None for box in boxes) for boxes in (ours, theirs)]
    assert stats.fisher_exact([none, [3000 - count for count in none]]).pvalue > 0.001
    ours, theirs = (np.array([box for box in boxes if box]) for boxes in (ours, theirs))
    for measure in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: box[:, 2] / box[:, 3],  # aspect
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] < height).all() and (ours[:, 3] < width).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_so_many_images_are_changed(p):
    erase = erasing.random_erasing(p)
    changed = sum((erase.apply(IMAGE, row, (32, 40)) != IMAGE).any() for row in rows(1000))
    assert stats.binomtest(int(changed), 1000, p).pvalue > 0.001


@pytest.mark.parametrize("value", erasing.VALUES)
def test_the_rectangle_is_overwritten_and_the_rest_is_left(value):
    erase = erasing.random_erasing(1.0, value)
    for row in rows(50):
        top, left, height, width = erasing.erased_box((32, 40), row[2:])
        before = IMAGE.copy()
        erased = erase.apply(IMAGE, row, (32, 40))
        np.testing.assert_array_equal(IMAGE, before)
        inside = np.zeros(IMAGE.shape, bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(erased[~inside], IMAGE[~inside])
        if value == "zero":
            assert (erased[inside] == 0).all()


def test_noise_is_uniform_and_differs_from_image_to_image():
    erase = erasing.random_erasing(1.0, "random")
    black = np.zeros((40, 40, 3), np.uint8)
    erased = [erase.apply(black, row, (40, 40)) for row in rows(200)]
    boxes = [erasing.erased_box((40, 40), row[2:]) for row in rows(200)]
    noise = np.concatenate([image[t : t + h, w : w + n].ravel() for image, (t, w, h, n) in zip(erased, boxes)])
    assert stats.chisquare(np.bincount(noise, minlength=256)).pvalue > 0.001
    assert len({image.tobytes() for image in erased}) == 200
    again = [erase.apply(black, row, (40, 40)) for row in rows(200)]
    np.testing.assert_array_equal(erased, again)


def test_an_image_too_small_for_any_rectangle_is_left():
    pixel = IMAGE[:1, :1]
    for row in rows(20):
        np.testing.assert_array_equal(erasing.random_erasing(1.0).apply(pixel, row, (1, 1)), pixel)


@pytest.mark.parametrize(
    "settings, message",
    [
        ((1.5,), "p 1.5: a probability from 0 to 1"),
        ((-0.1,), "p -0.1: a probability"),
        ((math.nan,), "p nan: a probability"),
        ((0.5, "mean"), "value 'mean': valid are zero, random"),
    ],
)
def test_impossible_settings_name_the_valid_ones(settings, message):
    with pytest.raises(ValueError, match=message):
        erasing.random_erasing(*settings)
