"""What training and a sweep share: the data, the net, its instances and batches, as a config describes them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from sdpoint_jax import data
from sdpoint_jax.config import AUTO, check_config, with_absolute_paths
from sdpoint_jax.instance import DEFAULT_RATIOS, SDPointInstance, check_sampling
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.net import DEVICE_AXIS, SDPointNet
from sdpoint_jax.models.norm_parameters import instances_with_own_norms, with_own_norms
from sdpoint_jax.models.registry import create_model, make_model, parse_args

_SHOWN_CLASSES = 10


def parse_instances(
    model: SDPointNet, names: str, points: Iterable[int] = (), ratios: Iterable[float] = ()
) -> tuple[SDPointInstance, ...]:
    """Finds instances of `model` by their comma-separated `names`, or `all` at these points and ratios.

    Args:
        model: the net.
        names: as `full,p01_r0.50`, or `all`.
        points: with `all`, a subset of the net's; empty for all of them.
        ratios: with `all`; empty for the paper's.

    Returns:
        the instances in order of depth.

    Raises:
        ValueError: a name that is none, or an instance that the net does not have.
    """
    if names == "all":
        return model.instances(ratios or DEFAULT_RATIOS, points or None)
    wanted = dict.fromkeys(SDPointInstance.from_name(name.strip()) for name in names.split(","))
    for instance in wanted:
        model.check_instance(instance)
    depth = {point: index for index, point in enumerate(dict.fromkeys(i.point for i in model.instances()))}
    return tuple(sorted(wanted, key=lambda instance: (depth[instance.point], instance.ratio)))


class Experiment:
    """The parts of an experiment, checked against each other.

    Attributes:
        config: as given, with absolute paths.
        dataset: see `data.load_dataset`.
        model: the net.
        instances: those that training draws from.
        image_shape: (H, W, C) of the uint8 images.
        num_training_images: examples of the training split.
        preprocess: maps uint8 images to the net's input, on the device.
        resize: (height, width) that an image just covers before its centre is cut out for evaluation.
        evaluation_batch_size: global; that of the config, rounded up to a multiple of all devices.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: SDPointNet | type[SDPointNet] | None = None,
        dataset: data.Dataset | Mapping[str, Any] | None = None,
    ):
        """Raise ValueError, in one line, for anything in `config` that does not fit.

        Args:
            config: See `config.default_config`.
            model: The net, or its class, instead of `config.model.name` and `config.model.args`.
            dataset: The data set, or objects with `__len__` and `__getitem__` by split, instead of
                `config.dataset.name`; see `data.from_sources`.
        """
        check_config(config)
        config = self.config = with_absolute_paths(config)
        on_bad_image = config.dataset.on_bad_image
        if dataset is None:
            self.dataset = data.load_dataset(
                config.dataset.name, config.dataset.data_dir or None, on_bad_image=on_bad_image
            )
        else:
            given = dataset if isinstance(dataset, data.Dataset) else data.from_sources(dataset)
            self.dataset = dataclasses.replace(given, on_bad_image=on_bad_image)
            config.dataset.name = given.name
        try:
            data.check_augmentation(config.dataset.augmentation)
        except ValueError as error:
            raise ValueError(f"config.dataset.{error}") from None
        self.image_shape = (*config.dataset.image_size, self.dataset.channels)
        for key in ("mean", "std"):
            if len(config.dataset[key]) != self.dataset.channels:
                raise ValueError(
                    f"config.dataset.{key} {tuple(config.dataset[key])}: {self.dataset.name} has "
                    f"{self.dataset.channels} channels, one value each"
                )
        self.preprocess = functools.partial(normalize, mean=config.dataset.mean, std=config.dataset.std)
        self.model = model_of_config(config, self.dataset.num_classes, model)
        self.model.check_image_size(config.dataset.image_size)
        self.instances = parse_instances(self.model, config.instances, config.points, config.ratios)
        check_sampling(config.sampling, self.instances)
        self.num_training_images = len(self._open("train_split", config.dataset.train_split))
        self.resize = data.evaluation_resize(self.dataset, self.image_shape[:2], config.dataset.resize or None)
        self.evaluation_batch_size = -(-config.evaluation_batch_size // jax.device_count()) * jax.device_count()

    @functools.cached_property
    def validation_split(self) -> str:
        """Split that is watched during training; raises ValueError where there is none."""
        dataset = self.config.dataset
        chosen = self._find("validation_split", "validation", "test")
        if chosen == AUTO and dataset.test_split != AUTO:
            chosen = dataset.test_split
        if chosen == AUTO:
            sizes = ", ".join(f"{name} ({size})" for name, size in self.dataset.splits.items())
            raise ValueError(
                f"config.dataset.validation_split auto: {self.dataset.name} has neither validation nor test images, "
                f"only {sizes}; to hold some out: --config.dataset.train_split=train[:90%] "
                "--config.dataset.validation_split=train[90%:]"
            )
        self._open("validation_split", chosen)
        return chosen

    @functools.cached_property
    def test_split(self) -> str:
        """Split that a sweep reports; raises ValueError where there is none."""
        chosen = self._find("test_split", "test")
        if chosen == AUTO:
            return self.validation_split
        self._open("test_split", chosen)
        return chosen

    def _find(self, key, *names):
        """Return the split that the config names; for `auto` the first of `names` that the data have, else `auto`."""
        given = self.config.dataset[key]
        found = [name for name in map(self.dataset.find_split, names) if name]
        return found[0] if given == AUTO and found else given

    def _open(self, key, split):
        try:
            examples = self.dataset.source(split)
            if self.dataset.on_bad_image == "error":
                examples[0]  # Files that are missing or of another kind are found now, not after hours.
        except data.BadImageError:  # It names its own place.
            raise
        except ValueError as error:
            raise ValueError(f"config.dataset.{key}: {error}") from None
        return examples

    def describe_data(self, **splits: str) -> str:
        """Describe in a line which split each purpose gets, how many images it has, and the classes."""
        listed = ", ".join(f"{use} {split} ({len(self.dataset.source(split)):,})" for use, split in splits.items())
        names = self.dataset.class_names
        return f"images of {self.dataset.name}: {listed}; {len(names)} classes: {_some(names)}"

    def digest(self, split: str) -> tuple[int, str]:
        """Return how many images a split has, and a digest of which they are."""
        examples = self.dataset.source(split)
        return len(examples), examples.digest

    def check_classes(self, record: Mapping[str, Any], where: str) -> None:
        """Raise ValueError unless the classes of a checkpoint's record, if it has any, are those of the data."""
        there, here = record.get("class_names"), list(self.dataset.class_names)
        if there is not None and list(there) != here:
            raise ValueError(
                f"{where}: trained on other classes than those of {self.dataset.name}: {compare_classes(there, here)}"
            )

    def check_params(self, params: Any, source: str) -> None:
        """Raises ValueError, naming `source`, unless `params` are those of this net for these images and classes.

        Whether instances have scales and shifts of their own is for `params` to say.
        """
        check_variables(self.model, self.config.model.name, self, params, source)

    def check_statistics(self, statistics: Any, source: str) -> None:
        """Raises ValueError, naming `source`, unless `statistics` are `batch_stats` of this net."""
        check_variables(self.model, self.config.model.name, self, statistics, source, kind="batch_stats")

    def training_batches(self, start_step: int) -> data.Batches:
        """Reads this host's share of the training batches from `start_step` on, without end."""
        return data.training_batches(
            self.dataset,
            self.config.dataset.train_split,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            augmentation=self.config.dataset.augmentation,
            start_step=start_step,
            **self._reading(),
        )

    def reestimation_batches(self, images: str) -> data.Batches:
        """Reads this host's share of training batches to re-estimate from, `augmented` or `clean`; without end."""
        return data.training_batches(
            self.dataset,
            self.config.dataset.train_split,
            batch_size=self.evaluation_batch_size,
            seed=self.config.seed + 1,
            augmentation=self.config.dataset.augmentation if images == "augmented" else "none",
            **self._reading(),
        )

    def evaluation_batches(self, split: str) -> data.Batches:
        """Reads this host's share of `split`, each example once."""
        return data.evaluation_batches(self.dataset, split, batch_size=self.evaluation_batch_size, **self._reading())

    def _reading(self):
        dataset = self.config.dataset
        return dict(
            image_size=tuple(dataset.image_size),
            resize=dataset.resize or None,
            num_threads=None if dataset.num_threads < 0 else dataset.num_threads,
            num_workers=dataset.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def compare_classes(there: Sequence[str], here: Sequence[str]) -> str:
    """Describe in a line how two lists of class names differ, the first of a checkpoint, the second of the data."""
    if sorted(there) == sorted(here):
        first = next(index for index, (one, other) in enumerate(zip(there, here, strict=True)) if one != other)
        return f"the same in another order, class {first} is {here[first]}, was {there[first]}"
    gone, new = [name for name in there if name not in here], [name for name in here if name not in there]
    return "; ".join(f"{what} {_some(names)}" for what, names in (("without", gone), ("new", new)) if names)


def _some(names):
    return ", ".join(names[:_SHOWN_CLASSES]) + (
        f" and {more} more" if (more := len(names) - _SHOWN_CLASSES) > 0 else ""
    )


def model_of_config(
    config: ConfigDict, num_classes: int, given: SDPointNet | type[SDPointNet] | None = None
) -> SDPointNet:
    """Return the net that a config describes, or `given` with the attributes that the config sets.

    Raises:
        ValueError: The net is unknown, or lacks an attribute that the config sets.
    """
    attributes = {"downsampling": config.model.downsampling, "remat": config.model.remat}
    if config.model.cross_device_norm:
        attributes["axis_name"] = DEVICE_AXIS
    try:
        if given is None:
            found = dict(dtype=config.model.dtype, args=config.model.args, **attributes)
            return create_model(config.model.name, num_classes, **found)
        attributes |= parse_args(config.model.args)
        return make_model(given, num_classes, dtype=config.model.dtype, **attributes)
    except ValueError as error:
        raise ValueError(f"config.model: {error}") from error


def check_variables(
    model: SDPointNet, name: str, experiment: Experiment, given: Any, source: str, *, kind: str = "params"
) -> None:
    """Raises ValueError unless variables are those of a net for the images and classes of an experiment.

    Args:
        model: the net.
        name: of the net, for the message.
        experiment: has the images and classes.
        given: nested dicts of arrays.
        source: where they are from, for the message.
        kind: `params` or `batch_stats`.
    """
    images = jax.ShapeDtypeStruct((1, *experiment.image_shape), np.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    like = variables.get(kind, {})
    if kind == "params":
        like = with_own_norms(model, like, instances_with_own_norms(given))
    wanted, given = (
        {key: value.shape for key, value in traverse_util.flatten_dict(tree, sep="/").items()} for tree in (like, given)
    )
    wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if wrong:
        listed = ", ".join(f"{key} {given.get(key)}, needs {wanted.get(key)}" for key in wrong[:3])
        raise ValueError(
            f"{source}: does not fit {name} for {experiment.dataset.num_classes} classes "
            f"and {experiment.dataset.channels} channels: {listed}{' ...' if len(wrong) > 3 else ''}"
        )
