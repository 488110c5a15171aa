"""What a batch of each instance takes, as the controller plans with it. No JAX."""

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from sdpoint_jax.choice.pareto import pareto_front
from sdpoint_jax.choice.selection import Where, find_setting, list_batch_sizes, list_latencies
from sdpoint_jax.choice.table import InstanceRow

LARGEST_MARGIN = 3.0  # Of tails over medians; what is above is a fault of the measurement.


class LatencyTable:
    """What a batch of each instance takes, as profiled on one device.

    Attributes:
        rows: of the instances.
        names: of the instances.
        setting: device, runtime (None: the faster one for each instance and batch size), dtype.
        batch_sizes: that programs exist for, ascending.
        seconds: [I, S], median time of a batch.
        margin: time that 95 of 100 batches do not exceed, over the median; the median of all programs.
        top1: [I], accuracies as shares.
        macs: [I], of one image.
        per_image: [I], time for an image in the best batch size.
        work: [I, S, K + 1], least time for k images in batches of at most `batch_sizes[s]`, K being the largest.
        largest: [I, S, K + 1], number of the largest batch size that takes part in that.
    """

    def __init__(self, rows: Sequence[InstanceRow], setting: Where, batch_sizes: Sequence[int]):
        """Takes rows that were all measured in the setting at all the batch sizes; see `from_rows`."""
        self.rows, self.setting, self.batch_sizes = tuple(rows), setting, tuple(batch_sizes)
        self.names = tuple(row.name for row in rows)
        self._index = {name: number for number, name in enumerate(self.names)}
        self.top1, self.macs = np.array([row.top1 for row in rows]), np.array([row.macs for row in rows])
        found = [list_latencies(row, self.setting) for row in rows]
        self.seconds = np.array([[measured[size].p50_ms / 1e3 for size in batch_sizes] for measured in found])
        tails = [measured[size].p95_ms / measured[size].p50_ms for measured in found for size in batch_sizes]
        self.margin = min(max(1.0, statistics.median(tails)), LARGEST_MARGIN)
        self.per_image = (self.seconds / np.array(batch_sizes)).min(axis=1)
        self.work, self.largest = _split(self.seconds, self.batch_sizes)

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[InstanceRow],
        *,
        device: str | None = None,
        runtime: str | None = None,
        dtype: str | None = None,
        batch_sizes: Iterable[int] | None = None,
    ) -> "LatencyTable":
        """Takes the profiled latencies from the table of a sweep.

        Args:
            rows: of which those count that were measured at all the batch sizes.
            device: on which they were measured; None for the only one there is.
            runtime: likewise; None for the faster one of each instance and batch size.
            dtype: as `device`.
            batch_sizes: to use; None for all that any row was measured at.

        Raises:
            ValueError: there is no such measurement; names those that there are.
        """
        setting = find_setting(rows, device=device, runtime=runtime, dtype=dtype)
        measured = list_batch_sizes(rows, setting)
        sizes = measured if batch_sizes is None else sorted(set(batch_sizes))
        unknown = sorted(set(sizes) - set(measured))
        if unknown or not sizes:
            raise ValueError(f"batch_sizes {unknown or sizes}: measured are {', '.join(map(str, measured))}")
        complete = [row for row in rows if set(list_batch_sizes([row], setting)) >= set(sizes)]
        if not complete:
            raise ValueError(f"batch_sizes {sizes}: no instance was measured at all of them on {setting[0]}")
        return cls(complete, setting, sizes)

    def index_of(self, name: str) -> int:
        """Returns the number of the instance called `name`.

        Raises:
            ValueError: it is not in the table; names those that are.
        """
        if name not in self._index:
            raise ValueError(f"instance {name!r}: profiled are {', '.join(self.names)}")
        return self._index[name]

    def front(self, among: Iterable[int]) -> tuple[int, ...]:
        """Return the Pareto front of accuracy and of the time at every batch size, most accurate first."""
        return tuple(pareto_front(among, lambda i: self.top1[i], lambda i: self.seconds[i], lambda i: i))

    def hull(self, among: Iterable[int]) -> tuple[int, ...]:
        """Returns those of the front that no mixture of two others equals, most accurate first.

        Some batches on a faster instance and some on a more accurate one can give a queue the accuracy of a third in
        less time than that one takes.
        """
        front = np.array(self.front(among), int)
        return tuple(int(i) for i in front if not self._is_equalled(i, front))

    def _is_equalled(self, i: int, front: np.ndarray) -> bool:
        """Tells whether a mixture that is as accurate as an instance is as fast as it at every batch size."""
        accurate, fast = front[self.top1[front] > self.top1[i]], front[self.top1[front] < self.top1[i]]
        shares = (self.top1[i] - self.top1[fast]) / (self.top1[accurate, None] - self.top1[fast])  # [accurate, fast]
        mixtures = shares[..., None] * self.seconds[accurate, None] + (1 - shares[..., None]) * self.seconds[fast]
        return bool((mixtures <= self.seconds[i]).all(axis=-1).any())

    def fastest(self, among: Iterable[int]) -> int:
        """Returns the one that takes the least time for an image; of equal ones the most accurate."""
        return min(among, key=lambda i: (self.per_image[i], -self.top1[i], i))


def _split(seconds: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Finds how to run k images soonest in batches of limited size: `LatencyTable.work` and `.largest`."""
    most = max(sizes)
    work = np.zeros((len(seconds), len(sizes), most + 1))
    largest = np.zeros(work.shape, int)
    left = np.maximum(0, np.arange(most + 1)[:, None] - np.array(sizes))  # [K + 1, S], images after a first batch.
    for limit in range(len(sizes)):
        for k in range(1, most + 1):
            times = seconds[:, : limit + 1] + work[:, limit, left[k, : limit + 1]]
            work[:, limit, k] = times.min(axis=1)
            best = times <= work[:, limit, k, None] * (1 + 1e-9)
            largest[:, limit, k] = limit - np.argmax(best[:, ::-1], axis=1)
    return work, largest
