"""The file of results: a row for each cell, sweep and instance, as CSV; and what the rows of several seeds say."""

import csv
import dataclasses
import io
import pathlib
import types
import typing
from collections.abc import Iterable, Sequence

from sdpoint_jax.storage import files


@dataclasses.dataclass(frozen=True)
class Row:
    """What one instance of one trained net achieves.

    Attributes:
        study, recipe, seed: the cell; see `grids`.
        settings: digest of all settings of the training that are not defaults, seed and place of the data apart.
        dataset: name of the data set; of a folder, its last part.
        train_images: size of the training split.
        model: name of the net.
        params: trainable parameters.
        image_size: height and width in pixels, as `32x32`.
        epochs: of the training.
        images_seen: in training, with repetitions.
        instance: name of the SDPoint instance; or `cascade_60`, the best cascade of at most 60 % of full resolution's
            MACs.
        macs: multiply-accumulates for one image; of a cascade, the mean over the test images.
        top1: share of the test images that are classified correctly, in 0..1.
        loss: mean cross-entropy on them; None for a cascade.
        n: test images.
        statistics: `augmented` or `clean` training images, from which BatchNorm statistics were re-estimated.
        statistics_batches, statistics_images: how many of them.
        train_seconds: wall time of the training, compiling included; None where a run was cut off and did not say.
        train_cpu_seconds: the process's own time likewise, over all cores, which other programs disturb less.
        machine: processor and devices.
        versions: of Python and libraries.
    """

    study: str
    recipe: str
    seed: int
    settings: str
    dataset: str
    train_images: int
    model: str
    params: int
    image_size: str
    epochs: float
    images_seen: int
    instance: str
    macs: int
    top1: float
    loss: float | None
    n: int
    statistics: str
    statistics_batches: int
    statistics_images: int
    train_seconds: float | None
    train_cpu_seconds: float | None
    machine: str
    versions: str

    @property
    def is_cascade(self) -> bool:
        """Tells whether the row is of a cascade, not of an instance."""
        return self.instance.startswith(CASCADE)


CASCADE = "cascade_"  # Then the most MACs in % of those of full resolution.
_TYPES = typing.get_type_hints(Row)


def read(path: pathlib.Path) -> tuple[Row, ...]:
    """Reads the rows of a file; none where there is no file.

    Raises:
        ValueError: not such a file; names the line.
    """
    if not path.exists():
        return ()
    with path.open(newline="") as file:
        table = csv.DictReader(file)
        try:
            return tuple(Row(**{name: _parse(name, text) for name, text in record.items()}) for record in table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: line {table.line_num} is no row of a study's results: {error}") from None


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Replaces the file at `path` by these rows."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    table.writeheader()
    table.writerows(map(dataclasses.asdict, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, text.getvalue())


def _parse(name, text):
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        return float(text) if text else None
    return kind(text)


@dataclasses.dataclass(frozen=True)
class Point:
    """One instance of one recipe over its seeds.

    Attributes:
        rows: one for each seed.
    """

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """Returns the row of the first seed, for what all have in common."""
        return self.rows[0]

    @property
    def macs(self) -> int:
        """Returns the MACs for one image; of a cascade, which is another one with each seed, the mean."""
        return round(sum(row.macs for row in self.rows) / len(self.rows))

    @property
    def mean(self) -> float:
        """Returns the mean top-1 over the seeds, in 0..1."""
        return sum(row.top1 for row in self.rows) / len(self.rows)

    @property
    def low(self) -> float:
        """Returns the lowest top-1 of a seed."""
        return min(row.top1 for row in self.rows)

    @property
    def high(self) -> float:
        """Returns the highest top-1 of a seed."""
        return max(row.top1 for row in self.rows)


def training_time(rows: Iterable[Row]) -> tuple[int, float]:
    """Return the number of trainings behind rows of any studies, and their hours of processor time.

    Studies share trainings that have the same settings, data and seed. Unknown times count as none.
    """
    seconds = {(row.settings, row.dataset, row.seed): row.train_cpu_seconds for row in rows if row.images_seen}
    return len(seconds), sum(filter(None, seconds.values())) / 3600


def points(
    rows: Iterable[Row],
    recipe: str,
    *,
    statistics: str | None = None,
    batches: int | None = None,
    cascades: bool = False,
) -> tuple[Point, ...]:
    """Gathers the rows of a recipe by instance and statistics, in order of MACs and of the statistics' batches.

    Args:
        rows: of one study.
        recipe: its name.
        statistics: only from such images; by default from all.
        batches: only from so many batches; by default from any number.
        cascades: those instead of the instances.
    """
    gathered: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.recipe != recipe or row.is_cascade != cascades or statistics not in (None, row.statistics):
            continue
        if batches in (None, row.statistics_batches):
            gathered.setdefault((row.instance, row.statistics, row.statistics_batches), []).append(row)
    found = {key: Point(tuple(sorted(some, key=lambda row: row.seed))) for key, some in gathered.items()}
    return tuple(found[key] for key in sorted(found, key=lambda key: (found[key].macs, key)))
