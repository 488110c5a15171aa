"""Image classification data: sets by name, and batches of uint8 images from them.

NumPy in, NumPy out: nothing here knows of JAX, and a pod's hosts come in as `process_index` and `process_count`. The
libraries that read data are imported on first use, so that the models do not need them.
"""

from sdpoint_jax.data.augment import AUGMENTATIONS, check_augmentation
from sdpoint_jax.data.dataset import Dataset, from_sources, load_dataset
from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.data.pipeline import Batches, evaluation_batches, evaluation_resize, training_batches

__all__ = [
    "AUGMENTATIONS",
    "BadImageError",
    "Batches",
    "Dataset",
    "check_augmentation",
    "evaluation_batches",
    "evaluation_resize",
    "from_sources",
    "load_dataset",
    "training_batches",
]
