"""The recipe of the authors on ImageNet (Kuen et al. 2018), for any net with an ImageNet stem.

    python -m sdpoint_jax prepare imagenet2012 --help
    python train.py --config=configs/imagenet.py:preresnet101 --workdir=runs/preresnet101
    python evaluate.py --workdir=runs/preresnet101

After the colon: preresnet101 (the default), resnext101, resnet50, or another net of sdpoint_jax.models. The batch of
256 is over all devices, and each device normalises by itself, as in the authors' run on several GPUs. Written for
accelerators; a full run of it has not been made with this code, so no result is given.
"""

from sdpoint_jax.config import default_config


def get_config(model="preresnet101"):
    """The config; see above."""
    config = default_config()
    config.model.name = model or "preresnet101"
    config.model.dtype = "bfloat16"
    config.dataset.name = "imagenet2012"
    config.dataset.validation_split = "validation"
    config.dataset.test_split = "validation"
    config.dataset.image_size = (224, 224)
    config.dataset.resize = 256
    config.dataset.augmentation = "random_resized_crop_flip"
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (0.229, 0.224, 0.225)
    config.num_epochs = 115.0
    config.batch_size = 256
    config.learning_rate = 0.1
    config.schedule = "step"
    config.milestones = (40.0, 75.0, 105.0)
    config.decay = 0.1
    config.weight_decay = 1e-4
    config.reestimate_batches = 200
    config.evaluation_batch_size = 256
    config.validate_every_epochs = 5.0
    config.checkpoint_every_steps = 5000
    config.log_every_steps = 10
    return config
