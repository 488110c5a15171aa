"""What the controller is asked and answers, and the line in which requests wait. No JAX."""

import bisect
import dataclasses
from collections.abc import Hashable

from sdpoint_jax.choice.latency_table import LatencyTable


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


class Line:
    """Keeps the waiting requests of one cost class, in the order of their deadlines; of equal ones as they came.

    Attributes:
        options: numbers of the instances that may answer them, most accurate first.
        fastest: that one of them.
        deadlines: of the requests.
        requests: beside them.
    """

    def __init__(self, options: tuple[int, ...], table: LatencyTable):
        """Starts empty."""
        self.options, self.fastest = options, table.fastest(options)
        self.deadlines: list[float] = []
        self.requests: list[Request] = []
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
        """Takes out the request at a place."""
        del self.deadlines[place], self.requests[place]

    def take(self, count: int) -> list[Request]:
        """Takes out the first requests."""
        taken = self.requests[:count]
        del self.requests[:count], self.deadlines[:count]
        return taken
