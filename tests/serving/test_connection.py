"""Connections are bounded in what their clients send, hold and wait for. Sockets, and an application without a net."""

import asyncio
import contextlib
import functools
import json
import socket
import time

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")

from sdpoint_jax.serving.connection import Bounds, Connection, Door  # noqa: E402

GET = b"GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG = bytes(8 << 20)  # More than the kernel buffers.


async def application(scope, receive, send):
    """Answers /slow when its client has left, /echo with the body, everything else at once."""
    body, more = b"", scope["path"] == "/echo"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/slow":
        while (await receive())["type"] != "http.disconnect":
            pass
    content = {"/long": LONG, "/echo": body}.get(scope["path"], b"ok")
    headers = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@contextlib.asynccontextmanager
async def serving(hosts=None, **bounds):
    """A server with these bounds; yields (its port, its door, a function that stops it)."""
    door = Door(Bounds(**bounds), hosts)
    config = uvicorn.Config(
        application,
        http=functools.partial(Connection, door=door),
        ws="none",
        lifespan="off",
        log_level="error",
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    running = asyncio.create_task(server._serve([listener]))
    while not server.started:
        await asyncio.sleep(0.001)

    async def stop():
        server.should_exit = True
        await running

    try:
        yield listener.getsockname()[1], door, stop
    finally:
        await stop()


async def read(reader):
    """All that the server sends until it closes; b"" where it resets the connection."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 20)
    return b""


@contextlib.asynccontextmanager
async def connected(port, **settings):
    ours = socket.socket()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    ours.setblocking(False)
    await asyncio.get_running_loop().sock_connect(ours, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=ours, **settings)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(port, *parts):
    """Send parts; return all that comes back."""
    async with connected(port) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
        return await read(reader)


def run(coroutine):
    """Run on the event loop that the service has."""
    with asyncio.Runner(loop_factory=uvicorn.Config(application).get_loop_factory()) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


def reason(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]


def close(request):
    return request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 3000, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 3000, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 30 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"aaaaaa: bbbbbb\r\n" * 200, 431),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200), 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nnonsense", 400),
        (GET * 40, 429),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_head_beyond_the_bounds_gets_a_reason(head, status):
    async def ask():
        async with serving(head_bytes=1000, headers=20, linger_seconds=0.5) as (port, _, _):
            return await exchange(port, head)

    answer = run(ask())
    assert b"HTTP/1.1 %d " % status in answer, answer
    assert reason(answer[answer.index(b"HTTP/1.1 %d " % status) :])


def test_a_refusal_comes_after_the_answers_that_are_owed():
    async def ask():
        async with serving(linger_seconds=0.5) as (port, _, _):
            return await exchange(port, GET * 2 + b"nonsense\r\n\r\n" + GET)

    answer = run(ask())
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")] == [b"", b"200", b"200", b"400"]


def test_a_head_without_end_is_closed_and_its_reason_can_be_read():
    async def ask():
        async with serving(head_bytes=1000, discarded_bytes=1 << 20, linger_seconds=5.0) as (port, door, _):
            answer = await exchange(port, b"GET / HTTP/1.1\r\nX: ", *[b"a" * 65536] * 4)
            await exchange(port, b"GET / HTTP/1.1\r\nX: ", *[b"a" * 65536] * 200)  # Within seconds: it is not read.
            assert not door._all
            return answer

    began = time.monotonic()
    assert run(ask()).startswith(b"HTTP/1.1 431")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"], ids=str)
def test_silent_and_half_open_connections_are_closed(sent):
    async def ask():
        async with serving(idle_seconds=0.2, head_seconds=0.2) as (port, _, _):
            assert await exchange(port, sent) == b""
            assert (await exchange(port, GET)).endswith(b"ok")  # Kept open, then closed.

    run(ask())


def test_a_head_that_comes_slowly_is_closed_though_bytes_keep_coming():
    async def ask():
        async with serving(head_seconds=0.2) as (port, _, _):
            async with connected(port) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\nX: ")
                closed = asyncio.create_task(read(reader))
                while not closed.done():
                    writer.write(b"a")
                    await asyncio.sleep(0.02)

    run(ask())


def test_one_connection_too_many_closes_the_one_that_waits_longest():
    async def ask():
        async with serving(connections=2) as (port, door, _), connected(port) as first, connected(port) as second:
            while len(door._all) < 2:
                await asyncio.sleep(0.001)
            first[1].write(GET)  # It waits less long than the second now.
            assert (await first[0].readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            assert (await exchange(port, close(GET))).endswith(b"ok")
            assert await read(second[0]) == b""
            first[1].write(close(GET))
            assert (await read(first[0])).endswith(b"ok")

    run(ask())


def test_many_connections_of_one_client_close_each_other():
    class Made:
        def __init__(self, host):
            self.host, self.aborted = host, False

        def abort(self):
            self.aborted = True
            door.remove(self)

    door = Door(Bounds(connections=5))
    modest, crowd = Made("1.1.1.1"), [Made("2.2.2.2") for _ in range(20)]
    for connection in [modest, *crowd]:
        door.add(connection)
    assert not modest.aborted and [made.aborted for made in crowd] == [True] * 16 + [False] * 4


def test_a_client_that_does_not_read_is_closed():
    async def ask():
        async with serving(write_seconds=0.2, write_bytes=1000) as (port, door, _):
            async with connected(port, limit=1000) as (_, writer):
                writer.write(GET.replace(b"/a", b"/long") * 10)
                while not door._writing:
                    await asyncio.sleep(0.01)
                while door._all:
                    await asyncio.sleep(0.01)

    run(ask())


def test_few_clients_at_once_may_read_slowly():
    async def ask():
        async with serving(writers=2, write_seconds=20.0, write_bytes=1000) as (port, door, _):
            async with contextlib.AsyncExitStack() as stack:
                for number in range(4):
                    _, writer = await stack.enter_async_context(connected(port, limit=1000))
                    writer.write(GET.replace(b"/a", b"/long"))
                    while len(door._writing) < min(number + 1, 2):
                        await asyncio.sleep(0.01)
                while len(door._all) != 2:
                    await asyncio.sleep(0.01)

    run(ask())


def test_a_body_after_its_answer_is_read_for_a_while_only():
    async def ask():
        async with serving(linger_seconds=0.2, discarded_bytes=1 << 20) as (port, door, _):
            head = b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"
            assert (await exchange(port, head, b"x")).endswith(b"ok")  # The time is over.
            began = time.monotonic()
            assert (await exchange(port, head, *[bytes(1 << 18)] * 100)).endswith((b"ok", b""))  # The bytes are.
            assert time.monotonic() - began < 10 and not door._all
            whole = b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n12345"
            assert (await exchange(port, whole, close(GET))).count(b"ok") == 2  # A small one is no reason to close.

    run(ask())


def test_pieces_of_a_large_body_come_whole():
    body = bytes(range(256)) * 1000

    async def ask():
        async with serving() as (port, _, _):
            head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            return await exchange(port, head + body, close(GET))

    answer = run(ask())
    assert answer.partition(b"\r\n\r\n")[2].startswith(body) and answer.endswith(b"ok")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP",
        b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc",
        GET.replace(b"/a", b"/slow"),
    ],
    ids=["silent", "half a head", "half a body", "an answer that never comes"],
)
def test_a_stop_ends_within_its_time_whatever_clients_do(sent):
    async def ask():
        async with serving(stop_seconds=0.3) as (port, door, stop):
            async with connected(port) as (_, writer):
                writer.write(sent)
                while not door._all or sent and not hasattr(next(iter(door._all)), "url"):
                    await asyncio.sleep(0.01)
                began = time.monotonic()
                await stop()
                assert time.monotonic() - began < 4

    run(ask())


LOCAL = ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7", "box", "a.localhost", "my.site:80"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""]


@pytest.mark.parametrize("host", LOCAL + FOREIGN)
def test_a_host_that_a_page_of_another_site_could_have_is_refused(host):
    assert Door(hosts=["My.site"]).admits(host) == (host in LOCAL)
    assert Door(hosts=None).admits(host)


def test_a_foreign_host_gets_a_reason():
    async def ask():
        async with serving(hosts=[]) as (port, _, _):
            assert (await exchange(port, close(GET))).endswith(b"ok")
            return await exchange(port, GET.replace(b"localhost", b"evil.example"))

    answer = run(ask())
    assert answer.startswith(b"HTTP/1.1 421") and "--allowed-hosts" in reason(answer)
