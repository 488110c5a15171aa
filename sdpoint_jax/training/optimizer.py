"""The optimiser and the learning rate of a run, as values: what they are made from tells them from others."""

import collections
import dataclasses
from typing import Any

import jax
import optax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class SGD:
    """SGD as PyTorch defines it, but for the learning rate, which the training step applies.

    An `optax.GradientTransformation` by its methods.

    Attributes:
        momentum: of the gradients, weight decay included.
        nesterov: whether to look ahead by it.
        weight_decay: L2 coefficient on every parameter.
        clip_norm: the largest global norm of the gradients; 0 for no limit.
    """

    momentum: float
    nesterov: bool
    weight_decay: float
    clip_norm: float = 0.0

    def init(self, params: PyTree) -> optax.OptState:
        """Makes the state before the first step."""
        return self._transformation().init(params)

    def update(self, grads: PyTree, state: optax.OptState, params: PyTree) -> tuple[PyTree, optax.OptState]:
        """Maps gradients to (updates, state), where a step subtracts updates times the learning rate."""
        return self._transformation().update(grads, state, params)

    def _transformation(self):
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            optax.add_decayed_weights(self.weight_decay),
            optax.trace(self.momentum, self.nesterov),
        )


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Learning rate at a step: linear warm-up from 0, then a cosine to 0, or steps.

    Attributes:
        peak: after the warm-up.
        total_steps: of the run.
        warmup_steps: of these, in the warm-up.
        milestones: steps at each of which the rate is multiplied by `decay`; None for the cosine.
        decay: see `milestones`.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    milestones: tuple[int, ...] | None = None
    decay: float = 0.1

    def __call__(self, step: int | jax.Array) -> jax.Array:
        """Computes the learning rate of a step."""
        if self.milestones is None:
            main = optax.cosine_decay_schedule(self.peak, max(1, self.total_steps - self.warmup_steps))
        else:
            times = collections.Counter(milestone - self.warmup_steps for milestone in self.milestones)
            main = optax.piecewise_constant_schedule(self.peak, {at: self.decay**n for at, n in times.items()})
        if not self.warmup_steps:
            return main(step)
        warmup = optax.linear_schedule(0.0, self.peak, self.warmup_steps)
        return optax.join_schedules([warmup, main], [self.warmup_steps])(step)
