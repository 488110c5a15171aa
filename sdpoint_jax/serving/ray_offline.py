"""Classify offline on Ray: the parts of a plan are the rows of a Ray dataset, with one predictor per device.

Needs the extras `ray` and `predict`. A part is written whole or not at all, by whichever worker has it. Ray may run one
twice, therefore, and the files are those that one process writes.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.serving import ray_cluster
from sdpoint_jax.serving.offline import Image, Plan


def run_parts(
    artefact: str,
    plan: Plan,
    images: Sequence[Image],
    output: pathlib.Path,
    numbers: Sequence[int],
    *,
    batch_size: int = 64,
    on_bad_image: str = "error",
    workers: int | None = None,
    runtime: str = "auto",
    model: str | None = None,
) -> Iterator[tuple[int, int]]:
    """Classify parts and write them; yield for each part what `offline.run_part` returns.

    The process is connected to Ray.

    Args:
        artefact: path that all machines of the cluster see, as `output` and the images.
        plan: of the folder `output`.
        images: all of them.
        output: folder of the results.
        numbers: of the parts to run.
        batch_size: images that are classified at once.
        on_bad_image: see `offline.classify`.
        workers: predictors, a process each; by default one per GPU or TPU chip of the cluster, or one per machine.
        runtime: of each predictor; see `Predictor`.
        model: The artefact's net, where it is a user's own; every worker imports its module.

    Raises:
        BadImageError: an image that cannot be opened or decoded, where `on_bad_image` is `error`; names it.
        OSError: a part that cannot be written.
    """
    kind, count = ray_cluster.count_devices()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    parts = [{"number": number, **_to_columns(images[plan.part(number)])} for number in numbers]
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        _Worker,
        fn_constructor_args=(artefact, plan, str(output), batch_size, on_bad_image, runtime, model),
        compute=ray.data.ActorPoolStrategy(size=min(workers or count, len(parts))),
        num_cpus=1,
        num_gpus=1 if kind == "GPU" else None,
        **({"resources": {"TPU": 1}} if kind == "TPU" else {}),
    )
    for row in done.iter_rows():
        if row["place"]:
            raise BadImageError(row["error"], row["place"])
        if row["error"]:
            raise OSError(row["error"])
        yield row["count"], row["unreadable"]


def _to_columns(images):
    # A worker has another working directory. Arrow's text is UTF-8, which a file's name need not be.
    return {
        "names": [image.name for image in images],
        "files": [os.fsencode(os.path.abspath(image.file)) for image in images],
    }


class _Worker:
    """One process with one predictor."""

    def __init__(self, artefact, plan, output, batch_size, on_bad_image, runtime, model):
        from sdpoint_jax.programs.process import keep_compiled_programs

        keep_compiled_programs()
        from sdpoint_jax.serving.predictor import Predictor

        self._plan, self._output = plan, pathlib.Path(output)
        self._settings = {"batch_size": batch_size, "on_bad_image": on_bad_image}
        self._predictor = Predictor.load(artefact, runtime, model=model)
        self._predictor.compile([plan.instance], [batch_size])

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Classify a part and write it; return what is wrong with it in the row, as Ray Data loses error messages."""
        from sdpoint_jax.serving import offline

        images = [Image(name, os.fsdecode(file)) for name, file in zip(part["names"], part["files"])]
        row = {"count": 0, "unreadable": 0, "place": "", "error": ""}
        try:
            count, unreadable = offline.run_part(
                self._predictor, self._plan, part["number"], images, self._output, **self._settings
            )
        except BadImageError as error:
            return row | {"place": error.place, "error": error.reason}
        except OSError as error:
            return row | {"error": str(error)}
        return row | {"count": count, "unreadable": unreadable}
