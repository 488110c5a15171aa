"""The operations that shrink a map at a downsampling point. The paper's is `avg`; see Kuen et al. 2018, section 3.1.

Each takes (x [B, H, W, C], (height, width)) and returns [B, height, width, C].
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdpoint_jax.models.pool import adaptive_avg_pool, adaptive_max_pool, downsampled_size


def strided(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Return every `side / size`-th cell: the first one of each adaptive window, as nearest interpolation does."""
    for axis, out in ((1, size[0]), (2, size[1])):
        side = x.shape[axis]
        x = jnp.take(x, np.arange(out) * side // out, axis=axis)
    return x


def blur(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Return the cells of `strided` after a 1-2-1 filter on each axis, against aliasing (Zhang 2019)."""
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded, side = jnp.pad(x, padding, mode="edge"), x.shape[axis]
        left, middle, right = (jax.lax.slice_in_dim(padded, start, start + side, axis=axis) for start in range(3))
        x = (left + 2 * middle + right) / 4
    return strided(x, size)


OPERATIONS: dict[str, Callable[[jax.Array, tuple[int, int]], jax.Array]] = {
    "avg": adaptive_avg_pool,
    "max": adaptive_max_pool,
    "strided": strided,
    "blur": blur,
}


def downsampled_sizes(sides: Sequence[int], ratio: float) -> tuple[int, int]:
    """Return (height, width) after downsampling sides (height, width) by `ratio`."""
    return downsampled_size(sides[0], ratio), downsampled_size(sides[1], ratio)


def downsample(x: jax.Array, ratio: float, operation: str = "avg") -> jax.Array:
    """Return a map [B, H, W, C] shrunk by `ratio` on each side.

    Raises:
        ValueError: The operation is unknown, or `x` is not a map.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"downsampling {operation!r}: valid are {', '.join(OPERATIONS)}")
    if getattr(x, "ndim", None) != 4:
        raise ValueError(
            f"a state of {jax.tree.map(jnp.shape, x)} is no map [B, H, W, C]: override SDPointNet.downsample"
        )
    return OPERATIONS[operation](x, downsampled_sizes(x.shape[1:3], ratio))
