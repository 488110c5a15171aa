"""What an SDPoint instance costs, counted from shapes alone: MACs, parameters, activation memory.

MACs are the multiply-accumulates of convolutions and the classifier for one image; normalisation, ReLU, pooling and
additions count nothing, as in the tables that papers and torchvision publish. No program is traced or compiled: XLA's
own cost analysis counts pooling matrices as work and may call a downsampled instance dearer than full resolution.

    python -m sdpoint_jax cost --model=preresnet101 --image-size=224
"""

import dataclasses
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture, BlockSpec, ConvolutionSpec
from sdpoint_jax.models.pool import downsampled_size
from sdpoint_jax.models.resnet import ResNet

Shape = tuple[int, int, int]


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
        """Two per multiply-accumulate."""
        return 2 * self.macs

    def activation_bytes(self, dtype: Any = jnp.float32) -> int:
        """Bytes of `activations` for one image in the computation's `dtype`: no weights, gradients or copies."""
        return self.activations * jnp.dtype(dtype).itemsize


def count_macs(model: ResNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3) -> int:
    """Counts the multiply-accumulates of `model` under `instance` for one image; see `count_cost`."""
    return count_cost(model, instance, image_size, channels).macs


def count_suffix_macs(
    model: ResNet, instance: SDPointInstance, start: int, image_size: int | tuple[int, int], channels: int = 3
) -> int:
    """Counts the multiply-accumulates of the layers after point `start` alone, for one image; see `count_cost`."""
    modules = model.suffix_modules(start)
    layers = list_layers(model, instance, image_size, channels)
    return sum(layer.macs for layer in layers if layer.name.partition("/")[0] in modules)


def count_set_macs(
    model: ResNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
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


def count_cost(model: ResNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3) -> Cost:
    """Counts what `model` under `instance` costs for one image.

    Args, Raises: see `list_layers`.
    """
    return total_cost(list_layers(model, instance, image_size, channels))


def total_cost(layers: Sequence[LayerCost]) -> Cost:
    """Sums up the costs of `layers`."""
    _, _, *columns = zip(*layers)
    return Cost(*map(sum, columns))


def list_layers(
    model: ResNet, instance: SDPointInstance, image_size: int | tuple[int, int], channels: int = 3
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
    height, width = (image_size, image_size) if isinstance(image_size, numbers.Integral) else image_size
    if channels < 1:
        raise ValueError(f"channels {channels}: at least 1")
    model.check_instance(instance)
    model.check_image_size((height, width))
    return tuple(_layers(model.architecture, model.num_classes, instance, (height, width, channels)))


def _layers(net: Architecture, num_classes: int, instance: SDPointInstance, images: Shape) -> Iterator[LayerCost]:
    stem = _convolution("stem/conv", net.stem_convolution, images)
    yield stem
    if net.stem_has_norm:
        yield _norm("stem/norm", stem.output)
    x = _pass_stem_pool(net, stem.output, instance)
    for k, spec in enumerate(net.blocks(), 1):
        yield from _block(f"block_{k:02d}", spec, net.preactivation, x)
        x = _block_output(spec, x)
        if k == instance.point:
            x = _downsample(x, instance.ratio)
    if net.preactivation:
        yield _norm("head/norm", x)
    inputs = x[-1]
    yield LayerCost("head/dense", (1, 1, num_classes), inputs * num_classes, (inputs + 1) * num_classes, num_classes)


def _block(name: str, spec: BlockSpec, preactivation: bool, x: Shape) -> Iterator[LayerCost]:
    y = x
    for index, convolution in enumerate(spec.convolutions, 1):
        layer = _convolution(f"{name}/conv{index}", convolution, y)
        norm = _norm(f"{name}/norm{index}", y if preactivation else layer.output)
        yield from (norm, layer) if preactivation else (layer, norm)
        y = layer.output
    if spec.shortcut and spec.shortcut.kind != "padded_identity":
        shortcut = _convolution(f"{name}/shortcut_conv", spec.shortcut.convolution, x)
        yield shortcut
        if spec.shortcut.kind == "projection_norm":
            yield _norm(f"{name}/shortcut_norm", shortcut.output)


def _block_output(spec: BlockSpec, x: Shape) -> Shape:
    for convolution in spec.convolutions:
        x = _strided(x, convolution.stride, convolution.features)
    return x


def _pass_stem_pool(net: Architecture, x: Shape, instance: SDPointInstance) -> Shape:
    if not net.imagenet_stem:
        return x
    x = _strided(x, 2, x[-1])
    return _downsample(x, instance.ratio) if instance.point == STEM else x


def _downsample(x: Shape, ratio: float) -> Shape:
    return downsampled_size(x[0], ratio), downsampled_size(x[1], ratio), x[2]


def _strided(x: Shape, stride: int, features: int) -> Shape:
    """Output of an odd kernel padded by half its side."""
    return -(-x[0] // stride), -(-x[1] // stride), features


def _convolution(name: str, spec: ConvolutionSpec, x: Shape) -> LayerCost:
    output = _strided(x, spec.stride, spec.features)
    weights = spec.kernel**2 * (x[-1] // spec.groups) * spec.features
    return LayerCost(name, output, output[0] * output[1] * weights, weights, output[0] * output[1] * output[2])


def _norm(name: str, x: Shape) -> LayerCost:
    return LayerCost(name, x, 0, 2 * x[-1], 0)


def format_instances(
    model: ResNet, instances: Sequence[SDPointInstance], image_size: int | tuple[int, int], channels: int = 3
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
