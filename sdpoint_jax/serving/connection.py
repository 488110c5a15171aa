"""The connections of the HTTP service, with bounds on what a client may send, hold and wait for.

Uvicorn's own connection accepts heads of any size, waits for ever for clients that neither send nor read, and refuses
everyone once there are too many. `Connection` takes its place: `uvicorn.Config(..., http=functools.partial(Connection,
door=Door(bounds)))`.
"""

import asyncio
import dataclasses
import http
import ipaddress
import json
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_PIECE = 1 << 14  # Bytes that are parsed at once: so much more than its bound a head may hold.
_MOST_PIPELINED = 16


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What connections may be.

    Attributes:
        connections: Open at once. One more closes that which has waited longest for its client.
        head_bytes: Request line and headers.
        headers: Number of headers.
        head_seconds: From the first byte of a head to its end.
        idle_seconds: Without a request.
        write_seconds: For a client to read what is in the write buffer.
        write_bytes: Of the write buffer of a connection; a longer response waits for its client to read.
        writers: Connections with longer responses at once.
        discarded_bytes: Of a body that comes after its answer.
        linger_seconds: For a client to read the answer to a request that it has not sent completely.
        stop_seconds: From SIGTERM to the end of all connections.
    """

    connections: int = 4096
    head_bytes: int = 1 << 15
    headers: int = 100
    head_seconds: float = 10.0
    idle_seconds: float = 30.0
    write_seconds: float = 10.0
    write_bytes: int = 1 << 14
    writers: int = 64
    discarded_bytes: int = 16 << 20
    linger_seconds: float = 2.0
    stop_seconds: float = 10.0


class Door:
    """What the connections of a service share."""

    def __init__(self, bounds: Bounds = Bounds(), hosts: Sequence[str] | None = None):
        """Create a door that nobody has come through.

        Args:
            bounds: Bounds of each connection.
            hosts: Names in the `Host` header that are answered beside `is_local_name`; None for every name.
        """
        self.bounds = bounds
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._all: set[Connection] = set()
        # By host, the connections for which the service waits, longest first.
        self._waiting: dict[str, dict[Connection, None]] = {}
        self._writing: dict[Connection, None] = {}

    def add(self, connection: "Connection") -> None:
        """Let a connection in, and close another one if there are too many."""
        self._all.add(connection)
        self.wait_for(connection)
        if len(self._all) > self.bounds.connections:
            # Of the client with the most, so that many connections of one client close each other.
            crowd = max(self._waiting.values(), key=len)
            next(iter(crowd)).abort()

    def remove(self, connection: "Connection") -> None:
        """Forget a connection."""
        self._all.discard(connection)
        self._writing.pop(connection, None)
        self.attend_to(connection)

    def wait_for(self, connection: "Connection") -> None:
        """Take down that a connection waits for its client."""
        self._waiting.setdefault(connection.host, {})[connection] = None

    def attend_to(self, connection: "Connection") -> None:
        """Take down that the client of a connection waits for the service."""
        own = self._waiting.get(connection.host, {})
        own.pop(connection, None)
        if not own:
            self._waiting.pop(connection.host, None)

    def pause(self, connection: "Connection") -> None:
        """Take down that the client of a connection does not read."""
        self._writing[connection] = None
        if len(self._writing) > self.bounds.writers:
            next(iter(self._writing)).abort()

    def resume(self, connection: "Connection") -> None:
        """Take down that it has read."""
        self._writing.pop(connection, None)

    def admits(self, host: str) -> bool:
        """Whether requests with this `Host` header are answered."""
        name = _name_of(host)
        return self._hosts is None or is_local_name(name) or name in self._hosts


def is_local_name(name: str) -> bool:
    """Whether a host name cannot be a public one: an IP address, localhost, or a name without a dot.

    A page of another site can make a browser send requests to a service on this machine by a name of its own that it
    lets resolve to 127.0.0.1 (DNS rebinding); such a name has a dot, and is the `Host` of these requests.
    """
    if "." not in name.rstrip(".") and ":" not in name:
        return bool(name)
    if name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """Return the name in a `Host` header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *args: Any, door: Door, **kwargs: Any):
        """Create a connection that is not made yet; see `HttpToolsProtocol`."""
        super().__init__(*args, **kwargs)
        self._door, self._bounds = door, door.bounds
        self.host = ""
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_head, self._in_message = False, False
        self._head_bytes, self._discarded = 0, 0
        self._refusal: tuple[int, str] | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._bounds.write_bytes)
        self.host = self.client[0] if self.client else ""
        self._set_timer(self._bounds.idle_seconds, self._close)
        self._door.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timers()
        self._door.remove(self)
        self.pipeline.clear()
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close the connection at once, whatever is to be written."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what came, in pieces, as long as it is within the bounds."""
        if self.transport.is_closing() or self._refused:
            self._discard(len(data))
            return
        if not (self._in_head or self._in_message):
            self._set_timer(self._bounds.head_seconds, self._close)
        for start in range(0, len(data), _PIECE):
            began = self._in_head or not self._in_message
            super().data_received(data[start : start + _PIECE] if len(data) > _PIECE else data)
            if self.transport.is_closing() or self._refused:
                return
            if self._in_head and began:
                self._head_bytes += min(_PIECE, len(data) - start)
                if self._head_bytes > self._bounds.head_bytes:
                    self._refuse(431, f"request head of more than {self._bounds.head_bytes} bytes")
                    return
        if self._in_message and not self._in_head and self.cycle.response_complete:
            self._discard(len(data))

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._in_head, self._in_message, self._head_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        """Check the head, then begin the request."""
        self._in_head = False
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        hosts = [value.decode("latin1") for name, value in self.headers if name == b"host"]
        if size > self._bounds.head_bytes:
            self._refusal = 431, f"request head of more than {self._bounds.head_bytes} bytes"
        elif len(self.headers) > self._bounds.headers:
            self._refusal = 431, f"{len(self.headers)} headers: at most {self._bounds.headers}"
        elif len(hosts) > 1 or not hosts and self.parser.get_http_version() == "1.1":
            self._refusal = 400, f"{len(hosts)} Host headers: needs one"
        elif hosts and not self._door.admits(hosts[0]):
            self._refusal = 421, f"Host {hosts[0][:100]}: not a name of this service; see --allowed-hosts"
        elif len(self.pipeline) >= _MOST_PIPELINED:
            self._refusal = 429, f"more than {_MOST_PIPELINED} requests before the first is answered"
        if self._refusal:
            raise ValueError(self._refusal[1])  # Uvicorn then calls `send_400_response`.
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Count the time from now on as the service's."""
        self._in_message = False
        self._door.attend_to(self)
        if self.cycle.response_complete:
            self._wait_for_next()
        elif self._timer is not None:  # The service stops, and waited for the rest of this request.
            self._set_timer(self._bounds.stop_seconds, self.abort)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one."""
        super().on_response_complete()
        if self.transport.is_closing():  # It is closed when all is written, which a client can put off for ever.
            self._set_timer(self._bounds.write_seconds, self.abort)
        elif self.cycle.response_complete:
            self._door.wait_for(self)
            if self._refused:
                self._send_refusal()
            elif self._in_message and not self._in_head:
                self._discarded = 0
                self._set_timer(self._bounds.linger_seconds, self._close)
            elif not self._in_head:
                self._wait_for_next()

    def send_400_response(self, msg: str) -> None:
        """Refuse what was sent, and close."""
        status, reason = self._refusal or (400, "not an HTTP request")
        self._refuse(status, reason)

    def shutdown(self) -> None:
        """Close when the request in progress is answered, or when the time to stop is over."""
        if self.cycle is None or self.cycle.response_complete:
            self._close()
        else:
            self.cycle.keep_alive = False
            self.pipeline.clear()  # What was sent behind it is not answered any more.
            # Who has not sent all of it gets little time, so that the service does not wait for clients.
            seconds = self._bounds.linger_seconds if self._in_message else self._bounds.stop_seconds
            self._set_timer(seconds, self.abort)

    def pause_writing(self) -> None:
        """Give the client some time to read."""
        super().pause_writing()
        self._door.pause(self)
        self._write_timer = self.loop.call_later(self._bounds.write_seconds, self.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        self._stop_write_timer()
        self._door.resume(self)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        self._close()

    def _wait_for_next(self):
        self._unset_keepalive_if_required()  # `_timer` does that.
        self._door.wait_for(self)
        self._set_timer(self._bounds.idle_seconds, self._close)

    def _refuse(self, status, reason):
        """Read no more, and refuse once all earlier requests are answered."""
        self._refusal, self._refused, self._discarded = (status, reason), True, 0
        owed = self.cycle is not None and not self.cycle.response_complete
        in_body = self._in_message and not self._in_head
        if owed and in_body and not self.pipeline and not self.cycle.response_started:
            self.cycle.disconnected = True  # It would wait for the rest of the body, which cannot be read.
            self.cycle.message_event.set()
            owed = False
        if not owed:
            self._send_refusal()

    def _send_refusal(self):
        status, reason = self._refusal
        content = json.dumps({"detail": reason}).encode()
        phrase = http.HTTPStatus(status).phrase
        self.transport.write(
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
            "connection: close\r\n\r\n".encode()
            + content
        )
        # To close while the client still sends would reset the connection, and it could not read the reason.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer(self._bounds.linger_seconds, self.abort)

    def _discard(self, size):
        self._discarded += size
        if self._discarded > self._bounds.discarded_bytes:
            self.abort()

    def _close(self):
        """Close when all is written, or without that after some time."""
        if not self.transport.is_closing():
            self.transport.close()
        self._set_timer(self._bounds.linger_seconds, self.abort)

    def _set_timer(self, seconds, action):
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, action)

    def _stop_timer(self):
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self):
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _stop_timers(self):
        self._stop_timer()
        self._stop_write_timer()
