"""What a training run computes, from its config: the state before step 0, the programs, each step's draw."""

import jax
import numpy as np
from ml_collections import ConfigDict

from sdpoint_jax.experiment import Experiment, parse_instances
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance, sample_instance
from sdpoint_jax.programs.devices import check_batch_size, shape_of_shards
from sdpoint_jax.training.optimizer import SGD, LearningRate
from sdpoint_jax.training.step import TrainPrograms, TrainState, create_state


def learning_rate_of(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> LearningRate:
    """Makes the learning rate that the config describes in epochs."""

    def steps(epochs):
        return round(epochs * steps_per_epoch)

    milestones = tuple(map(steps, config.milestones)) if config.schedule == "step" else None
    return LearningRate(config.learning_rate, total_steps, steps(config.warmup_epochs), milestones, config.decay)


class Plan:
    """The plan of one run.

    Attributes:
        config: as given.
        experiment: the net and its data.
        validation_instances: those that are evaluated during training.
        total_steps: of the run.
        validate_every: steps.
    """

    def __init__(self, config: ConfigDict):
        """Raises ValueError, in one line, for anything in `config` that does not fit."""
        self.config = config
        self.experiment = Experiment(config)
        check_batch_size(config.batch_size, "config.batch_size")
        images, local_batch = self.experiment.num_training_images, config.batch_size // jax.device_count()
        if config.batch_size > images:
            raise ValueError(f"config.batch_size {config.batch_size}: more than the {images} training images")
        if local_batch % config.microbatches:
            raise ValueError(
                f"config.microbatches {config.microbatches}: does not divide a device's {local_batch} images"
            )
        self.validation_instances = _validation_instances(config, self.experiment)
        steps_per_epoch = images / config.batch_size
        self.total_steps = max(1, round(config.num_epochs * steps_per_epoch))
        self.validate_every = max(1, round(config.validate_every_epochs * steps_per_epoch))
        self._optimizer = SGD(config.momentum, config.nesterov, config.weight_decay, config.clip_norm)
        self._schedule = learning_rate_of(config, steps_per_epoch, self.total_steps)

    def create_state(self) -> TrainState:
        """Makes the state before step 0, on the host."""
        return create_state(self.experiment.model, self._optimizer, self.config.seed, self.experiment.image_shape)

    def programs(self, state: TrainState) -> TrainPrograms:
        """Makes the programs for such a state, yet to be compiled."""
        local_batch = self.config.batch_size // jax.process_count()
        batch = {
            "images": shape_of_shards((local_batch, *self.experiment.image_shape), np.uint8),
            "labels": shape_of_shards((local_batch,), np.int32),
        }
        return TrainPrograms(
            state,
            batch,
            model=self.experiment.model,
            optimizer=self._optimizer,
            schedule=self._schedule,
            preprocess=self.experiment.preprocess,
            label_smoothing=self.config.label_smoothing,
            microbatches=self.config.microbatches,
            skip_nonfinite=self.config.on_nonfinite == "skip",
        )

    def draw(self, step: int) -> SDPointInstance:
        """Draws the instance of a step."""
        return sample_instance(self.config.seed, step, self.experiment.instances, self.config.sampling)

    def describe(self, step: int) -> str:
        """Says what goes into a step, for messages."""
        first, end = step * self.config.batch_size, (step + 1) * self.config.batch_size
        return f"step {step}, instance {self.draw(step).name}, training examples {first} to {end - 1}"


def _validation_instances(config, experiment):
    """Picks full resolution and, by default, two instances at about two thirds and one third of the cost."""
    if config.validation_instances != "auto":
        return parse_instances(experiment.model, config.validation_instances)
    drawn = [instance for instance in experiment.instances if instance != FULL_RESOLUTION]
    if not drawn:
        return experiment.instances
    halves = [instance for instance in drawn if instance.ratio == drawn[0].ratio]
    chosen = {FULL_RESOLUTION, halves[len(halves) // 4], halves[len(halves) * 2 // 3]}
    return tuple(instance for instance in (FULL_RESOLUTION, *drawn) if instance in chosen)
