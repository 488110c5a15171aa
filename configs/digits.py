"""The default: handwritten digits, all instances of a small ResNet, in a few minutes on two CPU cores.

python train.py --config=configs/digits.py --workdir=runs/digits
python train.py --config=configs/digits.py --config.instances=full --workdir=runs/digits_plain
"""

from sdpoint_jax.config import default_config


def get_config():
    """The config; see above."""
    config = default_config()
    config.model.name = "resnet20_projection_norm"  # Not He et al.'s shortcuts, but those of larger nets.
    config.dataset.image_size = (16, 16)  # Twice the native size, so that the last feature map is 4x4.
    config.num_epochs = 30.0
    config.batch_size = 64
    config.learning_rate = 0.1
    config.warmup_epochs = 2.0
    config.weight_decay = 5e-4
    config.reestimate_batches = 20
    return config
