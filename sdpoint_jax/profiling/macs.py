"""What an SDPoint instance costs: MACs, parameters, activation memory, read off the network's own trace.

MACs are the multiply-accumulates of convolutions, dense layers and the products of attention for one image.
Normalisation, activation functions, pools and additions count nothing, as in the tables that papers, torchvision and
timm publish. No program is compiled: XLA's own cost analysis counts pooling matrices as work and may call a downsampled
instance dearer than full resolution.

    python -m sdpoint_jax cost --model=preresnet101 --image-size=224
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.profiling.operations import Operation, Shape
from sdpoint_jax.profiling.parts import list_operations, list_parts
from sdpoint_jax.storage.artefact import Artefact


class LayerCost(NamedTuple):
    """One layer that holds parameters, or one product of attention, for one image.

    Attributes:
        name: Path of its parameters in the variables, as in `block_03/conv1`.
        output: Height, width and channels; (1, 1, K) for the classifier.
        macs: Number of multiply-accumulates; 0 for a norm.
        params: Number of trainable parameters.
        activations: Number of elements of the output; 0 for a norm, which can work in place.
    """

    name: str
    output: Shape
    macs: int
    params: int
    activations: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        macs: Number of multiply-accumulates of convolutions, dense layers and products of attention.
        params: Number of trainable parameters; the same for every instance of a network.
        activations: Number of elements of the outputs of what `macs` counts (Radosavovic et al. 2020, section 3.3),
            which memory in training and time on an accelerator follow.
    """

    macs: int
    params: int
    activations: int

    @property
    def flops(self) -> int:
        """Number of floating-point operations: two per multiply-accumulate."""
        return 2 * self.macs

    def activation_bytes(self, dtype: Any = jnp.float32) -> int:
        """Return the bytes of `activations` in the computation's `dtype`: no weights, gradients or copies."""
        return self.activations * jnp.dtype(dtype).itemsize


def count_macs(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> int:
    """Return the multiply-accumulates of `model` under `instance` for one image; see `list_layers`."""
    return count_suffix_macs(model, instance, None, image_size, channels)


def count_suffix_macs(
    model: SDPointNet,
    instance: SDPointInstance,
    start: int | None,
    image_size: int | tuple[int, int],
    channels: int = 3,
) -> int:
    """Return the multiply-accumulates of the layers after point `start` alone, or of all if it is None."""
    parts = list_parts(model, instance, image_size, channels)
    first = 0 if start is None else max(start, 0) + 1
    return sum(part.macs for part in parts[first:])


def count_set_macs(
    model: SDPointNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
) -> int:
    """Return the multiply-accumulates of several instances that share every layer before a point, for one image."""
    last = max(map(model.last_shared_point, instances))
    full = count_macs(model, FULL_RESOLUTION, image_size, channels)
    prefix = full - count_suffix_macs(model, FULL_RESOLUTION, last, image_size, channels)
    return prefix + sum(
        count_suffix_macs(model, instance, model.last_shared_point(instance), image_size, channels)
        for instance in instances
    )


def count_cost(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> Cost:
    """Return what `model` under `instance` costs for one image; see `list_layers`."""
    return total_cost(list_layers(model, instance, image_size, channels))


def full_macs(swept: Artefact) -> int:
    """Return the MACs of one image at full resolution, whether or not the artefact has that instance."""
    known = [row.macs for row in swept.rows if row.instance == FULL_RESOLUTION]
    height, width, channels = swept.image_shape
    return known[0] if known else count_macs(model_of(swept), FULL_RESOLUTION, (height, width), channels)


def total_cost(layers: Sequence[LayerCost]) -> Cost:
    """Return the sum of the costs of `layers`."""
    _, _, *columns = zip(*layers)
    return Cost(*map(sum, columns))


def list_layers(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> tuple[LayerCost, ...]:
    """Return what costs parameters or MACs, from the input to the output, as `instance` runs it.

    Args:
        model: The network, without variables.
        instance: One that the network has.
        image_size: Side, or (height, width), in pixels.
        channels: Number of channels of the images.

    Raises:
        ValueError: The network does not have the instance or fails to run it, the images are too small for it, or
            `channels` is below 1.
    """
    operations = list_operations(model, instance, image_size, channels)
    return tuple(_layer_cost(operation) for operation in operations if operation.params or operation.macs)


def _layer_cost(operation: Operation) -> LayerCost:
    activations = math.prod(operation.output) if operation.macs else 0
    return LayerCost(operation.name, operation.output, operation.macs, operation.params, activations)


def distinct_instances(
    model: SDPointNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
) -> tuple[tuple[SDPointInstance, ...], dict[SDPointInstance, str]]:
    """Return the instances that differ at this image size, and why the others do not.

    A point may leave a small map as it is: 2x2 times 0.75 is 2x2. Two ratios may give the same size, or two sizes that
    the next block rounds to one, at the same cost. Of two such ratios the larger one stays.

    Args:
        model: The network, without variables.
        instances: Instances of the network, in any order.
        image_size: Side, or (height, width), in pixels.
        channels: Number of channels of the images.

    Returns:
        (instances that stay, in the order given; the reason by instance that does not stay)

    Raises:
        ValueError: See `list_layers`.
    """
    known: dict[Hashable, SDPointInstance] = {}
    reasons = {}
    for instance in sorted(instances, key=lambda one: -one.ratio):
        identities = _identities(model, instance, image_size, channels)
        same = next(((known[key], reason) for key, reason in identities.items() if key in known), None)
        if same:
            reasons[instance] = same[1].format(same[0].name)
        else:
            known |= dict.fromkeys(identities, instance)
    distinct = tuple(instance for instance in instances if instance not in reasons)
    return distinct, {instance: reasons[instance] for instance in instances if instance in reasons}


def _identities(model, instance, *images) -> dict[Hashable, str]:
    """Return what makes another instance equal to this one: any key in common, with its reason in words."""
    if instance == FULL_RESOLUTION:
        return {instance: ""}
    full, parts = list_parts(model, FULL_RESOLUTION, *images), list_parts(model, instance, *images)
    after = max(instance.point, 0) + 1  # Index of the part after the point.
    state, output, pool = full[after - 1].output, parts[after].output, f"{parts[after - 1].name}/pool"

    def layers(part):
        return tuple((one.input, one.output) for one in part.operations if not one.name.startswith(pool))

    pools = [one for one in parts[after].operations if one.name.startswith(pool)]
    pooled = tuple(one.output for one in pools)
    if layers(parts[after]) == layers(full[after]):
        # As where a head reads the class token alone.
        is_unread = any(one.input != one.output for one in pools)
        reason = "shrinks what no later layer reads" if is_unread else f"leaves {_text(*state)} as it is"
        return {FULL_RESOLUTION: f"{reason}, so it is {{}}"}
    identities: dict[Hashable, str] = {
        (instance.point, pooled, layers(parts[after])): f"makes {_text(*pooled)} of {_text(*state)}, so it is {{}}"
    }
    cost = count_cost(model, instance, *images)
    if after <= model.num_blocks and cost.macs < count_macs(model, FULL_RESOLUTION, *images):
        reason = f"costs what {{}} does: {parts[after].name} gives {_text(*output)} in both"
        identities[instance.point, cost, output] = reason
    return identities


def _text(*shapes: Sequence[int]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)


def format_instances(
    model: SDPointNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
) -> str:
    """Return the costs of `instances` as a table, each distinct one once; `relative` is to full resolution's MACs."""
    full = count_macs(model, FULL_RESOLUTION, image_size, channels)
    distinct, dropped = distinct_instances(model, instances, image_size, channels)
    lines = [f"{'instance':<12}{'GMACs':>10}{'GFLOPs':>10}{'relative':>10}{'activations, float32':>22}"]
    for instance in distinct:
        cost = count_cost(model, instance, image_size, channels)
        # Behind the last block often only the head is left, which costs the same at any resolution.
        mark = "  no MACs left to save" if instance != FULL_RESOLUTION and cost.macs == full else ""
        lines.append(
            f"{instance.name:<12}{cost.macs / 1e9:>10.4f}{cost.flops / 1e9:>10.4f}{cost.macs / full:>10.1%}"
            f"{cost.activation_bytes() / 2**20:>18.2f} MiB{mark}"
        )
    lines += format_dropped(dropped)
    lines.append(f"{cost.params:,} parameters, shared by all instances")
    return "\n".join(lines)


def format_dropped(dropped: Mapping[SDPointInstance, str]) -> list[str]:
    """Return a line for each instance that `distinct_instances` drops."""
    return [f"{instance.name:<12}is not listed: it {reason}" for instance, reason in dropped.items()]


def format_layers(layers: Sequence[LayerCost]) -> str:
    """Return `layers` as a table, with their sums in the last line."""
    width = max(24, *(len(layer.name) for layer in layers))
    lines = [f"{'layer':<{width}}{'output':>16}{'MACs':>16}{'parameters':>14}{'activations':>14}"]
    for layer in layers:
        output = "x".join(map(str, layer.output))
        lines.append(f"{layer.name:<{width}}{output:>16}{layer.macs:>16,}{layer.params:>14,}{layer.activations:>14,}")
    total = total_cost(layers)
    lines.append(f"{'sum':<{width + 16}}{total.macs:>16,}{total.params:>14,}{total.activations:>14,}")
    return "\n".join(lines)
