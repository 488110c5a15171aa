"""What a training step minimises: the mean loss of its instances, which labels and soft targets teach.

A `Loss` of the user's own can take the place of `label_loss`. It maps the logits [b, K] by instance and a batch to
(loss, metrics): a scalar that the step minimises, and further scalars to log, by name. The batch has, on one device:

- `images` [b, H, W, C], the network's input, and `labels` [b], int32;
- `other_labels` [b] and `label_shares` [b], with mixup or CutMix: labels of what the images are mixed with, and shares
  of `labels`;
- `teacher_logits` [b, K], with a teacher;
- `step`, int32 scalar, the number of the training step.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.norm_parameters import params_for

Loss = Callable[[Mapping[SDPointInstance, jax.Array], Mapping[str, jax.Array]], tuple[jax.Array, Mapping[str, Any]]]
# Metrics that every step has.
STEP_METRICS = ("loss", "accuracy", "gradient_norm", "finite", "learning_rate", "agreed", "instances")
_OF_ROWS = ("step", "instance", "skipped", "validation", "images_per_second")  # What else a row of the log holds.


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


def label_loss(
    logits: Mapping[SDPointInstance, jax.Array],
    batch: Mapping[str, jax.Array],
    *,
    label_smoothing: float = 0.0,
    distillation: Distillation | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Return (loss, metrics) of a step: the mean of `losses_of_set`, and where there are several, each by its name.

    Args:
        logits, batch: See `Loss`, in the module's docstring.
        label_smoothing: See `cross_entropy`.
        distillation: None for labels alone.
    """
    losses = losses_of_set(
        logits,
        batch["labels"],
        batch.get("teacher_logits"),
        batch.get("other_labels"),
        batch.get("label_shares"),
        batch["step"] if distillation and distillation.first_step else None,
        label_smoothing=label_smoothing,
        distillation=distillation,
    )
    named = {instance.name: {"loss": loss} for instance, loss in losses.items()} if len(losses) > 1 else {}
    return mean(losses), {"instances": named} if named else {}


def mean(values: Mapping[Any, jax.Array]) -> jax.Array:
    """Return the mean of the values of a mapping, added up in its order."""
    return functools.reduce(operator.add, values.values()) / len(values)


def check_loss(
    loss: Loss,
    name: str,
    instances: Sequence[SDPointInstance],
    batch: Mapping[str, jax.ShapeDtypeStruct],
    num_classes: int,
) -> None:
    """Raise ValueError unless a user's loss returns (loss, metrics), all scalars; `batch` has shapes of one device."""
    logits = [jax.ShapeDtypeStruct((*batch["labels"].shape, num_classes), jnp.float32)] * len(instances)
    found = jax.eval_shape(lambda logits, batch: loss(dict(zip(instances, logits)), batch), logits, dict(batch))
    pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)
    if not pair or not all(getattr(value, "shape", None) == () for value in (found[0], *found[1].values())):
        raise ValueError(
            f"config.loss {name}: returns {jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', found)}; needs "
            "(loss, metrics), a scalar and a dict of scalars"
        )
    if taken := sorted({*STEP_METRICS, *_OF_ROWS} & set(found[1])):
        raise ValueError(f"config.loss {name}: metric {taken[0]!r} is one that every step has; give it another name")


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
