"""Inference within a budget: loads a sweep's artefact, picks an SDPoint instance, predicts."""

import collections
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from sdpoint_jax.choice.cascade import Cascade, CascadeRow, select_cascade
from sdpoint_jax.choice.selection import Budget, check_device, choose_runtime, select
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.norm_parameters import params_for
from sdpoint_jax.models.registry import model_of
from sdpoint_jax.profiling.macs import full_macs
from sdpoint_jax.programs.cascade import CascadePrograms
from sdpoint_jax.programs.inference import InferencePrograms
from sdpoint_jax.runtimes.onnx_sessions import OnnxSessions, check_onnxruntime
from sdpoint_jax.serving.images import to_batch
from sdpoint_jax.storage import artefact
from sdpoint_jax.storage.artefact import Artefact, InstanceRow
from sdpoint_jax.storage.device import describe_device

RUNTIMES = ("auto", "xla", "onnxruntime")
_POWERS_OF_TWO = tuple(1 << power for power in range(9))  # Batches are padded to these, so that programs stay few.


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One class of an image.

    Attributes:
        label: number of the class.
        class_name: its name.
        probability: in 0..1.
    """

    label: int
    class_name: str
    probability: float


class Predictor:
    """A trained net with the statistics of the instances that were swept. Any number of threads may use it.

        predictor = Predictor.load("runs/digits/sweep/artefact")
        logits = predictor.predict(images, budget=Budget(max_macs=5_000_000))

    Programs are compiled on first use, and cached on disk in JAX's compilation cache. `compile` compiles them ahead of
    time. After it, nothing else is compiled: batches are padded to the compiled sizes, a budget chooses among the
    compiled instances, and naming another instance is an error. Parameters are on each device once, whatever the number
    of instances; switching instances copies nothing.

    There are two runtimes. XLA runs anything anywhere; onnxruntime runs instances, not cascades, in float32 on one CPU,
    where it is often the faster. Which one runs what is fixed by the table and the arguments; see `runtime_of`.

    Attributes:
        device: the first that it runs on; see `storage.device.describe_device`.
        runtimes: those that are used: `xla`, `onnxruntime` or, each where it is the faster, both.
        rows: the table, a row per instance.
        cascades: the table of cascades, if the sweep has evaluated some.
        class_names: of the K classes.
        image_shape: (H, W, C) that the net takes.
    """

    def __init__(self, swept: Artefact, *, runtime: str = "auto", devices: Sequence[jax.Device] | None = None):
        """Puts an artefact on devices.

        Args:
            swept: see `load`.
            runtime: `xla`, `onnxruntime`, or `auto`: for each instance and batch size the faster of those that
                `profile` has measured on this device. Where it has measured none, or onnxruntime is not installed or
                does not do (see `check_onnxruntime`), that is XLA.
            devices: of this host; by default all its accelerators, or, where there is none, one CPU device. Batches of
                a large input, and calls of several threads, take turns on them.

        Raises:
            ValueError: an unknown runtime, or one that does not do for this artefact or these devices.
            ImportError: `onnxruntime` is not installed; names the extra.
        """
        self._artefact = swept
        self.rows: tuple[InstanceRow, ...] = swept.rows
        self.cascades = tuple(CascadeRow.from_record(record) for record in swept.cascades)
        self.class_names, self.image_shape = swept.class_names, swept.image_shape
        local = jax.local_devices()
        chosen = devices or (local if local[0].platform != "cpu" else local[:1])
        model = model_of(swept)
        preprocess = functools.partial(normalize, mean=swept.mean, std=swept.std)
        self._replicas = [_Replica(swept, model, preprocess, device) for device in chosen]
        self.runtimes = _find_runtimes(runtime, swept.dtype, chosen)
        self.device = describe_device(chosen[0])
        self._sessions = OnnxSessions(swept)
        self._runtimes: dict[tuple[SDPointInstance, int], str] = {}  # By instance and batch size, as they were asked.
        self._swept = {key: row.instance for row in self.rows for key in (row.name, row.instance)}
        # A search of the table takes longer than a small net.
        self._select = functools.lru_cache(256)(self._select_uncached)
        self._turns = itertools.count()
        # Batch sizes, ascending. `compile` replaces these dicts and does not change them: other threads read them.
        self._compiled: dict[SDPointInstance, tuple[int, ...]] = {}
        self._compiled_cascades: dict[tuple[SDPointInstance, ...], tuple[int, ...]] = {}

    def __repr__(self) -> str:
        count = f"; compiled: {len(self._compiled)} of them" if self._compiled else ""
        where = f"on {self.device}" + (f" and {len(self._replicas) - 1} more" if len(self._replicas) > 1 else "")
        return f"<Predictor of {self._artefact.describe()}{count}\n  {where}, in {' or '.join(self.runtimes)}>"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        runtime: str = "auto",
        *,
        devices: Sequence[jax.Device] | None = None,
        model: Any = None,
    ) -> "Predictor":
        """Load and verify the artefact at `path`, as `runs/digits/sweep/artefact`.

        Args:
            path: Folder of the artefact.
            runtime, devices: See the constructor.
            model: The net, its class or its name `module:Class`, if it is a user's own; see `artefact.load`.

        Raises:
            CheckpointError: there is none, it is damaged or of a newer format, or it is a checkpoint without
                re-estimated statistics.
            ValueError: the runtime is unknown, or does not do.
            ImportError: it is not installed.
        """
        return cls(artefact.load(path, model), runtime=runtime, devices=devices)

    @property
    def instances(self) -> tuple[SDPointInstance, ...]:
        """Lists the instances that can be used."""
        return tuple(row.instance for row in self.rows)

    @property
    def resize(self) -> tuple[int, int] | None:
        """Returns the (height, width) that an image just covers before its centre is cut out; None for (H, W)."""
        return self._artefact.resize

    @functools.cached_property
    def full_macs(self) -> int:
        """MACs of one image at full resolution, which the table need not hold."""
        return full_macs(self._artefact)

    @property
    def programs(self) -> InferencePrograms:
        """Returns XLA's programs of the first device."""
        return self._replicas[0].programs

    @property
    def sessions(self) -> OnnxSessions:
        """Returns the sessions of onnxruntime."""
        return self._sessions

    def runtime_of(self, instance: SDPointInstance | str, batch_size: int) -> str:
        """Names the runtime, `xla` or `onnxruntime`, that runs an instance at a batch size.

        Of two, it is the one that was measured to be the faster; see `selection.choose_runtime`. A smaller batch that
        is padded to this size runs in the same one.
        """
        key = self.find(instance), batch_size
        if key not in self._runtimes:
            self._runtimes[key] = self._choose_runtime(*key)
        return self._runtimes[key]

    def _choose_runtime(self, instance, batch_size):
        if len(self.runtimes) == 1:
            return self.runtimes[0]
        row = self._artefact.row(instance)
        return choose_runtime(row, batch_size, device=self.device, dtype=self._artefact.dtype) or "xla"

    def compile(
        self,
        instances: Iterable[SDPointInstance | str],
        batch_sizes: Iterable[int],
        workers: int = 0,
        cascades: Iterable[Cascade | str] = (),
    ) -> None:
        """Compile ahead of time, or load programs from the cache. Afterwards nothing else is compiled.

        A budget, or `mean_macs`, then chooses among what has been compiled. Later calls add to it. For onnxruntime, one
        session is opened for each instance, which runs batches of any size unpadded.

        Args:
            instances: or their names.
            batch_sizes: a batch is padded to the next of them, and split by the largest.
            workers: threads that compile; 0 for one per core.
            cascades: or their names; at the same batch sizes.

        Raises:
            ValueError: an instance that was not swept, a cascade that is not in the table, or a batch size below 1.
        """
        sizes = tuple(sorted(set(batch_sizes)))
        if not sizes or sizes[0] < 1:
            raise ValueError(f"batch_sizes {list(sizes)}: give at least one, each at least 1")
        chosen = [self.find(instance) for instance in instances]
        keys = [(instance, size) for instance in chosen for size in sizes if self.runtime_of(instance, size) == "xla"]
        self._sessions.open({i: None for i in chosen if any(self.runtime_of(i, size) != "xla" for size in sizes)})
        stages = [self.find_cascade(cascade).stages for cascade in cascades]
        for replica in self._replicas:
            collections.deque(replica.programs.compile(keys, workers), maxlen=0)
            collections.deque(replica.cascade_programs.compile(stages, sizes, workers), maxlen=0)
        self._compiled = _with_sizes(self._compiled, chosen, sizes)
        self._compiled_cascades = _with_sizes(self._compiled_cascades, stages, sizes)
        self._select = functools.lru_cache(256)(self._select_uncached)

    def program(
        self, instance: SDPointInstance | str, batch_size: int
    ) -> Callable[[ArrayLike], jax.Array | np.ndarray]:
        """Returns the program of an instance for just this batch size, in its runtime, compiled now if it is not.

        Returns:
            from uint8 images [batch_size, H, W, C] to logits [batch_size, K]: in XLA on the first device, for which it
            does not wait; in onnxruntime a NumPy array, which is ready.
        """
        found = self.find(instance)
        if self.runtime_of(found, batch_size) == "onnxruntime":
            return self._sessions[found]
        return self._replicas[0].program(found, batch_size)

    def select(
        self, budget: Budget | None = None, *, max_macs: float | None = None, **settings: Any
    ) -> SDPointInstance:
        """Pick the most accurate instance (top-1) within a budget; of equally accurate ones the cheapest.

        After `compile`, only compiled instances are candidates.

        Args:
            budget: see `selection.Budget`; None for no limit.
            max_macs: the same as `Budget(max_macs=...)`.
            **settings: `device`, `runtime`, `dtype` and `prefer` of `selection.select`. Latency and memory are those
                of the device at hand, of its runtimes (see `runtime_of`) and of this net's dtype, unless others are
                named. Of another device they are used with a warning that names both.

        Raises:
            ValueError: an impossible budget; names the nearest possible.
        """
        if max_macs is not None:
            if budget is not None:
                raise ValueError(f"max_macs {max_macs:g} and budget {budget}: give one of them")
            budget = Budget(max_macs=max_macs)
        return self._select(budget or Budget(), **settings)

    def _select_uncached(self, budget, **settings):
        if not self._is_compiled:
            return self._select_among(self.rows, budget, **settings)
        rows = [row for row in self.rows if row.instance in self._compiled]
        if not rows:
            raise ValueError("no instance was compiled, only cascades: name instances in Predictor.compile")
        try:
            return self._select_among(rows, budget, **settings)
        except ValueError as error:
            names = ", ".join(row.name for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
            raise ValueError(f"{error} (compiled are {names})") from None

    def _select_among(self, rows, budget, **settings):
        if budget.is_of_measurements:
            settings["device"] = check_device(rows, self.device, settings.get("device"))
            only = self.runtimes[0] if len(self.runtimes) == 1 else None
            settings = {"runtime": only, "dtype": self._artefact.dtype} | settings
        return select(rows, budget, **settings).instance

    @property
    def _is_compiled(self) -> bool:
        """Whether `compile` was called, so that nothing else may be compiled."""
        return bool(self._compiled or self._compiled_cascades)

    def predict(
        self,
        images: Any,
        *,
        budget: Budget | None = None,
        max_macs: float | None = None,
        instance: SDPointInstance | str | None = None,
        mean_macs: float | None = None,
        cascade: Cascade | str | None = None,
    ) -> np.ndarray:
        """Classifies with one instance, or with a cascade.

        Args:
            images: an array [B, H, W, C] of `image_shape`, uint8 or floats in 0..1; or one image or a list of images of
                any size: paths, bytes of image files, PIL images, uint8 arrays; see `images.to_batch`.
            budget: see `select`.
            max_macs: the same as `Budget(max_macs=...)`.
            instance: the one to use, or its name, instead of a budget.
            mean_macs: the most multiply-accumulates of an image, mean over many: the most accurate cascade within it.
            cascade: the one to use, or the name of one in the table, as `p03_r0.50+full`.

        Returns:
            logits [B, K], float32.

        Raises:
            ValueError: images of another shape, type or range, an impossible budget, an instance that was not swept, or
                one that was not compiled where `compile` was called.
            BadImageError: a file that is no image; names it.
            OSError: a file that cannot be opened.
        """
        given = dict(budget=budget, max_macs=max_macs, instance=instance, mean_macs=mean_macs, cascade=cascade)
        if len(named := [f"{name} {value}" for name, value in given.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(named)}: give one of them")
        if (wanted := mean_macs if cascade is None else cascade) is not None:
            return self.run_cascade(images, self.find_cascade(wanted))[0]
        chosen = self.select(budget, max_macs=max_macs) if instance is None else self.find(instance)
        batch, sizes = to_batch(images, self.image_shape, self.resize), self._batch_sizes(chosen)
        starts = range(0, len(batch), sizes[-1])
        running = [self._start(batch[start : start + sizes[-1]], chosen, sizes) for start in starts]
        logits = [np.asarray(output)[:count] for output, count in running]
        return np.concatenate([np.empty((0, len(self.class_names)), np.float32), *logits])

    def run_cascade(self, images: Any, cascade: Cascade) -> tuple[np.ndarray, np.ndarray]:
        """Classifies with a cascade: images that a stage is not sure of go on from its prefix.

        Args:
            images: see `predict`.
            cascade: of instances that were swept.

        Returns:
            logits [B, K], float32, and the stage at which each image stopped, int [B].

        Raises:
            ValueError: a stage that was not swept, or was not compiled where `compile` was called; besides those of
                `predict`.
        """
        for stage in cascade.stages:
            self.find(stage)
        if self._is_compiled and cascade.stages not in self._compiled_cascades:
            names = ", ".join("+".join(stage.name for stage in stages) for stages in self._compiled_cascades)
            raise ValueError(f"cascade {cascade.name}: not compiled; compiled are {names or 'no cascades'}")
        batch = to_batch(images, self.image_shape, self.resize)
        sizes = self._compiled_cascades.get(cascade.stages, _POWERS_OF_TWO)
        return self._next_replica().run_cascade(cascade, batch, sizes)

    def find_cascade(self, wanted: Cascade | str | float) -> Cascade:
        """Find a cascade of the table by its name, or the most accurate one within a mean cost, in MACs.

        After `compile`, a mean cost chooses among the compiled cascades.

        Raises:
            ValueError: none of that name, or none so cheap.
        """
        if isinstance(wanted, Cascade):
            return wanted
        if not isinstance(wanted, str):
            rows = self.cascades
            if self._is_compiled:
                rows = tuple(row for row in rows if row.cascade.stages in self._compiled_cascades)
                if self.cascades and not rows:
                    raise ValueError(f"mean_macs {wanted}: no cascade was compiled; name some in Predictor.compile")
            return select_cascade(rows, wanted).cascade
        for row in self.cascades:
            if row.name == wanted:
                return row.cascade
        known = ", ".join(row.name for row in self.cascades) or "none; evaluate.py --cascades=auto finds some"
        raise ValueError(f"cascade {wanted!r}: the artefact has {known}")

    def predict_probabilities(self, images: Any, **choice: Any) -> np.ndarray:
        """Classifies as `predict`, to probabilities [B, K], float32, that sum to 1."""
        return _softmax(self.predict(images, **choice))

    def predict_classes(self, images: Any, *, top: int = 1, **choice: Any) -> list[list[Prediction]]:
        """Classifies as `predict`, to the `top` most likely classes of each image, the likeliest first.

        Raises:
            ValueError: `top` below 1 or over K; besides those of `predict`.
        """
        if not 1 <= top <= len(self.class_names):
            raise ValueError(f"top {top}: valid are 1 to {len(self.class_names)}, the number of classes")
        return self.rank_classes(self.predict(images, **choice), top)

    def rank_classes(self, logits: np.ndarray, top: int) -> list[list[Prediction]]:
        """Returns the `top` most likely classes by each row of logits [B, K], the likeliest first."""
        probabilities = _softmax(logits)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            [Prediction(int(k), self.class_names[k], float(row[k])) for k in labels]
            for row, labels in zip(probabilities, best)
        ]

    def _start(self, images, instance, sizes) -> tuple[jax.Array | np.ndarray, int]:
        """Starts to classify a batch on the next device; returns its logits, padded, and how many count."""
        size = next(size for size in sizes if size >= len(images))
        if self.runtime_of(instance, size) == "onnxruntime":
            return self._sessions[instance](images), len(images)
        padded = np.pad(images, [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]) if size > len(images) else images
        return self._next_replica().program(instance, size)(padded), len(images)

    def _next_replica(self) -> "_Replica":
        return self._replicas[next(self._turns) % len(self._replicas)]

    def _batch_sizes(self, instance) -> Sequence[int]:
        """Return the batch sizes that `instance` may run at, ascending."""
        if not self._is_compiled:
            return _POWERS_OF_TWO
        if instance not in self._compiled:
            names = ", ".join(compiled.name for compiled in self._compiled) or "cascades alone"
            raise ValueError(f"instance {instance.name}: not compiled; compiled are {names}")
        return self._compiled[instance]

    def find(self, instance: SDPointInstance | str) -> SDPointInstance:
        """Returns the instance, or the one of that name; raises ValueError if it was not swept."""
        if instance in self._swept:
            return self._swept[instance]
        found = SDPointInstance.from_name(instance) if isinstance(instance, str) else instance
        return self._artefact.row(found).instance


def describe_runtimes(
    predictor: Predictor, instances: Iterable[SDPointInstance | str], batch_sizes: Iterable[int]
) -> str:
    """Says in words which runtime runs what, as `onnxruntime at batch size 1, 8; xla at batch size 32`."""
    chosen, places = [predictor.find(instance) for instance in instances], collections.defaultdict(list)
    for size in sorted(set(batch_sizes)):
        counts = collections.Counter(predictor.runtime_of(instance, size) for instance in chosen)
        for runtime, count in sorted(counts.items()):
            places[runtime].append(f"{size}" + (f" ({count} of {len(chosen)} instances)" if len(counts) > 1 else ""))
    return "; ".join(f"{runtime} at batch size {', '.join(sizes)}" for runtime, sizes in places.items())


class _Replica:
    """The net on one device: parameters once, statistics of each instance, programs."""

    def __init__(self, swept, model, preprocess, device):
        settings = dict(image_shape=swept.image_shape, preprocess=preprocess, device=device)
        self.programs = InferencePrograms(model, **settings)
        self.cascade_programs = CascadePrograms(model, **settings)
        self._params = jax.device_put(swept.params, device)
        self._batch_stats = {instance: jax.device_put(tree, device) for instance, tree in swept.batch_stats.items()}

    def program(self, instance, batch_size):
        """Returns the program of (instance, batch size), bound to parameters and statistics."""
        return functools.partial(
            self.programs[instance, batch_size], params_for(self._params, instance), self._batch_stats[instance]
        )

    def run_cascade(self, cascade, images, sizes):
        """Returns logits and stages of uint8 images."""
        return self.cascade_programs.run(cascade.stages, cascade.decide, self._params, self._batch_stats, images, sizes)


def _find_runtimes(runtime: str, dtype: str, devices: Sequence[jax.Device]) -> tuple[str, ...]:
    """Lists the runtimes to choose from; raises an error if the one that is wanted does not do."""
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r}: valid are {', '.join(RUNTIMES)}")
    if runtime == "xla":
        return ("xla",)
    try:
        check_onnxruntime(dtype, devices)
    except (ImportError, ValueError):
        if runtime == "onnxruntime":
            raise
        return ("xla",)
    return ("onnxruntime",) if runtime == "onnxruntime" else ("xla", "onnxruntime")


def _with_sizes(compiled, keys, sizes):
    """Return a copy of {key: batch sizes} to which `sizes` are added for each of `keys`."""
    return compiled | {key: tuple(sorted({*compiled.get(key, ()), *sizes})) for key in keys}


def _softmax(logits):
    shifted = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(1, keepdims=True)
