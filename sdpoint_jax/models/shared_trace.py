"""Traces a block once for each shape, whichever nets and SDPoint instances contain it: nets repeat their blocks."""

import functools

import jax
from flax import linen as nn


def apply_block(block: nn.Module, x: jax.Array, *, remat: bool, train: bool) -> jax.Array:
    """Computes `block(x, train)`, with the trace of an equal block on an equal shape where there is one.

    Args:
        block: bound to its variables, as within a method of the net; its updated statistics are put there.
        x: [B, h, w, C].
        remat: whether to recompute the block's activations in the backward pass instead of keeping them.
        train: whether to normalise by the batch's own statistics.
    """
    if block.is_initializing() or block.is_mutable_collection("intermediates"):
        return block(x, train)  # Variables that do not exist yet, or are to be captured, need the block itself.
    traced = _traced(type(block), block.spec, (block.conv, block.norm), remat, train)  # type: ignore[arg-type]
    y, updates = traced(block.variables, x)
    for name, value in updates.get("batch_stats", {}).items():
        block.put_variable("batch_stats", name, value)
    return y


@functools.cache
def _traced(block, spec, layers, remat, train):
    """Returns (variables, x) -> (y, updates), which jit traces once for each shape."""
    module = block(spec, *layers, parent=None)

    def apply(variables, x):
        return module.apply(variables, x, train, mutable=["batch_stats"] if train else [])

    # Inline, as XLA treats a program in parts worse than a whole one.
    return jax.jit(jax.checkpoint(apply) if remat else apply, inline=True)
