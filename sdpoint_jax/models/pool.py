"""Adaptive pooling with PyTorch's windows, exact for every size, as static programs.

Output cell i of n covers the input cells floor(i * size / n) .. ceil((i + 1) * size / n) - 1, height and width
separately. The windows repeat every size / gcd(size, n) cells, so the usual sizes need only a few strided slices.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from sdpoint_jax.models import target

SCOPE = "sdpoint_pool"  # Start of the scopes of adaptive pools, by which a trace tells them from other products.
_MAX_CELLS = 256  # Height times width up to which a TPU averages irregular windows by one matrix product.
_MAX_SLICES = 8  # Windows per period up to which slices are used; an irregular size has as many as cells.


def downsampled_size(size: int, ratio: float) -> int:
    """Returns the side after downsampling: size * ratio, rounded half to even, at least 1."""
    return max(1, round(size * ratio))


@jax.named_scope(f"{SCOPE}.average")
def adaptive_avg_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average `x` [B, H, W, C] over adaptive windows to [B, *size, C]; a larger size repeats cells, as in PyTorch."""
    if size[0] > x.shape[1] or size[1] > x.shape[2]:
        for axis, out in ((1, size[0]), (2, size[1])):
            x = _average_by_matrix(x, axis, out)
        return x
    if target.platform() == "tpu" and pools_at_once(x.shape[1:3], size, averages=True):
        return _average_at_once(x, size)
    if target.platform() == "onnx":
        return _average_for_onnx(x, size)
    for axis, out in ((1, size[0]), (2, size[1])):
        if x.shape[axis] - out == math.gcd(x.shape[axis], out):
            x = _average_neighbours(x, axis, out)
        elif _is_periodic(x.shape[axis], out):
            x = _pool_slices(x, axis, out, jnp.mean)
        else:
            x = _average_by_matrix(x, axis, out)
    return x


@jax.named_scope(f"{SCOPE}.max")
def adaptive_max_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Takes the maximum of `x` [B, H, W, C] over adaptive windows, to [B, *size, C].

    The gradient goes to the largest cells of a window, shared where several are; on a TPU, where windows are regular,
    to one of them. Behind a ReLU, cells are rarely equal but where they are 0, and there its own gradient is 0.
    """
    if target.platform() == "tpu" and pools_at_once(x.shape[1:3], size, averages=False):
        return _pool_regular(x, size, -jnp.inf, lax.max)
    if target.platform() == "onnx" and all(side % out == 0 for side, out in zip(x.shape[1:3], size)):
        return _pool_regular(x, size, -jnp.inf, lax.max)
    for axis, out in ((1, size[0]), (2, size[1])):
        if _is_periodic(x.shape[axis], out):
            x = _pool_slices(x, axis, out, jnp.max)
        else:
            x = _max_by_gather(x, axis, out)
    return x


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the maximum of `x` [B, H, W, C] over windows of 3x3 cells, 2 apart, to [B, ceil(H / 2), ceil(W / 2), C].

    The gradient goes to the first of the largest cells of a window. On a GPU, XLA's own operation adds gradients in any
    order, so that two runs differ, or sorts them first; slices move fewer bytes there than either.
    """
    if target.platform() == "gpu":
        return _max_of_slices(x)
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class _RegularWindows(NamedTuple):
    """Windows of one axis as XLA's own operation has them, in every period anew.

    Attributes:
        periods: equal lengths of the axis.
        width: cells of a window; those before or behind the period do not count.
        stride: cells from one window to the next.
        padding: cells that the first window begins before the period.
    """

    periods: int
    width: int
    stride: int
    padding: int


def pools_at_once(before: Sequence[int], after: Sequence[int], *, averages: bool) -> bool:
    """Tells whether a TPU pools height and width in one pass, which reads and writes each cell once.

    Slices are read and written by window there, one side after the other; on a CPU they are faster nevertheless.
    """
    windows = [_regular_windows(*sides) for sides in zip(before, after)]
    if not averages:
        return None not in windows
    return _are_whole(windows) or math.prod(before) <= _MAX_CELLS


def _are_whole(windows):
    """Tells whether windows are regular and none is cut at the end of a period, as an average of it would be wrong."""
    return not any(side is None or side.padding for side in windows)


@functools.cache
def _regular_windows(size, out):
    """Finds the adaptive windows of `size` cells to `out` in XLA's form; None where they have none."""
    periods = 1 if size % out == 0 else math.gcd(size, out)
    period, cells = size // periods, out // periods
    windows = _windows(period, cells)
    width = max(stop - start for start, stop in windows)
    padding = width - windows[0][1]
    stride = windows[1][1] - windows[0][1] if cells > 1 else width
    starts = [k * stride - padding for k in range(cells)]
    if [(max(0, start), min(period, start + width)) for start in starts] != windows:
        return None
    return _RegularWindows(periods, width, stride, padding)


def _average_at_once(x, size):
    windows = [_regular_windows(*sides) for sides in zip(x.shape[1:3], size)]
    if not _are_whole(windows):
        return _average_by_product(x, size)
    total = _sum_overlapping if any(side.stride < side.width for side in windows) else _sum
    return total(x, size) / math.prod(side.width for side in windows)


def _sum(x, size):
    return _pool_regular(x, size, 0.0, lax.add)


def _sum_overlapping(x, size):
    """Sums windows that share cells, apart from the layers around: fused with them, XLA takes more passes."""
    return lax.optimization_barrier(_sum(lax.optimization_barrier(x), size))


def _average_by_product(x, size):
    """Averages by one product of zeros and ones, which is exact; weights in bfloat16 would not be.

    Height and width come first and the result stands by itself, so that XLA lays it out as the layers around it; as a
    product over the inner axes, it has the layers behind it copied, each of them.
    """
    batch, height, width, channels = x.shape
    rows, columns = (averaging_matrix(*sides) for sides in zip((height, width), size))
    cells = jnp.asarray(np.einsum("oh,pw->ophw", rows > 0, columns > 0).reshape(-1, height * width), x.dtype)
    share = np.outer(rows.max(1), columns.max(1)).reshape(-1, 1, 1)
    x = x.transpose(1, 2, 0, 3).reshape(height * width, batch, channels)
    precision = None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    total = jnp.einsum("qk,kbc->qbc", cells, x, precision=precision, preferred_element_type=jnp.float32)
    average = (total * share).astype(x.dtype).reshape(*size, batch, channels)
    return lax.optimization_barrier(average.transpose(2, 0, 1, 3))


def _average_for_onnx(x, size):
    """Average by a pool that ONNX has, of windows at equal distances, which are more than needed where periods end.

    Dropping these takes one slice. In onnxruntime that is faster than a product, and an int8 graph stays one.
    """
    windows = {}
    for axis, out in zip((1, 2), size):
        found = _regular_windows(x.shape[axis], out)
        if found and not found.padding and (found.periods == 1 or x.shape[axis] // found.periods % found.stride == 0):
            windows[axis] = found
        else:
            x = _average_by_matrix(x, axis, out)
    sides = [windows.get(axis, _RegularWindows(1, 1, 1, 0)) for axis in (1, 2)]
    width, stride = ([1, *(side[i] for side in sides), 1] for i in (1, 2))
    padding = [(0, side.width - side.stride if side.periods > 1 else 0) for side in sides]
    x = lax.reduce_window(x, 0.0, lax.add, width, stride, ((0, 0), *padding, (0, 0))) / math.prod(width)
    if x.shape[1:3] == tuple(size):
        return x
    cells, kept = (
        [count for side, all_cells in zip(sides, shape) for count in (side.periods, all_cells // side.periods)]
        for shape in (x.shape[1:3], size)
    )
    batch, channels = x.shape[0], x.shape[3]
    x = lax.slice(x.reshape(batch, *cells, channels), (0,) * 6, (batch, *kept, channels))
    return x.reshape(batch, *size, channels)


def _max_of_slices(x):
    for axis in (2, 1):  # In this order, the first of equal cells is that of the first row, as elsewhere.
        out = -(-x.shape[axis] // 2)
        padding = [(0, 0)] * 4
        padding[axis] = (1, 2 * out - x.shape[axis])
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        x, *others = (lax.slice_in_dim(padded, i, i + 2 * out - 1, 2, axis) for i in range(3))
        for other in others:
            x = jnp.where((x >= other) | (x != x), x, other)  # As the maximum, NaN where one is.
    return x


def _pool_regular(x, size, initial, reduce):
    """Pools height and width by XLA's windows; of an axis with several periods, each is an axis of its own."""
    shape, window, strides, padding = [x.shape[0]], [1], [1], [(0, 0)]
    for side, out in zip(x.shape[1:3], size):
        axis = _regular_windows(side, out)
        period, cells = side // axis.periods, out // axis.periods
        if axis.periods > 1:
            shape, window, strides = [*shape, axis.periods], [*window, 1], [*strides, 1]
            padding = [*padding, (0, 0)]
        after = (cells - 1) * axis.stride + axis.width - axis.padding - period
        shape, window, strides = [*shape, period], [*window, axis.width], [*strides, axis.stride]
        padding = [*padding, (axis.padding, after)]
    x = x.reshape(*shape, x.shape[3])
    pooled = lax.reduce_window(x, initial, reduce, (*window, 1), (*strides, 1), (*padding, (0, 0)))
    return pooled.reshape(x.shape[0], *size, x.shape[-1])


def _windows(size, out):
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _is_periodic(size, out):
    return out // math.gcd(size, out) <= _MAX_SLICES


def _average_neighbours(x, axis, out):
    """Averages where sizes are one less in each period, as for ratios 1/2 and 3/4: each window is two neighbours."""

    def pool(x, axis, out):
        first, second = (lax.slice_in_dim(x, start, start + out, axis=axis) for start in (0, 1))
        return (first + second) / 2

    return _by_periods(x, axis, out, pool)


def _pool_slices(x, axis, out, reduce):
    def pool(x, axis, out):
        windows = _windows(x.shape[axis], out)
        return jnp.stack([reduce(lax.slice_in_dim(x, *window, axis=axis), axis=axis) for window in windows], axis)

    return _by_periods(x, axis, out, pool)


def _by_periods(x, axis, out, pool):
    """Pools an axis of `x` to `out` cells by `pool(x, axis, cells)`, which sees each period as an axis of its own."""
    size, before, after = x.shape[axis], x.shape[:axis], x.shape[axis + 1 :]
    periods = math.gcd(size, out)
    x = x.reshape(*before, periods, size // periods, *after)
    return pool(x, axis + 1, out // periods).reshape(*before, out, *after)


def _average_by_matrix(x, axis, out):
    matrix = averaging_matrix(x.shape[axis], out)
    # Highest precision, as an average of bfloat16 or TF32 products would not be exact.
    pooled = jnp.tensordot(x, matrix, axes=(axis, 1), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(pooled, -1, axis).astype(x.dtype)


def _max_by_gather(x, axis, out):
    return jnp.stack([jnp.take(x, cells, axis) for cells in window_cells(x.shape[axis], out)]).max(axis=0)


def averaging_matrix(size: int, out: int) -> np.ndarray:
    """Builds the matrix [out, size], float32, whose product with `size` cells is their averages over the windows."""
    matrix = np.zeros((out, size), np.float32)
    for row, (start, stop) in zip(matrix, _windows(size, out)):
        row[start:stop] = 1 / (stop - start)
    return matrix


def window_cells(size: int, out: int) -> np.ndarray:
    """Lists the cells of the windows, [widest, out]: the first one of each, the second, ...; the last is repeated."""
    windows = _windows(size, out)
    widest = max(stop - start for start, stop in windows)
    return np.array([[min(start + i, stop - 1) for start, stop in windows] for i in range(widest)])
