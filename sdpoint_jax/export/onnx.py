"""ONNX models of SDPoint instances, with one file of weights for all; see `programs.onnx_graph`."""

import pathlib
from collections.abc import Sequence

import onnx
from flax import traverse_util

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.norm_parameters import own_params, params_for
from sdpoint_jax.programs.onnx_graph import build_model, lay_out, refer_to_file
from sdpoint_jax.storage.artefact import Artefact

WEIGHTS = "params.weights"
_ALIGNMENT = 64  # Bytes.


def write(
    swept: Artefact, instances: Sequence[SDPointInstance], folder: pathlib.Path
) -> dict[SDPointInstance, dict[str, str]]:
    """Writes the weights once and a model for each instance, and checks each model in full.

    What an instance has for itself, its statistics and perhaps scales and shifts, is in its model.

    Args:
        swept: the artefact.
        instances: of those that were swept.
        folder: to write to.

    Returns:
        for each instance, what its file is (`onnx`) and its name.
    """
    places = _write_weights(swept, folder / WEIGHTS)
    files = {}
    for instance in instances:
        model = build_model(swept, instance)
        own = traverse_util.flatten_dict(own_params(swept.params, instance), sep="/")
        refer_to_file(model, WEIGHTS, {name: place for name, place in places.items() if name not in own})
        path = folder / f"{instance.name}.onnx"
        onnx.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        files[instance] = {"onnx": path.name}
    return files


def _write_weights(swept, path) -> dict[str, tuple[int, int]]:
    """Writes the shared parameters one after the other; returns the offset and length of each in bytes, by name."""
    places, shared = {}, lay_out(params_for(swept.params, FULL_RESOLUTION))
    with path.open("wb") as file:
        for name, array in sorted(shared.items()):
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            content = array.tobytes()
            places[name] = file.tell(), len(content)
            file.write(content)
    return places
