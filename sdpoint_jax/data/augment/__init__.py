"""What happens to an image between its file and the batch: uint8 in, uint8 out.

A random augmentation comes in two parts. `draw` makes all random numbers of a batch at once, as one array of uniform
numbers with a row per image; `apply` is a pure function of (image, row). So a batch's pixels depend on its seed alone,
and a host that needs some rows of a batch draws the same numbers as a host that needs them all.
"""

import functools
import inspect

from sdpoint_jax.data.augment.base import Augmentation, Chain, Size
from sdpoint_jax.data.augment.crop import (
    CROP_TRIES,
    pad_and_crop,
    random_crop_box,
    random_resized_crop,
    resize_and_center_crop,
    with_flip,
)
from sdpoint_jax.data.augment.erasing import random_erasing
from sdpoint_jax.data.augment.policies import rand_augment, trivial_augment

__all__ = [
    "AUGMENTATIONS",
    "CROP_TRIES",
    "Augmentation",
    "Chain",
    "Size",
    "augmentation_named",
    "check_augmentation",
    "random_crop_box",
    "resize_and_center_crop",
]

# What brings images to one size, and comes first.
CROPS = {
    "none": None,  # The evaluation preprocessing.
    "shift": Augmentation(2, pad_and_crop),
    "pad_crop_flip": with_flip(Augmentation(2, pad_and_crop)),
    "random_resized_crop_flip": with_flip(Augmentation(4 * CROP_TRIES, random_resized_crop)),
}
# What may follow; the parameters of these functions are the settings after the colon.
CHANGES = {
    "trivial_augment": trivial_augment,
    "rand_augment": rand_augment,
    "random_erasing": random_erasing,
}
AUGMENTATIONS = {**CROPS, **{name: make() for name, make in CHANGES.items()}}


def augmentation_named(name: str, resize_to: Size) -> Chain:
    """Returns the augmentation of that name.

    Args:
        name: one of CROPS, then any of CHANGES, each after a +; with settings after a colon where they should not be
            the defaults: "pad_crop_flip", "pad_crop_flip+trivial_augment+random_erasing:0.25",
            "random_resized_crop_flip+rand_augment:2,9". "none" is the evaluation preprocessing.
        resize_to: see `resize_and_center_crop`; for "none".

    Raises:
        ValueError: an unknown name, or a setting that is not valid.
    """
    first, *others = (part.strip() for part in name.split("+"))
    if first not in CROPS:
        raise ValueError(f"augmentation {name!r}: unknown {first!r} at the beginning; {_valid()}")
    crop = CROPS[first] or Augmentation(0, lambda image, _, size: resize_and_center_crop(image, resize_to, size))
    return Chain((crop, *(_change(name, part) for part in others)))


def check_augmentation(name: str) -> None:
    """Raises ValueError, in one line, unless there is an augmentation of that name; see `augmentation_named`."""
    augmentation_named(name, (1, 1))


def _change(name: str, part: str) -> Augmentation:
    known, _, settings = part.partition(":")
    if known not in CHANGES:
        raise ValueError(f"augmentation {name!r}: unknown {known!r} after a +; {_valid()}")
    make = CHANGES[known]
    parameters = inspect.signature(make).parameters.values()
    values = settings.split(",") if settings else []
    try:
        if len(values) > len(parameters):
            raise ValueError(f"{len(values)} settings, {len(parameters)} at most")
        return make(*(_setting(parameter, value) for parameter, value in zip(parameters, values)))
    except ValueError as error:
        raise ValueError(f"augmentation {name!r}: {_form(known)}: {error}") from None


def _setting(parameter: inspect.Parameter, value: str) -> int | float | str:
    try:
        return parameter.annotation(value)
    except ValueError:
        raise ValueError(f"{parameter.name} {value!r}: not of type {parameter.annotation.__name__}") from None


@functools.cache
def _form(known: str) -> str:
    """Returns how to write a change with all its settings, as random_erasing:P,VALUE."""
    settings = ",".join(parameter.upper() for parameter in inspect.signature(CHANGES[known]).parameters)
    return f"{known}:{settings}" if settings else known


def _valid() -> str:
    return f"valid: {', '.join(CROPS)}; then, each after a +: {', '.join(map(_form, CHANGES))}"
