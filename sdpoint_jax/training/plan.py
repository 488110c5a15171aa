"""What a training run computes, from its config: the state before step 0, the programs, each step's draw."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from sdpoint_jax.config import AUTO, named_model
from sdpoint_jax.data import Dataset
from sdpoint_jax.experiment import Experiment, parse_instances
from sdpoint_jax.instance import (
    FULL_RESOLUTION,
    SDPointInstance,
    check_weights,
    cost_weights,
    list_sets,
    sample_set,
    set_name,
)
from sdpoint_jax.models.net import SDPointNet, draws_random_numbers
from sdpoint_jax.models.norm_parameters import PER_INSTANCE, params_for
from sdpoint_jax.models.registry import check_allowed, import_named
from sdpoint_jax.profiling.macs import count_macs, count_set_macs
from sdpoint_jax.programs.devices import check_batch_size, shape_of_shards
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training.mixing import Mixing
from sdpoint_jax.training.objective import Distillation, Loss, check_loss
from sdpoint_jax.training.optimizer import LearningRate, optimizer_of
from sdpoint_jax.training.step import TrainPrograms, TrainState, create_state, device_keys, shapes_of_state
from sdpoint_jax.training.teacher import load_teacher

_COUNTED_STEPS = 10_000  # Of a longer run, so many steps are drawn to count MACs, or to find the sets drawn first.


def learning_rate_of(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> LearningRate:
    """Makes the learning rate that the config describes in epochs."""

    def steps(epochs):
        return round(epochs * steps_per_epoch)

    milestones = tuple(map(steps, config.milestones)) if config.schedule == "step" else None
    return LearningRate(config.learning_rate, total_steps, steps(config.warmup_epochs), milestones, config.decay)


class Plan:
    """The plan of one run.

    Attributes:
        config: as given, with absolute paths and the name of the net.
        experiment: the net and its data.
        data: which images the run has chosen, in a line.
        images: by purpose, training and validation: how many they are, and their digest.
        sets: the sets of instances that its steps train.
        validation_instances: those that are evaluated during training.
        own_norms: those that have scales and shifts of BatchNorm of their own.
        teacher: see `load_teacher`; None without one.
        total_steps: of the run.
        validate_every: steps.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: SDPointNet | type[SDPointNet] | None = None,
        loss: Loss | None = None,
        dataset: Dataset | Mapping[str, Any] | None = None,
    ):
        """Raise ValueError, in one line, for anything in `config` that does not fit; see `Experiment`.

        Args:
            config, model, dataset: See `Experiment`.
            loss: The loss, instead of `config.loss`.
        """
        self.experiment = Experiment(config if model else _with_net(config), model, dataset)
        self.config = config = self.experiment.config
        splits = {"training": config.dataset.train_split, "validation": self.experiment.validation_split}
        # All that the run and the sweep after it will read is opened before the first step.
        self.data = self.experiment.describe_data(**splits, sweep=self.experiment.test_split)
        self.images = {purpose: list(self.experiment.digest(split)) for purpose, split in splits.items()}
        check_batch_size(config.batch_size, "config.batch_size")
        images, local_batch = self.experiment.num_training_images, config.batch_size // jax.device_count()
        if config.batch_size > images:
            raise ValueError(f"config.batch_size {config.batch_size}: more than the {images} training images")
        if local_batch % config.microbatches:
            raise ValueError(
                f"config.microbatches {config.microbatches}: does not divide a device's {local_batch} images"
            )
        self._always = _always(config, self.experiment)
        self._costs = _costs(self.experiment)
        self._mixing = _mixing(config, self.experiment, local_batch)
        self.sets = list_sets(self.experiment.instances, config.instances_per_step, self._always)
        _check_weights(config, self.experiment.instances, self._always)
        self.own_norms = self.experiment.instances if config.model.norm_parameters == "per_instance" else ()
        self.teacher = load_teacher(self.experiment) if config.teacher else None
        self.validation_instances = _validation_instances(config, self.experiment)
        steps_per_epoch = images / config.batch_size
        self.total_steps = max(1, round(config.num_epochs * steps_per_epoch))
        self.validate_every = max(1, round(config.validate_every_epochs * steps_per_epoch))
        self._draws = draws_random_numbers(self.experiment.model, self.experiment.image_shape)
        self._optimizer = optimizer_of(config)
        self._schedule = learning_rate_of(config, steps_per_epoch, self.total_steps)
        self._loss = self._find_loss(loss, local_batch // config.microbatches)

    def _find_loss(self, given, batch_size):
        """Return the user's loss, checked; None for `label_loss`."""
        name = self.config.loss
        if not name:
            return None
        for key in ("label_smoothing", "distillation"):
            if self.config[key]:
                raise ValueError(f"config.{key} {self.config[key]}: has no effect with config.loss {name}; set it to 0")
        loss = given or import_named(name, "config.loss")
        if not callable(loss):
            raise ValueError(f"config.loss {name}: is no function (logits by instance, batch) -> (loss, metrics)")
        batch = {
            "images": jax.ShapeDtypeStruct((batch_size, *self.experiment.image_shape), np.float32),
            "labels": jax.ShapeDtypeStruct((batch_size,), np.int32),
            "step": jax.ShapeDtypeStruct((), np.int32),
        }
        if self._mixing:
            batch["other_labels"] = batch["labels"]
            batch["label_shares"] = jax.ShapeDtypeStruct((batch_size,), np.float32)
        check_loss(loss, name, self.sets[0], batch, self.experiment.dataset.num_classes)
        return loss

    def create_state(self) -> TrainState:
        """Makes the state before step 0, on the host."""
        return create_state(
            self.experiment.model,
            self._optimizer,
            self.config.seed,
            self.experiment.image_shape,
            ema=self.config.ema_decay > 0,
            own_norms=self.own_norms,
        )

    def shapes_of_state(self) -> TrainState:
        """Returns the shapes of what `create_state` makes."""
        return shapes_of_state(
            self.experiment.model,
            self._optimizer,
            self.experiment.image_shape,
            ema=self.config.ema_decay > 0,
            own_norms=self.own_norms,
        )

    def training_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's share of the training batches from `start_step` on, and how their images are mixed."""
        with self.experiment.training_batches(start_step) as batches:
            for step, batch in enumerate(batches, start_step):
                yield batch | (self._mixes(step) if self._mixing else {}) | (self._keys(step) if self._draws else {})

    def _mixes(self, step):
        local_batch = self.config.batch_size // jax.process_count()
        first = jax.process_index() * local_batch
        rows = self._mixing.rows(self.config.seed, step, self.config.batch_size, self.experiment.image_shape[:2])
        return {"mixes": rows[first : first + local_batch]}

    def _keys(self, step):
        local = jax.local_device_count()
        first = jax.process_index() * local
        return {"keys": device_keys(self.config.seed, step, range(first, first + local))}

    def programs(self, state: TrainState) -> TrainPrograms:
        """Makes the programs for such a state or its shapes, yet to be compiled; a teacher gets its statistics here."""
        local_batch = self.config.batch_size // jax.process_count()
        batch = {
            "images": shape_of_shards((local_batch, *self.experiment.image_shape), np.uint8),
            "labels": shape_of_shards((local_batch,), np.int32),
        }
        if self._mixing:
            batch["mixes"] = shape_of_shards((local_batch, 5), np.float32)
        if self._draws:
            batch["keys"] = shape_of_shards((jax.local_device_count(), 2), np.uint32)
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
            ema_decay=self.config.ema_decay,
            distillation=self._distillation(),
            loss=self._loss,
            teacher=self.teacher and self.teacher.variables(self.experiment),
        )

    def _distillation(self):
        config = self.config
        if not config.distillation:
            return None
        return Distillation(
            config.distillation,
            config.distillation_temperature,
            self.teacher and self.teacher.model,
            config.distillation_targets,
            first_step=round(config.distillation_start * self.total_steps),
        )

    def draw(self, step: int) -> tuple[SDPointInstance, ...]:
        """Draws the instances of a step."""
        config = self.config
        return sample_set(
            config.seed,
            step,
            self.experiment.instances,
            config.instances_per_step,
            always=self._always,
            sampling=config.sampling,
            weights=self._weights(step),
        )

    def sets_by_first_use(self, start_step: int) -> tuple[tuple[SDPointInstance, ...], ...]:
        """Lists the sets in the order in which the steps from `start_step` on draw them; not those that none draws.

        In a long run, sets that are not drawn soon come last, in the order of `sets`.
        """
        end = min(self.total_steps, start_step + _COUNTED_STEPS)
        drawn: dict[tuple[SDPointInstance, ...], None] = {}
        for step in range(start_step, end):
            drawn.setdefault(self.draw(step))
            if len(drawn) == len(self.sets):
                break
        return tuple(dict.fromkeys([*drawn, *(self.sets if end < self.total_steps else ())]))

    def _weights(self, step):
        config = self.config
        if config.sampling == "weighted":
            return config.sampling_weights
        if config.sampling == "cost":
            progress = step / max(1, self.total_steps - 1)
            return cost_weights(self._costs, tuple(config.sampling_powers), progress)
        return None

    def describe_cost(self) -> str:
        """Says what the steps cost: the exact MACs of forward and backward, over those of full resolution alone."""
        model, images = self.experiment.model, (self.experiment.image_shape[:2], self.experiment.dataset.channels)
        full = count_macs(model, FULL_RESOLUTION, *images)
        # A backward pass takes the MACs of two forward passes; a teacher has none.
        taught = count_macs(self.teacher.model, FULL_RESOLUTION, *images) / 3 if self.teacher else 0
        shared = {group: (count_set_macs(model, group, *images) + taught) / full for group in self.sets}
        apart = {group: sum(count_macs(model, one, *images) for one in group) / full for group in self.sets}
        drawn = [self.draw(step) for step in range(0, self.total_steps, -(-self.total_steps // _COUNTED_STEPS))]
        mean, separate = (sum(costs[group] for group in drawn) / len(drawn) for costs in (shared, apart))
        text = f"a step takes {mean:.4f} of the MACs of full resolution on average, {min(shared.values()):.4f} to "
        text += f"{max(shared.values()):.4f}" + (", the teacher included" if self.teacher else "")
        if self.config.instances_per_step > 1:
            text += f"; {self.config.instances_per_step} instances one by one would take {separate:.4f}"
        return text

    def describe_parameters(self, state: TrainState) -> str:
        """Says how many parameters `state` has."""
        shared, own = params_for(state.params, FULL_RESOLUTION), state.params.get(PER_INSTANCE, {})
        text = f"{optax.tree.size(shared):,} parameters, shared by all instances"
        if not own:
            return text
        return f"{text}; beside them {optax.tree.size(own):,} scales and shifts of single ones, {len(own)} of them"

    def describe(self, step: int) -> str:
        """Says what goes into a step, for messages."""
        first, end = step * self.config.batch_size, (step + 1) * self.config.batch_size
        return f"step {step}, instance {set_name(self.draw(step))}, training examples {first} to {end - 1}"


def _with_net(config):
    """Return the config with the name of the net, which may be that of `init_from`."""
    if config.model.name != AUTO:
        return config
    if not config.init_from:
        raise ValueError("config.model.name auto: the net of config.init_from, which is empty; name a net")
    _, record = checkpoint.load_newest(config.init_from)
    name, args = named_model(record)
    if name is None:
        raise ValueError(f"config.model.name auto: {config.init_from} does not say which net it is; name it")
    check_allowed(name, None, f"config.init_from {config.init_from}")
    config = config.copy_and_resolve_references()
    config.model.name, config.model.args = name, args
    return config


def _validation_instances(config, experiment):
    """Picks full resolution and, by default, two instances at about two thirds and one third of the cost."""
    if config.validation_instances != AUTO:
        return parse_instances(experiment.model, config.validation_instances)
    drawn = [instance for instance in experiment.instances if instance != FULL_RESOLUTION]
    if not drawn:
        return experiment.instances
    halves = [instance for instance in drawn if instance.ratio == drawn[0].ratio]
    chosen = {FULL_RESOLUTION, halves[len(halves) // 4], halves[len(halves) * 2 // 3]}
    return tuple(instance for instance in (FULL_RESOLUTION, *drawn) if instance in chosen)


def _costs(experiment):
    images = experiment.image_shape[:2], experiment.dataset.channels
    return [count_macs(experiment.model, instance, *images) for instance in experiment.instances]


def _check_weights(config, instances, always):
    if config.sampling != "weighted":
        return
    try:
        check_weights(config.sampling_weights, instances)
        if config.instances_per_step > len(always):
            check_weights(*zip(*(pair for pair in zip(config.sampling_weights, instances) if pair[1] not in always)))
    except ValueError as error:
        raise ValueError(f"config.sampling_{error}") from None


def _mixing(config, experiment, local_batch):
    """Returns how images are mixed; None where they are not."""
    if not config.mixup and not config.cutmix:
        return None
    key = "mixup" if config.mixup else "cutmix"
    if experiment.dataset.num_classes == 1:
        raise ValueError(f"config.{key} {config[key]}: {experiment.dataset.name} has one class, nothing to mix")
    if local_batch // config.microbatches % 2:
        raise ValueError(
            f"config.{key} {config[key]}: mixes images in pairs, and {local_batch // config.microbatches} of them in a "
            "device's batch, or a part of it, is odd: see config.batch_size and config.microbatches"
        )
    return Mixing(config.mixup, config.cutmix)


def _always(config, experiment):
    """Picks the instances that every step trains."""
    count, instances = config.instances_per_step, experiment.instances
    if count == 1:
        return ()
    if count > len(instances):
        raise ValueError(
            f"config.instances_per_step {count}: more than the {len(instances)} instances of the run, "
            f"{', '.join(instance.name for instance in instances)}"
        )
    if config.sampling == "legacy":
        raise ValueError(f"config.instances_per_step {count}: legacy sampling draws one instance a step")
    if config.step_instances == "drawn":
        return ()
    if FULL_RESOLUTION not in instances:
        raise ValueError(
            f"config.step_instances {config.step_instances!r}: trains full resolution in every step, which is not "
            "among the instances"
        )
    if config.step_instances == "full":
        return (FULL_RESOLUTION,)
    others = [pair for pair in zip(_costs(experiment), instances) if pair[1] != FULL_RESOLUTION]
    return FULL_RESOLUTION, min(others, key=lambda pair: pair[0])[1]
