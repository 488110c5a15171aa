"""What an SDPoint instance moves through an accelerator's memory, and how long it takes at peak rates.

Both come from the operations of the network's own trace. On accelerators most training layers of a residual network are
memory-bound, so fewer MACs need not save time. A *pass* is one trip of the activations through an operation: forward,
or, in training, one of those of its backward pass. It takes as long as its arithmetic at the device's peak rate, or as
its bytes at its bandwidth, whichever is longer (the roofline model, Williams, Waterman & Patterson 2009); passes follow
one another.

What is counted, in elements of the computation's dtype, for an operation from `input` to `output`:

    operation        inference         training, forward     training, backward
    convolution      input + output    input + output        input gradient: output + input (not for the images)
                                                             kernel gradient: output + input
    dense            input + output    input + output        as a convolution
    product          inputs + output   inputs + output       a gradient of each input: inputs + output
    norm             0                 2 outputs             sums: 2 outputs; input gradient: 3 outputs
    own norm         2 outputs         2 outputs             the same; without parameters no sums
    affine           0                 0                     sums: 2 outputs
    add              output            output                3 outputs
    multiply         2 outputs         2 outputs             4 outputs
    concatenate      2 outputs         2 outputs             2 outputs
    pool             input + output    input + output        output + input (a max-pool's: twice)

where a *norm* is BatchNorm, an *own norm* takes its input's statistics, as LayerNorm and softmax do, an *affine* layer
scales or shifts (layer scale, positions), a *product* is one of attention's, whose scores are written and read, and
*multiply* is a gate, as of squeeze-excitation. This assumes that a compiler fuses as XLA does:

    - A convolution's result is added up for the statistics of its norm as it is written.
    - In inference, norm, ReLU and addition work on the convolution's result before it is written: an addition reads
      the shortcut, and no more.
    - In training, normalising and ReLU are one pass, which reads and writes. Of its backward pass, the sums over the
      batch come first; both read the gradient and the norm's input.
    - Where two branches meet, their gradients are read, added up and written; ReLUs are masked along the way.
    - A pool is one pass where a TPU needs no more, as for ratios 1/2 and 3/4 of most sizes and for averages of small
      ones; elsewhere it may be more than one. Any other goes along the height, then the width: each window of a period
      reads its own cells and is written by itself, a sum in float32, to be read once more and written to its place.
      Backward, gradients are added up in one pass per side.
    - Nothing stays in a cache from one pass to the next, and layouts need no copies or padding.

Weights are read once per batch, as float32; in training a second time for the input gradient, and their gradients are
written. The update of momentum SGD reads parameters, momentum and gradients, and writes the first two. Not counted:
the images before they have the computation's dtype, the loss, and what devices exchange with each other.

    python -m sdpoint_jax cost --model=resnet50 --image-size=224 --device=tpu-v5e --batch-size=128
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.pool import pools_at_once
from sdpoint_jax.profiling.macs import count_macs, distinct_instances, format_dropped
from sdpoint_jax.profiling.operations import Operation
from sdpoint_jax.profiling.parts import compute_dtype, list_operations

_WEIGHT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Device:
    """Peak rates of one accelerator.

    Attributes:
        name: as in a flag.
        bfloat16_tflops: 10^12 floating-point operations a second, two of them per multiply-accumulate, in bfloat16.
        float32_tflops: likewise for float32 operands at JAX's default precision: on a TPU one pass in bfloat16, on a
            GPU TensorFloat-32.
        bandwidth_gbps: 10^9 bytes a second, of the main memory.
        memory_gib: size of that memory in 2^30 bytes; None if not known.
        matrix_side: rows and columns of a matrix unit, which takes the kernel's weights in blocks of that size: what a
            block lacks is padded with zeros. 1 for no such padding.
    """

    name: str
    bfloat16_tflops: float
    float32_tflops: float
    bandwidth_gbps: float
    memory_gib: float | None = None
    matrix_side: int = 1

    def __post_init__(self):
        for field in ("bfloat16_tflops", "float32_tflops", "bandwidth_gbps", "matrix_side"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} {getattr(self, field)} of device {self.name}: must be more than 0")

    def peak_flops(self, dtype: Any) -> float:
        """Returns floating-point operations a second in the computation's `dtype`."""
        return 1e12 * (self.bfloat16_tflops if jnp.dtype(dtype) == jnp.bfloat16 else self.float32_tflops)


def _tpu(name, tflops, bandwidth_gbps, memory_gib, matrix_side=128):
    return Device(name, tflops, tflops, bandwidth_gbps, memory_gib, matrix_side)


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "System architecture", for one chip; v5p lists 95 GB. A matrix unit
# is 128 x 128, from v6e on 256 x 256. GPUs, of the SXM form, without sparsity: NVIDIA's data sheets "A100 Tensor Core
# GPU" (80 GB) and "H200 Tensor Core GPU", and "H100 Tensor Core GPU Architecture"; data sheets of the last two list
# their rates with sparsity, twice as high.
DEVICES = {
    device.name: device
    for device in (
        _tpu("tpu-v4", 275, 1200, 32),
        _tpu("tpu-v5e", 197, 819, 16),
        _tpu("tpu-v5p", 459, 2765, 95),
        _tpu("tpu-v6e", 918, 1638, 32, matrix_side=256),
        Device("a100", 312, 156, 2039, 80),
        Device("h100", 989.4, 494.7, 3350, 80),
        Device("h200", 989.4, 494.7, 4800, 141),
    )
}


def get_device(name: str) -> Device:
    """Returns the device called `name`.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r}: known are {', '.join(DEVICES)}; any other by its peak rates")
    return DEVICES[name]


class Pass(NamedTuple):
    """One trip of a batch through an operation.

    Attributes:
        name: of the operation, and what the pass does, as in `block_03/conv1 kernel_gradient`.
        operation: that of one image; None for the update.
        macs: multiply-accumulates of the batch.
        bytes: read from and written to memory.
    """

    name: str
    operation: Operation | None
    macs: int
    bytes: int

    def seconds(self, device: Device, dtype: Any) -> float:
        """Estimates the time of the pass: that of its arithmetic or of its bytes, whichever is longer."""
        macs = self.macs * _padding(self.operation, device.matrix_side) if self.operation else 0
        return max(2 * macs / device.peak_flops(dtype), self.bytes / (1e9 * device.bandwidth_gbps))


def list_passes(
    model: SDPointNet,
    instance: SDPointInstance,
    image_size: int | tuple[int, int],
    batch_size: int,
    *,
    training: bool,
    channels: int = 3,
) -> tuple[Pass, ...]:
    """Lists the passes of one batch, in the model's dtype.

    Args:
        model: the net, without variables.
        instance: one that the net has.
        image_size: side, or (height, width), in pixels.
        batch_size: images on one device.
        training: forward, backward and update instead of inference.
        channels: of the images.

    Raises:
        ValueError: a batch of no images, and as `macs.list_layers`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1")
    operations = list_operations(model, instance, image_size, channels)
    itemsize = compute_dtype(model, image_size, channels).itemsize
    passes = [
        _pass(operation, does, elements * itemsize, batch_size)
        for operation in operations
        for does, elements in _elements(operation, training)
    ]
    if training:
        params = sum(operation.params for operation in operations)
        passes.append(Pass("update", None, 0, 5 * _WEIGHT_BYTES * params))
    return tuple(passes)


def _pass(operation, does, image_bytes, batch_size):
    macs = batch_size * operation.macs
    return Pass(
        f"{operation.name} {does}", operation, macs, batch_size * image_bytes + _WEIGHT_BYTES * operation.weights
    )


def _elements(operation: Operation, training: bool) -> Iterator[tuple[str, int]]:
    """Return what an operation does to one image, and how many elements each pass reads and writes."""
    reads, o = operation.reads, math.prod(operation.output)
    match operation.kind:
        case "convolution" | "dense":
            yield "forward", reads + o
            if training and not operation.of_images:
                yield "input_gradient", reads + o
            if training:
                yield "kernel_gradient", reads + o
        case "product":
            yield "forward", reads + o
            if training:
                yield from (("left_gradient", reads + o), ("right_gradient", reads + o))
        case "norm" if training:
            yield from (("forward", 2 * o), ("sums", 2 * o), ("input_gradient", 3 * o))
        case "own_norm":
            yield "forward", 2 * o
            if training and operation.params:
                yield "sums", 2 * o
            if training:
                yield "input_gradient", 3 * o
        case "affine" if training:
            yield "sums", 2 * o
        case "add":
            yield "forward", o
            if training:
                yield "input_gradient", 3 * o
        case "multiply":
            yield "forward", 2 * o
            if training:
                yield "input_gradient", 4 * o
        case "concatenate":
            yield "forward", 2 * o
            if training:
                yield "input_gradient", 2 * o
        case "max_pool" | "average_pool":
            yield "forward", _pooled(operation, forward=True)
            if training:
                again = reads if operation.kind == "max_pool" else 0
                yield "input_gradient", _pooled(operation, forward=False) + again


def _pooled(operation, forward):
    """Counts the elements that a pool reads and writes; backward, those of the gradients."""
    averages = operation.kind == "average_pool"
    if not operation.at_point:
        return operation.reads + math.prod(operation.output)
    (height, width, channels), (rows, columns, _) = operation.input, operation.output
    if pools_at_once((height, width), (rows, columns), averages=averages):
        return channels * (height * width + rows * columns)
    by_height = width * channels * _pooled_axis(height, rows, averages, forward)
    return by_height + rows * channels * _pooled_axis(width, columns, averages, forward)


def _pooled_axis(size, out, averages, forward):
    """Counts likewise for one line of cells."""
    if not forward:
        return size + out
    cells = sum(-(-(i + 1) * size // out) - i * size // out for i in range(out))
    return cells + (5 if averages else 3) * out  # A sum, written and read in float32, counts as four in bfloat16.


def _padding(operation, side):
    """Return how many times the multiply-accumulates grow where the kernel, a matrix, is padded to whole blocks.

    The matrix has a row for each weight of an output channel. A convolution in groups is, if that is less, computed as
    one without: a matrix whose weights between groups are zeros.
    """
    groups, rows, columns = operation.matrix
    if columns == 1 and groups > 1:
        return 1.0  # A depthwise convolution is left to the vector units; memory limits it.

    def padded(groups, rows, columns):
        return groups * _round_up(rows, side) * _round_up(columns, side)

    least = padded(groups, rows, columns)
    if operation.kind == "convolution":
        least = min(least, padded(1, groups * rows, groups * columns))
    return least / (groups * rows * columns)


def _round_up(size, multiple):
    return -(-size // multiple) * multiple


def count_bytes(
    model: SDPointNet,
    instance: SDPointInstance,
    image_size: int | tuple[int, int],
    batch_size: int,
    *,
    training: bool,
    channels: int = 3,
) -> int:
    """Counts the bytes that one batch reads from and writes to memory: activations and weights.

    Args, Raises: see `list_passes`. The assumptions stand at the head of this module.
    """
    passes = list_passes(model, instance, image_size, batch_size, training=training, channels=channels)
    return sum(one.bytes for one in passes)


def estimate_seconds(
    model: SDPointNet,
    instance: SDPointInstance,
    image_size: int | tuple[int, int],
    batch_size: int,
    device: Device,
    *,
    training: bool,
    channels: int = 3,
) -> float:
    """Estimates the seconds of one batch on one device: a step of training, or the inference of its images.

    It is of use as a ratio between instances: real programs reach neither peak rate, pay for what the head of this
    module leaves out, and save bytes where activations fit into a device's faster memory.

    Args:
        device: its peak rates; see `DEVICES`.
        model, instance, image_size, batch_size, training, channels: see `list_passes`.

    Raises:
        ValueError: see `list_passes`.
    """
    passes = list_passes(model, instance, image_size, batch_size, training=training, channels=channels)
    dtype = compute_dtype(model, image_size, channels)
    return sum(one.seconds(device, dtype) for one in passes)


def format_estimates(
    model: SDPointNet,
    instances: Sequence[SDPointInstance],
    image_size: int | tuple[int, int],
    batch_size: int,
    device: Device | None = None,
    channels: int = 3,
) -> str:
    """Formats what `instances` cost as a table, in inference and in training; percentages are of full resolution.

    Args:
        device: its peak rates, for estimates of the time; None for bytes alone.
        model, image_size, batch_size, channels: see `list_passes`.

    Raises:
        ValueError: see `list_passes`.
    """

    dtype = compute_dtype(model, image_size, channels)

    def costs(instance):
        yield count_macs(model, instance, image_size, channels)
        for training in (False, True):
            passes = list_passes(model, instance, image_size, batch_size, training=training, channels=channels)
            yield sum(one.bytes for one in passes)
            if device:
                yield sum(one.seconds(device, dtype) for one in passes)

    columns = ["GMACs"]
    scales = [1e9]
    for does in ("inference", "training"):
        columns += [f"{does}, MB"] + ([f"{does}, ms"] if device else [])
        scales += [1e6 * batch_size] + ([1e-3] if device else [])
    full = tuple(costs(FULL_RESOLUTION))
    instances, dropped = distinct_instances(model, instances, image_size, channels)
    lines = [f"{'instance':<12}" + "".join(f"{column:>16}{'%':>8}" for column in columns)]
    for instance in instances:
        cells = zip(costs(instance), full, scales)
        row = "".join(f"{value / scale:>16.4g}{value / whole:>8.1%}" for value, whole, scale in cells)
        lines.append(f"{instance.name:<12}{row}")
    lines += format_dropped(dropped)
    lines.append(
        f"GMACs and MB (10^6 bytes that memory moves) for one image, in {dtype.name} and batches of {batch_size}"
    )
    if device:
        rates = f"{device.peak_flops(dtype) / 1e12:g} TFLOP/s, {device.bandwidth_gbps:g} GB/s"
        lines.append(
            f"ms for one batch on one device, {device.name}, at its peak rates ({rates}): the least it can take"
        )
    return "\n".join(lines)
