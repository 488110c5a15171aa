"""What hostile clients cost the others: answers a second beside them, and the service's memory, health and stop.

    python benchmarks/hostile.py --artefact=runs/digits/sweep/artefact             # answers a second
    python benchmarks/hostile.py --artefact=runs/digits/sweep/artefact --bounds    # memory, /healthz, SIGTERM

Starts the service itself. Answers: four clients send an array each time the last one is answered, in turns alone and
beside one client that sends the same bad body as fast as it can: the most expensive ones of each format that the limits
allow, and such that they refuse. Prints the ratio of all answers beside it to those alone, with its standard error over
the rounds, which are interleaved because other programs may use the machine.
Bounds: 5,000 hostile requests, 4,000 silent connections and 400 MB of headers, with the worst answer of /healthz
meanwhile, then SIGTERM in mid-request.
"""

import argparse
import contextlib
import http.client
import io
import multiprocessing
import os
import pathlib
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
from PIL import Image

GOOD_CLIENTS = 4
SIDE = 7000  # 49 million pixels: just allowed.


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side: int, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """Return a black PNG, with more chunks before its pixels."""
    row = (side * depth * {0: 1, 2: 3, 6: 4}[colour] + 7) // 8 + 1
    pixels = zlib.compress(bytes(row * side), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(mode: str, side: int, form: str, **settings) -> bytes:
    """Return a black image as a file."""
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, form, **settings)
    return file.getvalue()


def tiff(tile: int) -> bytes:
    """Return a TIFF of 128 x 128 pixels with one deflated tile, which is larger."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(tile * 3)) for _ in range(min(tile, 1280))) + packer.flush()
    tags = [(256, 128), (257, 128), (258, 8), (259, 8), (262, 2), (277, 3), (284, 1), (322, tile), (323, tile)]
    offset = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (324, offset), (325, len(data))]
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 2) + entries + bytes(4) + data


def bmp(side: int) -> bytes:
    """Return a run-length encoded BMP, which PIL decodes in Python."""
    data = (b"\xff\0" * (side // 255) + bytes([side % 255, 0]) + b"\0\0") * side + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(data), 0, 0, 14 + 40 + 1024) + head + bytes(1024) + data


def scans(side: int, count: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan."""
    whole = encoded("L", side, "JPEG", progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * count + whole[-2:]


def hostile_bodies() -> dict[str, bytes]:
    """Return bodies by name, the worst of each format."""
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes((1 << 20) - 8), 9))
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 20), 9))
    jpeg = encoded("L", 8, "JPEG")
    return {
        "no image": b"x",
        "PNG, 49 MP RGBA": png(SIDE, 8, 6),
        "PNG, 49 MP, 1 bit": png(SIDE, 1),
        "PNG, 169 MP": png(13_000, 1),
        "PNG, 1 MP": png(1000, 8, 2),
        "PNG, 50 MB of texts": png(10, extra=text * 50),
        "PNG, 50 profiles": png(10, colour=2, extra=profile * 50),
        "PNG, 80,000 chunks": png(10, extra=chunk(b"teSt", b"") * 80_000),
        "JPEG, 49 MP": encoded("RGB", SIDE, "JPEG"),
        "JPEG, 49 MP, 500 scans": scans(SIDE, 500),
        "JPEG, 1 MP": encoded("RGB", 1000, "JPEG"),
        "JPEG, 250,000 comments": jpeg[:2] + b"\xff\xfe\0\2" * 250_000 + jpeg[2:],
        "WebP, 49 MP": encoded("RGB", SIDE, "WEBP", lossless=True),
        "WebP, 1 MP": encoded("RGB", 1000, "WEBP", lossless=True),
        "GIF, 49 MP": encoded("P", SIDE, "GIF"),
        "GIF, 200,000 comments": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"!\xfe\1a\0" * 200_000 + b";",
        "BMP, 49 MP, RLE": bmp(SIDE),
        "TIFF, 49 MP": encoded("RGB", SIDE, "TIFF", compression="tiff_lzw"),
        "TIFF, a tile of 0.8 GB": tiff(16_384),
    }


@contextlib.contextmanager
def served(artefact: str, *flags: str, files: int | None = None):
    """Run the service; yields (process, port) once it is ready."""
    command = [sys.executable, "-m", "sdpoint_jax", "serve", artefact, "--port=0", *flags]
    if files:
        command = ["prlimit", f"--nofile={files}:{files}", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        assert process.stderr is not None
        lines = []
        while not lines or not lines[-1].startswith("ready"):
            lines.append(process.stderr.readline())
            if not lines[-1]:
                raise SystemExit("the service has ended: " + "".join(lines))
        port = int(re.search(r"^serving .*:(\d+)$", "".join(lines), re.M)[1])
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, port
    finally:
        process.kill()
        process.wait()


def post(connection: http.client.HTTPConnection, body: bytes) -> int:
    """Return the status of one request; connects again where the service has closed the connection."""
    for _ in range(2):
        try:
            connection.request("POST", "/predict?top=1", body)
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            connection.close()
    return 0


def attack(port: int, body: bytes, sent) -> None:
    """Send a body again and again; runs in a process of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while True:
        post(connection, body)
        sent.value += 1


def rate(port: int, body: bytes, seconds: float) -> float:
    """Return the answers a second that four clients get."""
    counts, stop = [0] * GOOD_CLIENTS, time.monotonic() + seconds

    def ask(number):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < stop:
            counts[number] += post(connection, body) == 200

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(GOOD_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def rate_beside(port: int, body: bytes, hostile: bytes, seconds: float) -> tuple[float, float]:
    """Return the answers a second that four clients get beside a hostile one, and its requests a second."""
    context = multiprocessing.get_context("fork")
    sent = context.Value("i", 0)
    process = context.Process(target=attack, args=(port, hostile, sent), daemon=True)
    process.start()
    time.sleep(0.5)  # Its first effects are part of what it does.
    before = sent.value
    answers = rate(port, body, seconds)
    requests = (sent.value - before) / seconds
    process.kill()
    process.join()
    return answers, requests


def npy(shape: tuple[int, ...]) -> bytes:
    """Return an array of random bytes as an .npy file."""
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    return file.getvalue()


def good_body(kind: str) -> bytes:
    """Return what the well-behaved clients send."""
    if kind == "npy":
        return npy((16, 16, 1))
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)
    Image.fromarray(noise).resize((400, 300), Image.Resampling.BILINEAR).save(file, kind.upper())
    return file.getvalue()


def measure_answers(options: argparse.Namespace) -> None:
    """Print the ratio of the rates for each hostile body."""
    body = good_body(options.good)
    with served(options.artefact, f"--objective-ms={options.objective_ms:g}") as (process, port):
        rate(port, body, options.seconds)  # A first round of no account.
        for name, hostile in hostile_bodies().items():
            if options.only not in name:
                continue
            alone, beside, requests = [], [], []
            for _ in range(options.rounds):
                before = rate(port, body, options.seconds / 2)
                answers, sent = rate_beside(port, body, hostile, options.seconds)
                alone.append((before + rate(port, body, options.seconds / 2)) / 2)
                beside.append(answers)
                requests.append(sent)
            ratio = sum(beside) / sum(alone)
            deviations = [found - ratio * usual for found, usual in zip(beside, alone)]
            error = statistics.stdev(deviations) / statistics.fmean(alone) / len(alone) ** 0.5
            print(
                f"{name:<26} {len(hostile):>9,} B  alone {statistics.fmean(alone):6.1f}/s  "
                f"ratio {ratio:.2f} ±{error:.2f}, n={len(alone)}  hostile {statistics.fmean(requests):6.1f}/s",
                flush=True,
            )


def memory_mib(pid: int) -> float:
    """Return the largest memory that a process has held."""
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


class Health(threading.Thread):
    """Asks /healthz over and over; keeps the worst time."""

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self.port, self.worst, self.failed, self.count, self.stopped = port, 0.0, 0, 0, False

    def run(self) -> None:
        """Ask until it is stopped, on a new connection each time."""
        while not self.stopped:
            start = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request("GET", "/healthz")
                self.failed += connection.getresponse().status != 200
            except (OSError, http.client.HTTPException):
                self.failed += 1
            finally:
                connection.close()
            self.worst = max(self.worst, time.monotonic() - start)
            self.count += 1
            time.sleep(0.02)


def send_hostile(port: int, requests: int) -> None:
    """Send all hostile bodies in turns, on 64 connections."""
    bodies, left = list(hostile_bodies().values()), iter(range(requests))

    def send():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for number in left:
            post(connection, bodies[number % len(bodies)])

    threads = [threading.Thread(target=send) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def flood_heads(port: int, megabytes: int) -> None:
    """Send heads without an end, on many connections, each until it is closed."""
    left = megabytes << 20
    while left > 0:
        with socket.create_connection(("127.0.0.1", port), 10) as connection, contextlib.suppress(OSError):
            left -= connection.send(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-A: ")
            for _ in range(256):
                left -= connection.send(b"a" * (1 << 16))


def measure_bounds(options: argparse.Namespace) -> None:
    """Print memory, the worst answer of /healthz and the time to stop."""
    with served(options.artefact, "--objective-ms=1000", files=20_000) as (process, port):
        start = memory_mib(process.pid)
        health = Health(port)
        health.start()
        silent = []
        for what, act in (
            (f"{options.requests:,} hostile requests", lambda: send_hostile(port, options.requests)),
            ("400 MB of headers", lambda: flood_heads(port, 400)),
            (
                f"{options.connections:,} silent connections",
                lambda: silent.extend(
                    socket.create_connection(("127.0.0.1", port), 10) for _ in range(options.connections)
                ),
            ),
        ):
            health.worst, began = 0.0, time.monotonic()
            act()
            print(
                f"{what}: {time.monotonic() - began:.1f} s, /healthz at worst {health.worst:.2f} s, "
                f"{health.failed} of {health.count} failed; memory {memory_mib(process.pid) - start:.0f} MiB more",
                flush=True,
            )
        health.stopped = True
        with socket.create_connection(("127.0.0.1", port), 10) as half:
            half.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            code = process.wait(60)
            print(f"SIGTERM in mid-request: code {code} after {time.monotonic() - began:.1f} s")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefact", required=True, help="path of an artefact that was profiled")
    parser.add_argument("--bounds", action="store_true", help="memory, /healthz and SIGTERM instead of answers")
    parser.add_argument("--rounds", type=int, default=5, help="for each body")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--objective-ms", type=float, default=1000.0)
    parser.add_argument("--good", default="npy", choices=("npy", "png", "jpeg"), help="what the good clients send")
    parser.add_argument("--only", default="", help="bodies whose names hold this")
    parser.add_argument("--requests", type=int, default=5000, help="of the bounds")
    parser.add_argument("--connections", type=int, default=4000, help="of the bounds")
    options = parser.parse_args()
    (measure_bounds if options.bounds else measure_answers)(options)


if __name__ == "__main__":
    main()
