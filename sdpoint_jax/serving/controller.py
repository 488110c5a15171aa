"""Which requests run next, on which SDPoint instance, in which batch size: so that answers come in time. No JAX.

A data structure that a server or a simulator drives: it owns no thread and no clock, every method is told the time, in
seconds on a clock that never goes back.

controller = Controller(LatencyTable.from_rows(rows), objective=0.1)
answer = controller.submit(Request("a"), now)  # Accepted, or Refused with the time to try again.
batch = controller.next_batch(now)  # Whenever a worker is free: what it runs now, or None.
controller.observe(batch, seconds, now)  # When the batch is done.
late = controller.give_up(now)  # Accepted requests that no answer can reach in time any more.

Requests wait in the order of their deadlines. Those that allow the same instances form one cost class; within a class
no request overtakes one with an earlier deadline. What cannot be answered in time is refused at once.

All instances share their parameters, so that switching from one to another between batches costs nothing. Hence there
is no hysteresis: it would only delay the better choice.
"""

import bisect
import dataclasses
import functools
import math
import numbers
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from sdpoint_jax.serving.selection import Budget, Where, find_setting, list_affordable, list_batch_sizes, list_latencies
from sdpoint_jax.storage.table import InstanceRow

# For `headroom`: how far back the rate of arrivals is looked at, and for how long its peak is expected to go on, in
# objectives. That is the most after a request was lost, and fades to the least over that many that were not.
SCALES = (1 / 16, 1 / 4, 1.0)
MOST_OUTLOOK, LEAST_OUTLOOK, FADING_REQUESTS = 4.0, 0.25, 1000
# Not published. Of 4, 8, 16, 32 and 64 on a simulated processor, none lets SlackFit answer clearly more in time.
SLACKFIT_BUCKETS = 16

_TOLERANCE = 1.05  # A smaller batch is worth this much more time for an image: it keeps others waiting less.
_TAIL, _MARGIN_STEP, _LARGEST_MARGIN = 0.95, 0.02, 3.0
_RECENT_BATCHES = 5  # Their median is a worker's slowness: up to two outliers do not count, a change does after three.
_INSTANCE_STEP, _LARGEST_SURPRISE = 0.02, 0.25
_PATIENCE_STEP = 0.05


@dataclasses.dataclass(frozen=True)
class Request:
    """One image to classify.

    Attributes:
        id: whatever the caller knows it by.
        deadline: when the answer must be there, in seconds on the caller's clock; None for the controller's objective,
            from when it is submitted.
        instance: name of the only instance that may answer; None for any.
        max_macs: the most multiply-accumulates that the answer may cost; None for no limit.
    """

    id: Hashable
    deadline: float | None = None
    instance: str | None = None
    max_macs: float | None = None


@dataclasses.dataclass(frozen=True)
class Accepted:
    """The request will be answered in time, if batches take as long as expected.

    Attributes:
        deadline: when, at the latest.
    """

    deadline: float


@dataclasses.dataclass(frozen=True)
class Refused:
    """The request will not be answered.

    Attributes:
        reason: in words.
        retry_after: seconds until what waits now is answered, if the fastest instances do it: then there is room again,
            unless others come. None where waiting changes nothing.
    """

    reason: str
    retry_after: float | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a worker runs.

    Attributes:
        requests: to answer; each has its deadline.
        instance: name of the instance.
        batch_size: of the program, at least the number of requests: the rest is padding.
        worker: its number, from 0.
        start: the time when it was handed out.
        seconds: that it is expected to take.
    """

    requests: tuple[Request, ...]
    instance: str
    batch_size: int
    worker: int
    start: float
    seconds: float


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
        self.margin = min(max(1.0, statistics.median(tails)), _LARGEST_MARGIN)
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
        """Returns those that no other one is as accurate as and as fast as at every batch size, most accurate first."""
        kept = []
        for i in sorted(among, key=lambda i: (-self.top1[i], self.per_image[i], i)):
            if not any((self.seconds[other] <= self.seconds[i]).all() for other in kept):
                kept.append(i)
        return tuple(kept)

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


class _Line:
    """The waiting requests of one cost class, in the order of their deadlines; of equal ones as they came.

    Attributes:
        options: numbers of the instances that may answer them, most accurate first.
        fastest: that one of them.
        deadlines: of the requests.
        requests: beside them.
    """

    def __init__(self, options: tuple[int, ...], table: LatencyTable):
        self.options, self.fastest = options, table.fastest(options)
        self.deadlines, self.requests = [], []
        self._speeds = [(table.per_image[i], i) for i in options]

    def __len__(self):
        return len(self.deadlines)

    def at_level(self, per_image: float) -> int:
        """Picks the most accurate option that takes no longer for an image, or else the fastest."""
        return next((i for speed, i in self._speeds if speed <= per_image), self.fastest)

    def add(self, request: Request) -> int:
        """Returns the request's place in the line."""
        place = bisect.bisect_right(self.deadlines, request.deadline)
        self.deadlines.insert(place, request.deadline)
        self.requests.insert(place, request)
        return place

    def remove(self, place: int) -> None:
        del self.deadlines[place], self.requests[place]

    def take(self, count: int) -> list[Request]:
        taken = self.requests[:count]
        del self.requests[:count], self.deadlines[:count]
        return taken


class Controller:
    """Queue, admission, and the choice of instance and batch size for one or more equal workers; see the module.

    Attributes:
        table: the latencies that it plans with.
        objective: seconds within which a request is answered that has no deadline of its own.
        max_queue: most requests that wait.
    """

    def __init__(
        self,
        table: LatencyTable,
        *,
        objective: float,
        policy: str = "headroom",
        max_queue: int = 1024,
        workers: int = 1,
        admission: bool = True,
    ):
        """Starts with an empty queue and free workers.

        Args:
            table: as profiled.
            objective: seconds within which a request is to be answered.
            policy: see `find_policy`.
            max_queue: most requests that wait; more are refused.
            workers: that run a batch each at the same time.
            admission: whether to refuse what cannot be answered in time. If not, requests are refused only where the
                queue is full, and given up when their time has run out.

        Raises:
            ValueError: an unknown policy or instance, or a number that is not positive.
        """
        if not (_is_finite(objective) and objective > 0):
            raise ValueError(f"objective {objective!r}: valid are positive numbers of seconds")
        for name, value in (("max_queue", max_queue), ("workers", workers)):
            if not (_is_finite(value) and isinstance(value, numbers.Integral) and value > 0):
                raise ValueError(f"{name} {value!r}: valid are 1, 2, 3, ...")
        self.table, self.objective = table, objective
        narrow, self._choose = find_policy(policy, table)
        self._options = functools.cache(functools.partial(narrow, table))
        self.max_queue, self._admission = max_queue, admission
        self._allowed = tuple(range(len(table.names)))
        self._lines: dict[tuple[int, ...], _Line] = {}
        self._running: list[Batch | None] = [None] * workers
        self._given_up: list[Request] = []
        self._outlook = MOST_OUTLOOK
        self._arrivals = _Arrivals(objective)
        self._pace = _Pace(table, workers)
        self._observed_at = math.inf

    @property
    def waiting(self) -> int:
        """Counts the accepted requests that are in no batch yet."""
        return sum(map(len, self._lines.values()))

    @property
    def slowness(self) -> float:
        """Tells how much longer than profiled batches take at present; 1.0 for no longer."""
        return self._pace.mean_slowness

    def submit(self, request: Request, now: float) -> Accepted | Refused:
        """Takes a request into the queue, or refuses it.

        Raises:
            ValueError: it names an instance that is not in the table, or its deadline or limit is not a number.
        """
        request = self._with_deadline(request, now)
        self._arrivals.count(now, request.deadline - now)
        line, reason = self._line_of(request)
        if line is None:
            return Refused(reason, None)
        if self.waiting >= self.max_queue:
            self._outlook = MOST_OUTLOOK
            return Refused(f"{self.max_queue} requests wait already", self._drain_seconds(now))
        place = line.add(request)
        lateness = Plan(self, now, self.slowness).least_lateness(request.deadline) if self._admission else 0.0
        if lateness <= 0:
            self._outlook += (LEAST_OUTLOOK - self._outlook) / FADING_REQUESTS
            return Accepted(request.deadline)
        line.remove(place)
        if self._forgets_pace(now):
            return self.submit(request, now)
        if self._pace.quickest(line.options, self.slowness, self._pace.margin) > request.deadline - now:
            return Refused("no instance that it allows is fast enough for its deadline", None)
        self._outlook = MOST_OUTLOOK
        return Refused("too many others are answered first", self._drain_seconds(now))

    def next_batch(self, now: float) -> Batch | None:
        """Picks what the first free worker runs now.

        Returns:
            the batch, or None where nothing waits or no worker is free: then ask again after the next `submit` or
            `observe`. A free worker never waits for a batch to fill, which would only give time away: what comes while
            it runs a small batch fills the next one.
        """
        worker = next((number for number, batch in enumerate(self._running) if batch is None), None)
        if worker is None:
            return None
        slowness = self._pace.slowness(worker)
        self._drop_hopeless(now, slowness)
        plan = Plan(self, now, slowness)
        if plan.line is None:
            return None
        instance, limit = self._choose(plan)
        count = min(len(plan.line), self.table.batch_sizes[-1])
        number = self.table.largest[instance, limit, count]
        batch_size = self.table.batch_sizes[number]
        requests = plan.line.take(min(count, batch_size))
        requests += self._fill(batch_size - len(requests), instance, plan.line)
        seconds = float(plan.seconds[instance, number])
        batch = Batch(tuple(requests), self.table.names[instance], batch_size, worker, now, seconds)
        self._running[worker] = batch
        return batch

    def observe(self, batch: Batch, seconds: float | None, now: float) -> None:
        """Frees the batch's worker and learns from the time that it took.

        Args:
            batch: as it was handed out.
            seconds: that it took; None where it failed, from which nothing is learned.
            now: the time.

        Raises:
            ValueError: the batch is not running, or the seconds are not a positive number.
        """
        if self._running[batch.worker] is not batch:
            raise ValueError(f"batch of worker {batch.worker}, started at {batch.start}: it is not running")
        if seconds is not None and not (_is_finite(seconds) and seconds > 0):
            raise ValueError(f"seconds {seconds!r}: valid are positive numbers")
        self._running[batch.worker] = None
        if seconds is not None:
            self._pace.observe(batch, seconds)
            self._observed_at = now

    def _forgets_pace(self, now: float) -> bool:
        """Takes workers that have been idle for an objective to be as fast as profiled again; tells whether they were.

        Else a machine that was slow once, so slow that all is refused, would never be seen to be fast again.
        """
        forgets = now - self._observed_at > self.objective and not self.waiting and not any(self._running)
        if forgets:
            self._pace, self._observed_at = _Pace(self.table, len(self._running)), math.inf
        return forgets

    def give_up(self, now: float) -> tuple[Request, ...]:
        """Hands over those accepted requests, since the last call, that can no longer be answered in time.

        They are in no batch, and never will be.
        """
        self._drop_hopeless(now, self._pace.least_slowness)
        given_up, self._given_up = tuple(self._given_up), []
        return given_up

    def set_limits(self, budget: Budget | None = None, instances: Iterable[str] | None = None) -> None:
        """Limits the instances that are used from now on, in place of earlier limits; without arguments, to none.

        A request that names an instance is refused if that is not among them. Accepted requests are kept: where no
        instance is left for one, it gets the fastest that itself allows.

        Args:
            budget: that they must be within.
            instances: names of those that may be used.

        Raises:
            ValueError: no instance is left; names the nearest possible. Then the earlier limits stay.
        """
        device, runtime, dtype = self.table.setting
        rows = list_affordable(self.table.rows, budget or Budget(), device=device, runtime=runtime, dtype=dtype)
        allowed = {row.name for row in rows}
        if instances is not None:
            named = {name for name in instances if self.table.index_of(name) is not None}
            if not named & allowed:
                raise ValueError(f"instances {sorted(named)}: within the budget are {', '.join(sorted(allowed))}")
            allowed &= named
        self._allowed = tuple(sorted(map(self.table.index_of, allowed)))
        waiting = [request for line in self._lines.values() for request in line.requests]
        self._lines = {}
        for request in waiting:
            self._line_of(request, keep=True)[0].add(request)

    def recent_arrivals(self, now: float) -> list[tuple[float, float]]:
        """Returns some spans of time, in seconds, and about how many others came within each before the last one."""
        return self._arrivals.recent(now)

    @property
    def patience(self) -> float:
        """Returns the seconds that requests leave for an answer, on average; at most the objective."""
        return self._arrivals.patience

    def _with_deadline(self, request: Request, now: float) -> Request:
        for name in ("deadline", "max_macs"):
            value = getattr(request, name)
            if value is not None and not _is_finite(value):
                raise ValueError(f"{name} {value!r}: valid are numbers")
        if request.instance is not None:
            self.table.index_of(request.instance)
        return request if request.deadline is not None else dataclasses.replace(request, deadline=now + self.objective)

    def _line_of(self, request: Request, keep: bool = False) -> tuple[_Line | None, str]:
        """Returns the line of the request's cost class, or None and why it has none."""
        own = range(len(self.table.names)) if request.instance is None else [self.table.index_of(request.instance)]
        own = [i for i in own if request.max_macs is None or self.table.macs[i] <= request.max_macs]
        allowed = [i for i in own if i in self._allowed]
        if not allowed and not (keep and own):
            return None, "no instance that the service uses at present is one that it allows"
        options = self._options(tuple(allowed)) if allowed else (self.table.fastest(own),)
        if options not in self._lines:
            self._lines[options] = _Line(options, self.table)
        return self._lines[options], ""

    def _fill(self, seats: int, instance: int, head: _Line) -> list[Request]:
        """Takes the most urgent requests of other classes that are no freer, in place of padding."""
        lines = [line for line in self._lines.values() if instance in line.options]
        lines = [line for line in lines if line is not head and set(line.options) <= set(head.options)]
        requests = []
        while len(requests) < seats and any(lines):
            requests += min(filter(len, lines), key=lambda line: line.deadlines[0]).take(1)
        return requests

    def _drop_hopeless(self, now: float, slowness: float) -> None:
        """Gives up the requests that even the quickest batch, begun now, would answer too late."""
        for line in self._lines.values():
            end = now + self._pace.quickest(line.options, slowness)
            if hopeless := line.take(bisect.bisect_left(line.deadlines, end)):
                self._given_up += hopeless
                self._outlook = MOST_OUTLOOK

    def _busy_seconds(self, now: float) -> float:
        """Sums the work in progress. A batch that is overdue by x is taken to need another x."""
        return sum(abs(batch.start + batch.seconds - now) for batch in self._running if batch is not None)

    def _drain_seconds(self, now: float) -> float:
        """Estimates the time until all that waits is done, on the fastest instances in their best batch sizes."""
        work = sum(len(line) * self.table.per_image[line.fastest] for line in self._lines.values())
        return float(self._busy_seconds(now) + work * self.slowness) / len(self._running)


class _Arrivals:
    """How many requests came of late, and how much time they left."""

    def __init__(self, objective: float):
        self._scales = [scale * objective for scale in SCALES]
        self._counts, self._last = [0.0] * len(SCALES), -math.inf
        self._objective, self.patience = objective, objective

    def count(self, now: float, patience: float) -> None:
        self._counts = [1 + count for count in self._faded(now)]
        self._last = now
        self.patience += _PATIENCE_STEP * (min(max(patience, 0.0), self._objective) - self.patience)

    def recent(self, now: float) -> list[tuple[float, float]]:
        """Spans, and the others that came within each: that one came when it did says nothing about the rate."""
        return [(scale, max(0.0, count - 1)) for scale, count in zip(self._scales, self._faded(now))]

    def _faded(self, now: float) -> list[float]:
        passed = now - self._last
        return [count * math.exp(-passed / scale) for count, scale in zip(self._counts, self._scales)]


class _Pace:
    """What batches take at present, over what was profiled.

    A worker's slowness is the median over its last batches; that of an instance beside it changes little by little;
    the margin follows the quantile that batches exceed the expectation by.

    Attributes:
        correction: [I], by which the times of an instance are multiplied on every worker.
        margin: most batches take no longer than this times what is expected.
    """

    def __init__(self, table: LatencyTable, workers: int):
        self._table, self.margin = table, table.margin
        self.correction = np.ones(len(table.names))
        self._ratios = [deque([1.0] * _RECENT_BATCHES, maxlen=_RECENT_BATCHES) for _ in range(workers)]

    def slowness(self, worker: int) -> float:
        return statistics.median(self._ratios[worker])

    @property
    def mean_slowness(self) -> float:
        return statistics.fmean(map(statistics.median, self._ratios))

    @property
    def least_slowness(self) -> float:
        return min(map(statistics.median, self._ratios))

    def quickest(self, options: Iterable[int], slowness: float, margin: float = 1.0) -> float:
        """Returns the seconds of the smallest batch on the quickest of the instances."""
        return min(self._table.seconds[i, 0] * self.correction[i] for i in options) * slowness * margin

    def observe(self, batch: Batch, seconds: float) -> None:
        instance = self._table.index_of(batch.instance)
        profiled = self._table.seconds[instance, self._table.batch_sizes.index(batch.batch_size)]
        self._ratios[batch.worker].append(float(seconds / (profiled * self.correction[instance])))
        surprise = min(max(-_LARGEST_SURPRISE, math.log(seconds / batch.seconds)), _LARGEST_SURPRISE)
        self.correction[instance] *= math.exp(_INSTANCE_STEP * surprise)
        step = _TAIL if seconds > batch.seconds * self.margin else _TAIL - 1
        self.margin = min(max(1.0, self.margin + _MARGIN_STEP * step), _LARGEST_MARGIN)


class Plan:
    """What is known when a batch is chosen, and what would become of the queue.

    Attributes:
        table: as profiled.
        line: the cost class of the most urgent request; None where nothing waits.
        slack: seconds until that one's deadline.
        seconds: [I, S], expected time of a batch.
        margin: most batches take no longer than this times that.
        outlook: for how long the recent peak of arrivals is expected to go on, in objectives.
    """

    def __init__(self, controller: Controller, now: float, slowness: float):
        """Looks at a controller.

        Args:
            controller: whose queue and workers are planned for.
            now: the time.
            slowness: of the worker that will run the batch.
        """
        self.table, self.margin, self.outlook = controller.table, controller._pace.margin, controller._outlook
        self._factors = controller._pace.correction * slowness
        self.seconds = self.table.seconds * self._factors[:, None]
        self._lines = [line for line in controller._lines.values() if line]
        self.line = min(self._lines, key=lambda line: line.deadlines[0], default=None)
        self.slack = self.line.deadlines[0] - now if self.line else math.inf
        self._now, self._workers, self._busy = now, len(controller._running), controller._busy_seconds(now)
        self._controller = controller

    def sizes(self, instance: int, hurry: bool = False) -> list[int]:
        """Lists the numbers of the largest batch sizes to try for the most urgent class, the best first.

        That is the smallest one that is about as quick as any, for what waits; in a hurry, the quickest. Then come the
        larger ones, then the smaller ones.
        """
        best = self._best_size(len(self.line), instance, 1.0 if hurry else _TOLERANCE)
        useful = bisect.bisect_left(self.table.batch_sizes, min(len(self.line), self.table.batch_sizes[-1])) + 1
        return [*range(best, max(useful, best + 1)), *reversed(range(best))]

    def _best_size(self, count: int, instance: int, tolerance: float) -> int:
        work = self.table.work[instance, :, min(count, self.table.batch_sizes[-1])]
        return int(np.argmax(work <= tolerance * work.min()))

    def lateness(self, instance: int, size: int, *, level: float = 0.0, since: float = -math.inf) -> float:
        """Returns by how many seconds a deadline is missed if the queue is drained from now on.

        The most urgent class is run on one instance in batches of limited size, the other classes on theirs at a level,
        in the batch sizes that are best for them. A batch ends at the latest when all work before it is done, shared by
        the workers, and then its own.

        Args:
            instance: its number.
            size: number of the largest batch size.
            level: seconds for an image, that the others may take; 0 for the fastest instances.
            since: only batches count that hold requests with a deadline from this one on.

        Returns:
            the largest lateness of a batch; negative where all are in time.
        """
        parts = [self._batches(self.line, instance, size)]
        for line in self._lines:
            if line is not self.line:
                option = line.at_level(level)
                parts.append(self._batches(line, option, self._best_size(len(line), option, _TOLERANCE)))
        deadlines, times = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts))
        if len(parts) > 1:
            order = np.argsort(deadlines, kind="stable")
            deadlines, times = deadlines[order], times[order]
        before = np.cumsum(times) - times + self._busy
        late = self._now + before / self._workers + times * self.margin - deadlines
        return float(late[max(0, int(np.searchsorted(deadlines, since, "right")) - 1) :].max())

    def least_lateness(self, since: float) -> float:
        """Returns the lateness on the fastest instances in the batch size that is best for it, if none fits."""
        least = math.inf
        for size in self.sizes(self.line.fastest):
            least = min(least, self.lateness(self.line.fastest, size, since=since))
            if least <= 0:
                break
        return least

    def has_headroom(self, instance: int, outlook: float) -> bool:
        """Tells whether what waits and what may come can be answered at the level of an instance.

        On each span of the recent past, requests go on to come as fast as they did within it.

        Args:
            instance: its number.
            outlook: for how long, in objectives.
        """
        each = self.table.per_image[instance] * self._factors[instance] / self._workers
        ahead = outlook * self._controller.objective
        room = min(self._controller.patience, self._controller.max_queue * each)
        ready = ahead + room - self._busy / self._workers
        recent = self._controller.recent_arrivals(self._now)
        return all((self._controller.waiting + count * ahead / span) * each <= ready for span, count in recent)

    def _batches(self, line: _Line, instance: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Deadlines and times of the batches that a line is cut into; the last one may be cut further."""
        deadlines = np.array(line.deadlines[:: self.table.batch_sizes[size]])
        times = np.full(len(deadlines), self.seconds[instance, size])
        if rest := len(line) % self.table.batch_sizes[size]:
            times[-1] = self.table.work[instance, size, rest] * self._factors[instance]
        return deadlines, times


def headroom(plan: Plan, outlook: float | None = None) -> tuple[int, int]:
    """Runs the most accurate instance at whose level the queue is answered in time, and what else may come.

    Accuracy grows ever less with cost, so that a queue is best answered at one level all through; and a service that
    only looks at what already waits learns of an outburst when it has no time left for it. So the rate of arrivals is
    looked at over short spans of the recent past, and the highest is expected to go on for a while: for longer, the
    more recently a request was lost.

    Args:
        plan: what is known.
        outlook: for how long, in objectives, instead of that. More answers more requests in an outburst, less answers
            them more accurately.

    Returns:
        numbers of the instance and of the largest batch size.
    """
    outlook = plan.outlook if outlook is None else outlook
    for instance in plan.line.options:
        if plan.has_headroom(instance, outlook):
            for size in plan.sizes(instance):
                if plan.lateness(instance, size, level=plan.table.per_image[instance]) <= 0:
                    return instance, size
    return keep_deadlines(plan, hurry=True)


def keep_deadlines(plan: Plan, hurry: bool = False) -> tuple[int, int]:
    """Runs the fastest instance that keeps all deadlines, or else the most requests that the first deadline allows.

    Args:
        plan: what is known.
        hurry: whether time for an image counts more than the time of a batch.

    Returns:
        numbers of the instance and of the largest batch size.
    """
    by_speed = sorted(plan.line.options, key=lambda i: plan.table.per_image[i])
    for instance in by_speed:
        for size in plan.sizes(instance, hurry):
            if plan.lateness(instance, size) <= 0:
                return instance, size
    in_time = [
        (plan.table.batch_sizes[size] / plan.seconds[instance, size], instance, size)
        for instance in by_speed
        for size in plan.sizes(instance)
        if plan.seconds[instance, size] * plan.margin <= plan.slack
    ]
    return max(in_time)[1:] if in_time else (min(by_speed, key=lambda i: plan.seconds[i, 0]), 0)


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
    "headroom": (LatencyTable.front, headroom),
}


def find_policy(name: str, table: LatencyTable) -> tuple[Narrow, Choose]:
    """Finds a policy by its name.

    Args:
        name: one of `POLICIES`; `fixed:NAME` for a single instance, or the most accurate one where a request does not
            allow it; `headroom:OUTLOOK` for a fixed outlook in objectives, as `headroom:1.5`.
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
            outlook = float(value)
        except ValueError:
            outlook = math.nan
        if not 0 <= outlook < math.inf:
            raise ValueError(f"policy {name!r}: valid outlooks are 0 and positive numbers of objectives")
        return LatencyTable.front, functools.partial(headroom, outlook=outlook)
    raise ValueError(f"policy {name!r}: valid are {', '.join(POLICIES)}, fixed:NAME, headroom:OUTLOOK")


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
