"""Convolutions of the networks, each computed in the form that is fastest on the platform.

Accelerators take XLA's own convolution. XLA's CPU backend passes a convolution to Eigen or, in the cases below, runs a
naive loop. Each case has a form of its own here, chosen by static shapes alone, whose values agree to rounding. Times
are CPU milliseconds of one core (AMD EPYC, jax 0.10.2, float32).

    case                                  example                              XLA     here
    1x1: a matrix product                                               2 to 5 times faster
    input or result with fewer cells      [64, 2, 2, 256] to 256, 3x3         91.1      1.9
      than the kernel                       gradient of the input             95.7      2.0
    depthwise                             [16, 56, 56, 96], 3x3              333.5      3.9
                                            gradient of the input            299.6      3.9
                                            gradient of the kernel           161.3      9.3
    grouped                               [16, 56, 56, 128], 3x3, 32 groups  361.8     51.6
                                            gradient of the input            367.0     52.4
                                            gradient of the kernel          32,283     70.9
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from sdpoint_jax.models import target

_LARGE_BATCH = 16  # From here on, multiplying by padding costs more than splitting the kernel.
_MOST_TAPS = 49  # Each is operations of its own to compile. Larger kernels cut images into patches, once in a network.
_FEW_TAPS = 9  # Up to here, padding in XLA's loop is cheaper than a padded copy. With 25 taps it is 3 times dearer.
_BLOCK_CHANNELS = 32  # Narrower blocks are not faster in Eigen; blocks of 64 channels take 1.7 times as long.
_NO_PADDING = ((0, 0), (0, 0))
_MAX_BLOCKS = 16  # Each block takes 0.05 s to compile, forward and in each gradient.


def convolution(
    features: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    *,
    padding: int | None = None,
    use_bias: bool = False,
    **kwargs: Any,
) -> nn.Conv:
    """Return a square convolution, zero-padded on every side by kernel // 2 as in PyTorch.

    Args:
        features: Number of output channels.
        kernel: Side of the kernel.
        stride: In both directions.
        groups: Number of groups of channels, as in ResNeXt; for a depthwise convolution, that of input channels.
        padding: Zeros on every side, instead of kernel // 2.
        use_bias: Whether to add a bias.
        **kwargs: Further arguments of `nn.Conv`.
    """
    padding = kernel // 2 if padding is None else padding
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        conv_general_dilated=conv_general_dilated,
        **{"kernel_init": he_fan_out_normal} | kwargs,
    )


def he_fan_out_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draw a kernel [k, k, in, out] from normal(0, sqrt(2 / (k * k * out))), as the authors initialise."""
    height, width, _, features = shape
    return math.sqrt(2 / (height * width * features)) * jax.random.normal(key, shape, dtype)


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **kwargs: Any) -> jax.Array:
    """Compute what `lax.conv_general_dilated` does, in the fastest form: an argument of the same name for `nn.Conv`.

    Programs that are lowered for several platforms contain both forms and choose between them when they are lowered.
    """

    def xlas_own(lhs, rhs):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)

    platform = target.platform()
    form = _cpu_form(lhs, rhs, window_strides, padding, **kwargs) if platform in ("cpu", target.ANY) else None
    if form is None:
        return xlas_own(lhs, rhs)
    return form(lhs, rhs) if platform == "cpu" else lax.platform_dependent(lhs, rhs, cpu=form, default=xlas_own)


class _Windows(NamedTuple):
    """How a kernel moves over a map; each attribute has a value for height and one for width.

    Attributes:
        strides: Cells of the map from one window to the next.
        padding: Cells of zeros before and after the map.
    """

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    def result_sides(self, sides: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Return the number of windows in a map of `sides`: the sides of the result."""
        axes = zip(sides, kernel, self.strides, self.padding)
        height, width = ((side + sum(zeros) - cells) // stride + 1 for side, cells, stride, zeros in axes)
        return height, width


def _cpu_form(x, kernel, strides, padding, *, dimension_numbers=None, feature_group_count=1, precision=None, **kwargs):
    """Return (x, kernel) -> result, or None where XLA's own form is as fast on a CPU or the arguments are rare ones."""
    if x.ndim != 4 or not _is_channels_last(x, kernel, dimension_numbers):
        return None
    if any(np.any(np.asarray(value) != 1) for value in kwargs.values() if value is not None):  # Dilation.
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    windows = _Windows(tuple(strides), tuple((low, high) for low, high in padding))
    regular = all(0 <= low < cells and 0 <= high for (low, high), cells in zip(windows.padding, kernel.shape))
    if not regular or min(windows.result_sides(x.shape[1:3], kernel.shape[:2])) < 1:
        return None
    if feature_group_count == 1:
        form = _dense_form(x, kernel, windows)
        return form and functools.partial(form, windows=windows, precision=precision)
    if feature_group_count == x.shape[3] == kernel.shape[3]:
        return lambda x, kernel: _depthwise(x, kernel, windows)
    return functools.partial(_in_blocks, windows=windows, groups=feature_group_count, precision=precision)


def _is_channels_last(x, kernel, dimension_numbers):
    ours = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    return lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers) == ours


def _dense_form(x, kernel, windows):
    """Return the form of a convolution without groups, or None for XLA's own."""
    sides, cells = x.shape[1:3], kernel.shape[:2]
    if cells == (1, 1) and windows.padding == _NO_PADDING:
        return _pointwise
    # XLA's algebraic simplifier exchanges map and kernel where the map has fewer cells, which Eigen cannot compute. In
    # the gradient of the input, the map is the result's gradient. A larger map is Eigen's, with any stride or channels.
    smallest = min(math.prod(sides), math.prod(windows.result_sides(sides, cells)))
    if smallest >= math.prod(cells) or math.prod(cells) > _MOST_TAPS:
        return None
    whole = len(list(_taps(sides, cells, windows))) == math.prod(cells)
    # The batch is no number in an export.
    large = isinstance(x.shape[0], int) and x.shape[0] >= _LARGE_BATCH
    return _by_columns if whole and not large else _by_taps


def _wide(x):
    """Return `x` in the type that sums are kept in: float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pointwise(x, kernel, windows, precision):
    """Multiply two matrices: contracting several axes, as the kernel's gradient would, transposes its operands."""
    x = x[:, :: windows.strides[0], :: windows.strides[1]]
    product = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=precision)
    return product.reshape(*x.shape[:-1], -1)


def _by_columns(x, kernel, windows, precision):
    """Multiply the cells of each window, side by side in one row, by the kernel as one matrix."""
    height, width, _, features = kernel.shape
    padded = _pad(_wide(x), windows)
    taps = _taps(padded.shape[1:3], (height, width), _Windows(windows.strides, _NO_PADDING))
    columns = jnp.concatenate([tap.cells(padded) for tap in taps], -1)
    matrix = _wide(kernel.reshape(-1, features))
    product = jnp.matmul(columns.reshape(-1, columns.shape[-1]), matrix, precision=precision)
    return product.reshape(*columns.shape[:3], features).astype(x.dtype)


def _by_taps(x, kernel, windows, precision):
    """Add up a matrix product for each cell of the kernel, of those cells of the map alone that it meets.

    At 2x2 cells, a kernel of 3x3 multiplies 16 cells by weights, and 20 of padding, which this form leaves out.
    """
    height, width, channels, features = kernel.shape
    # Sums of bfloat16 are rounded once, here and in the gradients.
    wide = _wide(x)
    # A split, because its gradient is one concatenation; that of slices would be a sum of padded kernels.
    weights = lax.split(_wide(kernel.reshape(-1, features)), [channels] * (height * width))

    def product(tap):
        cells = tap.cells(wide)
        y = jnp.matmul(cells.reshape(-1, channels), weights[tap.number], precision=precision)
        return y.reshape(*cells.shape[:3], features)

    return _add_up(product, _taps(x.shape[1:3], (height, width), windows)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, windows):
    return _depthwise_sum(x, kernel, windows)


def _depthwise_sum(x, kernel, windows):
    """Add up the products of each cell of the kernel and the cells that it meets: XLA makes one loop of them all."""
    sides = kernel.shape[:2]
    taps = list(_taps(x.shape[1:3], sides, windows))
    if len(taps) > _FEW_TAPS:
        # The barrier keeps the padding out of the loop.
        x = lax.optimization_barrier(_pad(x, windows))
        taps = _taps(x.shape[1:3], sides, _Windows(windows.strides, _NO_PADDING))
    wide, weights = _wide(x), _wide(kernel.reshape(-1, 1, 1, 1, kernel.shape[3]))
    return _add_up(lambda tap: tap.cells(wide) * weights[tap.number], taps).astype(x.dtype)


def _depthwise_forward(x, kernel, windows):
    return _depthwise(x, kernel, windows), (x, kernel)


def _depthwise_backward(windows, residuals, gradient):
    x, kernel = residuals
    of_input = _depthwise_input_gradient(x, kernel, windows, gradient)
    return of_input, _depthwise_kernel_gradient(x, kernel, windows, gradient)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_input_gradient(x, kernel, windows, gradient):
    sides, cells = x.shape[1:3], kernel.shape[:2]
    if len(list(_taps(sides, cells, windows))) <= _FEW_TAPS:
        (of_input,) = jax.linear_transpose(lambda x: _depthwise_sum(x, kernel, windows), x)(gradient)
        return of_input
    # The convolution of the gradient, with zeros between its cells where there is a stride, by the reversed kernel.
    config = [(0, 0, 0)]
    for axis in range(2):
        before = cells[axis] - 1 - windows.padding[axis][0]
        spread = (gradient.shape[axis + 1] - 1) * windows.strides[axis] + 1
        after = sides[axis] + cells[axis] - 1 - before - spread
        config.append((before, after, windows.strides[axis] - 1))
    spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), [*config, (0, 0, 0)])
    return _depthwise_sum(lax.optimization_barrier(spread), kernel[::-1, ::-1], _Windows((1, 1), _NO_PADDING))


def _depthwise_kernel_gradient(x, kernel, windows, gradient):
    """Add up, row by row of the result, what each of its cells gives to all cells of the kernel."""
    height, width, _, channels = kernel.shape
    batch, rows, columns, _ = gradient.shape
    down, right = windows.strides
    padded = lax.optimization_barrier(_pad(x, windows))

    def add_row(row, total):
        # XLA makes one loop of it, over [batch, height, width, channels], and the rows stay in the CPU's cache. A sum
        # for each cell of the kernel would read the whole batch each time, and take 5 times as long.
        cells = _wide(lax.dynamic_slice_in_dim(padded, row * down, height, 1))
        of_row = _wide(lax.dynamic_slice_in_dim(gradient, row, 1, 1))
        for column in range(columns):
            start = column * right
            total += cells[:, :, start : start + width] * of_row[:, :, column : column + 1]
        return total

    zeros = jnp.zeros((batch, height, width, channels), jnp.promote_types(x.dtype, jnp.float32))
    total = lax.fori_loop(0, rows, add_row, zeros).sum(0)
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _in_blocks(x, kernel, windows, groups, precision):
    """Compute some groups at a time, as a convolution without groups whose kernel is zero between different groups.

    Eigen is faster with these zeros than XLA's loops over groups are without them.
    """
    height, width, per_group, features = kernel.shape
    together = _groups_of_block(groups, per_group)
    blocks = groups // together
    split = kernel.reshape(height, width, 1, per_group, blocks, together, features // groups)
    same_group = np.eye(together, dtype=bool).reshape(together, 1, 1, together, 1)
    kernels = jnp.where(same_group, split, jnp.zeros((), kernel.dtype))
    results = []
    for block, part in enumerate(jnp.split(x, blocks, -1)):
        own = kernels[..., block, :, :].reshape(height, width, together * per_group, -1)
        form = _dense_form(part, own, windows) or _xlas_own
        results.append(form(part, own, windows, precision))
    return jnp.concatenate(results, -1)


def _groups_of_block(groups, per_group):
    """Return how many groups of `per_group` channels a block has, a divisor of `groups`."""
    channels = max(_BLOCK_CHANNELS, groups * per_group // _MAX_BLOCKS)
    return max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * per_group <= channels))


def _xlas_own(x, kernel, windows, precision):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, windows.strides, windows.padding, dimension_numbers=layout, precision=precision
    )


class _Tap(NamedTuple):
    """One cell of a kernel, and the cells of a map that it meets as the kernel moves over the map.

    Attributes:
        number: Number of the cell, row by row.
        starts, limits, strides: Of the slice of the map [B, H, W, C], for height and width.
        margins: Cells of the result before and behind those that the slice contributes to.
    """

    number: int
    starts: tuple[int, int]
    limits: tuple[int, int]
    strides: tuple[int, int]
    margins: tuple[tuple[int, int], tuple[int, int]]

    def cells(self, x: jax.Array) -> jax.Array:
        """Return the slice of the map."""
        batch, _, _, channels = x.shape
        return lax.slice(x, (0, *self.starts, 0), (batch, *self.limits, channels), (1, *self.strides, 1))


def _taps(sides, kernel, windows) -> Iterator[_Tap]:
    """List the cells of the kernel that meet a map of `sides`; all others meet padding alone."""
    out = windows.result_sides(sides, kernel)
    rows, columns = (
        list(_meetings(*axis)) for axis in zip(sides, kernel, out, windows.strides, windows.padding, strict=True)
    )
    for i, top, bottom, vertical in rows:
        for j, left, right, horizontal in columns:
            yield _Tap(i * kernel[1] + j, (top, left), (bottom, right), windows.strides, (vertical, horizontal))


def _meetings(side, cells, out, stride, padding):
    """List (cell of the kernel, start, limit, margins) along one axis."""
    low, _ = padding
    for cell in range(cells):
        first = max(0, -(-(low - cell) // stride))
        last = min(out - 1, (side - 1 + low - cell) // stride)
        if first <= last:
            offset = cell - low
            yield cell, first * stride + offset, last * stride + offset + 1, (first, out - 1 - last)


def _add_up(product: Callable[[_Tap], jax.Array], taps) -> jax.Array:
    """Add up the products of taps, each with zeros where its tap meets no cell of the map."""
    padded = []
    for tap in taps:
        y = product(tap)
        margins = [(0, 0, 0), *((before, after, 0) for before, after in tap.margins), (0, 0, 0)]
        padded.append(lax.pad(y, jnp.zeros((), y.dtype), margins))
    return functools.reduce(jnp.add, padded)


def _pad(x, windows):
    return jnp.pad(x, ((0, 0), *windows.padding, (0, 0)))
