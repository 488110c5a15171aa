"""The processes that decode images, and who is served next: no client slows the others down by what it sends.

There are two lanes. The quick lane decodes what is small in every respect. The slow lane decodes everything else at a
low priority: it takes the CPU time that the net and the quick lane leave. Within a lane, the client who has used the
least CPU time is next. All images of a client who uses more than its share go to the slow lane.
"""

import asyncio
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Hashable

import numpy as np

from sdpoint_jax.serving.clients import Usage
from sdpoint_jax.serving.contents import FORMATS, ContentError
from sdpoint_jax.serving.decoder import DONE, READY, REQUEST, RESPONSE, TOO_LARGE, DecoderSettings

_SHARE = 2.0  # Of the mean CPU time of the clients: who uses more goes to the slow lane, if it is also more than this:
_NEGLIGIBLE_SECONDS = 0.05
_RESTART_SECONDS = 0.3  # CPU time to start a process, charged to the client whose image ended the last one.
_SECRETS = ("SDPOINT_TOKEN",)  # Not for a process that opens what clients send.


class TooLate(Exception):
    """The deadline came before the image was decoded.

    Attributes:
        begun: Whether decoding had begun.
    """

    def __init__(self, begun: bool):
        super().__init__(begun)
        self.begun = begun


@dataclasses.dataclass(frozen=True)
class Lane:
    """One of the lanes.

    Attributes:
        processes: How many decode at the same time.
        body_bytes: Most bytes of a body.
        formats: Formats that are decoded.
        work: Most pixels to decode; see `DecoderSettings`.
        cpu_seconds: Most CPU time for an image.
        memory_mib: Most memory of a process for an image.
        niceness: Added to that of the service.
    """

    processes: int
    body_bytes: float
    formats: tuple[str, ...]
    work: int
    cpu_seconds: float
    memory_mib: int
    niceness: int


# The limits of the quick lane are generous for what it decodes: about 50 ms on a slow core, 60 MiB. A GIF or a BMP may
# keep PIL's Python loops busy, and a TIFF may hold tiles of any size, whatever their headers say.
QUICK = Lane(2, 1 << 20, ("JPEG", "PNG", "WEBP"), 1_000_000, 0.5, 128, 0)
SLOW = Lane(1, math.inf, FORMATS, 1 << 60, 4.0, 1024, 15)


@dataclasses.dataclass(eq=False)
class _Job:
    body: bytes
    content_type: str
    client: Hashable
    done: asyncio.Future
    begun: bool = False
    again: bool = False


class Decoders:
    """Decode bodies in other processes; belongs to one asyncio event loop.

    Processes start when they are first needed, or all with `start`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        resize: tuple[int, int] | None,
        *,
        pixels: int,
        lanes: tuple[Lane, Lane] = (QUICK, SLOW),
    ):
        """Start no process yet.

        Args:
            image_shape: (H, W, C) of the results.
            resize: See `images.to_batch`.
            pixels: Most pixels of an image.
            lanes: The quick and the slow lane.
        """
        self._shape, self._usage = image_shape, Usage()
        self._lanes = [_Queue(lane, image_shape, resize, pixels, self._usage) for lane in lanes]

    def start(self) -> None:
        """Start all processes and wait until they are ready. May be called from any thread, before the first image."""
        for lane in self._lanes:
            lane.start()

    def close(self) -> None:
        """End all processes."""
        for lane in self._lanes:
            lane.close()

    @property
    def waiting(self) -> int:
        """Number of images that are not decoded yet."""
        return sum(len(lane.jobs) for lane in self._lanes)

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that run."""
        return [process.pid for lane in self._lanes for process in lane.processes]

    def greet(self, client: Hashable) -> None:
        """Count a client as one of those that share the decoders."""
        self._usage.add(client, 0.0)

    def is_excessive(self, client: Hashable) -> bool:
        """Whether a client uses so much more CPU time than the others that it should wait for idle time."""
        own = self._usage.of(client)
        return own > _NEGLIGIBLE_SECONDS and own >= _SHARE * self._usage.mean()

    async def decode(self, body: bytes, content_type: str, client: Hashable, deadline: float) -> np.ndarray:
        """Return the image of a body, as the net takes it: uint8 [H, W, C].

        Args:
            body: An image file, an .npy array, or a form with one of them.
            content_type: The header of a form, else empty.
            client: Who sent it.
            deadline: By `time.monotonic`, for giving up.

        Raises:
            ContentError: It cannot be decoded, or not within the limits.
            TooLate: The deadline has passed.
        """
        quick, slow = self._lanes
        lane = slow if len(body) > quick.lane.body_bytes or self.is_excessive(client) else quick
        while True:
            job = _Job(body, content_type, client, asyncio.get_running_loop().create_future())
            lane.submit(job)
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    status, content = await job.done
            except TimeoutError:
                raise TooLate(job.begun) from None
            finally:
                lane.withdraw(job)
            if status == DONE:
                return np.frombuffer(content, np.uint8).reshape(self._shape)
            if status != TOO_LARGE or lane is slow:
                raise ContentError(status, content.decode())
            lane = slow


class _Queue:
    """The images that wait in one lane, and its processes."""

    def __init__(self, lane, image_shape, resize, pixels, usage):
        self.lane, self._usage = lane, usage
        self._settings = DecoderSettings(
            image_shape=image_shape,
            resize=resize,
            pixels=pixels,
            **{name: getattr(lane, name) for name in ("work", "formats", "cpu_seconds", "memory_mib", "niceness")},
        )
        self.jobs: list[_Job] = []
        self.processes: list[_Process] = []
        self._free: list[_Process] = []
        self._tasks: set[asyncio.Task] = set()
        self._closed = False

    def start(self):
        while len(self.processes) < self.lane.processes:
            self._add()
        for process in self.processes:
            process.wait_until_ready()

    def close(self):
        self._closed = True
        for process in self.processes:
            process.end(0.0)

    def submit(self, job):
        self.jobs.append(job)
        self._begin()

    def withdraw(self, job):
        if job in self.jobs:
            self.jobs.remove(job)

    def _add(self):
        process = _Process(self._settings)
        self.processes.append(process)
        self._free.append(process)

    def _begin(self):
        while self.jobs and not self._closed:
            if not self._free and len(self.processes) == self.lane.processes:
                return
            if not self._free:
                self._add()
            # Of equal ones the first: `min` and the list keep the order in which they came.
            job = min(self.jobs, key=lambda job: self._usage.of(job.client))
            self.jobs.remove(job)
            job.begun = True
            process = self._free.pop()
            if process.has_ended:  # While it had nothing to do: the kernel may have needed its memory.
                self._bury(process)
                if not self._free:
                    self._add()
                process = self._free.pop()
            task = asyncio.get_running_loop().create_task(self._run(process, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, process, job):
        try:
            status, seconds, content = await process.decode(job.body, job.content_type)
        except OSError:
            code = self._bury(process)
            if code == -signal.SIGKILL and not job.again:  # By the kernel, which needed memory: no fault of the image.
                job.again, job.begun = True, False
                self.submit(job)
                return
            status, seconds, content = self._explain(code)
        else:
            self._free.append(process)
        self._usage.add(job.client, seconds)
        if not job.done.done():
            job.done.set_result((status, content))
        self._begin()

    def _bury(self, process):
        """Replace a process that has ended; return its exit code."""
        self.processes.remove(process)
        code = process.end(1.0)
        if not self._closed and process.was_ready:  # At once, so that the next image does not wait for it.
            self._add()
        return code

    def _explain(self, code):
        """Return what to answer for an image that ended its process."""
        limit = self.lane.cpu_seconds
        if code != -signal.SIGPROF:
            return 422, _RESTART_SECONDS, b"the image cannot be decoded (it ended the decoder)"
        if self.lane.formats != FORMATS:
            return TOO_LARGE, limit + _RESTART_SECONDS, b""
        return 413, limit + _RESTART_SECONDS, f"the image takes more than {limit:g} s to decode".encode()


class _Process:
    """One process that decodes an image at a time."""

    def __init__(self, settings):
        self._socket, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from sdpoint_jax.serving.decoder import run; run()",
                    str(theirs.fileno()),
                    json.dumps(dataclasses.asdict(settings)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for the service, which ends its decoders itself.
            )
        self.was_ready = False
        self.pid = self._process.pid

    @property
    def has_ended(self):
        return self._process.poll() is not None

    def wait_until_ready(self):
        if not self.was_ready:
            self.was_ready = self._socket.recv(1) == READY
        if not self.was_ready:
            raise OSError(f"a process that decodes images does not start: code {self.end(1.0)}")

    async def decode(self, body, content_type):
        """Return (status, CPU seconds, content); raise OSError where the process has ended."""
        loop, kind = asyncio.get_running_loop(), content_type.encode("latin1", "replace")
        self._socket.setblocking(False)
        if not self.was_ready:
            self.was_ready = await self._receive(loop, 1) == READY
        head = REQUEST.pack(len(kind), len(body)) + kind
        await loop.sock_sendall(self._socket, head + body if len(body) < 1 << 16 else head)
        if len(body) >= 1 << 16:
            await loop.sock_sendall(self._socket, body)
        status, seconds, size = RESPONSE.unpack(await self._receive(loop, RESPONSE.size))
        return status, seconds, await self._receive(loop, size)

    async def _receive(self, loop, size):
        received = bytearray()
        while len(received) < size:
            chunk = await loop.sock_recv(self._socket, min(size - len(received), 1 << 18))
            if not chunk:
                raise ConnectionResetError
            received += chunk
        return bytes(received)

    def end(self, patience):
        """Return the exit code of the process, which is killed after so many seconds."""
        self._socket.close()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._process.wait()
