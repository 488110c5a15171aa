"""Classify any number of images offline, resumably. Files of results need the extra `predict`.

The images are split into parts, in order. Each part is one Parquet file, which is written whole or not at all. It
records in its metadata which plan it belongs to, so that the folder of results holds nothing but results, and a command
that was stopped resumes with the parts that are missing or damaged.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sdpoint_jax.data.decode import BadImageError
from sdpoint_jax.data.listing import list_files
from sdpoint_jax.data.sources.folder import EXTENSIONS
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.paths import check_local
from sdpoint_jax.serving.images import to_batch
from sdpoint_jax.storage import files

if TYPE_CHECKING:  # Without JAX: a process that is not prepared for it may read plans.
    from sdpoint_jax.serving.predictor import Predictor
    from sdpoint_jax.storage.artefact import Artefact

COLUMNS = ("path", "rank", "label", "class_name", "probability", "instance", "error")
ENDINGS = (".parquet", ".csv", ".jsonl")  # Of a list of images, and of a single file of results.
ON_BAD_IMAGE = ("error", "skip")
_PLAN = b"sdpoint_jax.predict"  # Key of a part's metadata.
_READERS = 4  # Threads that read and decode; all decoders release Python's lock.


class Image(NamedTuple):
    """An image to classify.

    Attributes:
        name: its path as it was given, for the results. Bytes that are not UTF-8 are written as `\\xe9`.
        file: the path to open.
    """

    name: str
    file: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the results of a command. A folder of results is continued with an equal plan only.

    Attributes:
        model: checksum of what the instance computes: its parameters, statistics, preprocessing and classes.
        instance: name of the instance.
        inputs: checksum of the images' names, sizes and times of change.
        count: number of images.
        part_size: images of one part.
        top: classes that are listed for each image.
    """

    model: str
    instance: str
    inputs: str
    count: int
    part_size: int
    top: int

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-self.count // self.part_size)

    def part(self, number: int) -> slice:
        """Return which of the images belong to a part."""
        return slice(number * self.part_size, min((number + 1) * self.part_size, self.count))


def list_images(sources: Sequence[str], exclude: Collection[pathlib.Path] = ()) -> tuple[list[Image], list[str]]:
    """List the images that are meant by paths.

    Args:
        sources: each an image; a folder, whose images are found at any depth, in order of their names; or a file with
            one of `ENDINGS` that lists images in its column `path`. A relative path in such a list counts from the
            working directory or, where nothing is there, from the folder of the list.
        exclude: files and folders inside of the folders that do not count, as the results.

    Returns:
        the images, and the names of files in folders that were passed over because they are not images.

    Raises:
        ValueError: there are no images, or a list is not valid; names it.
        OSError: a source does not exist or cannot be read.
    """
    images: list[Image] = []
    passed_over: list[Image] = []
    excluded = {find(path) for path in exclude for find in (os.path.realpath, os.path.abspath)}
    for source in (pathlib.Path(source).expanduser() for source in sources):
        if source.is_dir():
            for name in sorted(list_files(str(source), excluded)):
                file = source / name
                if os.path.abspath(file) not in excluded:
                    (images if _is_image(file) else passed_over).append(_image(file))
        elif not os.path.lexists(source):
            raise FileNotFoundError(
                f"{_show(source)}: no such file or folder; give images, folders of images, or a list "
                f"({', '.join(ENDINGS)}) with a column 'path'"
            )
        elif source.suffix.lower() in ENDINGS:
            images += [_listed(path, source) for path in _read_list(source)]
        else:
            images.append(_image(source))
    if not images:
        hint = f", but {len(passed_over)} other files, as {passed_over[0].name}" if passed_over else ""
        raise ValueError(f"{', '.join(map(_show, sources))}: holds no images ({' '.join(EXTENSIONS)}){hint}")
    return images, [image.name for image in passed_over]


def _image(file):
    return Image(_show(file), str(file))


def _show(path: str | os.PathLike) -> str:
    """Return a path as text that can be encoded."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_image(file: pathlib.Path) -> bool:
    """Whether a file of a folder is an image by its name or, without such a name, by how it begins."""
    if not file.is_file():  # A dangling link, a pipe, a device.
        return False
    if file.suffix.lower() in EXTENSIONS:
        return True
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
    except OSError:
        return False
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")) or (
        start[:4] == b"RIFF" and start[8:] == b"WEBP"
    )


def _read_list(source: pathlib.Path) -> list[str]:
    """Return the column `path` of a list of images."""
    read = {".parquet": _read_parquet_column, ".csv": _read_csv_column, ".jsonl": _read_json_column}
    try:
        names, found = read[source.suffix.lower()](source)
    except ValueError as error:  # Also pyarrow's, and those of text that is not UTF-8.
        raise ValueError(f"{_show(source)}: not a list of images: {error}") from None
    if found is None:
        raise ValueError(f"{_show(source)}: has no column 'path'; it has {', '.join(names)}")
    for number, path in enumerate(found):
        if not isinstance(path, str) or not path:
            raise ValueError(f"{_show(source)}: row {number}, {path!r}: not a path")
        check_local(path, f"{_show(source)}: row {number}, ")
    return found


def _read_parquet_column(source):
    import pyarrow.parquet as parquet

    names = parquet.read_schema(source).names
    return names, parquet.read_table(source, columns=["path"])["path"].to_pylist() if "path" in names else None


def _read_csv_column(source):
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        return names, [row["path"] for row in reader] if "path" in names else None


def _read_json_column(source):
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    return names, [isinstance(row, dict) and row.get("path") for row in rows] if "path" in names else None


def _listed(path: str, source: pathlib.Path) -> Image:
    beside = source.parent / path
    return Image(path, str(beside) if not os.path.lexists(path) and beside.exists() else path)


def make_plan(
    swept: "Artefact",
    instance: SDPointInstance,
    images: Sequence[Image],
    *,
    part_size: int = 1024,
    top: int = 1,
) -> Plan:
    """Make the plan that classifies images.

    Raises:
        ValueError: a value is not valid.
    """
    if part_size < 1:
        raise ValueError(f"part_size {part_size}: at least 1")
    if not 1 <= top <= swept.num_classes:
        raise ValueError(f"top {top}: valid are 1 to {swept.num_classes}, the number of classes")
    listed = hashlib.sha256()
    for image in images:
        listed.update(b"%s\0%s\n" % (os.fsencode(image.name), _state(image.file)))
    return Plan(_checksum(swept, instance), instance.name, listed.hexdigest(), len(images), part_size, top)


def _state(file: str) -> bytes:
    """Return what changes when a file is replaced or written to."""
    try:
        found = os.stat(file)
    except OSError:  # It is named when it is read.
        return b""
    return b"%d %d" % (found.st_size, found.st_mtime_ns)


def _checksum(swept: "Artefact", instance: SDPointInstance) -> str:
    """Return a checksum of what an instance computes. Measurements of it, as latencies, do not count."""
    from sdpoint_jax.storage.checkpoint import checksum_tree

    arrays = checksum_tree({"params": swept.params, "batch_stats": swept.batch_stats[instance]})
    net = (swept.model, swept.model_args, swept.downsampling, swept.dtype)
    images = (swept.image_shape, swept.resize, swept.mean, swept.std, swept.class_names)
    return hashlib.sha256(json.dumps([arrays, *net, *images]).encode()).hexdigest()


class Progress(NamedTuple):
    """What a folder of results holds.

    Attributes:
        missing: numbers of the parts that have to be classified.
        damaged: those of them of which there is a file that cannot be read.
        unreadable: images in the other parts that could not be read.
    """

    missing: list[int]
    damaged: list[int]
    unreadable: int


def find_progress(plan: Plan, output: pathlib.Path, on_bad_image: str = "error") -> Progress:
    """Read and verify the parts in a folder of results.

    Args:
        plan: what is to be computed.
        output: the folder; it may be missing.
        on_bad_image: where this is `error`, parts with images that could not be read count as missing.

    Raises:
        ValueError: the folder holds results of another plan, or files named as parts that are not ours.
        OSError: a part cannot be opened.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; give a folder, or a file that ends in {', '.join(ENDINGS)}")
    missing, damaged, unreadable = list(range(plan.num_parts)), [], 0
    for path in sorted(output.glob("part-*.parquet")):
        content = path.read_bytes()
        number, found = _verify_part(content, path)
        if found is None:
            # A part that was cut is written again. No data are lost: a Parquet file is unreadable without its end.
            if number >= plan.num_parts or (content and not content.startswith(b"PAR1")):
                raise ValueError(f"{path}: not a result of predict; give another --output")
            damaged.append(number)
            continue
        if changed := [key for key, value in dataclasses.asdict(plan).items() if found["plan"].get(key) != value]:
            raise ValueError(f"{output}: holds results of another {_describe(changed)}; give another --output")
        if found["part"] == number and number in missing and not (found["unreadable"] and on_bad_image == "error"):
            missing.remove(number)
            unreadable += found["unreadable"]
    return Progress(missing, [number for number in damaged if number in missing], unreadable)


def _describe(changed: Sequence[str]) -> str:
    """Name what differs between two plans, the cause before its consequences."""
    words = {"inputs": "list of images, or of images that were changed", "count": None, "part_size": "--part-size"}
    words |= {"top": "--top", "model": None if "instance" in changed else "artefact"}
    return ", another ".join(word for key in changed if (word := words.get(key, key)))


def _verify_part(content: bytes, path: pathlib.Path) -> tuple[int, dict[str, Any] | None]:
    """Read all of a part; return its number by its name, and its record, or None where it is damaged.

    Raises:
        ValueError: it is a Parquet file, and not ours.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    number = path.stem.removeprefix("part-")
    if not (number.isdecimal() and path == part_path(path.parent, int(number))):
        raise ValueError(f"{path}: not a result of predict; give another --output")
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content), page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError):
        return int(number), None
    record = (file.schema_arrow.metadata or {}).get(_PLAN)
    if record is None:
        raise ValueError(f"{path}: not a result of this version of predict; give another --output")
    try:
        file.read()  # The pages have checksums.
        return int(number), json.loads(record)
    except (pyarrow.ArrowException, OSError, ValueError):
        return int(number), None


def part_path(output: pathlib.Path, number: int) -> pathlib.Path:
    """Return where a part is written."""
    return output / f"part-{number:06d}.parquet"


def run_parts(
    predictor: "Predictor",
    plan: Plan,
    images: Sequence[Image],
    output: pathlib.Path,
    numbers: Sequence[int],
    *,
    batch_size: int = 64,
    on_bad_image: str = "error",
) -> Iterator[tuple[int, int]]:
    """Classify parts and write them; yield for each part what `run_part` returns.

    Args:
        predictor: of the artefact that the plan is of.
        plan: of the folder `output`.
        images: all of them.
        output: folder of the results.
        numbers: of the parts to run.
        batch_size: images that are classified at once.
        on_bad_image: see `classify`.

    Raises:
        BadImageError: see `classify`.
        OSError: a part cannot be written.
    """
    for number in numbers:
        part = images[plan.part(number)]
        yield run_part(predictor, plan, number, part, output, batch_size=batch_size, on_bad_image=on_bad_image)


def run_part(
    predictor: "Predictor",
    plan: Plan,
    number: int,
    images: Sequence[Image],
    output: pathlib.Path,
    *,
    batch_size: int = 64,
    on_bad_image: str = "error",
) -> tuple[int, int]:
    """Classify the images of one part and write it; see `run_parts`.

    Returns:
        the number of images, and of those that could not be read.
    """
    rows = classify(predictor, plan, images, batch_size=batch_size, on_bad_image=on_bad_image)
    unreadable = sum(row["error"] is not None for row in rows)
    record = {"plan": dataclasses.asdict(plan), "part": number, "unreadable": unreadable}
    files.write_atomically(part_path(output, number), _to_parquet(rows, record))
    return len(images), unreadable


def classify(
    predictor: "Predictor",
    plan: Plan,
    images: Sequence[Image],
    *,
    batch_size: int = 64,
    on_bad_image: str = "error",
) -> list[dict[str, Any]]:
    """Return rows with `COLUMNS`: `plan.top` of each image, the likeliest class first.

    Args:
        predictor: of the artefact that the plan is of.
        plan: names the instance.
        images: to classify.
        batch_size: images that are classified at once.
        on_bad_image: `error`, or `skip` for one row without a class whose `error` says what is wrong.

    Raises:
        BadImageError: an image that cannot be opened or decoded, where `on_bad_image` is `error`; names it.
    """
    readers = concurrent.futures.ThreadPoolExecutor(_READERS)
    try:
        pixels = list(readers.map(_reader(predictor, on_bad_image), images))
    finally:
        readers.shutdown(cancel_futures=True)  # After an error or Ctrl-C, the other images are not read.
    usable = [index for index, image in enumerate(pixels) if not isinstance(image, str)]
    ranked: dict[int, Any] = {}
    for start in range(0, len(usable), batch_size):
        chosen = usable[start : start + batch_size]
        batch = np.stack([pixels[index] for index in chosen])
        ranked |= zip(chosen, predictor.predict_classes(batch, top=plan.top, instance=plan.instance))
    rows = []
    for index, image in enumerate(images):
        row = dict.fromkeys(COLUMNS) | {"path": image.name, "rank": 1, "instance": plan.instance}
        if index in ranked:
            rows += [row | dataclasses.asdict(found) | {"rank": 1 + rank} for rank, found in enumerate(ranked[index])]
        else:
            rows.append(row | {"error": pixels[index]})
    return rows


def _reader(predictor: "Predictor", on_bad_image: str) -> Callable[[Image], np.ndarray | str]:
    """Return a function that reads an image, or returns what is wrong with it."""

    def read(image):
        try:
            return to_batch(image.file, predictor.image_shape, predictor.resize)[0]
        except BadImageError as error:
            reason = error.reason
        except (OSError, ValueError) as error:  # ValueError: a zero byte in a path.
            reason = getattr(error, "strerror", None) or str(error)
        if on_bad_image == "error":
            raise BadImageError(reason, image.name)
        return reason

    return read


def _to_parquet(rows, record) -> bytes:
    import pyarrow
    import pyarrow.parquet as parquet

    text, whole = pyarrow.string(), pyarrow.int32()
    types = (text, whole, whole, text, pyarrow.float32(), text, text)
    schema = pyarrow.schema(list(zip(COLUMNS, types)), metadata={_PLAN: json.dumps(record)})
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer, write_page_checksum=True)
    return buffer.getvalue().to_pybytes()


def join_parts(plan: Plan, parts: pathlib.Path, output: pathlib.Path) -> None:
    """Write the parts in a folder as the one file `output`, by its ending, and remove them.

    Raises:
        OSError: it could not be written.
    """
    import pyarrow.parquet as parquet

    paths = [part_path(parts, number) for number in range(plan.num_parts)]
    rows = [row for path in paths for row in parquet.ParquetFile(path).read().to_pylist()]
    if output.suffix.lower() == ".parquet":
        unreadable = sum(row["error"] is not None for row in rows)
        content = _to_parquet(rows, {"plan": dataclasses.asdict(plan), "part": None, "unreadable": unreadable})
    else:
        content = _to_text(rows, output.suffix.lower()).encode()
    files.write_atomically(output, content)
    for path in paths:
        path.unlink()
    remove_leftovers(parts)
    with contextlib.suppress(OSError):  # Somebody has put files there.
        parts.rmdir()


def remove_leftovers(output: pathlib.Path) -> None:
    """Remove the temporary files of parts that a killed command has left; call it when all parts are written."""
    pattern = re.compile(files.temporary_pattern(r"part-[0-9]+\.parquet"))
    for path in output.iterdir():
        if pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _to_text(rows, ending) -> str:
    for row in rows:
        if row["probability"] is not None:
            row["probability"] = round(row["probability"], 6)  # As text, a float32 would have ten digits of noise.
    if ending == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
