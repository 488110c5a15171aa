"""The tensors of single SDPoint instances under torchvision's names, in folders as the Hugging Face hub has them.

timm loads such a folder by `timm.create_model("local-dir:FOLDER", pretrained=True)`, where it has the net. An instance
other than full resolution needs the pool at its point besides, which no other library's net has: `config.json` says
which, below `sdpoint`.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from sdpoint_jax.instance import STEM, SDPointInstance
from sdpoint_jax.interop.inference_trace import norms_after_convolutions, trace_inference
from sdpoint_jax.interop.torch_import import torch_tensors
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.models.resnet import ARCHITECTURES, architecture
from sdpoint_jax.programs.layout import channels_first
from sdpoint_jax.storage.artefact import Artefact

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # As timm and the hub call them.


def write(
    swept: Artefact, instances: Sequence[SDPointInstance], folder: pathlib.Path, *, fold: bool = False
) -> dict[SDPointInstance, dict[str, str]]:
    """Writes a folder for each instance, with its tensors and its config.

    Args:
        swept: the artefact.
        instances: of those that were swept.
        folder: to write to.
        fold: see `state_dict`.

    Returns:
        for each instance, what its files are (`safetensors` and `config`) and their names.
    """
    files = {}
    for instance in instances:
        (folder / instance.name).mkdir()
        names = {"safetensors": f"{instance.name}/{WEIGHTS}", "config": f"{instance.name}/{CONFIG}"}
        tensors = state_dict(swept, instance, fold=fold)
        (folder / names["safetensors"]).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        config = json.dumps(_config(swept, instance, folded=fold), indent=1) + "\n"
        (folder / names["config"]).write_text(config)
        files[instance] = names
    return files


def state_dict(swept: Artefact, instance: SDPointInstance, *, fold: bool = False) -> dict[str, np.ndarray]:
    """Returns the tensors of an instance by PyTorch's names, in PyTorch's layout, float32.

    Args:
        swept: the artefact.
        instance: one that was swept.
        fold: make each BatchNorm that follows a convolution a part of it: the convolution gets a bias, and the tensors
            of the BatchNorm, which is to be an identity then, are left out. One that comes before ReLU and convolution,
            as in pre-activation nets, stays.
    """
    model = model_of(swept)
    names = {tensor.path: name for name, tensor in torch_tensors(model, swept.image_shape[-1]).items()}
    variables = {"params": params_for(swept.params, instance), "batch_stats": swept.batch_stats[instance]}
    arrays = traverse_util.flatten_dict(variables)
    tensors = {names[path]: channels_first(array) for path, array in arrays.items()}
    for layer, folded in norms_after_convolutions(trace_inference(swept, instance)).items() if fold else ():
        weight = names["params", *layer.split("/"), "kernel"]
        tensors[weight] = tensors[weight] * folded.scale[:, None, None, None]
        tensors[weight.removesuffix("weight") + "bias"] = folded.shift
        for path in arrays:
            if "/".join(path[1:-1]) == folded.norm:
                del tensors[names[path]]
    return tensors


def _config(swept: Artefact, instance: SDPointInstance, *, folded: bool) -> dict[str, Any]:
    height, width, channels = swept.image_shape
    return {
        "architecture": _torchvision_name(swept.model),
        "num_classes": swept.num_classes,
        "label_names": list(swept.class_names),
        **({} if channels == 3 else {"model_args": {"in_chans": channels}}),
        "pretrained_cfg": {
            "input_size": [channels, height, width],
            "interpolation": "bilinear",
            "crop_pct": _crop_pct(swept),
            "crop_mode": "center",
            "mean": list(swept.mean),
            "std": list(swept.std),
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "sdpoint": {
            "instance": instance.name,
            "point": instance.point,
            "ratio": instance.ratio,
            "pool": _pool(swept, instance),
            "folded": folded,
        },
    }


def _torchvision_name(name: str) -> str:
    """Returns torchvision's name of a net; ours where it has none or the same."""
    return f"{name}_32x4d" if f"{name}_32x4d" in ARCHITECTURES else name


def _crop_pct(swept: Artefact) -> float:
    """Returns the share of the resized image that is kept, such that the size over it, rounded down, is `resize`."""
    size, resize = swept.image_shape[0], (swept.resize or swept.image_shape)[0]
    return math.floor(1e6 * size / resize) / 1e6


def _pool(swept: Artefact, instance: SDPointInstance) -> dict[str, str] | None:
    """Describes, for a PyTorch user, the pool of an instance: what it is, where, and its output's size."""
    size = "max(1, round(ratio * side)) for height and width"
    if instance.point == 0:
        return None
    if instance.point == STEM:
        return {"function": "adaptive_max_pool2d", "in_place_of": "maxpool", "size": f"{size} of what maxpool gives"}
    before = ", before its ReLU" if not architecture(swept.model).preactivation else ""
    after = f"the addition of {_block(swept, instance.point)}{before}"
    return {"function": "adaptive_avg_pool2d", "after": after, "size": size}


def _block(swept: Artefact, point: int) -> str:
    """Returns PyTorch's name of the block that ends at `point`, as `layer2.0`."""
    tensors = torch_tensors(model_of(swept), swept.image_shape[-1])
    kernel = ("params", f"block_{point:02d}", "conv1", "kernel")
    return next(name.removesuffix(".conv1.weight") for name, tensor in tensors.items() if tensor.path == kernel)
