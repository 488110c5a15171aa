"""Answers requests in batches: the controller says which and on which SDPoint instance, a worker thread runs them.

The engine belongs to one asyncio event loop, which takes requests in and gives answers out. A worker that is done asks
the controller for its next batch itself: it would idle for as long as a busy event loop is late, tens of milliseconds.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from sdpoint_jax.choice.selection import Budget
from sdpoint_jax.serving.controller import Batch, Controller, Refused, Request
from sdpoint_jax.serving.predictor import Predictor

_HISTORY_SECONDS = 60


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        reason: in words.
        retry_after: seconds after which it would have a chance; None where waiting changes nothing.
    """

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class Late(Exception):
    """A request that was accepted and could not be answered in time."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes:
        logits: [K], float32.
        instance: name of the one that answered.
        batch_size: images that were answered together.
        queue_seconds: from acceptance to the start of its batch.
        compute_seconds: of its batch.
    """

    logits: np.ndarray
    instance: str
    batch_size: int
    queue_seconds: float
    compute_seconds: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """What happened in one second, for the page.

    Attributes:
        second: on the engine's clock, a whole number.
        accepted, refused, late: requests.
        instances: answers, by instance.
        latency_ms: mean time from acceptance to the answer; None without answers.
    """

    second: int
    accepted: int
    refused: int
    late: int
    instances: dict[str, int]
    latency_ms: float | None


@dataclasses.dataclass
class _Waiting:
    image: np.ndarray
    future: asyncio.Future
    accepted_at: float


_Work = tuple[Batch, list[_Waiting]]  # A batch, and its requests.


@dataclasses.dataclass
class _Second:
    accepted: int = 0
    refused: int = 0
    late: int = 0
    latencies: list[float] = dataclasses.field(default_factory=list)
    instances: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Engine:
    """Answers requests for one predictor.

    Attributes:
        controller: queue and choice; to be read alone, see `set_limits`.
        on_batch: hears of each batch that is done, and the seconds that it took.
        current_instance: name of the one that ran last; None before the first batch.
    """

    def __init__(
        self,
        predictor: Predictor,
        controller: Controller,
        *,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        on_batch: Callable[[Batch, float], None] = lambda batch, seconds: None,
    ):
        """Starts with nothing to do.

        Args:
            predictor: with programs compiled for all that the controller may choose.
            controller: of as many workers.
            workers: batches that run at the same time.
            clock: seconds; never goes back.
            on_batch: see the attribute.
        """
        self._predictor, self.controller, self._clock, self.on_batch = predictor, controller, clock, on_batch
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="predict")
        self._lock = threading.Lock()  # Of the controller, and of the next two.
        self._waiting: dict[Hashable, _Waiting] = {}
        self._undelivered = 0  # Batches that were handed to a worker, and whose answers are not out.
        self._ids = itertools.count()
        self._closing = False
        self._history: collections.OrderedDict[int, _Second] = collections.OrderedDict()
        self.current_instance: str | None = None

    async def classify(
        self,
        image: np.ndarray,
        *,
        deadline_seconds: float | None = None,
        instance: str | None = None,
        max_macs: float | None = None,
    ) -> Answer:
        """Answers one request.

        Args:
            image: uint8 [H, W, C], as the net takes it.
            deadline_seconds: from now; the controller's objective by default.
            instance: name of the only one that may answer.
            max_macs: the most that the answer may cost.

        Raises:
            Refusal: it is not accepted.
            Late: it was accepted, and could not be answered in time.
            ValueError: an unknown instance, or a number that is none.
        """
        if self._closing:
            raise Refusal("the service is stopping", None)
        now, number = self._clock(), next(self._ids)
        deadline = None if deadline_seconds is None else now + deadline_seconds
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            outcome = self.controller.submit(Request(number, deadline, instance, max_macs), now)
            if not isinstance(outcome, Refused):
                self._waiting[number] = _Waiting(image, future, now)
        second = self._second(now)
        if isinstance(outcome, Refused):
            second.refused += 1
            raise Refusal(outcome.reason, outcome.retry_after)
        second.accepted += 1
        self._start_workers()
        try:
            return await future
        except asyncio.CancelledError:  # The client has left. A batch that runs already takes its image along.
            with self._lock:
                if self.controller.withdraw(number):
                    del self._waiting[number]
            raise

    def count_refusal(self) -> None:
        """Count a request that was refused before it came to the engine."""
        self._second(self._clock()).refused += 1

    def set_limits(self, budget: Budget | None = None, instances: Iterable[str] | None = None) -> None:
        """Limits the instances that are used from now on; see `Controller.set_limits`."""
        with self._lock:
            self.controller.set_limits(budget, instances)

    async def drain(self, seconds: float = math.inf) -> bool:
        """Refuse what comes from now on, and wait until all that was accepted is answered.

        Args:
            seconds: Time for that.

        Returns:
            Whether all was answered in time.
        """
        self._closing = True
        until = self._clock() + seconds
        while (self._waiting or self._undelivered) and self._clock() < until:
            await asyncio.sleep(0.005)
        drained = not (self._waiting or self._undelivered)
        self._threads.shutdown(wait=drained, cancel_futures=True)
        return drained

    def history(self) -> list[Sample]:
        """Lists the last minute, second by second, the current one last."""
        now = int(self._clock())
        return [self._sample(second) for second in range(now - _HISTORY_SECONDS + 1, now + 1)]

    def _start_workers(self):
        """Hands batches to the workers that are free, in the event loop."""
        loop, works = asyncio.get_running_loop(), []
        with self._lock:
            while work := self._next_work():
                works.append(work)
            late = self._take_late()
        for work in works:
            self._threads.submit(self._work, loop, work)
        self._tell_late(late)

    def _next_work(self) -> _Work | None:
        """Takes the next batch from the controller, if there is a free worker for one; the lock is held."""
        batch = self.controller.next_batch(self._clock())
        if batch is None:
            return None
        self._undelivered += 1
        self.current_instance = batch.instance
        return batch, [self._waiting.pop(request.id) for request in batch.requests]

    def _take_late(self) -> list[_Waiting]:
        """Takes the requests that were given up; the lock is held."""
        return [self._waiting.pop(request.id) for request in self.controller.give_up(self._clock())]

    def _work(self, loop: asyncio.AbstractEventLoop, work: _Work | None) -> None:
        """Runs a batch, and whatever the controller has after it, in a worker's thread."""
        while work:
            (batch, waiting), logits, seconds, error = work, None, None, None
            try:
                logits, seconds = self._run(batch, np.stack([request.image for request in waiting]))
            except Exception as raised:
                error = raised
            with self._lock:
                now = self._clock()
                self.controller.observe(batch, None if error else now - batch.start, now)  # All that the worker needed.
                following, late = self._next_work(), self._take_late()
            loop.call_soon_threadsafe(self._deliver, work, logits, seconds, error, late)
            work = following

    def _run(self, batch, images):
        """Returns the logits of a batch and the seconds that it took."""
        start = self._clock()
        logits = self._predictor.predict(images, instance=batch.instance)
        return logits, self._clock() - start

    def _deliver(self, work: _Work, logits, seconds, error, late):
        """Answers the requests of a batch, in the event loop, and those that were given up when it was done."""
        (batch, waiting), now = work, self._clock()
        with self._lock:
            self._undelivered -= 1
        if seconds is not None:
            self.on_batch(batch, seconds)
        second = self._second(now)
        for index, request in enumerate(waiting):
            if request.future.done():  # The client has gone.
                continue
            if error:
                request.future.set_exception(error)
                continue
            second.instances[batch.instance] += 1
            second.latencies.append(now - request.accepted_at)
            queue_seconds = batch.start - request.accepted_at
            request.future.set_result(Answer(logits[index], batch.instance, len(waiting), queue_seconds, seconds))
        self._tell_late(late)

    def _tell_late(self, late: list[_Waiting]) -> None:
        for request in late:
            self._second(self._clock()).late += 1
            if not request.future.done():
                request.future.set_exception(Late("accepted, but could not be answered in time"))

    def _second(self, now) -> _Second:
        found = self._history.setdefault(int(now), _Second())
        while len(self._history) > _HISTORY_SECONDS:
            self._history.popitem(last=False)
        return found

    def _sample(self, second) -> Sample:
        found = self._history.get(second, _Second())
        mean = 1e3 * sum(found.latencies) / len(found.latencies) if found.latencies else None
        return Sample(second, found.accepted, found.refused, found.late, dict(found.instances), mean)
