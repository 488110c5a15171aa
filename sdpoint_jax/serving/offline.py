"""Classifies any number of images offline, resumably, to Parquet files. Needs the extra `predict`.

The inputs are split into parts, in order; each part is written whole or not at all, so that a command that was killed
goes on with the parts that are missing, and every image is there once.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.serving.images import to_batch
from sdpoint_jax.storage import files

if TYPE_CHECKING:  # Without JAX: a process that is not prepared for it may read plans.
    from sdpoint_jax.serving.predictor import Predictor

PLAN = "plan.json"
ON_BAD_IMAGE = ("error", "skip")
_READERS = 4  # Threads that read and decode; all decoders release Python's lock.


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command computes; a folder of results is continued by the same plan alone.

    Attributes:
        artefact: checksum of the parameters, statistics and table.
        instance: name of the one that classifies.
        inputs: checksum of the list of inputs.
        count: inputs.
        part_size: inputs of one part.
        on_bad_image: `error`, or `skip` for a row without a class that says what is wrong.
    """

    artefact: str
    instance: str
    inputs: str
    count: int
    part_size: int
    on_bad_image: str

    @property
    def num_parts(self) -> int:
        """Counts the parts."""
        return -(-self.count // self.part_size)

    def part(self, number: int) -> slice:
        """Returns which of the inputs belong to a part."""
        return slice(number * self.part_size, min((number + 1) * self.part_size, self.count))


def list_inputs(source: str | os.PathLike) -> list[str]:
    """Lists the images of a folder, at any depth, in order of their names; or the column `path` of a Parquet file.

    Raises:
        ValueError: there is none, or the file has no such column.
        OSError: there is no such folder or file.
    """
    path = pathlib.Path(source)
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        if "path" not in parquet.read_schema(path).names:
            raise ValueError(f"{path}: has no column 'path'; it has {', '.join(parquet.read_schema(path).names)}")
        found = parquet.read_table(path, columns=["path"])["path"].to_pylist()
    else:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; give a folder of images, or a .parquet file")
        found = sorted(str(file) for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    if not found:
        raise ValueError(f"{path}: holds no images")
    return found


def make_plan(
    artefact_checksum: str,
    instance: SDPointInstance,
    inputs: Sequence[str],
    output: pathlib.Path,
    *,
    part_size: int = 1024,
    on_bad_image: str = "error",
) -> Plan:
    """Makes the plan for a folder of results, and keeps it there.

    Raises:
        ValueError: the folder holds the results of another plan, or a value is not valid.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"on_bad_image {on_bad_image!r}: valid are {', '.join(ON_BAD_IMAGE)}")
    if part_size < 1:
        raise ValueError(f"part_size {part_size}: at least 1")
    listed = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    plan = Plan(artefact_checksum, instance.name, listed, len(inputs), part_size, on_bad_image)
    path = output / PLAN
    if path.exists():
        there = json.loads(path.read_bytes())
        if changed := [key for key, value in dataclasses.asdict(plan).items() if there.get(key) != value]:
            raise ValueError(f"{output}: holds results of another {', '.join(changed)}; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, json.dumps(dataclasses.asdict(plan), indent=1) + "\n")
    return plan


def missing_parts(plan: Plan, output: pathlib.Path) -> list[int]:
    """Lists the parts that are not written yet."""
    return [number for number in range(plan.num_parts) if not part_path(output, number).exists()]


def part_path(output: pathlib.Path, number: int) -> pathlib.Path:
    """Returns where a part is written."""
    return output / f"part-{number:06d}.parquet"


def run_parts(
    predictor: "Predictor",
    plan: Plan,
    inputs: Sequence[str],
    output: pathlib.Path,
    numbers: Sequence[int],
    *,
    batch_size: int = 64,
) -> Iterator[int]:
    """Classifies parts and writes them; yields how many images each had.

    Args:
        predictor: of the artefact that the plan names.
        plan: of the folder `output`.
        inputs: all of them.
        output: folder of the results.
        numbers: of the parts to run.
        batch_size: images that are classified at once.

    Raises:
        BadImageError: an image that cannot be used, where the plan says `error`; names it.
        OSError: a file that cannot be opened, or a part that cannot be written.
    """
    for number in numbers:
        yield run_part(predictor, plan, number, inputs[plan.part(number)], output, batch_size=batch_size)


def run_part(
    predictor: "Predictor",
    plan: Plan,
    number: int,
    paths: Sequence[str],
    output: pathlib.Path,
    *,
    batch_size: int = 64,
) -> int:
    """Classifies one part and writes it; returns how many images it had.

    Args:
        predictor: of the artefact that the plan names.
        plan: of the folder `output`.
        number: of the part.
        paths: the inputs that belong to it.
        output: folder of the results.
        batch_size: images that are classified at once.

    Raises:
        BadImageError: an image that cannot be used, where the plan says `error`; names it.
        OSError: a file that cannot be opened, or a part that cannot be written.
    """
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        images = list(readers.map(_reader(predictor, plan.on_bad_image), paths))
    write_part(part_path(output, number), _classify(predictor, plan, paths, images, batch_size))
    return len(paths)


def _reader(predictor: "Predictor", on_bad_image: str) -> Callable[[str], np.ndarray | str]:
    """Returns what reads an image, or says what is wrong with it."""

    def read(path):
        try:
            return to_batch(path, predictor.image_shape, predictor.resize)[0]
        except (BadImageError, OSError) as error:
            if on_bad_image == "error":
                raise
            return error.reason if isinstance(error, BadImageError) else error.strerror or str(error)

    return read


def _classify(predictor, plan, paths, images, batch_size) -> list[dict[str, Any]]:
    """Returns a row for each path."""
    rows = [dict(path=path, label=None, class_name=None, probability=None, instance=plan.instance) for path in paths]
    for row, image in zip(rows, images):
        row["error"] = image if isinstance(image, str) else None
    sound = [index for index, image in enumerate(images) if not isinstance(image, str)]
    for start in range(0, len(sound), batch_size):
        chosen = sound[start : start + batch_size]
        batch = np.stack([images[index] for index in chosen])
        for index, (best,) in zip(chosen, predictor.predict_classes(batch, instance=plan.instance)):
            rows[index] |= dataclasses.asdict(best)
    return rows


def write_part(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as a Parquet file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet as parquet

    text, columns = pyarrow.string(), ("path", "label", "class_name", "probability", "instance", "error")
    types = (text, pyarrow.int32(), text, pyarrow.float32(), text, text)
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(list(zip(columns, types)))), buffer)
    files.write_atomically(path, buffer.getvalue().to_pybytes())
