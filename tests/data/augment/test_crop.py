"""Bringing images to one size: torchvision's pixels on PIL images, and its distributions."""

import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from sdpoint_jax.data.augment import AUGMENTATIONS, crop

PHOTOGRAPHS = Path(__file__).resolve().parents[4] / "shared" / "data" / "jpeg"


def smooth_image(height, width, channels=3, seed=0):
    """A photograph's stand-in: noise at several scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, channels))
    for scale in (1, 4, 16, 64):
        noise = rng.integers(0, 256, (height // scale + 2, width // scale + 2, channels))
        image += np.kron(noise, np.ones((scale, scale, 1)))[:height, :width] * scale**0.5
    return (image * (255 / image.max())).astype(np.uint8)


def torchvision_evaluation(image, shorter, size):
    """What torchvision's Resize(shorter) and CenterCrop(size) do to a PIL image."""
    width, height = image.size
    if width <= height:
        new = shorter, int(shorter * height / width)
    else:
        new = int(shorter * width / height), shorter
    image = image.resize(new, Image.Resampling.BILINEAR)
    top, left = round((new[1] - size[0]) / 2), round((new[0] - size[1]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


@pytest.mark.parametrize("height, width", [(300, 400), (401, 299), (256, 256), (90, 61), (64, 300)])
@pytest.mark.parametrize("size", [(224, 224), (200, 256)])
def test_evaluation_pixels_are_torchvisions(height, width, size):
    image = smooth_image(height, width)
    expected = np.asarray(torchvision_evaluation(Image.fromarray(image), 256, size), np.int32)
    result = crop.resize_and_center_crop(image, (256, 256), size)
    assert result.dtype == np.uint8
    assert np.abs(result - expected).max() <= 1


def test_evaluation_pixels_of_photographs_are_torchvisions():
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"{PHOTOGRAPHS} is not there")
    from sdpoint_jax.data.decode import decode

    paths = sorted(PHOTOGRAPHS.glob("*.JPEG"))[::8]
    for path in paths:
        data = path.read_bytes()
        photograph = Image.open(io.BytesIO(data)).convert("RGB")
        expected = np.asarray(torchvision_evaluation(photograph, 256, (224, 224)), np.int32)
        result = crop.resize_and_center_crop(decode(data, 3), (256, 256), (224, 224))
        assert np.abs(result - expected).mean() < 2, path
    assert paths


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = smooth_image(32, 48)
    np.testing.assert_array_equal(crop.resize_and_center_crop(image, (32, 48), (32, 48)), image)
    np.testing.assert_array_equal(crop.fit(image, (32, 48)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_image_is_interpolated_up(channels):
    image = smooth_image(8, 8, channels)
    expected = crop.resize(image, (16, 16)).astype(int)
    assert expected.shape == (16, 16, channels)
    assert np.abs(crop.resize_and_center_crop(image, (16, 16), (16, 16)) - expected).max() == 0
    assert np.abs(crop.fit(image, (16, 16)) - expected).max() <= 1


def test_quick_resize_shrinks_nearly_as_pil_does():
    for height, width in [(300, 250), (448, 448), (500, 230), (230, 500), (700, 900), (224, 224)]:
        image = smooth_image(height, width)
        expected = crop.resize(image, (224, 224)).astype(int)
        assert np.abs(crop.quick_resize(image, (224, 224)) - expected).mean() < 2


def test_quick_resize_without_opencv_is_pils(monkeypatch):
    monkeypatch.setattr(crop, "opencv", lambda: None)
    image = smooth_image(100, 80)
    np.testing.assert_array_equal(crop.quick_resize(image, (32, 32)), crop.resize(image, (32, 32)))


@pytest.mark.parametrize("with_opencv", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_flip_mirrors_left_to_right(channels, with_opencv, monkeypatch):
    if not with_opencv:
        monkeypatch.setattr(crop, "opencv", lambda: None)
    image = smooth_image(9, 14, channels)
    np.testing.assert_array_equal(crop.flip(image, 0.49), image[:, ::-1])
    np.testing.assert_array_equal(crop.flip(image, 0.5), image)


def torchvision_crop_box(height, width, rng):
    """torchvision's RandomResizedCrop.get_params, on Python's random numbers."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    ratio = width / height
    if ratio < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif ratio > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (100, 1000)])
def test_crops_have_torchvisions_distribution(height, width):
    draws = AUGMENTATIONS["random_resized_crop_flip"].draw(np.random.default_rng(1), 4000)
    rng = random.Random(2)
    ours = np.array([crop.random_crop_box((height, width), row[:-1]) for row in draws])
    theirs = np.array([torchvision_crop_box(height, width, rng) for _ in range(4000)])
    for measure in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: box[:, 3] / box[:, 2],  # aspect
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


def test_a_shift_moves_by_whole_pixels_into_black():
    image = smooth_image(16, 24, 1) | 1  # nowhere black
    seen = set()
    for row in np.random.default_rng(0).random((600, 2)):
        shifted = crop.pad_and_crop(image, row, (16, 24))
        dy, dx = int(row[0] * 5) - 2, int(row[1] * 7) - 3  # an eighth of each side, either way
        padded = np.pad(image, ((2, 2), (3, 3), (0, 0)))
        np.testing.assert_array_equal(shifted, padded[2 + dy : 18 + dy, 3 + dx : 27 + dx])
        seen.add((dy, dx))
    assert len(seen) == 5 * 7


def test_every_cifar_crop_is_as_likely_as_another_and_half_are_mirrored():
    cifar = AUGMENTATIONS["pad_crop_flip"]
    image = np.zeros((32, 32, 1), np.uint8)
    image[14:18, 12], image[14, 12] = 100, 200  # a mark that tells offset and side
    counts = np.zeros((9, 9), int)
    mirrored = 0
    for row in cifar.draw(np.random.default_rng(3), 8100):
        y, x = (int(place[0]) for place in np.nonzero(cifar.apply(image, row, (32, 32))[..., 0] == 200))
        is_mirrored = row[2] < 0.5
        mirrored += is_mirrored
        counts[y - 10, ((31 - x) if is_mirrored else x) - 8] += 1
    assert stats.chisquare(counts.ravel()).pvalue > 0.001
    assert stats.binomtest(int(mirrored), 8100).pvalue > 0.001
