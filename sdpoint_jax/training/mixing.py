"""Mixup and cutmix: each image of a batch is mixed with its neighbour, and so are their labels.

The neighbours are the places 2j and 2j + 1 of the global batch, which any division of the batch over hosts, devices
and microbatches into even parts keeps together: so a mixed image is the same whatever the division. As the order of
the examples is drawn anew in each epoch, so are the neighbours. How a pair is mixed is drawn on the host, and depends
on the seed, the step and the place alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_MIXES = 0x6D6978  # Tells these random numbers from others of the same seed.


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How images are mixed; with both settings, each pair is mixed in one of the two ways at random.

    Attributes:
        mixup: both parameters of the beta distribution of an image's share (Zhang et al. 2018); 0 for no mixup.
        cutmix: likewise, of the area that an image keeps (Yun et al. 2019); 0 for no cutmix.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def rows(self, seed: int, step: int, batch_size: int, image_size: tuple[int, int]) -> np.ndarray:
        """Draws how the images of the global batch of a step are mixed, both of a pair alike.

        Returns:
            float32 [batch_size, 5]: the image's share outside of a box, and the box's top, bottom, left and right in
            pixels, which the neighbour fills.
        """
        rng = np.random.default_rng((seed, _MIXES, step))
        pairs = -(-batch_size // 2)
        cuts = rng.random(pairs) < (0.5 if self.mixup and self.cutmix else bool(self.cutmix))
        shares = np.where(cuts, 1.0, _beta(rng, self.mixup, pairs))
        sides = np.where(cuts, np.sqrt(1 - _beta(rng, self.cutmix, pairs)), 0.0)
        ends = []
        for size, center in zip(image_size, rng.random((2, pairs))):
            start, length = np.floor(center * size) - np.floor(sides * size) // 2, np.floor(sides * size)
            ends += [np.clip(start, 0, size), np.clip(start + length, 0, size)]
        return np.repeat(np.stack([shares, *ends], axis=1), 2, axis=0)[:batch_size].astype(np.float32)


def _beta(rng, parameter, count):
    return rng.beta(parameter or 1.0, parameter or 1.0, count)


def mix(
    x: jax.Array, labels: jax.Array, rows: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Mixes each image with its neighbour.

    Args:
        x: images [b, H, W, C] as the net takes them, an even number of them.
        labels: [b].
        rows: [b, 5], see `Mixing.rows`; None to mix nothing.

    Returns:
        (images, others, shares): [b, H, W, C]; the neighbours' labels [b]; and the share [b] of each image's own label.
        Without `rows`, the images as they are and None twice.
    """
    if rows is None:
        return x, None, None
    share, top, bottom, left, right = (rows[:, i, None, None] for i in range(5))
    down, across = jnp.arange(x.shape[1])[None, :, None], jnp.arange(x.shape[2])[None, None, :]
    in_box = (top <= down) & (down < bottom) & (left <= across) & (across < right)
    own = jnp.where(in_box, 0.0, share)
    mixed = own[..., None] * x + (1 - own[..., None]) * _neighbours(x)
    return mixed, _neighbours(labels), own.mean((1, 2))


def _neighbours(x):
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
