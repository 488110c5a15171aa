"""Whether a network keeps the contract of `SDPointNet`, read off its traces: nothing is compiled or run."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sdpoint_jax.instance import DEFAULT_RATIOS, STEM
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.trace import Constant, Program
from sdpoint_jax.profiling.parts import list_parts, trace_halves, trace_whole, variables_of


def check_model(
    model: SDPointNet, image_size: int | tuple[int, int], channels: int = 3, ratios: tuple[float, ...] = DEFAULT_RATIOS
) -> str:
    """Check that training, sweeps and serving can use a network as one of this package's.

    It has a stem, blocks and a head of different names, each with variables of its own. Each of its instances can be
    traced, so that every part, the head among them, takes the sizes that an instance leaves. A part returns what the
    next one takes. Prefix and suffix compute what the whole network does, equation by equation.

    Args:
        model: The network, without variables.
        image_size: Side, or (height, width), in pixels.
        channels: Number of channels of the images.
        ratios: Downsampling ratios of the instances.

    Returns:
        what was checked, in one line

    Raises:
        ValueError: The network does not keep the contract; the message names the part, and the shape that it fails on.
    """
    name, images = type(model).__name__, (image_size, channels)
    if not isinstance(model, SDPointNet):
        raise ValueError(f"{name} is no SDPointNet: a net subclasses it and assigns stem, blocks and head in setup")
    parts = (*model.prefix_modules(model.num_blocks), model.suffix_modules(model.num_blocks)[-1])
    held = {part for tree in variables_of(model, *images).values() for part in tree}
    if stray := sorted(held - set(parts)):
        raise ValueError(f"{name}: variables {', '.join(stray)} belong to no part; parts are {_shorten(parts)}")
    instances = model.instances(ratios)
    for instance in instances:
        list_parts(model, instance, *images)
    whole = trace_whole(model, *images)
    for point in (STEM, model.num_blocks):
        difference = _difference(whole, trace_halves(model, point, *images))
        if difference:
            raise ValueError(f"{name}: prefix and suffix at point {point} differ from the whole net: {difference}")
    return (
        f"{name} keeps the contract: {model.num_blocks} blocks, {len(instances)} instances, prefix and suffix compute "
        "what the whole net does"
    )


def _shorten(names):
    return ", ".join(names if len(names) <= 6 else (*names[:3], "...", *names[-2:]))


def _difference(whole: Program, halves: Program) -> str:
    """Return where two programs first differ, in words; an empty text if they are equal but for their values' names."""
    for first, second in itertools.zip_longest(_lines(whole), _lines(halves)):
        if first != second:
            one, other = (line[0] if line else "nothing" for line in (first, second))
            return f"where the whole computes {one}, they compute {other}"
    return ""


def _lines(program: Program) -> Iterator[tuple[Any, ...]]:
    """Yield what each equation computes, first in words, with values numbered in the order in which they come."""
    numbers = {value: number for number, value in enumerate(program.inputs)}

    def numbered(value):
        if isinstance(value, Constant):
            return str(value.aval), np.asarray(value.value).tobytes()
        return numbers.setdefault(value, len(numbers))

    for one in program.equations:
        # Functions among the parameters, as those of a custom gradient, are new ones in every trace.
        params = [(key, str(value)) for key, value in sorted(one.params.items()) if not callable(value)]
        shapes = [str(value.aval) for value in one.outputs]
        yield f"{one.primitive} {' '.join(shapes)}", params, [*map(numbered, (*one.inputs, *one.outputs))]
    yield "the logits", [*map(numbered, program.outputs)]
