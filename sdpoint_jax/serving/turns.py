"""Lets requests begin a few at a time, so that answers leave in between."""

import asyncio
import collections
import time

from starlette.types import ASGIApp, Receive, Scope, Send

_EACH = 4


class Turns:
    """Begins few requests in each turn of the event loop.

    In an outburst hundreds come within a turn. If all were begun in it, the answers to a batch would wait until the
    last of them is read, and would be late that were computed in time. Nobody is kept from coming: the rest wait in
    the order in which they came, and each knows since when (`arrived` in its scope, by `time.monotonic`).
    """

    def __init__(self, app: ASGIApp):
        """Wraps an application."""
        self._app, self._begun, self._scheduled = app, 0, False
        self._waiting: collections.deque[asyncio.Future] = collections.deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs a request when its turn has come."""
        if scope["type"] == "http":
            scope["arrived"] = time.monotonic()
            await self._wait()
        await self._app(scope, receive, send)

    async def _wait(self):
        self._schedule()
        if self._begun < _EACH and not self._waiting:
            self._begun += 1
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _schedule(self):
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._begin_next)

    def _begin_next(self):
        self._begun, self._scheduled = 0, False
        while self._waiting and self._begun < _EACH:
            future = self._waiting.popleft()
            if not future.done():  # The client has gone.
                future.set_result(None)
                self._begun += 1
        if self._begun:
            self._schedule()
