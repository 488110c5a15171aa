"""How programs meet devices: the switch of compiled programs, replicas and shards; all of the project's pmap.

Everything replicated is an ordinary pytree without a device axis; a batch has a leading axis of local devices.
"""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
REPLICATED, SHARDED = None, 0  # For the `in_axes` and `out_axes` of `parallel`.


def parallel(function: Callable, *, in_axes: tuple, out_axes: Any, donate: tuple[int, ...] = ()) -> Callable:
    """`function` on every device of every host at once; collectives name `AXIS`."""
    return jax.pmap(function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate)


def replicate(tree):
    """Puts a host pytree on every local device."""
    return jax.device_put(tree, _local_sharding(PartitionSpec()))


def shard(batch: Mapping[str, np.ndarray]):
    """Splits this host's batch, arrays [b, ...], over its devices: [local devices, b / local devices, ...]."""
    devices = jax.local_device_count()
    split = {name: value.reshape(devices, -1, *value.shape[1:]) for name, value in batch.items()}
    return jax.device_put(split, _local_sharding(PartitionSpec(AXIS)))


def prefetch(batches: Iterable[Mapping[str, np.ndarray]], size: int = 2) -> Iterator[Any]:
    """Shards batches `size` ahead of their use, so that the transfer runs beside the computation."""
    ahead = collections.deque()
    for batch in batches:
        ahead.append(shard(batch))
        if len(ahead) > size:
            yield ahead.popleft()
    yield from ahead


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless the global batch divides evenly over all devices."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        sizes = sorted({batch_size // devices * devices, -(-max(batch_size, 1) // devices) * devices} - {0})
        nearest = " or ".join(map(str, sizes))
        raise ValueError(f"batch size {batch_size} does not divide over {devices} devices; the nearest is {nearest}")


def shapes_of(tree):
    """The ShapeDtypeStructs of a pytree of arrays, which is what programs are compiled from."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def _local_sharding(spec):
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), spec)


class Switch:
    """Compiled programs looked up by a static key, as the SDPoint instance: each key is traced and compiled once.

    `switch[key]` compiles on first use; `compile` ahead of time. Programs are built from shapes: compiling needs
    neither data nor state.
    """

    def __init__(self, build: Callable[[Hashable], Callable], shapes: Callable[[Hashable], tuple]):
        """`build(key)` is the function of a key, made by `parallel`; `shapes(key)` its arguments' shapes."""
        self._build, self._shapes = build, shapes
        self._programs = {}
        # Many programs in flight on several CPU devices of one process deadlock in their collectives.
        self._wait = jax.default_backend() == "cpu" and jax.local_device_count() > 1

    def __getitem__(self, key: Hashable) -> Callable:
        if key not in self._programs:
            self._compile(key)
        program = self._programs[key]
        return (lambda *args: jax.block_until_ready(program(*args))) if self._wait else program

    def __len__(self) -> int:
        return len(self._programs)

    def compile(self, keys: Iterable[Hashable], workers: int) -> Iterator[tuple[Hashable, float]]:
        """Compiles what is missing in `workers` threads, as XLA releases the lock; yields (key, seconds) of each."""
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(self._compile, key) for key in keys if key not in self._programs]
            try:
                for task in concurrent.futures.as_completed(tasks):
                    yield task.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _compile(self, key):
        start = time.perf_counter()
        self._programs[key] = self._build(key).lower(*self._shapes(key)).compile()
        return key, time.perf_counter() - start
