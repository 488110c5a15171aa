"""The bodies of requests that are in memory, with a bound on all of them together."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator

from starlette.requests import Request

from sdpoint_jax.serving.contents import ContentError

_BODIES = 32  # Of the largest size, held at once; smaller ones accordingly more.
_SMALL_SHARE = 0.25  # Of the memory, for bodies of at most this size: uploads of large ones do not shut them out.
_SMALL_BYTES = 1 << 20


@dataclasses.dataclass(eq=False)
class _Upload:
    since: float
    timeout: asyncio.Timeout
    size: int = 0
    evicted: bool = False


class Uploads:
    """Reads bodies and counts their bytes until their requests are answered.

    Attributes:
        held_bytes: Of all bodies.
    """

    def __init__(self, body_bytes: int, body_seconds: float):
        """Hold nothing yet.

        Args:
            body_bytes: Most bytes of a body.
            body_seconds: In which a body must have come.
        """
        self._body_bytes, self._body_seconds = body_bytes, body_seconds
        self._coming: set[_Upload] = set()
        self.held_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body of a request, which counts as held until the end of the `async with` block.

        Raises:
            ContentError: It is too large or takes too long (413, 408), or there are too many (503).
            ClientDisconnect: The client has left.
        """
        limit = self._body_bytes
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise ContentError(413, f"body of {announced[:30]} bytes: at most {limit}")
        upload, chunks = None, []
        try:
            try:
                async with asyncio.timeout(self._body_seconds) as timeout:
                    upload = _Upload(time.monotonic(), timeout)
                    self._coming.add(upload)
                    async for chunk in request.stream():
                        if upload.size + len(chunk) > limit:
                            raise ContentError(413, f"body of more than {limit} bytes")
                        self._hold(upload, len(chunk))
                        chunks.append(chunk)
            except TimeoutError:
                if upload is not None and upload.evicted:
                    raise ContentError(503, "too many uploads at once") from None
                raise ContentError(408, f"the body took longer than {self._body_seconds:g} s") from None
            finally:
                self._coming.discard(upload)
            yield b"".join(chunks) if len(chunks) != 1 else chunks[0]
        finally:
            self.held_bytes -= upload.size if upload is not None else 0

    def _hold(self, upload, size):
        upload.size += size
        self.held_bytes += size
        share = 1.0 if upload.size <= _SMALL_BYTES else 1.0 - _SMALL_SHARE
        while self.held_bytes > share * _BODIES * self._body_bytes:
            now = time.monotonic()
            # That which has held most memory for longest, rather than the newest: a client who stalls many uploads
            # loses these, and others go on.
            victim = max(self._coming, key=lambda coming: coming.size * (now - coming.since))
            if victim is upload or not victim.size:
                raise ContentError(503, "too many uploads at once")
            self.held_bytes -= victim.size
            victim.size, victim.evicted = 0, True
            self._coming.discard(victim)
            victim.timeout.reschedule(asyncio.get_running_loop().time())
