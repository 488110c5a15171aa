"""ONNX models of SDPoint instances, with one file of weights for all; see `programs.onnx_graph`."""

import pathlib
from collections.abc import Sequence

import numpy as np
import onnx

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.interop.onnx_graph import build_graph, digest, refer_to_file
from sdpoint_jax.storage.artefact import Artefact

WEIGHTS = "params.weights"
_ALIGNMENT = 64  # Bytes.


def write(
    swept: Artefact, instances: Sequence[SDPointInstance], folder: pathlib.Path
) -> dict[SDPointInstance, dict[str, str]]:
    """Write a model for each instance and one file of weights, and check each model in full.

    Weights that several instances have in common are in the file once. Vectors, such as scales and shifts, are in the
    models.

    Args:
        swept: The artefact.
        instances: Of those that were swept.
        folder: To write to.

    Returns:
        For each instance, what its file is (`onnx`) and its name.

    Raises:
        ValueError: The network has a primitive that ONNX has no form of.
    """
    files = {}
    with (folder / WEIGHTS).open("wb") as file:
        weights = _WeightsFile(file)
        for instance in instances:
            model, arrays = build_graph(swept, instance)
            refer_to_file(model, WEIGHTS, {name: weights.place(array) for name, array in arrays.items()})
            files[instance] = {"onnx": f"{instance.name}.onnx"}
            onnx.save(model, folder / files[instance]["onnx"])
    for names in files.values():
        onnx.checker.check_model(str(folder / names["onnx"]), full_check=True)
    return files


class _WeightsFile:
    """Arrays in a file one after the other, equal ones once."""

    def __init__(self, file):
        self._file = file
        self._places: dict[bytes, tuple[int, int]] = {}

    def place(self, array: np.ndarray) -> tuple[int, int]:
        """Return the offset and the length in bytes of an array, which is written now if it is not there."""
        key = digest(array)
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[key] = self._file.tell(), array.nbytes
            self._file.write(array.tobytes())
        return self._places[key]
