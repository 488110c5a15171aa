"""What an SDPoint instance costs, counted from shapes alone: MACs, parameters, activation memory.

MACs are the multiply-accumulates of convolutions and the classifier for one image; normalisation, ReLU, pooling and
additions count nothing, as in the tables that papers and torchvision publish. No program is traced or compiled: XLA's
own cost analysis counts pooling matrices as work and may call a downsampled instance dearer than full resolution.

    python -m sdpoint_jax cost --model=preresnet101 --image-size=224
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture, BlockSpec, ConvolutionSpec
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.pool import downsampled_size
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.storage.artefact import Artefact

Shape = tuple[int, int, int]


class Operation(NamedTuple):
    """One operation on the activations of one image; ReLUs belong to the operation before them.

    Attributes:
        kind: what it does. `max_pool` is the stem's; `average_pool` a point's, or the global one.
        name: path of its parameters in the variables, as in `block_03/conv1`, or such a path for what has none.
        input: height, width and channels; of an `add`, those of its block's input.
        output: likewise; (1, 1, K) for the classifier.
        kernel: side of a convolution's kernel; 1 for all others.
        groups: of a convolution; 1 for all others.
    """

    kind: Literal["convolution", "norm", "add", "max_pool", "average_pool", "dense"]
    name: str
    input: Shape
    output: Shape
    kernel: int = 1
    groups: int = 1

    @property
    def weights(self) -> int:
        """Counts the weights of a convolution, or those of the classifier without its biases; 0 for all others."""
        if self.kind not in ("convolution", "dense"):
            return 0
        return self.kernel**2 * (self.input[-1] // self.groups) * self.output[-1]

    @property
    def macs(self) -> int:
        """Counts the multiply-accumulates."""
        return self.output[0] * self.output[1] * self.weights

    @property
    def params(self) -> int:
        """Counts the trainable parameters."""
        return self.weights + {"norm": 2, "dense": 1}.get(self.kind, 0) * self.output[-1]


class LayerCost(NamedTuple):
    """One layer that holds parameters, for one image.

    Attributes:
        name: path of its parameters in the variables, as in `block_03/conv1`.
        output: height, width and channels; (1, 1, K) for the classifier.
        macs: multiply-accumulates; 0 for a BatchNorm.
        params: trainable parameters.
        activations: elements of the output; 0 for a BatchNorm, which can work in place.
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
        macs: multiply-accumulates of convolutions and the classifier.
        params: trainable parameters; the same for every instance of a net.
        activations: elements of the outputs of all convolutions and of the classifier (Radosavovic et al. 2020,
            section 3.3), which memory in training and time on an accelerator follow.
    """

    macs: int
    params: int
    activations: int

    @property
    def flops(self) -> int:
        """Counts two operations per multiply-accumulate."""
        return 2 * self.macs

    def activation_bytes(self, dtype: Any = jnp.float32) -> int:
        """Bytes of `activations` for one image in the computation's `dtype`: no weights, gradients or copies."""
        return self.activations * jnp.dtype(dtype).itemsize


def count_macs(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> int:
    """Counts the multiply-accumulates of `model` under `instance` for one image; see `count_cost`."""
    return count_cost(model, instance, image_size, channels).macs


def count_suffix_macs(
    model: SDPointNet, instance: SDPointInstance, start: int, image_size: int | tuple[int, int], channels: int = 3
) -> int:
    """Counts the multiply-accumulates of the layers after point `start` alone, for one image; see `count_cost`."""
    modules = model.suffix_modules(start)
    layers = list_layers(model, instance, image_size, channels)
    return sum(layer.macs for layer in layers if layer.name.partition("/")[0] in modules)


def count_set_macs(
    model: SDPointNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
) -> int:
    """Counts the multiply-accumulates of several instances that share every layer before a point, for one image.

    Args, Raises: see `list_layers`.
    """
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
    """Counts what `model` under `instance` costs for one image.

    Args, Raises: see `list_layers`.
    """
    return total_cost(list_layers(model, instance, image_size, channels))


def full_macs(swept: Artefact) -> int:
    """Return the MACs of one image at full resolution, whether or not the artefact has that instance."""
    known = [row.macs for row in swept.rows if row.instance == FULL_RESOLUTION]
    height, width, channels = swept.image_shape
    return known[0] if known else count_cost(model_of(swept), FULL_RESOLUTION, (height, width), channels).macs


def total_cost(layers: Sequence[LayerCost]) -> Cost:
    """Sums up the costs of `layers`."""
    _, _, *columns = zip(*layers)
    return Cost(*map(sum, columns))


def list_layers(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> tuple[LayerCost, ...]:
    """Lists the layers of `model` that hold parameters, from the input to the output, as `instance` runs them.

    Args:
        model: the net, without variables.
        instance: one that the net has.
        image_size: side, or (height, width), in pixels.
        channels: of the images.

    Raises:
        ValueError: an instance that the net does not have, images too small for the net, or no channels.
    """
    operations = list_operations(model, instance, image_size, channels)
    return tuple(_layer_cost(operation) for operation in operations if operation.params)


def _layer_cost(operation: Operation) -> LayerCost:
    activations = math.prod(operation.output) if operation.macs else 0
    return LayerCost(operation.name, operation.output, operation.macs, operation.params, activations)


def list_operations(
    model: SDPointNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
) -> tuple[Operation, ...]:
    """Lists the operations of `model` from the input to the output, as `instance` runs them.

    Args, Raises: see `list_layers`.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int | np.integer) else image_size
    if channels < 1:
        raise ValueError(f"channels {channels}: at least 1")
    model.check_instance(instance)
    model.check_image_size((height, width))
    return tuple(_operations(model.architecture, model.num_classes, instance, (height, width, channels)))


def _operations(net: Architecture, num_classes: int, instance: SDPointInstance, images: Shape) -> Iterator[Operation]:
    stem = _convolution("stem/conv", net.stem_convolution, images)
    yield stem
    x = stem.output
    if net.stem_has_norm:
        yield Operation("norm", "stem/norm", x, x)
    if net.imagenet_stem:
        pool = Operation("max_pool", "stem/pool", x, _stem_pool_output(x, instance))
        yield pool
        x = pool.output
    for k, spec in enumerate(net.blocks(), 1):
        name = f"block_{k:02d}"
        yield from _block(name, spec, net.preactivation, x)
        x = _block_output(spec, x)
        if k == instance.point:
            pool = Operation("average_pool", f"{name}/pool", x, _downsample(x, instance.ratio))
            yield pool
            x = pool.output
    if net.preactivation:
        yield Operation("norm", "head/norm", x, x)
    pooled = (1, 1, x[-1])
    yield Operation("average_pool", "head/pool", x, pooled)
    yield Operation("dense", "head/dense", pooled, (1, 1, num_classes))


def _block(name: str, spec: BlockSpec, preactivation: bool, x: Shape) -> Iterator[Operation]:
    y = x
    for index, convolution in enumerate(spec.convolutions, 1):
        layer = _convolution(f"{name}/conv{index}", convolution, y)
        normalised = y if preactivation else layer.output
        norm = Operation("norm", f"{name}/norm{index}", normalised, normalised)
        yield from (norm, layer) if preactivation else (layer, norm)
        y = layer.output
    if spec.shortcut and spec.shortcut.kind != "padded_identity":
        shortcut = _convolution(f"{name}/shortcut_conv", spec.shortcut.convolution, x)
        yield shortcut
        if spec.shortcut.kind == "projection_norm":
            yield Operation("norm", f"{name}/shortcut_norm", shortcut.output, shortcut.output)
    yield Operation("add", f"{name}/add", x, y)


def _block_output(spec: BlockSpec, x: Shape) -> Shape:
    for convolution in spec.convolutions:
        x = _strided(x, convolution.stride, convolution.features)
    return x


def _stem_pool_output(x: Shape, instance: SDPointInstance) -> Shape:
    x = _strided(x, 2, x[-1])
    return _downsample(x, instance.ratio) if instance.point == STEM else x


def _downsample(x: Shape, ratio: float) -> Shape:
    return downsampled_size(x[0], ratio), downsampled_size(x[1], ratio), x[2]


def _strided(x: Shape, stride: int, features: int) -> Shape:
    """Returns the output of an odd kernel padded by half its side."""
    return -(-x[0] // stride), -(-x[1] // stride), features


def _convolution(name: str, spec: ConvolutionSpec, x: Shape) -> Operation:
    return Operation("convolution", name, x, _strided(x, spec.stride, spec.features), spec.kernel, spec.groups)


def format_instances(
    model: SDPointNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
) -> str:
    """Formats the costs of `instances` as a table; `relative` is to the MACs at full resolution."""
    full = count_macs(model, FULL_RESOLUTION, image_size, channels)
    lines = [f"{'instance':<12}{'GMACs':>10}{'GFLOPs':>10}{'relative':>10}{'activations, float32':>22}"]
    for instance in instances:
        cost = count_cost(model, instance, image_size, channels)
        lines.append(
            f"{instance.name:<12}{cost.macs / 1e9:>10.4f}{cost.flops / 1e9:>10.4f}{cost.macs / full:>10.1%}"
            f"{cost.activation_bytes() / 2**20:>18.2f} MiB"
        )
    lines.append(f"{cost.params:,} parameters, shared by all instances")
    return "\n".join(lines)


def format_layers(layers: Sequence[LayerCost]) -> str:
    """Formats `layers` as a table, with their sums in the last line."""
    lines = [f"{'layer':<24}{'output':>16}{'MACs':>16}{'parameters':>14}{'activations':>14}"]
    for layer in layers:
        output = "x".join(map(str, layer.output))
        lines.append(f"{layer.name:<24}{output:>16}{layer.macs:>16,}{layer.params:>14,}{layer.activations:>14,}")
    total = total_cost(layers)
    lines.append(f"{'sum':<40}{total.macs:>16,}{total.params:>14,}{total.activations:>14,}")
    return "\n".join(lines)
