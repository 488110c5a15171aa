"""Who the clients of the service are, and what each has used recently."""

import math
import time
from collections.abc import Hashable

from starlette.requests import Request

_FORGETTING_SECONDS = 2.0
_MOST_CLIENTS = 4096


def host_of(request: Request) -> str:
    """Return the address that a request came from."""
    return (request.scope.get("client") or ("", 0))[0]


class Clients:
    """Tells clients apart.

    A client is a host. Where all hosts are this machine, it is a connection from its second request on. The first
    requests of all connections count as those of one client, so that nobody gains by a new connection for each request.
    """

    def __init__(self) -> None:
        """Know nobody yet."""
        self._known: dict[tuple[str, int], None] = {}

    def of(self, request: Request) -> Hashable:
        """Return who sent a request."""
        host, port = request.scope.get("client") or ("", 0)
        if not (host.startswith("127.") or host == "::1"):
            return host
        if (host, port) in self._known:
            return host, port
        self._known[host, port] = None
        if len(self._known) > _MOST_CLIENTS:
            del self._known[next(iter(self._known))]
        return host


class Usage:
    """Sums by client, which fade."""

    def __init__(self) -> None:
        """Start without any."""
        self._sums: dict[Hashable, tuple[float, float]] = {}  # Client: sum, and when it was that.

    def add(self, client: Hashable, amount: float) -> float:
        """Add to the sum of a client; return the sum."""
        now = time.monotonic()
        found = self._faded(client, now) + amount
        self._sums.pop(client, None)  # The dictionary stays in the order of these times.
        self._sums[client] = found, now
        if len(self._sums) > _MOST_CLIENTS:
            del self._sums[next(iter(self._sums))]
        return found

    def of(self, client: Hashable) -> float:
        """Return the sum of a client."""
        return self._faded(client, time.monotonic())

    def mean(self) -> float:
        """Return the mean over the clients that were seen recently."""
        now = time.monotonic()
        recent = [client for client, (_, at) in self._sums.items() if now - at < _FORGETTING_SECONDS]
        return sum(self._faded(client, now) for client in recent) / max(1, len(recent))

    def _faded(self, client, now):
        found, at = self._sums.get(client, (0.0, now))
        return found * math.exp((at - now) / _FORGETTING_SECONDS)
