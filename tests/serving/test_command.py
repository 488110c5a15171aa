"""The command `serve` as its users run it: with the commands of the documents, careless clients and hostile ones."""

import contextlib
import io
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request
import zlib

import numpy as np
import pytest
import services
from PIL import Image

pytest.importorskip("uvicorn", reason="needs the extra serve")

from sdpoint_jax.cli import main  # noqa: E402

DOCS = sorted([*services.ROOT.glob("*.md"), *services.ROOT.glob("docs/*.md")])
MIB = 1 << 20
UPLOAD_MIB = 4


def shell_lines(page):
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
        yield from block.splitlines()


CURLS = [line for page in DOCS for line in shell_lines(page) if line.startswith(("curl ", "wget "))]


@pytest.fixture(scope="module")
def running(served):
    flags = ("--objective-ms=20000", f"--max-upload-mb={UPLOAD_MIB}")
    with services.running(
        served, *flags, environment=os.environ | {"XLA_FLAGS": "", "SDPOINT_TOKEN": "secret"}
    ) as service:
        yield service


def port_of(address):
    return int(address.rpartition(":")[2])


def npy():
    file = io.BytesIO()
    np.save(file, np.zeros((8, 8, 1), np.uint8))
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_documents_show_how_to_ask():
    assert any("--data-binary" in line for line in CURLS) and any(" -F " in line for line in CURLS)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("line", CURLS)
def test_a_request_of_the_documents_is_answered_as_it_is_typed(line, running, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(services.encode(services.PICTURE, "JPEG"))
    # The documents say port 8000, which may be in use here: curl itself goes to another one.
    (tmp_path / ".curlrc").write_text(f'connect-to = "127.0.0.1:8000:127.0.0.1:{port_of(running[1])}"\nsilent\nfail\n')
    environment = os.environ | {"CURL_HOME": str(tmp_path), "TOKEN": "secret"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("{"), done


@pytest.mark.slow
def test_urllib_is_answered_though_it_names_a_form(running):
    request = urllib.request.Request(f"{running[1]}/predict", services.encode(services.PICTURE, "JPEG"))
    with urllib.request.urlopen(request) as response:
        assert response.status == 200


@pytest.mark.slow
def test_the_token_of_the_environment_changes_the_budget(running):
    for token, status in (("secret", 200), ("guess", 401)):
        head = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{running[1]}/budget", b"{}", head, method="PUT")
        with contextlib.suppress(urllib.error.HTTPError):
            assert urllib.request.urlopen(request).status == status == 200


def ask(port, sent, wait=20):
    """What the server sends back until it closes, or until nothing comes."""
    with socket.create_connection(("127.0.0.1", port), wait) as connection, contextlib.suppress(OSError):
        connection.sendall(sent)
        return connection.recv(65536)
    return b""


@pytest.mark.slow
def test_odd_requests_get_a_reason_and_nothing_is_logged(running):
    process, address = running
    post = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    for sent, status in (
        (post + b"Content-Length: 1073741824\r\n\r\n", 413),
        (post + b"Content-Length: " + b"9" * 18 + b"\r\n\r\n", 413),
        (post + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n", 400),
        (post.replace(b"Host: x", b"Host: evil.example") + b"Content-Length: 1\r\n\r\nx", 421),
        (post + b"Content-Length: 5\r\nContent-Encoding: gzip\r\n\r\nabcde", 415),
        (post + b"Content-Length: 1\r\nExpect: 100-continue\r\n\r\nx", 100),
        (post.replace(b"/predict", b"/predict?x=" + b"y" * 60_000) + b"\r\n", 431),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
        (b"CONNECT evil:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ):
        answer = ask(port_of(address), sent)
        assert answer.startswith(b"HTTP/1.1 %d " % status), (sent[:200], answer)
    for part in (post + b"Content-Length: 1000\r\n\r\nabc", post + b"Content-Length: %d\r\n\r\n" % len(npy()) + npy()):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port_of(address)), 20) as connection:
                connection.sendall(part)  # And leaves.
    until = time.monotonic() + 20
    while 'outcome="left"' not in (text := urllib.request.urlopen(f"{address}/metrics").read().decode()):
        assert time.monotonic() < until
    assert 'outcome="failed"' not in text
    os.set_blocking(process.stderr.fileno(), False)
    assert "Traceback" not in (process.stderr.read() or "")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side, extra=b""):
    pixels = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


HOSTILE = [
    b"x",
    png(13_000),
    png(10, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(MIB), 9)) * 50),
    png(10, chunk(b"teSt", b"") * 50_000),
    services.encode(Image.new("RGB", (16_000, 3000)), "WEBP", lossless=True),
    services.encode(Image.new("P", (3000, 3000)), "GIF"),
    npy()[:-1],
    npy()[:20] + b"(" * 5000,
]


def high_water_mib(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_within_the_stated_bounds_and_others_are_answered(running):
    """Hostile images, stalled uploads, heads without end, silent connections: docs/serve.md says what they may take."""
    process, address = running
    port, worst, over = port_of(address), [0.0], threading.Event()
    before = high_water_mib(process.pid)

    def watch():
        while not over.is_set():
            start = time.monotonic()
            urllib.request.urlopen(f"{address}/healthz").close()
            worst[0] = max(worst[0], time.monotonic() - start)
            over.wait(0.02)

    def post(body):
        return ask(port, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)[9:12]

    watching = threading.Thread(target=watch)
    watching.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2000), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(40):  # Of which 32 would fit.
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (UPLOAD_MIB * MIB)
                )
                with contextlib.suppress(OSError):
                    connection.sendall(bytes(UPLOAD_MIB * MIB - 1))
            for _ in range(300):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            assert post(npy()) == b"200"  # None of them shuts others out.
            assert {post(body) for body in HOSTILE} <= {b"200", b"400", b"413", b"422"}
            for _ in range(2):
                flooding = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
                with contextlib.suppress(OSError):
                    flooding.sendall(b"GET / HTTP/1.1\r\nX: " + bytes(48 * MIB))
            assert post(npy()) == b"200"
    finally:
        over.set()
        watching.join()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # 32 bodies, one more that is copied, and 64 KiB a connection.
    assert high_water_mib(process.pid) - before < 33 * UPLOAD_MIB + 360 / 16 + 16
    assert worst[0] < 5.0  # Half a second on an idle machine; who had to wait for a client would wait for longer.


@pytest.mark.slow
def test_a_stop_in_mid_burst_answers_what_was_accepted_and_waits_for_nobody_else(running):
    process, address = running  # The last test of this server.
    answers, started = [], threading.Barrier(9)
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(npy()) + npy()

    def burst():
        started.wait()
        with contextlib.suppress(OSError):
            while answer := ask(port_of(address), request):
                answers.append(answer[9:12])

    threads = [threading.Thread(target=burst) for _ in range(8)]
    for thread in threads:
        thread.start()
    with (
        socket.create_connection(("127.0.0.1", port_of(address))),
        socket.create_connection(("127.0.0.1", port_of(address))) as half,
    ):
        half.sendall(request[:-10])
        started.wait()
        while len(answers) < 20:
            time.sleep(0.005)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0 and time.monotonic() - began < 8
    for thread in threads:
        thread.join()
    assert set(answers) <= {b"200", b"503"} and answers.count(b"200") >= 20


@pytest.fixture
def refused(served, capsys):
    """What the command says before it loads anything."""

    def run(*flags):
        with pytest.raises(SystemExit) as caught:
            main.main(["serve", str(served), *flags])
        assert caught.value.code == 2
        return capsys.readouterr().err

    return run


def test_a_port_that_cannot_be_had_is_refused_before_anything_is_loaded(refused, monkeypatch):
    monkeypatch.setattr("sdpoint_jax.storage.artefact.load", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for flags, message in (
            (("--port=70000",), "--port=70000: valid are"),
            (("--port=-1",), "--port=-1: valid are"),
            ((f"--port={port}",), f"--port={port} at --host=127.0.0.1: Address already in use"),
            (("--host=no.such.host.invalid",), "--host=no.such.host.invalid"),
            (("--ray", f"--port={port}"), "already in use"),
        ):
            error = refused(*flags)
            assert error.count("\n") == 1 and message in error and "ready:" not in error


def test_a_token_comes_from_one_place(refused, tmp_path):
    (tmp_path / "empty").write_text("\n")
    assert "the file is empty" in refused(f"--token-file={tmp_path / 'empty'}")
    assert "absent" in refused(f"--token-file={tmp_path / 'absent'}")
    assert "give one of them" in refused("--token=a", f"--token-file={tmp_path / 'empty'}")
