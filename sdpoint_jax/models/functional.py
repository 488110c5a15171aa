"""What comes before and after a net: normalised images, and the loss of its logits."""

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Maps uint8 images [..., C] to float32, less `mean` and over `std`, one each per channel on the scale 0..1."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    means, stds = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std))
    return (images.astype(jnp.float32) / 255 - means) / stds


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Computes the cross-entropy [B] of logits [B, K] with labels [B].

    Args:
        logits: float32.
        labels: int32, the true classes.
        label_smoothing: the share of a label that moves to the uniform distribution.
    """
    import optax  # Late: inference needs no optimisers.

    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)
