"""Your own images: a folder with train/<class>/* and test/<class>/* (or val/<class>/*).

    python train.py --config=configs/folder.py:/path/to/images --workdir=runs/mine
    python evaluate.py --workdir=runs/mine

After the colon: the folder. As it stands: a ResNet-20 on images of 32x32 pixels, on CPU or GPU. For photographs,
begin with configs/imagenet.py and set the data set and the splits as here.
"""

from sdpoint_jax.config import default_config


def get_config(folder=""):
    """The config; see above."""
    config = default_config()
    config.model.name = "resnet20"
    config.dataset.name = f"folder:{folder}"
    config.dataset.image_size = (32, 32)
    config.dataset.augmentation = "pad_crop_flip"
    config.dataset.mean = (0.485, 0.456, 0.406)
    config.dataset.std = (0.229, 0.224, 0.225)
    config.num_epochs = 30.0
    config.batch_size = 128
    config.weight_decay = 5e-4
    config.warmup_epochs = 1.0
    config.validate_every_epochs = 5.0
    return config
