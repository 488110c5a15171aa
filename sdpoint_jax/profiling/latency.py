"""How fast SDPoint instances run on the device at hand, in one runtime or in several side by side.

*Latency* is the time of one whole call, as a service pays it: from a batch of uint8 images in the host's memory to
their logits in the host's memory. Both transfers and the wait for the device are in it; decoding of images, and
compiling, are not. The batch is ready, the program is compiled and has run before.

Programs take turns: in each round every program has one turn, in an order drawn anew, so that a machine that becomes
slower or faster does so for all of them. A turn is one call that is not timed, as the caches hold what ran before, and
then a few that are.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sdpoint_jax import progress
from sdpoint_jax.choice.table import Latency
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.storage import files

Target = TypeVar("Target", bound=Hashable)
Turns = dict[Target, list[list[float]]]  # By target: the seconds of each timed call of each turn.

_LEAST_CALLS = 5  # Timed calls of a program, however slow it is.
_SAVE_SECONDS = 10.0  # Measurements that a process may lose when it is killed.
_BUSY = 0.5  # Load average, in processes.


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: timed calls of each program.
        seconds: once the timed calls of a program have taken so long, and are five, it has no more turns.
        rounds: turns of each program, over which its calls are spread.
        seed: of the order of the turns.

    Raises:
        ValueError: less than one repeat or round, or no time.
    """

    repeats: int = 100
    seconds: float = 2.0
    rounds: int = 20
    seed: int = 0

    def __post_init__(self):
        for name in ("repeats", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds {self.seconds}: a positive, finite number")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program together with all that it needs but the images.

    Attributes:
        run: computes logits [B, K] of uint8 images [B, H, W, C], and returns when they are in the host's memory.
        peak_memory_bytes: that one call needs; None where it is not known.
        compile_seconds: that compiling took; None where the program came from a cache.
    """

    run: Callable[[np.ndarray], np.ndarray]
    peak_memory_bytes: int | None
    compile_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What runs the instances of a net on a device.

    Attributes:
        name: `xla` or `onnxruntime`.
        device: see `storage.device.describe_device`.
        dtype: of the computation: `float32` or `bfloat16`.
        image_shape: (H, W, C) of the uint8 images.
        versions: of the libraries that count, by name.
        prepare: compiles the program of an instance for just this batch size, or loads it.
    """

    name: str
    device: str
    dtype: str
    image_shape: tuple[int, int, int]
    versions: Mapping[str, str]
    prepare: Callable[[SDPointInstance, int], Program]


def profile(
    runtimes: Sequence[Runtime],
    instances: Iterable[SDPointInstance],
    batch_sizes: Iterable[int],
    effort: Effort,
    *,
    unfinished: pathlib.Path,
    of: Any,
) -> dict[SDPointInstance, list[Latency]]:
    """Measures the latency of instances at each batch size in each runtime, with progress bars.

    Args:
        runtimes: what runs them, each of another name, for images of the same shape.
        instances: to measure.
        batch_sizes: of the calls.
        effort: how long to measure each program.
        unfinished: file of what is measured so far. A profile that was interrupted goes on from it, if everything is
            as it was. The caller removes it once the result is safe.
        of: what JSON can hold and tells the net from others, as a checksum of its parameters.

    Returns:
        by instance: a latency for each runtime and batch size.
    """
    by_name, sizes = {runtime.name: runtime for runtime in runtimes}, list(batch_sizes)
    targets = [_Target(instance, size, name) for instance in instances for name in by_name for size in sizes]
    what = [(name, runtime.device, runtime.dtype, dict(runtime.versions)) for name, runtime in by_name.items()]
    key = {"of": of, "runtimes": what, "targets": list(map(str, targets)), **dataclasses.asdict(effort)}
    with _Unfinished(unfinished, key) as kept:
        programs = _prepare(by_name, targets, kept)
        images = _draw_images(runtimes[0].image_shape, sizes)
        calls = {str(target): functools.partial(programs[target].run, images[target.batch_size]) for target in targets}
        _run_turns(calls, effort, kept)
    found: dict[SDPointInstance, list[Latency]] = {}
    for target in targets:
        program, runtime = programs[target], by_name[target.runtime]
        p50_ms, p95_ms, repeats = summarize(kept.turns[str(target)])
        latency = Latency(
            device=runtime.device,
            runtime=runtime.name,
            dtype=runtime.dtype,
            batch_size=target.batch_size,
            p50_ms=p50_ms,
            p95_ms=p95_ms,
            repeats=repeats,
            peak_memory_bytes=program.peak_memory_bytes,
            compile_seconds=kept.compile_seconds.get(str(target)),
            versions=runtime.versions,
        )
        found.setdefault(target.instance, []).append(latency)
    return found


class _Target(NamedTuple):
    """What is measured."""

    instance: SDPointInstance
    batch_size: int
    runtime: str

    def __str__(self):
        return f"{self.instance.name} x {self.batch_size} {self.runtime}"


def measure(
    targets: Mapping[Target, Callable[[], object]],
    effort: Effort,
    turns: Turns,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Target]:
    """Times calls of all targets in turns; yields a target after each of its turns. No garbage is collected meanwhile.

    Args:
        targets: what to call; each returns when its work is done.
        effort: how long to measure.
        turns: by target; filled in place. Turns that are in it are not repeated: so a measurement goes on.
        clock: seconds.
    """
    rounds = min(effort.rounds, effort.repeats)
    order = random.Random(effort.seed)
    for number in range(rounds):
        calls = effort.repeats * (number + 1) // rounds - effort.repeats * number // rounds
        for target in order.sample(list(targets), len(targets)):
            done = turns.setdefault(target, [])
            if len(done) <= number:
                enough = _has_enough(done, effort)
                done.append([] if enough else _take_turn(targets[target], calls, effort.seconds / rounds, clock))
                yield target


def _take_turn(call: Callable[[], object], calls: int, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Calls once, then up to `calls` times, until they have taken `seconds`; returns the seconds of each of these."""
    timed: list[float] = []
    with _no_garbage_collection():
        call()
        while len(timed) < calls and sum(timed) < seconds:
            start = clock()
            call()
            timed.append(clock() - start)
    return timed


def _has_enough(done, effort):
    return sum(map(sum, done)) >= effort.seconds and sum(map(len, done)) >= _LEAST_CALLS


def _prepare(runtimes, targets, kept):
    """Compiles the programs one after the other, so that none waits for another while its time is taken."""
    programs = {}
    with progress.bar(targets, desc="compiling", unit="program") as shown:
        for target in shown:
            prepare = runtimes[target.runtime].prepare
            programs[target] = program = prepare(target.instance, target.batch_size)
            if program.compile_seconds is not None:
                kept.compile_seconds[str(target)] = program.compile_seconds
                kept.save_now_and_then()
    return programs


def _run_turns(calls, effort, kept):
    """Fills `kept.turns`, under a progress bar."""
    rounds, done = min(effort.rounds, effort.repeats), sum(map(len, kept.turns.values()))
    with progress.bar(total=rounds * len(calls), initial=done, desc="timing", unit="turn") as shown:
        for name in measure(calls, effort, kept.turns):
            shown.set_postfix_str(name, refresh=False)
            shown.update()
            kept.save_now_and_then()


def summarize(turns: Iterable[Sequence[float]]) -> tuple[float, float, int]:
    """Sums up the calls of a target, given in seconds.

    Returns:
        (p50, p95, n): the median and the time that 95 of 100 calls do not exceed, in milliseconds; the number of calls.
    """
    ordered = sorted(1000 * seconds for turn in turns for seconds in turn)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return round(statistics.median(ordered), 4), round(p95, 4), len(ordered)


def check_unfinished(path: pathlib.Path) -> None:
    """Raise ValueError if there is a file at `path` that no profile wrote, which one would replace."""
    if path.exists() and not path.read_bytes().startswith(b'{"key": '):
        raise ValueError(f"{path}: was not written by a profile, and is in the way of one; move it")


class _Unfinished:
    """As a context, keeps the measurements so far in a file that belongs to one `key`; saves them at the end."""

    def __init__(self, path: pathlib.Path, key: Mapping[str, Any]):
        self._path, self._key = path, json.loads(json.dumps(key))
        self.turns: Turns[str] = {}
        self.compile_seconds: dict[str, float] = {}

    def __enter__(self) -> "_Unfinished":
        check_unfinished(self._path)
        content = self._path.read_bytes() if self._path.exists() else b""
        with contextlib.suppress(ValueError, TypeError, LookupError):  # Damaged.
            found = json.loads(content)
            if found["key"] == self._key:
                self.turns, self.compile_seconds = found["turns"], found["compile_seconds"]
        self._saved = time.monotonic()
        return self

    def save_now_and_then(self) -> None:
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._save()

    def __exit__(self, *_):
        self._save()

    def _save(self):
        content = {"key": self._key, "turns": self.turns, "compile_seconds": self.compile_seconds}
        files.write_atomically(self._path, json.dumps(content))
        self._saved = time.monotonic()


def _draw_images(image_shape, batch_sizes):
    rng = np.random.default_rng(0)
    return {size: rng.integers(0, 256, (size, *image_shape), np.uint8) for size in batch_sizes}


@contextlib.contextmanager
def _no_garbage_collection():
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


_events: Counter[str] = Counter()  # That JAX has reported to this process, by name.


def _count_event(event, *_, **__):
    _events[event] += 1


jax.monitoring.register_event_listener(_count_event)
jax.monitoring.register_event_duration_secs_listener(_count_event)


def time_compilation(compile_it: Callable[[], object]) -> float | None:
    """Calls `compile_it` and returns its seconds; None if XLA compiled nothing, as a cache had the program."""
    start, before = time.perf_counter(), _count_compilations()
    compile_it()
    seconds = time.perf_counter() - start
    return round(seconds, 3) if _count_compilations() > before else None


def _count_compilations():
    return _events["/jax/core/compile/backend_compile_duration"] - _events["/jax/compilation_cache/cache_hits"]


def warn_of_load() -> None:
    """Prints one line if the load average says that other processes are running; call it before anything heavy."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load >= _BUSY:
        progress.say(f"warning: load average {load:.1f}: other processes run, or did a minute ago; calls take longer")


def list_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Returns the version of each of the `libraries` that is installed, by name."""
    found = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
