"""Offline classification on Ray: the parts of a plan as rows of a Ray dataset, one predictor per device.

Needs the extras `ray` and `predict`. A part is written whole or not at all, by whichever worker has it; so it does not
matter if Ray runs one twice, and the files are those that one process writes.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import ray.data

from sdpoint_jax.serving import ray_cluster
from sdpoint_jax.serving.offline import Plan


def run_parts(
    artefact: str,
    plan: Plan,
    inputs: Sequence[str],
    output: pathlib.Path,
    numbers: Sequence[int],
    *,
    batch_size: int = 64,
    workers: int | None = None,
    runtime: str = "auto",
) -> Iterator[int]:
    """Classifies parts and writes them; yields how many images each had. The process is connected to Ray.

    Args:
        artefact: path that all machines of the cluster see, as `output` and the inputs.
        plan: of the folder `output`.
        inputs: all of them.
        output: folder of the results.
        numbers: of the parts to run.
        batch_size: images that are classified at once.
        workers: predictors, a process each; by default one per GPU or TPU chip of the cluster, or one per machine.
        runtime: of each predictor; see `Predictor`.

    Raises:
        ValueError: an image that cannot be used, where the plan says `error`, or a file that cannot be read or written;
            names it.
    """
    kind, count = ray_cluster.count_devices()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    parts = [{"number": number, "paths": list(inputs[plan.part(number)])} for number in numbers]
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        _Worker,
        fn_constructor_args=(artefact, plan, str(output), batch_size, runtime),
        compute=ray.data.ActorPoolStrategy(size=min(workers or count, len(parts))),
        num_cpus=1,
        num_gpus=1 if kind == "GPU" else None,
        **({"resources": {"TPU": 1}} if kind == "TPU" else {}),
    )
    for row in done.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        yield row["count"]


class _Worker:
    """One process with one predictor."""

    def __init__(self, artefact, plan, output, batch_size, runtime):
        from sdpoint_jax.programs.process import keep_compiled_programs

        keep_compiled_programs()
        from sdpoint_jax.serving.predictor import Predictor

        self._plan, self._output, self._batch_size = plan, pathlib.Path(output), batch_size
        self._predictor = Predictor.load(artefact, runtime)
        self._predictor.compile([plan.instance], [batch_size])

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Classifies a part and writes it; what is wrong with it goes into the row, as Ray Data loses its own words."""
        from sdpoint_jax.data.decode import BadImageError
        from sdpoint_jax.serving import offline

        number, paths = part["number"], part["paths"]
        try:
            count = offline.run_part(
                self._predictor, self._plan, number, paths, self._output, batch_size=self._batch_size
            )
        except (BadImageError, OSError) as error:
            return {"count": 0, "error": str(error)}
        return {"count": count, "error": ""}
