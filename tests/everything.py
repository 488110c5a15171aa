"""The settings of a run in which every part of training differs from the paper's recipe."""

from sdpoint_jax.config import default_config

SETTINGS = {
    "model.name": "wrn10_1",
    "model.cross_device_norm": True,
    "model.remat": True,
    "model.norm_parameters": "per_instance",
    "dataset.image_size": (8, 8),
    "dataset.augmentation": "shift+trivial_augment+random_erasing:0.25",
    "instances": "full,p01_r0.50,p02_r0.75,p03_r0.50",
    "validation_instances": "full,p01_r0.50",
    "sampling": "cost",  # Annealed: from cheap instances to full resolution.
    "sampling_powers": (-3.0, 3.0),
    "instances_per_step": 3,
    "distillation": 0.5,
    "distillation_temperature": 2.0,
    "distillation_start": 0.25,
    "optimizer": "lamb",
    "epsilon": 1e-3,  # So much, and so low a rate, that rounding does not grow.
    "learning_rate": 1e-3,
    "warmup_epochs": 0.1,
    "weight_decay": 1e-4,
    "weight_decay_on": "kernels",
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "ema_decay": 0.9,
    "validate_ema": True,
    "batch_size": 32,
    "num_epochs": 0.5,
    "reestimate_batches": 2,
    "checkpoint_every_steps": 4,
}
TOTAL_STEPS = 19  # round(0.5 * 1197 / 32)


def config(teacher):
    """The config, with the net at this path as the teacher."""
    made = default_config()
    made.update_from_flattened_dict(SETTINGS | {"teacher": str(teacher)})
    return made


def flags(teacher, **values):
    """The same as flags of train.py, with other values of some keys."""
    return as_flags(SETTINGS | {"teacher": teacher} | values)


def as_flags(settings):
    """Values by key as flags of train.py."""
    texts = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in settings.items()}
    return [f"--config.{key}={text}" for key, text in texts.items()]
