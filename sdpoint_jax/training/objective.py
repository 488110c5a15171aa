"""What a training step minimises: the mean loss of its instances, which labels and soft targets teach."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.norm_parameters import params_for


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a teacher's soft targets enter the loss (Hinton et al. 2015, section 2).

    Attributes:
        weight: share of the loss that comes from the teacher, in 0..1; the labels have the rest.
        temperature: by which the logits of both are divided first.
        teacher: the net that teaches all instances; None where the net that learns teaches itself.
        targets: which logits teach without a teacher: those of full resolution the other instances (Yu & Huang 2019,
            section 3.2), or the mean of the step's instances all of them (Wang et al. 2020, section 3.2, with equal
            weights).
        first_step: first training step that uses soft targets. Labels alone teach before it.
    """

    weight: float
    temperature: float = 1.0
    teacher: SDPointNet | None = None
    targets: Literal["full", "mean"] = "full"
    first_step: int = 0


def forward_set(
    model: SDPointNet,
    params: Mapping,
    x: jax.Array,
    instances: Sequence[SDPointInstance],
    rngs: Mapping[str, jax.Array] | None = None,
) -> dict[SDPointInstance, jax.Array]:
    """Computes the logits of several instances in training mode, each layer before a point once.

    Up to its point, an instance computes just what full resolution does, BatchNorm's batch statistics included. So the
    activation walks the net from point to point; at each of them the instances that downsample there run their suffix.

    Args:
        model: the net.
        params: of the net, and of single instances; see `models.norm_parameters`.
        x: the net's input [B, H, W, C].
        instances: those of the net to run.
        rngs: Random keys for dropout, which all instances share.

    Returns:
        logits [B, K] by instance, in the order of `instances`.
    """
    run = functools.partial(model.apply, train=True, mutable=["batch_stats"], rngs=rngs)
    shared = {"params": params_for(params, FULL_RESOLUTION)}
    by_point = sorted(instances, key=model.last_shared_point)
    (x, _), start, logits = run(shared, x, STEM, method="prefix"), STEM, {}
    for point, group in itertools.groupby(by_point, key=model.last_shared_point):
        (x, _), start = run(shared, x, start, point, method="between"), point
        for instance in group:
            own = {"params": params_for(params, instance)}
            logits[instance], _ = run(own, x, point, instance=instance, method="suffix")
    return {instance: logits[instance] for instance in instances}


def losses_of_set(
    logits: Mapping[SDPointInstance, jax.Array],
    labels: jax.Array,
    teacher_logits: jax.Array | None = None,
    others: jax.Array | None = None,
    shares: jax.Array | None = None,
    step: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
    distillation: Distillation | None = None,
) -> dict[SDPointInstance, jax.Array]:
    """Computes the mean loss of each instance, a scalar; a step minimises their mean, in which all count alike.

    Args:
        logits: [B, K] by instance.
        labels: [B].
        teacher_logits: [B, K] of the teacher; None for `distillation.targets`.
        others: [B], labels of what the images are mixed with; None where they are not.
        shares: [B], of `labels` in the loss; the rest is that of `others`.
        step: int32 scalar, the number of the training step; only needed with `distillation.first_step`.
        label_smoothing: see `cross_entropy`.
        distillation: None for labels alone.
    """
    targets, teaches_full = teacher_logits, True
    if targets is None and distillation and distillation.targets == "mean":
        targets = sum(logits.values()) / len(logits)
    elif targets is None:
        targets, teaches_full = logits.get(FULL_RESOLUTION), False
    losses = {}
    for instance, own in logits.items():
        loss = cross_entropy(own, labels, label_smoothing)
        if others is not None:
            loss = shares * loss + (1 - shares) * cross_entropy(own, others, label_smoothing)
        loss = loss.mean()
        if distillation and (teaches_full or instance != FULL_RESOLUTION):
            weight = distillation.weight
            if distillation.first_step:
                weight = jnp.where(step >= distillation.first_step, weight, 0.0)
            soft = distillation_loss(own, jax.lax.stop_gradient(targets), distillation.temperature).mean()
            loss = (1 - weight) * loss + weight * soft
        losses[instance] = loss
    return losses


def distillation_loss(logits: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
    """Computes the divergence [B] of a net's class probabilities from its teacher's, both at `temperature`.

    It is multiplied by the square of the temperature, which keeps its gradients in proportion to those of labels.

    Args:
        logits: [B, K] of the net.
        targets: [B, K], the teacher's logits.
        temperature: by which both are divided.
    """
    ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, targets))
    return temperature**2 * (jnp.exp(theirs) * (theirs - ours)).sum(-1)
