"""The artefact of a sweep: parameters once, BatchNorm statistics of each instance, the table, how to feed images."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sdpoint_jax.choice.table import InstanceRow, Latency
from sdpoint_jax.config import upgrade
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.storage import checkpoint

__all__ = ["ARTEFACT", "FORMAT", "Artefact", "InstanceRow", "Latency", "SweepSettings", "load", "save"]

PyTree = Any
ARTEFACT = "artefact"  # Its name in the folder of a sweep.
# Of the record. Format 1 had no number, and no `resize`; `cascades` and `source` came later, and may be missing.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """How a sweep was measured.

    Attributes:
        model: name of the net.
        dataset: name of the data set.
        split: that was evaluated.
        reestimate_batches: batches that the statistics come from; 0 where they were imported with the parameters.
        reestimate_images: `augmented` or `clean` training images; `none` where the statistics were imported.
        dtype: of the computation, `float32` or `bfloat16`.
    """

    model: str
    dataset: str
    split: str
    reestimate_batches: int
    reestimate_images: str
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, repr=False)
class Artefact:
    """What a sweep leaves to deploy.

    Attributes:
        params: of the net, and of single instances, nested dicts of arrays; see `models.norm_parameters`.
        batch_stats: by instance: its re-estimated statistics.
        rows: the table, a row per instance.
        model: name of the net, for `create_model`.
        model_args: Attributes of the net, for `create_model`.
        downsampling: Operation at the points; see `models.downsample`.
        given_model: The net, its class, or its name, if the user gave it to `load`; see there.
        dtype: of its computation, `float32` or `bfloat16`.
        class_names: of the K classes.
        image_shape: (H, W, C) of the uint8 images that it takes.
        resize: (height, width) that an image just covers, aspect kept, before the central `image_shape` is cut out;
            None to resize to `image_shape` itself.
        mean, std: of each channel, on the scale 0..1.
        config: of the experiment, as JSON holds it.
        settings: how the sweep was measured.
        cascades: the records of `choice.cascade.CascadeRow`, if cascades were evaluated.
        source: digests of all that the rows and statistics were measured from; a sweep of the same repeats nothing.
    """

    params: PyTree
    batch_stats: Mapping[SDPointInstance, PyTree]
    rows: tuple[InstanceRow, ...]
    model: str
    dtype: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    resize: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Mapping[str, Any]
    settings: SweepSettings
    cascades: tuple[Mapping[str, Any], ...] = ()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_args: str = ""
    downsampling: str = "avg"
    given_model: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        devices = dict.fromkeys(latency.device for row in self.rows for latency in row.latencies)
        measured = f"profiled on {', '.join(devices)}" if devices else "not profiled on any device"
        return f"<Artefact of {self.describe()}\n  {measured}>"

    def describe(self) -> str:
        """Describe net and instances in two lines."""
        images = "x".join(map(str, self.image_shape))
        first = f"{self.model}: {self.num_classes} classes, images {images}, {self.dtype}"
        ends = [f"{row.name} ({row.macs:,} MACs, top-1 {100 * row.top1:.2f} %)" for row in self._cheapest_and_dearest()]
        count = f"{len(self.rows)} instance{'s' if len(self.rows) != 1 else ''}"
        return f"{first}\n  {count}: {' to '.join(ends)}"

    def _cheapest_and_dearest(self):
        ordered = sorted(self.rows, key=lambda row: (row.macs, row.instance == FULL_RESOLUTION))
        return ordered[:1] + ordered[1:][-1:]

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    def row(self, instance: SDPointInstance) -> InstanceRow:
        """Returns the row of `instance`; raises ValueError, with those that there are, where it was not swept."""
        for row in self.rows:
            if row.instance == instance:
                return row
        raise ValueError(
            f"instance {instance.name}: its statistics were not re-estimated; the artefact has "
            f"{', '.join(row.name for row in self.rows)}"
        )

    def with_rows(self, rows: Sequence[InstanceRow]) -> "Artefact":
        """Returns a copy with another table of the same instances."""
        return dataclasses.replace(self, rows=tuple(rows))


def unfinished_profile(path: str | os.PathLike) -> pathlib.Path:
    """Return the file in which a profile of the artefact at `path` keeps what it has measured so far."""
    path = pathlib.Path(path)
    return path.with_name(f"{path.name}.profiling.json")


def save(artefact: Artefact, path: str | os.PathLike) -> None:
    """Writes the artefact at `path`, with checksums, replacing what is there once the new one is complete.

    Raises:
        OSError: it could not be written; names `path`, where nothing has changed.
    """
    statistics = {instance.name: tree for instance, tree in artefact.batch_stats.items()}
    record = {
        "format": FORMAT,
        "model": {
            "name": artefact.model,
            "args": artefact.model_args,
            "downsampling": artefact.downsampling,
            "dtype": artefact.dtype,
        },
        "num_classes": artefact.num_classes,
        "class_names": list(artefact.class_names),
        "image_shape": list(artefact.image_shape),
        "resize": artefact.resize and list(artefact.resize),
        "mean": list(artefact.mean),
        "std": list(artefact.std),
        "config": dict(artefact.config),
        "settings": dataclasses.asdict(artefact.settings),
        "table": [row.to_record() for row in artefact.rows],
        "cascades": list(artefact.cascades),
        "source": dict(artefact.source),
    }
    checkpoint.save(path, {"params": artefact.params, "batch_stats": statistics}, record)


def load(path: str | os.PathLike, model: Any = None) -> Artefact:
    """Read and verify the artefact at `path`, as `runs/digits/sweep/artefact`; of any format up to `FORMAT`.

    Args:
        path: Folder of the artefact.
        model: The net of the artefact where it is a user's own: its name `module:Class`, which allows to import the
            module and so to run its code, or the class, or a net of the class. Nets of this package need none. It is
            used when the net is first built; see `models.registry.model_of`.

    Raises:
        CheckpointError: there is none, it is damaged or of a newer format, or it is a checkpoint of another kind.
    """
    try:
        arrays, record = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{error}{_hint(pathlib.Path(path))}") from error
    if "table" not in record:
        raise checkpoint.CheckpointError(f"{path}: not the artefact of a sweep; evaluate.py writes one")
    if (version := record.get("format", 1)) not in range(1, FORMAT + 1):
        raise checkpoint.CheckpointError(
            f"{path}: an artefact of format {version!r}; this version reads 1 to {FORMAT}: update sdpoint_jax"
        )
    try:
        found = _from_record(arrays, record)
    except (LookupError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path}: not a sound artefact: {error}") from error
    return dataclasses.replace(found, given_model=model)


def _hint(path):
    """Return what an error adds where the path of a run or of a sweep was given instead of the artefact's."""
    found = sorted({*path.glob(ARTEFACT), *path.glob(f"sweep*/{ARTEFACT}")})
    if found:
        return f"; its artefact is {' or '.join(map(str, found))}"
    if (path / checkpoint.CHECKPOINTS).is_dir():
        return f"; it is a run, whose artefact comes from: python evaluate.py --workdir={path}"
    return ""


def _from_record(arrays, record):
    # Statistics of a net without BatchNorm are empty, and orbax keeps no empty dict.
    statistics = arrays.get("batch_stats", {})
    rows = tuple(map(InstanceRow.from_record, record["table"]))
    resize = record.get("resize", record["config"].get("dataset", {}).get("resize") or None)
    return Artefact(
        arrays["params"],
        {row.instance: statistics.get(row.name, {}) for row in rows},
        rows,
        upgrade(record["config"] | {"model": record["model"]})["model"]["name"],
        record["model"]["dtype"],
        tuple(record["class_names"]),
        tuple(record["image_shape"]),
        (resize, resize) if isinstance(resize, int) else resize and tuple(resize),
        tuple(record["mean"]),
        tuple(record["std"]),
        record["config"],
        SweepSettings(**{"dtype": record["model"]["dtype"]} | record["settings"]),
        tuple(record.get("cascades", ())),
        record.get("source", {}),
        record["model"].get("args", ""),
        record["model"].get("downsampling", "avg"),
    )
