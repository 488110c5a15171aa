"""Programs in StableHLO, which run wherever JAX does, without this package; `load.py` runs them.

Each takes parameters and statistics as flat dicts, `block_01/conv1/kernel` to an array, and uint8 images.
"""

import contextlib
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from flax import traverse_util

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.norm_parameters import own_params, params_for
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.models.target import ANY, Target, programs_for
from sdpoint_jax.programs.devices import shapes_of
from sdpoint_jax.programs.inference import classify
from sdpoint_jax.storage.artefact import Artefact

PLATFORMS = ("cpu", "cuda", "tpu")
PARAMS = "params.npz"
LOADER = "load.py"


def write(
    swept: Artefact, instances: Sequence[SDPointInstance], folder: pathlib.Path
) -> dict[SDPointInstance, dict[str, str]]:
    """Writes the shared parameters once, a program and statistics for each instance, and the loader.

    Args:
        swept: the artefact.
        instances: of those that were swept.
        folder: to write to.

    Returns:
        for each instance, what its files are (`stablehlo`, `statistics`, and `params` where it has scales and shifts of
        its own) and their names.
    """
    np.savez(folder / PARAMS, **_flat(params_for(swept.params, FULL_RESOLUTION)))
    (folder / LOADER).write_bytes(pathlib.Path(__file__).with_name(LOADER).read_bytes())
    files = {}
    for instance in instances:
        names = {"stablehlo": f"{instance.name}.stablehlo", "statistics": f"{instance.name}.npz"}
        (folder / names["stablehlo"]).write_bytes(export_program(swept, instance).serialize())
        np.savez(folder / names["statistics"], **_flat(swept.batch_stats[instance]))
        if own := _flat(own_params(swept.params, instance)):
            names["params"] = f"{instance.name}.{PARAMS}"
            np.savez(folder / names["params"], **own)
        files[instance] = names
    return files


def export_program(
    swept: Artefact, instance: SDPointInstance, platforms: Sequence[str] = PLATFORMS
) -> jax.export.Exported:
    """Lowers the program of `instance` for several platforms at once, from shapes, on whichever backend is at hand.

    Args:
        swept: the artefact.
        instance: one that was swept.
        platforms: as JAX names them.

    Returns:
        (parameters, statistics, images [B, H, W, C]) -> logits [B, K], for any B; see above.
    """
    model = model_of(swept)
    preprocess = functools.partial(normalize, mean=swept.mean, std=swept.std)

    def program(params, batch_stats, images):
        params, batch_stats = (traverse_util.unflatten_dict(flat, sep="/") for flat in (params, batch_stats))
        return classify(params, batch_stats, images, model=model, instance=instance, preprocess=preprocess)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *swept.image_shape), np.uint8)
    variables = (shapes_of(_flat(tree)) for tree in (params_for(swept.params, instance), swept.batch_stats[instance]))
    with _no_source_locations(), programs_for(Target(ANY)):
        return jax.export.export(jax.jit(program), platforms=platforms)(*variables, images)


def _flat(tree: Any) -> dict[str, Any]:
    return {name: np.asarray(array) for name, array in traverse_util.flatten_dict(tree, sep="/").items()}


@contextlib.contextmanager
def _no_source_locations() -> Iterator[None]:
    """Leaves the paths of this machine's source files out of what is lowered."""
    limit = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
