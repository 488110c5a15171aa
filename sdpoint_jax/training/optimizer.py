"""The optimiser and the learning rate of a run, as values: what they are made from tells them from others."""

import collections
import dataclasses
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser but for the learning rate, which the training step applies.

    An `optax.GradientTransformation` by its methods.
    """

    def init(self, params: PyTree) -> optax.OptState:
        """Makes the state before the first step."""
        return self._transformation().init(params)

    def update(self, grads: PyTree, state: optax.OptState, params: PyTree) -> tuple[PyTree, optax.OptState]:
        """Maps gradients to (updates, state), where a step subtracts updates times the learning rate."""
        return self._transformation().update(grads, state, params)

    def _transformation(self) -> optax.GradientTransformation:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """SGD as PyTorch defines it.

    Attributes:
        momentum: of the gradients, weight decay included.
        nesterov: whether to look ahead by it.
        weight_decay: L2 coefficient.
        clip_norm: the largest global norm of the gradients; 0 for no limit.
        decay_all: whether weights decay on every parameter; if not, on kernels, but not on BatchNorm and biases.
    """

    momentum: float
    nesterov: bool
    weight_decay: float
    clip_norm: float = 0.0
    decay_all: bool = True

    def _transformation(self):
        return optax.chain(_clip(self.clip_norm), _decay(self), optax.trace(self.momentum, self.nesterov))


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with weight decay apart from the gradients (Loshchilov & Hutter 2019), as PyTorch's AdamW.

    Attributes:
        betas: how much of the moments of the gradients, first and second, a step keeps.
        epsilon: added to the root of the second moment.
        weight_decay, clip_norm, decay_all: see `SGD`.
    """

    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip_norm: float = 0.0
    decay_all: bool = True

    def _transformation(self):
        return optax.chain(_clip(self.clip_norm), optax.scale_by_adam(*self.betas, self.epsilon), _decay(self))


@dataclasses.dataclass(frozen=True)
class LAMB(AdamW):
    """AdamW whose step on each array is as long as the array's norm (You et al. 2020), for large batches."""

    def _transformation(self):
        return optax.chain(super()._transformation(), optax.scale_by_trust_ratio())


def optimizer_of(config: ConfigDict) -> Optimizer:
    """Makes the optimiser that the config describes."""
    decay = dict(
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        decay_all=config.weight_decay_on == "all",
    )
    if config.optimizer == "sgd":
        return SGD(config.momentum, config.nesterov, **decay)
    return {"adamw": AdamW, "lamb": LAMB}[config.optimizer](tuple(config.betas), config.epsilon, **decay)


def _clip(norm):
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def _decay(optimizer):
    return optax.add_decayed_weights(optimizer.weight_decay, None if optimizer.decay_all else _kernels)


def _kernels(params):
    """Tells kernels, of several axes, from BatchNorm's scales and shifts and from biases, which are vectors."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


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
