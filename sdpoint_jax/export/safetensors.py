"""The tensors of single SDPoint instances under torchvision's names, in folders as the Hugging Face hub has them.

timm loads such a folder by `timm.create_model("local-dir:FOLDER", pretrained=True)`, where it has the net. An instance
other than full resolution needs the pool at its point besides, which no other library's net has: `config.json` says
which, below `sdpoint`.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from sdpoint_jax.instance import STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.models.resnet import ARCHITECTURES, NORM_EPSILON, architecture
from sdpoint_jax.models.torch_import import torch_tensors
from sdpoint_jax.programs.layout import channels_first
from sdpoint_jax.storage.artefact import Artefact

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # As timm and the hub call them.
_NORM_LEAVES = (("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))
Path = tuple[str, ...]  # Of a module or a variable, in our variables.


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
    for convolution, norm in _followed_by_norms(model.architecture) if fold else ():
        weight = names["params", *convolution, "kernel"]
        scale, shift = _scale_and_shift(arrays, norm)
        tensors[weight] = tensors[weight] * scale[:, None, None, None]
        tensors[weight.removesuffix("weight") + "bias"] = shift
        for kind, leaf in _NORM_LEAVES:
            del tensors[names[kind, *norm, leaf]]
    return tensors


def _scale_and_shift(arrays, norm: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a BatchNorm multiplies by and then adds; computed in float64."""
    scale, bias, mean, var = (np.asarray(arrays[kind, *norm, leaf], np.float64) for kind, leaf in _NORM_LEAVES)
    scale = scale / np.sqrt(var + NORM_EPSILON)
    return scale.astype(np.float32), (bias - mean * scale).astype(np.float32)


def _followed_by_norms(net: Architecture) -> Iterator[tuple[Path, Path]]:
    """Lists the convolutions whose output a BatchNorm normalises at once, each with that."""
    if net.stem_has_norm:
        yield ("stem", "conv"), ("stem", "norm")
    for k, spec in enumerate(net.blocks(), 1):
        block = f"block_{k:02d}"
        last = len(spec.convolutions)
        for index in range(1, last if net.preactivation else last + 1):
            yield (block, f"conv{index}"), (block, f"norm{index + 1 if net.preactivation else index}")
        if spec.shortcut and spec.shortcut.kind == "projection_norm":
            yield (block, "shortcut_conv"), (block, "shortcut_norm")


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
