"""Image folders small enough for tests."""

import numpy as np
from PIL import Image


def make_folder(root, per_class=12, splits=("train", "test"), classes=("cat", "dog", "fox"), side=8):
    """Write a folder of random PNG images, SPLIT/CLASS/NUMBER.png; return it."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:03d}.png")
    return root
