"""A trained net made adjustable: from imported weights, with your own images, in a few epochs.

    python -m sdpoint_jax import weights.safetensors --model=resnet20 --rename=linear:fc --output=runs/original
    python train.py --config=configs/finetune.py:/path/to/images --workdir=runs/finetuned
    python evaluate.py --workdir=runs/finetuned

After the colon: a folder with train/<class>/* and test/<class>/*, of the classes of the weights, in their order. The
weights are expected in runs/original: config.init_from and config.teacher name other ones. Each step trains full
resolution, the cheapest instance and a drawn one, and the original net teaches all three. The net is the one of the
weights. As it stands, the preprocessing is that of CIFAR nets, on images of 32x32 pixels; docs/finetune.md says what to
set for others.
Expected, with the ResNet-20 of akamaster/pytorch_resnet_cifar10 and 15,480 of the training images of CIFAR-10 (three
seeds, mean; docs/results.md, study D): 90.9 % at full resolution, 88.4 % at 62 % of its MACs and 83.7 % at 35 %, where
the original gives 91.7, 85.1 and 62.2 %. About 22 minutes of processor time on a CPU.
With all 50,000 training images, three epochs (`--config.num_epochs=3`; study H, one seed) give 91.2, 88.7 and 83.1 %.
"""

from sdpoint_jax.config import default_config


def get_config(folder=""):
    """The config; see above."""
    config = default_config()
    config.model.name = "auto"  # The net of the weights.
    config.init_from = "runs/original"
    config.teacher = "runs/original"
    config.dataset.name = f"folder:{folder}"
    config.dataset.image_size = (32, 32)
    config.dataset.augmentation = "pad_crop_flip"
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (0.229, 0.224, 0.225)
    config.instances_per_step = 3
    config.distillation = 0.9
    config.distillation_temperature = 2.0
    config.num_epochs = 20.0
    config.batch_size = 128
    config.learning_rate = 0.05  # `taught_20` of study D; at 0.02 full resolution loses less, the others more.
    config.warmup_epochs = 0.5
    config.weight_decay = 1e-4
    config.weight_decay_on = "kernels"
    config.validate_every_epochs = 5.0
    return config
