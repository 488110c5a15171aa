"""What a training run computes, from its config: the state before step 0, the programs, each step's draw."""

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import SDPointInstance, sample_instance
from sdpoint_jax.programs.devices import shard
from sdpoint_jax.training.step import TrainPrograms, TrainState, create_state, sgd


def learning_rate_schedule(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Learning rate at a step: linear warm-up, then a cosine to 0 or the milestones of the config."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - warmup))
    else:
        milestones = (round(epoch * steps_per_epoch) - warmup for epoch in config.milestones)
        main = optax.piecewise_constant_schedule(config.learning_rate, dict.fromkeys(milestones, config.decay))
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), main], [warmup])


class Recipe:
    """The recipe of one run.

    Attributes:
        config: as given.
        experiment: the net and its data.
        total_steps: of the run.
        validate_every: steps.
    """

    def __init__(self, config: ConfigDict):
        """Raises ValueError, in one line, for anything in `config` that does not fit."""
        self.config = config
        self.experiment = Experiment(config)
        images, local_batch = self.experiment.num_training_images, config.batch_size // jax.device_count()
        if config.batch_size > images:
            raise ValueError(f"config.batch_size {config.batch_size}: more than the {images} training images")
        if local_batch % config.microbatches:
            raise ValueError(
                f"config.microbatches {config.microbatches}: does not divide a device's {local_batch} images"
            )
        self._optimizer = sgd(config.momentum, config.nesterov, config.weight_decay, config.clip_norm)
        self._steps_per_epoch = self.experiment.num_training_images / config.batch_size
        self.total_steps = max(1, round(config.num_epochs * self._steps_per_epoch))
        self.validate_every = max(1, round(config.validate_every_epochs * self._steps_per_epoch))

    def create_state(self) -> TrainState:
        """The state before step 0, on the host."""
        return create_state(self.experiment.model, self._optimizer, self.config.seed, self.experiment.image_shape)

    def programs(self, state: TrainState) -> TrainPrograms:
        """The programs for such a state, yet to be compiled."""
        local_batch = self.config.batch_size // jax.process_count()
        images = np.empty((local_batch, *self.experiment.image_shape), np.uint8)
        return TrainPrograms(
            state,
            control(0),
            shard({"images": images, "labels": np.empty(local_batch, np.int32)}),
            model=self.experiment.model,
            optimizer=self._optimizer,
            schedule=learning_rate_schedule(self.config, self._steps_per_epoch, self.total_steps),
            preprocess=self.experiment.preprocess,
            label_smoothing=self.config.label_smoothing,
            microbatches=self.config.microbatches,
            skip_nonfinite=self.config.on_nonfinite == "skip",
        )

    def draw(self, step: int) -> SDPointInstance:
        """The instance of a step."""
        return sample_instance(self.config.seed, step, self.experiment.instances, self.config.sampling)

    def describe(self, step: int) -> str:
        """What goes into a step, for messages."""
        first, end = step * self.config.batch_size, (step + 1) * self.config.batch_size
        return f"step {step}, instance {self.draw(step).name}, training examples {first} to {end - 1}"


def control(step: int, stop: bool = False, save: bool = False):
    """What the host says to a step's programs, sharded: the step's number, and two flags, the same on all devices."""
    return shard({"control": np.tile(np.array([step, stop, save], np.int32), jax.local_device_count())})["control"]
