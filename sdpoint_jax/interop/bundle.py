"""An export: a folder with SDPoint instances in one or more formats, and a manifest of what they are.

The manifest, `manifest.json`, holds the SHA-256 of every other file; its own stands in `manifest.json.sha256`, as
`sha256sum --check` reads it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.storage import folders
from sdpoint_jax.storage.artefact import Artefact

FORMAT = 1  # Of the manifest.
KIND = "sdpoint_jax export"
MANIFEST, MANIFEST_SUM = "manifest.json", "manifest.json.sha256"
# The formats: the library that writes one, and the extra that installs it.
FORMATS = {"stablehlo": ("flatbuffers", "export"), "onnx": ("onnx", "onnx"), "safetensors": ("safetensors", "export")}
_VERSIONS = ("sdpoint_jax", "jax", "jaxlib", "flax", "numpy", "onnx", "safetensors")


def write(
    swept: Artefact,
    instances: Sequence[SDPointInstance],
    path: str | os.PathLike,
    *,
    formats: Sequence[str] = ("stablehlo",),
    fold: bool = False,
) -> dict[str, Any]:
    """Exports instances to the folder `path`, replacing an export that is there once the new one is complete.

    Args:
        swept: the artefact.
        instances: of those that were swept, at least one.
        path: of the folder; absent, empty, or an export. Other files in it stay.
        formats: of `FORMATS`.
        fold: for safetensors, whether BatchNorm becomes a part of the convolution before it.

    Returns:
        the manifest.

    Raises:
        ValueError: an instance that was not swept, an unknown format, `fold` without safetensors, or a folder that is
            something else.
        ImportError: a format's library is not installed; names the extra.
        OSError: the folder could not be written; it is as it was.
    """
    instances, formats = tuple(dict.fromkeys(instances)), tuple(dict.fromkeys(formats))
    rows = [swept.row(instance) for instance in instances]
    if not rows:
        raise ValueError("no instances to export: name at least one")
    _check_formats(formats, fold)
    with folders.replacing(path, _own_files, "an export") as folder:
        folder.mkdir()
        files: dict[str, dict[str, str]] = {row.name: {} for row in rows}
        for format_name in formats:
            for instance, names in _write_format(format_name, swept, instances, folder, fold).items():
                files[instance.name] |= names
        return _write_manifest(folder, swept, [row.to_record() | {"files": files[row.name]} for row in rows])


def _check_formats(formats, fold):
    if unknown := [name for name in formats if name not in FORMATS] or (not formats and ["none"]):
        raise ValueError(f"format {', '.join(unknown)}: valid are {', '.join(FORMATS)}")
    if fold and "safetensors" not in formats:
        raise ValueError(f"fold: is of safetensors alone, not of {', '.join(formats)}")
    for name in formats:
        library, extra = FORMATS[name]
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"format {name}: needs {library}, pip install 'sdpoint_jax[{extra}]'")


def _write_format(name, swept, instances, folder, fold) -> Mapping[SDPointInstance, Mapping[str, str]]:
    if name == "onnx":  # Late: each format needs its own library alone.
        from sdpoint_jax.interop import onnx

        return onnx.write(swept, instances, folder)
    if name == "safetensors":
        from sdpoint_jax.interop import safetensors

        return safetensors.write(swept, instances, folder, fold=fold)
    from sdpoint_jax.interop import stablehlo

    return stablehlo.write(swept, instances, folder)


def _write_manifest(folder, swept: Artefact, instances):
    """Writes the manifest of what is in `folder`, and its checksum."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "model": {"name": swept.model, "dtype": swept.dtype, "num_classes": swept.num_classes},
        "class_names": list(swept.class_names),
        "preprocessing": {
            "image_shape": list(swept.image_shape),
            "image_dtype": "uint8",
            "resize_to_cover": list(swept.resize or swept.image_shape[:2]),
            "crop": "center",
            "interpolation": "bilinear, antialiased",
            "mean": list(swept.mean),
            "std": list(swept.std),
            "normalized_by_the_programs": True,
        },
        "measured": {"dataset": swept.settings.dataset, "split": swept.settings.split},
        "instances": instances,
        "versions": _versions(),
        "files": {file.relative_to(folder).as_posix(): _digest(file.read_bytes()) for file in found},
    }
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_SUM).write_text(f"{_digest(content)}  {MANIFEST}\n")
    return manifest


def _own_files(folder: pathlib.Path) -> list[str] | None:
    """List the files that an export wrote into a folder; None for a folder that is no export."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["kind"] != KIND:
            return None
        listed = {MANIFEST_SUM, *manifest["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return [*(name for name in folders.list_files(folder) if name in listed), MANIFEST]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _versions():
    installed = {}
    for name in _VERSIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
