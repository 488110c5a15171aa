"""Applies a block with one trace for each shape, whichever networks and SDPoint instances contain it.

Networks repeat their blocks, and each instance is a program of its own, so that tracing every block every time would
take most of the time to start.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

# Part of the key of JAX's trace caches, so that no trace of re-estimation serves training.
_reestimating = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def reestimating() -> Iterator[None]:
    """Make BatchNorm leave a batch's own statistics, and switch dropout off, in forward passes with train=True.

    The moving average of `nn.BatchNorm` is what training needs of it, of whatever momentum; re-estimation needs the
    moments of one batch. Both are attributes of modules that users write, so they are set as the modules are called.
    """
    with _reestimating(True), nn.intercept_methods(_set_for_reestimation):
        yield


def _set_for_reestimation(call, args, kwargs, context):
    if context.method_name == "__call__" and isinstance(context.module, nn.BatchNorm):
        object.__setattr__(context.module, "momentum", 0.0)
    if context.method_name == "__call__" and isinstance(context.module, nn.Dropout):
        return args[0] if args else kwargs["inputs"]
    return call(*args, **kwargs)


def apply_block(block: nn.Module, x: Any, *, remat: bool, train: bool) -> Any:
    """Return `block(x, train)`, from the trace of an equal block on equal shapes where there is one.

    Args:
        block: Bound to its variables, as within a method of the network. Updated statistics are put there.
        x: State of the network, a pytree of arrays.
        remat: Whether the backward pass recomputes the block's activations instead of storing them.
        train: Whether BatchNorm uses the batch's own statistics, and dropout is on.
    """
    unbound = block.clone(parent=None, name=None)
    if block.is_initializing() or not _can_share(block, unbound):
        return nn.remat(type(block).__call__, static_argnums=(2,))(block, x, train) if remat else block(x, train)
    rngs = {"params": block.make_rng("params")} if block.has_rng("params") else {}
    y, updates = _traced(unbound, remat, train)(block.variables, rngs, x)
    for name, value in updates.get("batch_stats", {}).items():
        block.put_variable("batch_stats", name, value)
    return y


def _can_share(block, unbound):
    """Whether a block is known by its class and attributes alone, and has no variables but the usual ones."""
    try:
        hash(unbound)
    except TypeError:
        return False
    # Parts that come from outside the block, and variables to capture, need the block itself.
    fields = [getattr(unbound, name) for name in unbound.__dataclass_fields__ if name not in ("parent", "name")]
    if any(isinstance(leaf, nn.Module) for leaf in jax.tree.leaves(fields, is_leaf=_is_module)):
        return False
    return not block.is_mutable_collection("intermediates") and set(block.variables) <= {"params", "batch_stats"}


def _is_module(x):
    return isinstance(x, nn.Module)


@functools.lru_cache(4096)
def _traced(module, remat, train):
    """Return (variables, rngs, x) -> (y, updates), which jit traces once for each shape."""

    def apply(variables, rngs, x):
        return module.apply(variables, x, train, rngs=rngs, mutable=["batch_stats"] if train else [])

    # Inline, because XLA optimises a program in parts worse than a whole one.
    return jax.jit(jax.checkpoint(apply) if remat else apply, inline=True)
