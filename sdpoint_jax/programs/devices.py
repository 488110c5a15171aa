"""How programs meet devices: compiling for all of them or for one, replicas, shards, the switch of compiled programs.

All of the project's pmap is here. Programs are for the devices at hand, or in the context of `target.programs_for` for
absent ones, to be looked at. Everything replicated is an ordinary pytree without a device axis; what is sharded
has a leading axis of devices. Both are global arrays, over the devices of all hosts.
"""

import collections
import concurrent.futures
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sdpoint_jax.models import target
from sdpoint_jax.models.net import DEVICE_AXIS
from sdpoint_jax.programs import cache

AXIS = DEVICE_AXIS
REPLICATED, SHARDED = None, 0  # For the `in_axes` and `out_axes` of `parallel`.

_RARE = (100_000, 50, 100)  # Of `gc.set_threshold`.
_LEVEL = "xla_backend_optimization_level"
_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {
        # Convolutions to Eigen, whose kernel gradients are 2 to 5 times faster than those of YNNPACK, XLA's own choice.
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        # Less duplication of what comes before a transposition. It also compiles sooner, as does the level.
        "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
        _LEVEL: 1,
    },
    # The same bits from the same program and numbers: no sum whose order is left to chance.
    "gpu": {"xla_gpu_exclude_nondeterministic_ops": True},
}

PyTree = Any
Key = TypeVar("Key", bound=Hashable)
Compile = Callable[..., Callable]  # From the shapes of a function's arguments to its compiled program.


def parallel(function: Callable, *, in_axes: tuple, out_axes: Any, donate: tuple[int, ...] = ()) -> Compile:
    """Makes what compiles `function` for every device of every host at once; collectives name `AXIS`.

    Args:
        function: of one device's part of its arguments.
        in_axes: `REPLICATED` or `SHARDED` for each argument.
        out_axes: likewise for each output.
        donate: which arguments' memory the outputs may take.

    Returns:
        compile(*shapes): from the arguments' shapes, over all devices, to the compiled program. It is kept on disk, and
        loaded from there if it was compiled before; see `cache`. For absent devices it is kept nowhere, and for a
        platform without devices it is a `jax.export.Exported` instead.
    """
    absent = target.current()
    if absent and not absent.devices:
        return _export(_on_one(function, in_axes, out_axes), donate)
    devices = list(absent.devices) if absent else jax.devices()
    mapped = jax.pmap(
        function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate, devices=devices
    )

    def compile_from(*shapes):
        if jax.process_count() > 1 and not absent:  # There, pmap traces from arrays alone.
            specs = [PartitionSpec(AXIS) if axis == SHARDED else PartitionSpec() for axis in in_axes]
            shapes = [jax.tree.map(functools.partial(_zeros, spec), shape) for spec, shape in zip(specs, shapes)]
        what = (function, in_axes, out_axes, donate, shapes)
        return _fetch(what, lambda: mapped.lower(*shapes))

    return compile_from


def _fetch(what, lower, devices=None):
    """Compiles what `lower` lowers, or fetches it from disk, where no program for absent devices is."""
    options = compiler_options()
    if target.current():
        return lower().compile(options)
    return cache.fetch((*what, options), lambda: lower().compile(options), devices)


def _on_one(function, in_axes, out_axes):
    """Maps `function` over one device, as `parallel` does over all, in a form that can be exported: pmap's cannot."""
    specs = {REPLICATED: PartitionSpec(), SHARDED: PartitionSpec(AXIS)}
    several = isinstance(out_axes, tuple)

    def apply(*args):
        args = [jax.tree.map(lambda x: x[0], arg) if axis == SHARDED else arg for arg, axis in zip(args, in_axes)]
        outputs = function(*args)
        if not several:
            return add_axis(out_axes, outputs)
        return tuple(map(add_axis, out_axes, outputs))

    def add_axis(axis, output):
        return jax.tree.map(lambda x: x[None], output) if axis == SHARDED else output

    out_specs = tuple(specs[axis] for axis in out_axes) if several else specs[out_axes]
    in_specs = tuple(specs[axis] for axis in in_axes)
    mesh = AbstractMesh((1,), (AXIS,), axis_types=(AxisType.Auto,))  # From jax 0.12 on, Explicit is the default.
    return jax.shard_map(apply, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _export(function, donate=()):
    """Makes what traces and lowers `function` for one device of the target's platform."""
    platform = {"gpu": "cuda"}.get(target.platform(), target.platform())
    return jax.export.export(jax.jit(function, donate_argnums=donate), platforms=[platform])


def on_device(function: Callable, device: jax.Device) -> Compile:
    """Makes what compiles `function` for one device of this host, or, for absent devices, for the first of them.

    Returns:
        compile(*shapes): as of `parallel`.
    """
    absent = target.current()
    if absent and not absent.devices:
        return _export(function)
    device = absent.devices[0] if absent else device

    def compile_from(*shapes):
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), shapes
        )
        return _fetch((function, device.id, shapes), lambda: jax.jit(function).lower(*placed), [device])

    return compile_from


def device_count() -> int:
    """Counts the devices of all hosts that programs are for."""
    absent = target.current()
    return max(1, len(absent.devices)) if absent else jax.device_count()


def compiler_options() -> dict[str, Any]:
    """Returns what to ask of XLA for every program of the platform, other than its own choices.

    A flag that stands in XLA_FLAGS, or that this XLA does not know, is left out.
    """
    with _asking:  # Threads that ask at once would all try the flags.
        return _known_options(target.platform())


def quick_compiler_options() -> dict[str, Any]:
    """Returns those of `compiler_options` that make what runs once compile sooner, and change no bit of its results."""
    return {flag: value for flag, value in compiler_options().items() if flag == _LEVEL}


_asking = threading.Lock()


@functools.cache
def _known_options(platform):
    given = os.environ.get("XLA_FLAGS", "")
    asked = _OPTIONS.get(platform, {})
    return {flag: value for flag, value in asked.items() if flag not in given and _is_known(flag, value)}


def _is_known(flag, value):
    try:
        jax.jit(lambda: 0).lower().compile({flag: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def replicate(tree: PyTree) -> PyTree:
    """Puts a host pytree, the same on every host, on every device."""
    return _place(tree, PartitionSpec())


def shard(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Splits this host's share of a batch, arrays [b, ...], over its devices: [devices, b / local devices, ...]."""
    devices = jax.local_device_count()
    split = {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}
    return _place(split, PartitionSpec(AXIS))


def prefetch(batches: Iterable[Mapping[str, np.ndarray]], size: int = 2) -> Iterator[Any]:
    """Shards batches `size` ahead of their use, so that the transfer runs beside the computation."""
    ahead: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        ahead.append(shard(batch))
        if len(ahead) > size:
            yield ahead.popleft()
    yield from ahead


def is_main_host() -> bool:
    """Tells whether this process is the one that writes files and reports."""
    return jax.process_index() == 0


def shape_of_shards(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of what `shard` makes of this host's arrays [b, ...] of that shape.

    Absent devices count as those of one host.
    """
    size, *rest = shape
    local = device_count() if target.current() else jax.local_device_count()
    return jax.ShapeDtypeStruct((device_count(), size // local, *rest), dtype)


def check_batch_size(batch_size: int, key: str) -> None:
    """Raises ValueError, naming the config's `key`, unless the global batch divides evenly over all devices."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        sizes = sorted({batch_size // devices * devices, -(-max(batch_size, 1) // devices) * devices} - {0})
        nearest = " or ".join(map(str, sizes))
        raise ValueError(f"{key} {batch_size}: does not divide over {devices} devices; the nearest is {nearest}")


def shapes_of(tree: PyTree) -> PyTree:
    """Returns the ShapeDtypeStructs of a pytree of arrays, which is what programs are compiled from."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def _place(tree, spec):
    sharding = _sharding(spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def _zeros(spec, shape):
    sharding = _sharding(spec)
    zeros = np.zeros(sharding.shard_shape(shape.shape), shape.dtype)
    return jax.make_array_from_callback(shape.shape, sharding, lambda _: zeros)


def _sharding(spec):
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), spec)


class _RareGarbageCollection:
    """As a context of any number of threads, looks for garbage a hundred times less often while any of them is in it.

    Else that would take a third of tracing's time, whose many objects are no garbage. Not at all would be too seldom:
    a run may compile for hours behind its steps.
    """

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, gc.get_threshold()

    def __bool__(self):
        return self._inside > 0

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._before = gc.get_threshold()
                gc.set_threshold(*_RARE)
            self._inside += 1

    def __exit__(self, *_):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                gc.set_threshold(*self._before)


_rare_garbage_collection = _RareGarbageCollection()


def is_compiling() -> bool:
    """Whether any thread of this process compiles a program at the moment."""
    return bool(_rare_garbage_collection)


class Compilation(Generic[Key]):
    """Programs that threads compile, in the order of their keys, while those that are there run.

    As a context, ends with what has begun: the rest is given up, and nothing waits.

    Attributes:
        start: `time.perf_counter()` at its start.
    """

    def __init__(
        self,
        compile_it: Callable[[Key], float],
        keys: Iterable[Key],
        workers: int = 0,
        name: Callable[[Key], str] = str,
        urgent: int = 0,
    ):
        """Starts to compile.

        Args:
            compile_it: compiles the program of a key; returns the seconds that took.
            keys: in the order in which the programs are needed.
            workers: threads; 0 for one per core.
            name: names the program of a key, for errors.
            urgent: so many programs are needed first: until they are there, and one of the others is waited for, one
                core is left to what else is, as the first step.
        """
        self.start, self._name, self._is_over = time.perf_counter(), name, False
        # Threads help, as XLA releases Python's lock.
        keys, workers = list(keys), workers or os.cpu_count() or 1
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)
        at_once = max(urgent, workers - 1) if urgent else len(keys)
        self._tasks = {key: self._pool.submit(compile_it, key) for key in keys[:at_once]}
        self._later, self._are_due = frozenset(keys[at_once:]), threading.Event()
        first = list(self._tasks.values())[:urgent]

        def compile_later(key):
            concurrent.futures.wait(first, return_when=concurrent.futures.FIRST_EXCEPTION)
            self._are_due.wait()
            if self._is_over:
                raise concurrent.futures.CancelledError
            return compile_it(key)

        self._tasks |= {key: self._pool.submit(compile_later, key) for key in keys[at_once:]}

    def __len__(self) -> int:
        """Counts all programs, those that are there among them."""
        return len(self._tasks)

    def __iter__(self) -> Iterator[tuple[Key, float]]:
        """Yields (key, seconds) of each program as it comes, until all are there; raises as `seconds`."""
        self._are_due.set()
        keys = {task: key for key, task in self._tasks.items()}
        for task in concurrent.futures.as_completed(keys):
            yield keys[task], self._result(keys[task])

    def wait(self, keys: Iterable[Key], seconds: float) -> bool:
        """Tells whether the programs of `keys` are there, after at most so many seconds; others are taken to be.

        With 0 seconds it only looks: what is not urgent may not begin until it is waited for.

        Raises:
            RuntimeError: see `seconds`.
        """
        keys = frozenset(keys)
        if seconds and keys & self._later:
            self._are_due.set()
        tasks = [self._tasks[key] for key in keys if key in self._tasks]
        _, missing = concurrent.futures.wait(tasks, seconds, concurrent.futures.FIRST_EXCEPTION)
        self.seconds()
        return not missing

    def seconds(self) -> dict[Key, float]:
        """Returns how long each program took that is there.

        Raises:
            RuntimeError: one of the others does not compile.
        """
        return {key: self._result(key) for key, task in self._tasks.items() if task.done()}

    def _result(self, key):
        try:
            return self._tasks[key].result()
        except Exception as error:
            raise RuntimeError(f"{self._name(key)} does not compile: {error}") from error

    def __enter__(self) -> "Compilation[Key]":
        return self

    def __exit__(self, *_):
        self._is_over = True
        self._are_due.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


class Switch(Generic[Key]):
    """Compiled programs looked up by a static key, as the SDPoint instance: each key is traced and compiled once.

    `switch[key]` compiles on first use; `compile` ahead of time. Programs are built from shapes: compiling needs
    neither data nor state. Any number of threads may use a switch.
    """

    def __init__(self, build: Callable[[Key], Compile], shapes: Callable[[Key], tuple]):
        """Takes what makes the programs.

        Args:
            build: from a key to what `parallel` or `on_device` makes of its function.
            shapes: from a key to the shapes of the arguments.
        """
        self._build, self._shapes = build, shapes
        self._target = target.current()  # Programs are for that of the switch, in whatever thread they are compiled.
        self._programs: dict[Key, Callable] = {}
        self._lock = threading.Lock()
        self._compiling: dict[Key, threading.Lock] = {}
        # Many programs in flight on several CPU devices of one process deadlock in their collectives.
        self._wait = jax.default_backend() == "cpu" and jax.device_count() > 1 and not self._target

    def __getitem__(self, key: Key) -> Callable:
        """Returns the program of `key`, compiled now if it is not there."""
        if key not in self._programs:
            self._compile(key)
        program = self._programs[key]
        return (lambda *args: jax.block_until_ready(program(*args))) if self._wait else program

    def __contains__(self, key: Key) -> bool:
        """Tells whether the program of `key` is compiled."""
        return key in self._programs

    def __iter__(self) -> Iterator[Key]:
        """Iterates over the keys whose programs are compiled."""
        return iter(tuple(self._programs))

    def __len__(self) -> int:
        """Counts the programs that are compiled."""
        return len(self._programs)

    def compile(self, keys: Iterable[Key], workers: int = 0) -> Iterator[tuple[Key, float]]:
        """Compiles what is missing, in so many threads (0: one per core); yields (key, seconds) of each program."""
        with self.compile_behind(keys, workers) as compilation:
            yield from compilation

    def compile_behind(self, keys: Iterable[Key], workers: int = 0, **kwargs: Any) -> Compilation[Key]:
        """Starts to compile what is missing, and returns at once; for `kwargs` see `Compilation`."""
        return Compilation(self._compile, [key for key in keys if key not in self._programs], workers, **kwargs)

    def _compile(self, key):
        start = time.perf_counter()
        with self._lock:
            compiling = self._compiling.setdefault(key, threading.Lock())
        with compiling, _rare_garbage_collection:
            if key not in self._programs:
                with target.programs_for(self._target):
                    self._programs[key] = self._build(key)(*self._shapes(key))
        return time.perf_counter() - start
