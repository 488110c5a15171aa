"""Which instance runs next, and in which batch size: the policies of the controller. No JAX."""

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sdpoint_jax.choice.latency_table import LatencyTable
from sdpoint_jax.serving.line import Line
from sdpoint_jax.serving.observed import Arrivals, Pace

# Not published. Of 4, 8, 16, 32 and 64 on a simulated processor, none lets SlackFit answer clearly more in time.
SLACKFIT_BUCKETS = 16

# In margins. Of 1 and 2, on a simulated processor, 2 has less than half as many of the accepted given up, for up to
# half a point of the answers in bursts, and for none where there is always more to do than can be done.
_SURENESS = 2.0
_AHEAD = 12.0  # In objectives: by when what waits is to be worked off. From 4 to 12 it matters little.
_TOLERANCE = 1.05  # A smaller batch is worth this much more time for an image: it keeps others waiting less.


class Plan:
    """Foresees what would become of the queue, from what is known when a batch is chosen.

    Attributes:
        table: as profiled.
        line: the cost class of the most urgent request; None where nothing waits.
        slack: seconds until that one's deadline.
        seconds: [I, S], expected time of a batch.
        margin: most batches take no longer than this times that.
        factor: by which the rate of recent arrivals is multiplied, to foresee that of the next ones.
    """

    def __init__(
        self,
        table: LatencyTable,
        lines: Iterable[Line],
        arrivals: Arrivals,
        pace: Pace,
        *,
        now: float,
        slowness: float,
        busy: float,
        workers: int,
        factor: float,
    ):
        """Looks at what waits.

        Args:
            table: as profiled.
            lines: of all cost classes.
            arrivals: of late.
            pace: of batches.
            now: the time.
            slowness: of the worker that will run the batch.
            busy: seconds of work in progress, of all workers.
            workers: how many.
            factor: see the attribute.
        """
        self.table, self.margin, self.factor = table, pace.margin, factor
        self._slowness = pace.correction * slowness
        self.seconds = table.seconds * self._slowness[:, None]
        self._lines = [line for line in lines if line]
        self.line = min(self._lines, key=lambda line: line.deadlines[0], default=None)
        self.slack = self.line.deadlines[0] - now if self.line else math.inf
        self._now, self._workers, self._busy = now, workers, busy
        self._arrivals = arrivals

    def sizes(self, instance: int) -> list[int]:
        """Lists the numbers of the largest batch sizes to try for the most urgent class, the best first.

        That is the smallest one that is about as quick as any, for what waits. Then come the larger ones, then the
        smaller ones.
        """
        best = self._best_size(len(self.line), instance)
        useful = bisect.bisect_left(self.table.batch_sizes, min(len(self.line), self.table.batch_sizes[-1])) + 1
        return [*range(best, max(useful, best + 1)), *reversed(range(best))]

    def _best_size(self, count: int, instance: int) -> int:
        work = self.table.work[instance, :, min(count, self.table.batch_sizes[-1])]
        return int(np.argmax(work <= _TOLERANCE * work.min()))

    def lateness(
        self,
        instance: int,
        size: int,
        *,
        level: float = 0.0,
        since: float = -math.inf,
        margin: float | None = None,
        sure: bool = False,
    ) -> float:
        """Returns by how many seconds a deadline is missed if the queue is drained from now on.

        The most urgent class is run on one instance in batches of limited size, the other classes on theirs at a level,
        in the batch sizes that are best for them. A batch ends at the latest when all work before it is done, shared by
        the workers, and then its own.

        Args:
            instance: its number.
            size: number of the largest batch size.
            level: seconds for an image, that the others may take; 0 for the fastest instances.
            since: only batches count that hold requests with a deadline from this one on.
            margin: instead of the plan's.
            sure: whether to leave time for what the work before a batch may take longer as well.

        Returns:
            the largest lateness of a batch; negative where all are in time.
        """
        parts = [self._batches(self.line, instance, size)]
        for line in self._lines:
            if line is not self.line:
                option = line.at_level(level)
                parts.append(self._batches(line, option, self._best_size(len(line), option)))
        deadlines, times = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts))
        if len(parts) > 1:
            order = np.argsort(deadlines, kind="stable")
            deadlines, times = deadlines[order], times[order]
        before, tails = np.cumsum(times) - times + self._busy, times * ((margin or self.margin) - 1)
        if sure:  # Batches are late independently of each other, so that squares add.
            tails = _SURENESS * (self.margin - 1) * np.sqrt(np.cumsum(times**2) + self._busy**2)
        late = self._now + before / self._workers + times + tails - deadlines
        return float(late[max(0, int(np.searchsorted(deadlines, since, "right")) - 1) :].max())

    def least_lateness(self, since: float) -> float:
        """Returns the lateness on the fastest instances in the batch size that is best for it, if none fits.

        It leaves time for what all work before may take longer. Small errors add up over a queue, and who is refused
        knows it at once, while who is accepted and then given up has waited for nothing.
        """
        least = math.inf
        for size in self.sizes(self.line.fastest):
            least = min(least, self.lateness(self.line.fastest, size, since=since, sure=True))
            if least <= 0:
                break
        return least

    def too_late(self, instance: int, size: int) -> int:
        """Counts the most urgent requests that a batch begun now is expected to answer too late."""
        return bisect.bisect_left(self.line.deadlines, self._now + self.seconds[instance, size])

    def in_time(self, instance: int, size: int) -> int:
        """Counts the requests that a batch begun now could answer in time."""
        return min(len(self.line) - self.too_late(instance, size), self.table.batch_sizes[size])

    def keeps_up(self, instance: int, factor: float) -> bool:
        """Tells whether an instance can work off what waits while requests go on to come.

        Args:
            instance: its number.
            factor: they come so many times as fast as on the busiest of some spans of the recent past.
        """
        each = self.table.per_image[instance] * self._slowness[instance] / self._workers
        ahead = _AHEAD * self._arrivals.objective
        waiting = sum(map(len, self._lines))
        coming = factor * self._arrivals.peak_rate(self._now) * ahead
        return self._busy / self._workers + (waiting + coming) * each <= ahead

    def _batches(self, line: Line, instance: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Deadlines and times of the batches that a line is cut into; the last one may be cut further."""
        deadlines = np.array(line.deadlines[:: self.table.batch_sizes[size]])
        times = np.full(len(deadlines), self.seconds[instance, size])
        if rest := len(line) % self.table.batch_sizes[size]:
            times[-1] = self.table.work[instance, size, rest] * self._slowness[instance]
        return deadlines, times


def headroom(plan: Plan, factor: float | None = None) -> tuple[int, int]:
    """Runs the most accurate instance that keeps up with arrivals and answers in time all that waits.

    Accuracy grows ever less with cost, so that a queue is best answered at one level all through; and a service that
    only looks at what already waits learns of an outburst when it has no time left for it. So the rate of arrivals is
    looked at over short spans of the recent past, and the highest is expected to go on.

    Args:
        plan: what is known.
        factor: by which that rate is multiplied, instead of the plan's. More answers more requests in an outburst, less
            answers them more accurately; with 0, only what already waits counts.

    Returns:
        numbers of the instance and of the largest batch size.
    """
    factor = plan.factor if factor is None else factor
    for instance in plan.line.options:
        if plan.keeps_up(instance, factor):
            for size in plan.sizes(instance):
                if plan.lateness(instance, size, level=plan.table.per_image[instance]) <= 0:
                    return instance, size
    return keep_deadlines(plan)


def keep_deadlines(plan: Plan) -> tuple[int, int]:
    """Runs the fastest instance that keeps all deadlines, or else what answers the most requests in time.

    Where not all can be kept, to run what the most urgent still allows would end in ever smaller batches: they answer
    less, so that the next ones are as urgent. So time is best given to those who gain most by it.

    Args:
        plan: what is known.

    Returns:
        numbers of the instance and of the largest batch size.
    """
    by_speed = sorted(plan.line.options, key=lambda i: plan.table.per_image[i])
    for margin in (plan.margin, 1.0):
        for instance in by_speed:
            for size in plan.sizes(instance):
                if plan.lateness(instance, size, margin=margin) <= 0:
                    return instance, size
    rates = {(i, s): plan.in_time(i, s) / plan.seconds[i, s] for i in by_speed for s in plan.sizes(i)}
    best = max(rates, key=rates.get)
    return best if rates[best] else (min(by_speed, key=lambda i: plan.seconds[i, 0]), 0)


def slackfit(plan: Plan) -> tuple[int, int]:
    """Runs what SlackFit of SuperServe does (Khare et al., NSDI 2025, section 4.2 and appendix A.5).

    Buckets of equal width divide the range of latencies of all pairs of instance and batch size; in each, the pair with
    the largest batch counts, of equal ones the most accurate. The slack of the most urgent request picks the pair whose
    latency is closest below it, or the quickest one.

    Returns:
        numbers of the instance and of the largest batch size.
    """
    pairs = _bucketize(plan.table, plan.line.options)
    times = {pair: plan.seconds[pair] * plan.margin for pair in pairs}
    below = [pair for pair in pairs if times[pair] < plan.slack]
    return max(below, key=times.get) if below else min(pairs, key=times.get)


@functools.lru_cache(maxsize=64)
def _bucketize(table: LatencyTable, options: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    times = {(i, s): table.seconds[i, s] for i in options for s in range(len(table.batch_sizes))}
    low, high = min(times.values()), max(times.values())
    width = (high - low) / SLACKFIT_BUCKETS
    buckets = {}
    for pair, time in times.items():
        number = min(int((time - low) / width), SLACKFIT_BUCKETS - 1) if width else 0
        buckets.setdefault(number, []).append(pair)
    return tuple(max(pairs, key=lambda pair: (pair[1], table.top1[pair[0]])) for pairs in buckets.values())


def _only_the_most_accurate(table: LatencyTable, allowed: Sequence[int]) -> tuple[int, ...]:
    return table.front(allowed)[:1]


def _only_the_fastest(table: LatencyTable, allowed: Sequence[int]) -> tuple[int, ...]:
    return (table.fastest(allowed),)


Narrow = Callable[[LatencyTable, Sequence[int]], tuple[int, ...]]
Choose = Callable[[Plan], tuple[int, int]]

# By name: which of the instances that a request allows may answer it, most accurate first; and the choice of one of
# these, and of the largest batch size, for each batch.
POLICIES: dict[str, tuple[Narrow, Choose]] = {
    "full": (_only_the_most_accurate, keep_deadlines),
    "cheapest": (_only_the_fastest, keep_deadlines),
    "slackfit": (LatencyTable.front, slackfit),
    "headroom": (LatencyTable.hull, headroom),
}


def find_policy(name: str, table: LatencyTable) -> tuple[Narrow, Choose]:
    """Finds a policy by its name.

    Args:
        name: one of `POLICIES`; `fixed:NAME` for a single instance, or the most accurate one where a request does not
            allow it; `headroom:FACTOR` for a factor of `headroom`, as `headroom:0.5`.
        table: of the instances.

    Raises:
        ValueError: there is no such policy or instance; names those that there are.
    """
    if name in POLICIES:
        return POLICIES[name]
    kind, _, value = name.partition(":")
    if kind == "fixed" and value:
        fixed = table.index_of(value)
        return (lambda table, allowed: (fixed,) if fixed in allowed else table.front(allowed)[:1]), keep_deadlines
    if kind == "headroom":
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if not 0 <= factor < math.inf:
            raise ValueError(f"policy {name!r}: valid factors are 0 and positive numbers")
        return LatencyTable.hull, functools.partial(headroom, factor=factor)
    raise ValueError(f"policy {name!r}: valid are {', '.join(POLICIES)}, fixed:NAME, headroom:FACTOR")
