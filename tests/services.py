"""Services of the tiny net, with made-up latencies."""

import contextlib
import dataclasses
import io
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
from PIL import Image

from sdpoint_jax.choice.table import Latency

ROOT = pathlib.Path(__file__).parents[1]
SIZES = (1, 4, 16)
PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 24), np.uint8))


def with_latencies(found, device="cpu"):
    """The artefact with made-up latencies: a fixed part, and one that follows the MACs and the batch."""
    full, rows = max(row.macs for row in found.rows), []
    for row in found.rows:
        for size in SIZES:
            ms = 1.0 + 2.0 * size * row.macs / full
            row = row.with_latency(Latency(device, "xla", "float32", size, ms, 1.2 * ms, 10, None, 0.1, {}))
        rows.append(dataclasses.replace(row, top1=0.5 + 0.4 * row.macs / full))
    return found.with_rows(rows)


def encode(image, form="PNG", **kwargs):
    """The image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **kwargs)
    return file.getvalue()


@contextlib.contextmanager
def running(path, *flags, environment=None):
    """Runs the command that serves the artefact at `path`; gives (process, address) once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "sdpoint_jax", "serve", str(path), f"--port={port}", "--profile=no", *flags]
    with started(command, port, environment or os.environ | {"XLA_FLAGS": ""}) as service:
        yield service


@contextlib.contextmanager
def started(command, port, environment):
    """Runs a command that serves at `port`; gives (process, address) once it is ready."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def free_port():
    """Returns a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_until_ready(process, address):
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(address).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"not ready: {process.poll()}")
