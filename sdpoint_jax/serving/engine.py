"""Answers requests in batches: the controller says which and on which SDPoint instance, a worker thread runs them.

The engine belongs to one asyncio event loop: the controller is asked there alone, and only the programs run elsewhere.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable

import numpy as np

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
        controller: queue and choice; its limits may be changed from the event loop.
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
        self._waiting: dict[int, _Waiting] = {}
        self._ids = itertools.count()
        self._running = 0
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
        outcome = self.controller.submit(Request(number, deadline, instance, max_macs), now)
        second = self._second(now)
        if isinstance(outcome, Refused):
            second.refused += 1
            raise Refusal(outcome.reason, outcome.retry_after)
        second.accepted += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = _Waiting(image, future, now)
        self._start_batches()
        return await future

    async def drain(self) -> None:
        """Refuses what comes from now on, and returns when all that was accepted is answered."""
        self._closing = True
        while self._waiting or self._running:
            await asyncio.sleep(0.005)
        self._threads.shutdown()

    def history(self) -> list[Sample]:
        """Lists the last minute, second by second, the current one last."""
        now = int(self._clock())
        return [self._sample(second) for second in range(now - _HISTORY_SECONDS + 1, now + 1)]

    def _start_batches(self):
        """Hands batches to free workers, and tells those that were given up."""
        now = self._clock()
        while (batch := self.controller.next_batch(now)) is not None:
            waiting = [self._waiting.pop(request.id) for request in batch.requests]
            images = np.stack([request.image for request in waiting])
            self._running += 1
            self.current_instance = batch.instance
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._run, batch, images)
            work.add_done_callback(functools.partial(self._finish, batch, waiting))
        for request in self.controller.give_up(now):
            late = self._waiting.pop(request.id)
            self._second(now).late += 1
            if not late.future.done():
                late.future.set_exception(Late("accepted, but could not be answered in time"))

    def _run(self, batch, images):
        """Runs a batch, in a worker's thread; returns its logits and the seconds that it took."""
        start = self._clock()
        padding = batch.batch_size - len(images)
        padded = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)]) if padding else images
        logits = np.asarray(self._predictor.program(batch.instance, batch.batch_size)(padded))
        return logits, self._clock() - start

    def _finish(self, batch, waiting, work):
        """Answers the requests of a batch, in the event loop, and starts the next one."""
        now = self._clock()
        self._running -= 1
        error = work.exception()
        logits, seconds = (None, None) if error else work.result()
        self.controller.observe(batch, seconds, now)
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
        self._start_batches()

    def _second(self, now) -> _Second:
        found = self._history.setdefault(int(now), _Second())
        while len(self._history) > _HISTORY_SECONDS:
            self._history.popitem(last=False)
        return found

    def _sample(self, second) -> Sample:
        found = self._history.get(second, _Second())
        mean = 1e3 * sum(found.latencies) / len(found.latencies) if found.latencies else None
        return Sample(second, found.accepted, found.refused, found.late, dict(found.instances), mean)
