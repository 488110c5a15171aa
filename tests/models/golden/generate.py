"""Writes `logits.json`: what a plain PyTorch formulation gives for a few nets and instances.

    python tests/models/golden/generate.py

The formulation, `tests/torch_formulation.py`, gives the numbers of the authors' release exactly where those are at
hand; the weights and images follow from names and a seed.
"""

import importlib
import json
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
formulation = importlib.import_module("torch_formulation")

SIZES = {
    "resnet18": (224, 224),
    "preresnet50": (224, 224),
    "resnext50": (224, 224),
    "resnet20": (32, 28),
    "resnet20_projection_norm": (32, 28),
    "preresnet20": (32, 28),
    "preresnet20_projection_norm": (32, 28),
}


def instances_of(shapes):
    """(point, ratio) to record: full resolution, the stem, and blocks early, in the middle and last."""
    blocks = len(formulation.block_names(shapes))
    stem = [(-1, 0.75)] if shapes["conv1.weight"][-1] == 7 else []
    return [(0, 1.0), *stem, (1, 0.75), (blocks // 2, 0.5), (blocks, 0.75)]


def logits_of(name, size):
    """Rows of point, ratio and logits of one image of `size`, with nine digits, which tell float32 apart."""
    shapes = formulation.net_shapes(name, num_classes=10)
    tensors = {name: torch.from_numpy(array) for name, array in formulation.named_state_dict(shapes).items()}
    images = torch.from_numpy(formulation.named_images(1, 3, *size))
    with torch.no_grad():
        for point, ratio in instances_of(shapes):
            logits = formulation.torch_logits(tensors, images, point, ratio)[0].tolist()
            yield [point, ratio, [float(f"{value:.9g}") for value in logits]]


def main():
    """Writes the file."""
    nets = {name: {"image_size": size, "rows": list(logits_of(name, size))} for name, size in SIZES.items()}
    text = json.dumps(nets).replace("[[", "[\n[").replace("]], [", "]],\n[").replace("]]]}", "]]\n]}")
    (HERE / "logits.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
