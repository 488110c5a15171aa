"""ONNX models of SDPoint instances, with one file of weights for all; see `programs.onnx_graph`."""

import pathlib
from collections.abc import Sequence

import onnx

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.programs.onnx_graph import build_model, lay_out, refer_to_file, without_own
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
        refer_to_file(model, WEIGHTS, without_own(swept, instance, places))
        path = folder / f"{instance.name}.onnx"
        onnx.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
        files[instance] = {"onnx": path.name}
    return files


def _write_weights(swept, path) -> dict[str, tuple[int, int]]:
    """Writes the shared parameters one after the other; returns the offset and length of each in bytes, by name."""
    places = {}
    with path.open("wb") as file:
        for name, array in sorted(lay_out(swept).items()):
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            content = array.tobytes()
            places[name] = file.tell(), len(content)
            file.write(content)
    return places
