"""The configuration of an experiment: its keys with their defaults, and the checks that need nothing but the values.

`configs/` holds a file per experiment; each starts from `default_config()` and changes what differs.
"""

import difflib
import json
import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

FORMAT = 2  # Of a config as JSON holds it. Format 1 had no number, and other nets under the names of `_RENAMED`.
# Nets for small images: in format 1 a shortcut that changes the shape was a projection with BatchNorm.
_RENAMED = re.compile(r"(?:resnet|preresnet)(?:20|56|110|164)|wrn[0-9]+_[0-9]+")

AUTO = "auto"  # The value of a key that is found from the data or from other keys.
# Keys that each host may set as it needs.
HOST_KEYS = ("dataset.data_dir", "dataset.num_threads", "dataset.num_workers", "compile_workers")
# Keys that name images or parameters. What they name decides the result, and is compared; the name does not.
PLACE_KEYS = ("dataset.name", "dataset.train_split", "dataset.validation_split", "init_from", "teacher")
# Keys that change neither the result of a run nor its checkpoints: a run may be continued with other values.
RUN_TIME_KEYS = (
    *HOST_KEYS,
    "dataset.test_split",  # Of a sweep, which has a key of its own.
    "dataset.on_bad_image",  # A run that met a bad image or a step that is not finite has stopped before it.
    "dataset.on_changed_images",
    "on_nonfinite",
    "model.remat",  # The same sums, up to rounding.
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "keep_best_checkpoints",
    "best_metric",
    "log_every_steps",
    "on_log_error",
)


def default_config() -> ConfigDict:
    """Makes a config of every key there is, locked: setting another one is an error."""
    config = ConfigDict()
    config.seed = 0  # Of parameters, draws and data order.

    config.model = ConfigDict()
    # A net of sdpoint_jax.models; module:Class, whose code is run; or auto, the net of init_from.
    config.model.name = "wrn16_1"
    config.model.args = ""  # Attributes of the net, as widths=(8, 16), depth=2.
    config.model.downsampling = "avg"  # The operation at the points: avg, max, strided or blur; the paper's is avg.
    config.model.dtype = "float32"  # Of the computation: float32 or bfloat16.
    config.model.cross_device_norm = False  # Normalise in training over all devices, not on each by itself.
    config.model.norm_parameters = "shared"  # Scales and shifts of BatchNorm; or per_instance, after each one's point.
    config.model.remat = False  # Recompute activations in the backward pass, for less memory.

    config.dataset = ConfigDict()
    config.dataset.name = "digits"  # Or a prepared TFDS set, as cifar10; or folder:PATH.
    config.dataset.data_dir = ""  # Of prepared sets; TFDS's default where empty.
    config.dataset.train_split = "train"
    config.dataset.validation_split = "auto"  # Watched during training; auto for validation, or test if there is none.
    config.dataset.test_split = "auto"  # What a sweep reports; auto for test, or the validation split.
    config.dataset.image_size = (8, 8)  # Height, width.
    config.dataset.resize = 0  # Evaluation: shorter side before the centre crop; 0 for the data's default.
    config.dataset.augmentation = (
        "shift"  # A crop and what follows, as pad_crop_flip+trivial_augment; see sdpoint_jax.data.
    )
    config.dataset.mean = (0.305,)  # Per channel, on the scale 0..1.
    config.dataset.std = (0.376,)
    config.dataset.on_bad_image = "error"  # Or skip.
    config.dataset.on_changed_images = "error"  # Or continue, where a run is resumed on other images than it began on.
    config.dataset.num_threads = -1  # Reading and decoding; -1 for the data's default.
    config.dataset.num_workers = 0  # Processes that read; 0 for threads alone.

    config.instances = "all"  # Or names, as "full" (training without SDPoint) or "full,p01_r0.50".
    config.points = ()  # With "all": downsampling points; empty for all of the net's.
    config.ratios = (0.5, 0.75)  # With "all": downsampling ratios.
    config.sampling = "uniform"  # Or legacy, weighted or cost; see sdpoint_jax.instance.
    config.sampling_weights = ()  # With weighted: one for each instance, in order of depth.
    config.sampling_powers = (0.0, 0.0)  # With cost: of an instance's MACs, its weight, at the first and last step.

    # More share, in each step, every layer before a point. At the same compute, more epochs gained more: study C.
    config.instances_per_step = 1
    config.step_instances = "sandwich"  # Of those: full resolution and the cheapest; or full, or drawn. The rest drawn.
    config.distillation = (
        0.0  # Share of the loss from soft targets: of full resolution, for the others; or of a teacher.
    )
    config.distillation_temperature = 1.0
    config.distillation_targets = "full"  # Without a teacher: or mean, the mean logits of a step's instances, for all.
    config.distillation_start = 0.0  # Share of the steps that the labels alone teach, before soft targets do.
    config.teacher = ""  # A checkpoint of a trained net, whose soft targets then are for all instances.

    config.num_epochs = 100.0
    config.batch_size = 64  # Global: over all devices of all hosts.
    config.microbatches = 1  # Passes over which a device's batch is split, for less memory.
    config.learning_rate = 0.1
    config.optimizer = "sgd"  # Or adamw or lamb.
    config.schedule = "cosine"  # Or step: multiplied by `decay` at each of `milestones`.
    config.warmup_epochs = 0.0  # Linear, from 0.
    config.milestones = ()  # Epochs.
    config.decay = 0.1
    config.momentum = 0.9  # Of sgd.
    config.nesterov = False
    config.betas = (0.9, 0.999)  # Of adamw and lamb.
    config.epsilon = 1e-8
    config.weight_decay = 1e-4
    config.weight_decay_on = "all"  # Parameters; or kernels, so not on BatchNorm and biases.
    config.loss = ""  # A loss of your own, module:function, whose code is run; see sdpoint_jax.training.objective.
    config.label_smoothing = 0.0
    config.mixup = 0.0  # Both parameters of the beta distribution of an image's share; 0 for none.
    config.cutmix = 0.0  # Likewise; with both, each pair of images is mixed in one of the two ways.
    config.ema_decay = 0.0  # What a step keeps of the average of the parameters; 0 for no average.
    config.validate_ema = False  # Validate the average, not the parameters themselves.
    config.clip_norm = 0.0  # Of the gradients, global; 0 for none.
    config.on_nonfinite = "error"  # A loss or gradient that is not finite stops the run; or skip such steps.
    config.init_from = ""  # A checkpoint whose parameters to start from.
    config.reset_head = False  # With init_from: draw the classifier anew.

    config.reestimate_batches = 100  # Batches of training images that BatchNorm statistics are re-estimated from.
    config.reestimate_images = "augmented"  # As in training; or clean, preprocessed as in evaluation.
    config.evaluation_batch_size = 200  # Global.
    config.validate_every_epochs = 10.0
    config.validation_instances = "auto"  # Names; auto for full resolution and two of lower cost.

    config.checkpoint_every_steps = 500
    config.checkpoint_every_minutes = 0.0  # Besides; 0 for never.
    config.keep_checkpoints = 2  # The latest ones.
    config.keep_best_checkpoints = 0  # Besides, of those after a validation: the best ones by `best_metric`.
    config.best_metric = "full/top1"  # A validation instance, and top1 or loss.
    config.log_every_steps = 1
    config.on_log_error = "error"  # Or continue, without logs, where they cannot be written.
    config.compile_workers = 0  # Threads that compile; 0 for one per core.
    return config.lock()


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """Return a copy whose paths are absolute: a record of it can be used from another working directory."""
    config = config.copy_and_resolve_references()
    kind, colon, folder = config.dataset.name.partition(":")
    if kind == "folder" and folder:
        config.dataset.name = f"{kind}{colon}{_absolute(folder)}"
    config.dataset.data_dir = _absolute(config.dataset.data_dir)
    config.init_from, config.teacher = _absolute(config.init_from), _absolute(config.teacher)
    return config


def _absolute(path):
    return os.path.abspath(os.path.expanduser(path)) if path and "://" not in path else path


def known_keys() -> tuple[str, ...]:
    """Lists the keys of a config, nested ones with a dot."""
    return tuple(key for key, _ in _flatten(default_config()))


def unknown_key(key: str) -> ValueError:
    """Return the error for a key that a config does not have: it names the nearest ones."""
    inside = [known for known in known_keys() if known.startswith(f"{key}.")]
    if inside:
        return ValueError(f"config key {key!r}: a group of keys; valid are {', '.join(inside)}")
    last = [known.rpartition(".")[2] for known in known_keys()]
    # By the last part as well: the nearest of nme are model.name and dataset.name. And by initials, as lr.
    found = [name for name in last if "".join(part[0] for part in name.split("_")) == key]
    for wanted in (key, key.rpartition(".")[2]):
        found += difflib.get_close_matches(wanted, [*known_keys(), *last], n=3, cutoff=0.6)
    near = [known for name in found for known in known_keys() if f".{known}".endswith(f".{name}")]
    listed = f"nearest are {', '.join(list(dict.fromkeys(near))[:4])}" if near else "no key is near"
    return ValueError(f"config key {key!r}: {listed}; sdpoint_jax/config.py lists all")


def check_keys(config: ConfigDict) -> None:
    """Raise ValueError unless a config has all keys and no others."""
    found = {key for key, _ in _flatten(config)}
    if unknown := sorted(found - set(known_keys())):
        raise unknown_key(unknown[0])
    if missing := sorted(set(known_keys()) - found):
        raise ValueError(f"config has no {', '.join(missing)}: start from sdpoint_jax.config.default_config()")


def parse_value(key: str, text: str) -> Any:
    """Return the value of a key from text, as on the command line.

    Raises:
        ValueError: it is not of the key's type; names key and text.
    """
    default = dict(_flatten(default_config()))[key]
    try:
        if isinstance(default, tuple):
            inner = text.strip().removesuffix(",")
            if inner[:1] + inner[-1:] in ("()", "[]"):
                inner = inner[1:-1].removesuffix(",")
            separator = "x" if key == "dataset.image_size" and "," not in inner else ","
            return tuple(_parse(part, _ELEMENTS[key]) for part in inner.split(separator)) if inner.strip() else ()
        return _parse(text, type(default))
    except (ValueError, KeyError):
        raise ValueError(f"config.{key} {text}: must be {_describe_type(key, default)}") from None


def _parse(text, kind):
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    return int(text, 16) if kind is int and text.lower().startswith("0x") else kind(text)


def _describe_type(key, default):
    if isinstance(default, tuple):
        return f"{'whole numbers' if _ELEMENTS[key] is int else 'numbers'} with commas between"
    return {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]


def check_config(config: ConfigDict) -> None:
    """Raises ValueError for a key that is missing or unknown, and for a value that no experiment can have."""
    check_keys(config)
    flat = dict(_flatten(config))
    for key, valid in _CHOICES.items():
        if flat[key] not in valid:
            raise ValueError(f"config.{key} {flat[key]!r}: valid are {', '.join(valid)}")
    for key, lowest in _LOWEST.items():
        if not flat[key] >= lowest:
            raise ValueError(f"config.{key} {flat[key]}: at least {lowest}")
    for key, value in flat.items():
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"config.{key} {value}: must be finite")
    for key in _POSITIVE:
        if not flat[key] > 0:
            raise ValueError(f"config.{key} {flat[key]}: must be positive")
    for key, value in flat.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"config.{key} {value}: must be a number")
    for key, kind in _ELEMENTS.items():
        if wrong := [value for value in flat[key] if not _is_number(value, kind)]:
            what = "whole numbers" if kind is int else "finite numbers"
            raise ValueError(f"config.{key} {tuple(flat[key])}: {wrong[0]!r} is not among {what}")
    if min(flat["milestones"], default=0) < 0:
        raise ValueError(f"config.milestones {tuple(flat['milestones'])}: at least 0")
    size = flat["dataset.image_size"]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"config.dataset.image_size {tuple(size)}: a height and a width in pixels")
    if not all(value > 0 for value in flat["dataset.std"]):
        raise ValueError(f"config.dataset.std {tuple(flat['dataset.std'])}: must be positive")
    for key in ("label_smoothing", "ema_decay", "distillation_start"):
        if not 0 <= flat[key] < 1:
            raise ValueError(f"config.{key} {flat[key]}: at least 0, less than 1")
    if flat["validate_ema"] and not flat["ema_decay"]:
        raise ValueError("config.validate_ema True: with config.ema_decay 0.0 there is no average of the parameters")
    if len(flat["betas"]) != 2 or not all(0 <= beta < 1 for beta in flat["betas"]):
        raise ValueError(f"config.betas {tuple(flat['betas'])}: two numbers, each at least 0, less than 1")
    if len(flat["sampling_powers"]) != 2 or not all(abs(power) <= 100 for power in flat["sampling_powers"]):
        raise ValueError(f"config.sampling_powers {tuple(flat['sampling_powers'])}: two numbers of at most 100")
    _check_distillation(flat)


def _is_number(value, kind):
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole or (kind is float and isinstance(value, numbers.Real) and math.isfinite(value))


def _check_distillation(flat):
    weight, teacher = flat["distillation"], flat["teacher"]
    if not 0 <= weight <= 1:
        raise ValueError(f"config.distillation {weight}: a share of the loss, at least 0, at most 1")
    if teacher and not weight:
        raise ValueError(f"config.teacher {teacher}: with config.distillation 0.0 it teaches nothing")
    mean = flat["distillation_targets"] == "mean"
    if teacher and mean:
        raise ValueError(
            f"config.distillation_targets 'mean': with config.teacher {teacher}, its targets are used: full"
        )
    if weight and mean and flat["instances_per_step"] == 1:
        raise ValueError("config.distillation_targets 'mean': needs config.instances_per_step of at least 2")
    if weight and not (teacher or mean) and (flat["instances_per_step"] == 1 or flat["step_instances"] == "drawn"):
        raise ValueError(
            f"config.distillation {weight}: needs config.teacher, or full resolution in every step: "
            "config.instances_per_step of at least 2 and config.step_instances sandwich or full"
        )


_CHOICES = {
    "model.norm_parameters": ("shared", "per_instance"),
    "model.downsampling": ("avg", "max", "strided", "blur"),
    "step_instances": ("sandwich", "full", "drawn"),
    "distillation_targets": ("full", "mean"),
    "optimizer": ("sgd", "adamw", "lamb"),
    "weight_decay_on": ("all", "kernels"),
    "schedule": ("cosine", "step"),
    "reestimate_images": ("augmented", "clean"),
    "on_nonfinite": ("error", "skip"),
    "on_log_error": ("error", "continue"),
    "dataset.on_bad_image": ("error", "skip"),
    "dataset.on_changed_images": ("error", "continue"),
}
# Keys that hold several numbers, and of which kind.
_ELEMENTS = {
    "points": int,
    "ratios": float,
    "dataset.image_size": int,
    "dataset.mean": float,
    "dataset.std": float,
    "sampling_weights": float,
    "sampling_powers": float,
    "milestones": float,
    "betas": float,
}
_POSITIVE = ("num_epochs", "learning_rate", "validate_every_epochs", "distillation_temperature", "epsilon")
_LOWEST = {
    "seed": 0,
    "batch_size": 1,
    "evaluation_batch_size": 1,
    "microbatches": 1,
    "instances_per_step": 1,
    "reestimate_batches": 1,
    "checkpoint_every_steps": 1,
    "checkpoint_every_minutes": 0,
    "keep_checkpoints": 1,
    "keep_best_checkpoints": 0,
    "log_every_steps": 1,
    "warmup_epochs": 0,
    "momentum": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "decay": 0,
    "mixup": 0,
    "cutmix": 0,
}


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON holds it, with the number of its format."""
    return {"format": FORMAT, **json.loads(config.to_json())}


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Brings a record in which an earlier version named a net, as a config does, to the names of this one.

    Args:
        values: with the net's name below `model` and `name`, if at all, and the number of their `format`, if any.

    Raises:
        ValueError: a format that this version does not read.
    """
    found = values.get("format", 1)
    if found not in range(1, FORMAT + 1):
        raise ValueError(f"config of format {found!r}: this version reads 1 to {FORMAT}: update sdpoint_jax")
    model = values.get("model")
    if found > 1 or not isinstance(model, Mapping) or not _RENAMED.fullmatch(str(model.get("name"))):
        return dict(values)
    return {**values, "model": {**model, "name": f"{model['name']}_projection_norm"}}


def named_net(record: Mapping[str, Any]) -> str | None:
    """Return the net that a record of a run, of imported weights or of an artefact names; None if it names none."""
    return named_model(record)[0]


def named_model(record: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the net that a record names, see `named_net`, and its attributes, see `config.model.args`."""
    try:
        model = upgrade(record.get("config", record))["model"]
        return model["name"], model.get("args", "")
    except (LookupError, TypeError, AttributeError):
        return None, ""


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Makes a config from the defaults and `values`, the inverse of `to_dict`; nothing is executed.

    Args:
        values: of any format; see `upgrade`.

    Raises:
        ValueError: an unknown key or format, or a value of another type than its default.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"config {values!r}: not keys with values")
    config = default_config()
    values = upgrade(values)
    values.pop("format", None)
    for key, value in _flatten(values):
        if key not in known_keys():
            raise unknown_key(key)
        *path, last = key.split(".")
        target = config[path[0]] if path else config
        try:
            target[last] = tuple(value) if isinstance(value, list) else value
        except TypeError:
            raise ValueError(f"config.{key} {value!r}: must be of type {type(target[last]).__name__}") from None
    return config


def identity(config: ConfigDict) -> dict[str, Any]:
    """Return the values by which configs of the same results are told from others: no paths, and no run-time keys."""
    return {key: value for key, value in _flatten(config) if key not in RUN_TIME_KEYS and key not in PLACE_KEYS}


def facts(config: ConfigDict) -> dict[str, Any]:
    """Return the values that all hosts of a run must be given alike, by their keys."""
    return {f"config.{key}": value for key, value in _flatten(config) if key not in HOST_KEYS + PLACE_KEYS}


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """List where two configs differ in what a run computes, as `key: value, other value`; see `identity`."""
    ours, theirs = identity(config), identity(other)
    return [f"{key}: {ours[key]!r}, {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]


def _flatten(config, prefix="") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
