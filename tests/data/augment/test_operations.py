"""The operations of TrivialAugment and RandAugment: the pixels of PIL, and of torchvision on PIL images."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from sdpoint_jax.data.augment import operations, policies

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (32, 32, 3), np.uint8)
IMAGES = {
    "noise": NOISE,
    "dull": NOISE // 4 + 90,
    "smooth": np.add.outer(np.arange(32) * 3, np.arange(96) * 2).astype(np.uint8).reshape(32, 32, 3),
    "oblong": RNG.integers(0, 256, (17, 40, 3), np.uint8),
    "one channel": NOISE[..., :1],
    "one level": np.full((32, 32, 3), 77, np.uint8),
    "two levels": np.where(NOISE < 30, 10, 240).astype(np.uint8),
    "mostly white": np.maximum(NOISE, 250),
    "one pixel": NOISE[:1, :1],
}
# torchvision's name -> ours, in its order.
OPERATIONS = {
    "Identity": operations.keep,
    "ShearX": operations.shear_x,
    "ShearY": operations.shear_y,
    "TranslateX": operations.translate_x,
    "TranslateY": operations.translate_y,
    "Rotate": operations.rotate,
    "Brightness": operations.adjust_brightness,
    "Color": operations.adjust_color,
    "Contrast": operations.adjust_contrast,
    "Sharpness": operations.adjust_sharpness,
    "Posterize": operations.posterize,
    "Solarize": operations.solarize,
    "AutoContrast": operations.autocontrast,
    "Equalize": operations.equalize,
}
SPACES = {"trivial": policies.TRIVIAL_CHOICES, "rand": policies.rand_choices((32, 40))}


def to_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def pil_operation(name, image, magnitude):
    """What torchvision's definition makes of a PIL image, in calls of PIL."""
    moved = {
        "ShearX": (1, magnitude, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, magnitude, 1, 0),
        "TranslateX": (1, 0, -int(magnitude), 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -int(magnitude)),
    }
    if name in moved:
        return image.transform(image.size, Image.Transform.AFFINE, moved[name])
    if name == "Rotate":
        return image.rotate(magnitude)
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(1.0 + magnitude)
    if name == "Posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "Solarize":
        return ImageOps.solarize(image, magnitude)
    plain = {"Identity": Image.Image.copy, "AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize}
    return plain[name](image)


@pytest.fixture(params=["pil", "torchvision"])
def reference(request):
    """(torchvision's name, PIL image, magnitude) -> PIL image."""
    if request.param == "pil":
        return pil_operation
    transforms = request.getfixturevalue("torchvision")
    nearest = transforms.InterpolationMode.NEAREST
    return lambda name, image, magnitude: transforms.autoaugment._apply_op(image, name, magnitude, nearest, None)


def signed_magnitudes(space, name):
    _, magnitudes, signed = SPACES[space][list(OPERATIONS).index(name)]
    return sorted({sign * magnitude for magnitude in magnitudes for sign in ((1, -1) if signed else (1,))})


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_pixel_is_the_references_at_every_magnitude(name, space, reference):
    for title, image in IMAGES.items():
        before = image.copy()
        for magnitude in signed_magnitudes(space, name):
            result = OPERATIONS[name](image, magnitude)
            expected = np.asarray(reference(name, to_pil(image), magnitude)).reshape(image.shape)
            assert result.dtype == np.uint8
            np.testing.assert_array_equal(result, expected, f"{title}, magnitude {magnitude}")
        np.testing.assert_array_equal(image, before)


def test_no_operation_does_nothing_at_its_strongest():
    for name, operation in OPERATIONS.items():
        changed = operation(IMAGES["dull"], signed_magnitudes("trivial", name)[0])
        assert (changed == IMAGES["dull"]).all() == (name == "Identity"), name


@pytest.mark.parametrize("space", SPACES)
def test_choices_are_torchvisions_to_the_bit(space, torchvision):
    import torch

    if space == "trivial":
        expected = torchvision.TrivialAugmentWide()._augmentation_space(policies.BINS)
    else:
        expected = torchvision.RandAugment()._augmentation_space(policies.BINS, (32, 40))
    assert list(expected) == list(OPERATIONS)
    fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # Else torch.linspace rounds otherwise.
    for (name, (magnitudes, signed)), choice in zip(expected.items(), SPACES[space], strict=True):
        operation, found, found_signed = choice
        assert operation is OPERATIONS[name] and found_signed == signed
        wanted = np.broadcast_to(magnitudes.numpy(), policies.BINS).astype(float)
        assert list(found) == (list(wanted) if fused else pytest.approx(list(wanted), rel=1e-6)), name
