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
from collections.abc import Hashable, Iterable

from sdpoint_jax.choice.latency_table import LatencyTable
from sdpoint_jax.choice.selection import Budget, list_affordable
from sdpoint_jax.serving.line import Accepted, Batch, Line, Refused, Request
from sdpoint_jax.serving.observed import Arrivals, Pace
from sdpoint_jax.serving.policies import Plan, find_policy

# What the policy `headroom` multiplies the rate of arrivals by: the most at first and after a request was lost, which
# fades to the least over about so many that were not.
LEAST_FACTOR, MOST_FACTOR, FADING_REQUESTS = 0.5, 1.0, 10_000


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
        gives_up: bool = True,
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
        self.max_queue, self._admission, self._gives_up = max_queue, admission, gives_up
        self._allowed = tuple(range(len(table.names)))
        self._lines: dict[tuple[int, ...], Line] = {}
        self._running: list[Batch | None] = [None] * workers
        self._given_up: list[Request] = []
        self._factor = MOST_FACTOR
        self._arrivals = Arrivals(objective)
        self._pace = Pace(table, workers)
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
        self._arrivals.count(now)
        line, reason = self._line_of(request)
        if line is None:
            return Refused(reason, None)
        if self.waiting >= self.max_queue:
            self._factor = MOST_FACTOR
            return Refused(f"{self.max_queue} requests wait already", self._drain_seconds(now))
        place = line.add(request)
        lateness = self._plan(now, self.slowness).least_lateness(request.deadline) if self._admission else 0.0
        if lateness <= 0:
            self._factor += (LEAST_FACTOR - self._factor) / FADING_REQUESTS
            return Accepted(request.deadline)
        line.remove(place)
        if self._forgets_pace(now):
            return self.submit(request, now)
        if self._pace.quickest(line.options, self.slowness, self._pace.margin) > request.deadline - now:
            return Refused("no instance that it allows is fast enough for its deadline", None)
        self._factor = MOST_FACTOR
        return Refused("too many others are answered first", self._drain_seconds(now))

    def withdraw(self, number: Hashable) -> bool:
        """Take a request out of the queue whose client has left; return whether it was there."""
        for line in self._lines.values():
            for place, request in enumerate(line.requests):
                if request.id == number:
                    line.remove(place)
                    return True
        return False

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
        while (plan := self._plan(now, slowness)).line is not None:
            instance, limit = self._choose(plan)
            waiting = min(len(plan.line), self.table.batch_sizes[-1])
            number = self.table.largest[instance, limit, waiting]
            late = plan.too_late(instance, number) if self._gives_up else 0
            if not 0 < late < len(plan.line):
                return self._start(plan, worker, now, instance, number)
            self._lose(plan.line.take(late))
        return None

    def _start(self, plan: Plan, worker: int, now: float, instance: int, number: int) -> Batch:
        batch_size = self.table.batch_sizes[number]
        requests = plan.line.take(batch_size)
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
            self._pace, self._observed_at = Pace(self.table, len(self._running)), math.inf
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

    def _plan(self, now: float, slowness: float) -> Plan:
        return Plan(
            self.table,
            self._lines.values(),
            self._arrivals,
            self._pace,
            now=now,
            slowness=slowness,
            busy=self._busy_seconds(now),
            workers=len(self._running),
            factor=self._factor,
        )

    def _with_deadline(self, request: Request, now: float) -> Request:
        for name in ("deadline", "max_macs"):
            value = getattr(request, name)
            if value is not None and not _is_finite(value):
                raise ValueError(f"{name} {value!r}: valid are numbers")
        if request.instance is not None:
            self.table.index_of(request.instance)
        return request if request.deadline is not None else dataclasses.replace(request, deadline=now + self.objective)

    def _line_of(self, request: Request, keep: bool = False) -> tuple[Line | None, str]:
        """Returns the line of the request's cost class, or None and why it has none."""
        own = range(len(self.table.names)) if request.instance is None else [self.table.index_of(request.instance)]
        own = [i for i in own if request.max_macs is None or self.table.macs[i] <= request.max_macs]
        allowed = [i for i in own if i in self._allowed]
        if not allowed and not (keep and own):
            return None, "no instance that the service uses at present is one that it allows"
        options = self._options(tuple(allowed)) if allowed else (self.table.fastest(own),)
        if options not in self._lines:
            self._lines[options] = Line(options, self.table)
        return self._lines[options], ""

    def _fill(self, seats: int, instance: int, head: Line) -> list[Request]:
        """Takes the most urgent requests of other classes that are no freer, in place of padding."""
        lines = [line for line in self._lines.values() if instance in line.options]
        lines = [line for line in lines if line is not head and set(line.options) <= set(head.options)]
        requests = []
        while len(requests) < seats and any(lines):
            requests += min(filter(len, lines), key=lambda line: line.deadlines[0]).take(1)
        return requests

    def _drop_hopeless(self, now: float, slowness: float) -> None:
        """Gives up the requests that even the quickest batch, begun now, would answer too late."""
        for line in self._lines.values() if self._gives_up else ():
            end = now + self._pace.quickest(line.options, slowness)
            if hopeless := line.take(bisect.bisect_left(line.deadlines, end)):
                self._lose(hopeless)

    def _lose(self, requests: list[Request]) -> None:
        self._given_up += requests
        self._factor = MOST_FACTOR

    def _busy_seconds(self, now: float) -> float:
        """Sums the work in progress. A batch that is overdue by x is taken to need another x."""
        return sum(abs(batch.start + batch.seconds - now) for batch in self._running if batch is not None)

    def _drain_seconds(self, now: float) -> float:
        """Estimates the time until all that waits is done, on the fastest instances in their best batch sizes."""
        work = sum(len(line) * self.table.per_image[line.fastest] for line in self._lines.values())
        return float(self._busy_seconds(now) + work * self.slowness) / len(self._running)


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
