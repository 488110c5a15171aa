"""The teacher of a run: a trained net whose logits at full resolution distil the instances, with frozen parameters."""

import dataclasses
import functools
import itertools
from typing import Any

import jax

from sdpoint_jax import progress
from sdpoint_jax.config import named_model
from sdpoint_jax.experiment import Experiment, check_variables
from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.models.registry import check_allowed, create_model
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.storage import checkpoint

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained net.

    Attributes:
        name: of the net, for messages.
        model: the net.
        params: its parameters at full resolution, on the host.
        batch_stats: its own statistics at full resolution; None where it has none, as the checkpoint of a run.
    """

    name: str
    model: SDPointNet
    params: PyTree
    batch_stats: PyTree | None

    @functools.cached_property
    def checksum(self) -> int:
        """Checksum of its parameters and statistics."""
        return checkpoint.checksum_tree({"params": self.params, "batch_stats": self.batch_stats or {}})

    def variables(self, experiment: Experiment) -> PyTree:
        """Returns parameters and statistics at full resolution, re-estimated as `experiment` says if it has none."""
        statistics = self.batch_stats
        if statistics is None:
            progress.say("re-estimating the teacher's statistics at full resolution")
            statistics = _reestimate(self.model, self.params, experiment)
        return {"params": self.params, "batch_stats": statistics}


def load_teacher(experiment: Experiment) -> Teacher:
    """Loads the teacher that the config names: a run, imported weights, or the artefact of a sweep.

    Raises:
        CheckpointError: `config.teacher` is no sound checkpoint.
        ValueError: it does not say which net it is, or is one for other classes or images.
    """
    source = experiment.config.teacher
    arrays, record = checkpoint.load_newest(source)
    where, config = f"config.teacher {source}", experiment.config
    name, args = named_model(record)
    if name is None:
        raise ValueError(f"{where}: does not say which net it is, as a run, imported weights or a sweep do")
    classes, wanted = _count_classes(record, arrays["params"], where), experiment.dataset.num_classes
    if classes != wanted:
        raise ValueError(f"{where}: a net of {classes} classes; {experiment.dataset.name} has {wanted}")
    experiment.check_classes(record, where)
    if name == config.model.name and args == config.model.args:
        model = experiment.model
    else:
        check_allowed(name, None, where)
        model = create_model(name, classes, dtype=config.model.dtype, args=args)
    check_variables(model, name, experiment, arrays["params"], where)
    params = params_for(arrays["params"], FULL_RESOLUTION)
    statistics = arrays.get("batch_stats")
    if statistics and FULL_RESOLUTION.name in statistics:  # An artefact's, by instance.
        statistics = statistics[FULL_RESOLUTION.name]
    if statistics is not None:
        check_variables(model, name, experiment, statistics, where, kind="batch_stats")
    return Teacher(name, model, params, statistics)


def _count_classes(record, params, where):
    """Return the number of classes: imported weights and sweeps record it, a run its class names."""
    if classes := record.get("num_classes") or len(record.get("class_names", ())):
        return classes
    try:
        return len(params["head"]["dense"]["bias"])
    except (LookupError, TypeError):
        raise ValueError(f"{where}: does not say how many classes it has") from None


def _reestimate(model, params, experiment):
    config = experiment.config
    evaluator = Evaluator(
        model,
        [FULL_RESOLUTION],
        image_shape=experiment.image_shape,
        batch_size=experiment.evaluation_batch_size // jax.process_count(),
        preprocess=experiment.preprocess,
    )
    with experiment.reestimation_batches(config.reestimate_images) as batches:
        chosen = itertools.islice(batches, config.reestimate_batches)
        return evaluator.reestimate(params, chosen)[FULL_RESOLUTION]
