"""Runs the programs of an export folder, which this file lies in. It needs jax, numpy and flatbuffers, nothing else.

    from load import Classifier

    classifier = Classifier()  # Or Classifier(folder). Checks every file of the folder against its checksum.
    logits = classifier.classify(images, "p05_r0.50")  # uint8 [B, H, W, C], not normalised -> float32 [B, K]

The manifest lists the instances with their costs and accuracies, how to resize images, and the class names. The first
call for a number B of images compiles: fill batches up to a few sizes where that must not happen while serving.
"""

import hashlib
import io
import json
import pathlib

import jax
import jax.export
import numpy as np


class Classifier:
    """The instances of one trained net; `manifest` says which, and all about them."""

    def __init__(self, folder: str | pathlib.Path = pathlib.Path(__file__).parent):
        """Reads the manifest and the parameters; raises ValueError, naming the file, where one was altered."""
        self._folder = pathlib.Path(folder)
        self._programs: dict[str, tuple] = {}
        content = (self._folder / "manifest.json").read_bytes()
        if (self._folder / "manifest.json.sha256").read_bytes() != b"%s  manifest.json\n" % _digest(content):
            raise ValueError(f"{self._folder}: damaged: manifest.json does not fit manifest.json.sha256")
        self.manifest = json.loads(content)
        contents = {name: self._read(name) for name in self.manifest["files"]}
        self._params = _arrays(contents["params.npz"])

    def classify(self, images: np.ndarray, instance: str) -> np.ndarray:
        """Computes the logits [B, K], float32, of uint8 images [B, H, W, C] with the instance of that name."""
        shape = self.manifest["preprocessing"]["image_shape"]
        if images.dtype != np.uint8 or list(images.shape[1:]) != shape:
            raise ValueError(
                f"images {images.dtype} {list(images.shape)}: needs uint8 [B, {', '.join(map(str, shape))}]"
            )
        if instance not in self._programs:
            self._programs[instance] = self._load(instance)
        program, own, statistics = self._programs[instance]
        return np.asarray(program(self._params | own, statistics, images))

    def _load(self, instance):
        files = {row["instance"]: row["files"] for row in self.manifest["instances"]}
        if instance not in files:
            raise ValueError(f"instance {instance!r}: the folder has {', '.join(files)}")
        exported = jax.export.deserialize(bytearray(self._read(files[instance]["stablehlo"])))
        own = _arrays(self._read(files[instance]["params"])) if "params" in files[instance] else {}
        return jax.jit(exported.call), own, _arrays(self._read(files[instance]["statistics"]))

    def _read(self, name):
        content = (self._folder / name).read_bytes()
        if _digest(content).decode() != self.manifest["files"][name]:
            raise ValueError(f"{self._folder}: damaged: {name} does not fit its checksum")
        return content


def _digest(content):
    return hashlib.sha256(content).hexdigest().encode()


def _arrays(content):
    with np.load(io.BytesIO(content)) as arrays:
        return jax.device_put(dict(arrays))
