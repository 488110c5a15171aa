"""What the controller learns while it runs: how requests come, and what batches take. No JAX."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

import numpy as np

from sdpoint_jax.choice.latency_table import LARGEST_MARGIN, LatencyTable
from sdpoint_jax.serving.line import Batch

SCALES = (1 / 16, 1 / 4, 1.0)  # In objectives: how far back the rate of arrivals is looked at.

_TAIL, _MARGIN_STEP = 0.95, 0.02
_RECENT_BATCHES = 5  # Their median is a worker's slowness: up to two outliers do not count, a change does after three.
_INSTANCE_STEP, _LARGEST_SURPRISE = 0.02, 0.25
_ANSWER_STEP, _FORGETTING_SECONDS = 1 / 8, 2.0


class Arrivals:
    """Counts how many requests came of late.

    Attributes:
        objective: seconds within which a request is to be answered.
    """

    def __init__(self, objective: float):
        """Starts without any."""
        self._scales = [scale * objective for scale in SCALES]
        self._counts, self._last = [0.0] * len(SCALES), -math.inf
        self.objective = objective

    def count(self, now: float) -> None:
        """Counts one that comes now."""
        self._counts = [1 + count for count in self._faded(now)]
        self._last = now

    def peak_rate(self, now: float) -> float:
        """Returns how many came a second on the busiest of some spans of the recent past, before the last one.

        That one came when it did says nothing about the rate.
        """
        return max(max(0.0, count - 1) / scale for scale, count in zip(self._scales, self._faded(now)))

    def _faded(self, now: float) -> list[float]:
        passed = now - self._last
        return [count * math.exp(-passed / scale) for count, scale in zip(self._counts, self._scales)]


class Pace:
    """Follows what batches take at present, over what was profiled.

    A worker's slowness is the median over its last batches; that of an instance beside it changes little by little;
    the margin follows the quantile that batches exceed the expectation by.

    Attributes:
        correction: [I], by which the times of an instance are multiplied on every worker.
        margin: most batches take no longer than this times what is expected.
    """

    def __init__(self, table: LatencyTable, workers: int):
        """Starts as profiled."""
        self._table, self.margin = table, table.margin
        self.correction = np.ones(len(table.names))
        self._ratios = [deque([1.0] * _RECENT_BATCHES, maxlen=_RECENT_BATCHES) for _ in range(workers)]

    def slowness(self, worker: int) -> float:
        """Returns how much longer than profiled the batches of a worker take."""
        return statistics.median(self._ratios[worker])

    @property
    def mean_slowness(self) -> float:
        """Returns the mean over the workers."""
        return statistics.fmean(map(statistics.median, self._ratios))

    @property
    def least_slowness(self) -> float:
        """Returns that of the quickest worker."""
        return min(map(statistics.median, self._ratios))

    def quickest(self, options: Iterable[int], slowness: float, margin: float = 1.0) -> float:
        """Returns the seconds of the smallest batch on the quickest of the instances."""
        return min(self._table.seconds[i, 0] * self.correction[i] for i in options) * slowness * margin

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learns from a batch that took so many seconds."""
        instance = self._table.index_of(batch.instance)
        profiled = self._table.seconds[instance, self._table.batch_sizes.index(batch.batch_size)]
        self._ratios[batch.worker].append(float(seconds / (profiled * self.correction[instance])))
        surprise = min(max(-_LARGEST_SURPRISE, math.log(seconds / batch.seconds)), _LARGEST_SURPRISE)
        self.correction[instance] *= math.exp(_INSTANCE_STEP * surprise)
        step = _TAIL if seconds > batch.seconds * self.margin else _TAIL - 1
        self.margin = min(max(1.0, self.margin + _MARGIN_STEP * step), LARGEST_MARGIN)


class Delay:
    """Estimates what a request waits for beside its queue and its batch, so that deadlines leave time for it.

    A request waits for the event loop before anything of it is seen, and its answer waits for the loop again and is
    written. On a busy machine both take longer than most batches of a small net.

    Attributes:
        before: seconds by which the event loop was late of late.
    """

    def __init__(self) -> None:
        """Starts with a loop that is never late."""
        self.before = 0.0
        self._after = 0.0

    @property
    def seconds(self) -> float:
        """Returns the seconds to leave free: a mean of late, so that a single slow answer changes little."""
        return self.before + self._after

    def count(self, after: float) -> None:
        """Learns from one answer.

        Args:
            after: seconds from the acceptance of its request to its response, less those in the queue and its batch.
        """
        self._after += (after - self._after) * _ANSWER_STEP

    def watch(self, lateness: float, passed: float) -> None:
        """Learns how late the event loop is, and forgets what was counted.

        Else a service whose answers took too long once, so that all is refused, would never learn of a better time.

        Args:
            lateness: seconds.
            passed: seconds since it was told last.
        """
        self.before = max(lateness, self.before / 2)
        self._after *= math.exp(-passed / _FORGETTING_SECONDS)
