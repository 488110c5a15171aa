"""CIFAR-10 and CIFAR-100 with the nets and recipes that papers compare.

    python -m sdpoint_jax prepare cifar10 --help
    python train.py --config=configs/cifar.py:cifar10,wrn28_10 --workdir=runs/cifar10_wrn28_10
    python evaluate.py --workdir=runs/cifar10_wrn28_10

After the colon: cifar10 or cifar100, and wrn28_10 (the recipe of Zagoruyko & Komodakis 2016), or any other net for
small images, as preresnet164 or resnet20 (the recipe of He et al. 2016). One GPU does; a full run of it has not been
made with this code, so no result is given.
"""

from sdpoint_jax.config import default_config

_MEAN_AND_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def get_config(which="cifar10,wrn28_10"):
    """The config; see above."""
    dataset, _, model = (which or "cifar10,wrn28_10").partition(",")
    if dataset not in _MEAN_AND_STD or not model:
        raise ValueError(f"configs/cifar.py:{which}: give cifar10 or cifar100, a comma, and a net, as cifar10,wrn28_10")
    config = default_config()
    config.model.name = model
    config.dataset.name = dataset
    config.dataset.image_size = (32, 32)
    config.dataset.augmentation = "pad_crop_flip"
    config.dataset.mean, config.dataset.std = _MEAN_AND_STD[dataset]
    config.batch_size = 128
    config.learning_rate = 0.1
    config.schedule = "step"
    if model.startswith("wrn"):
        config.num_epochs = 200.0
        config.milestones = (60.0, 120.0, 160.0)
        config.decay = 0.2
        config.nesterov = True
        config.weight_decay = 5e-4
    else:
        config.num_epochs = 164.0
        config.milestones = (82.0, 123.0)
        config.warmup_epochs = 1.0
        config.weight_decay = 1e-4
    config.checkpoint_every_steps = 1000
    return config
