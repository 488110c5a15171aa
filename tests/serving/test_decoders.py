"""Images are decoded in other processes, within limits, and no client slows the others down."""

import asyncio
import dataclasses
import io
import os
import signal
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra serve")
from starlette.requests import Request  # noqa: E402

from sdpoint_jax.serving.clients import Clients  # noqa: E402
from sdpoint_jax.serving.contents import ContentError  # noqa: E402
from sdpoint_jax.serving.decoder import READY, DecoderSettings, _answer, _strip_jpeg, _strip_png  # noqa: E402
from sdpoint_jax.serving.decoders import QUICK, SLOW, Decoders, TooLate  # noqa: E402
from sdpoint_jax.serving.images import to_batch  # noqa: E402

SHAPE = (16, 16, 3)
RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), np.uint8))
# As of the slow lane, without the limits of the kernel: tests of what it answers run in their own process.
SETTINGS = DecoderSettings(SHAPE, None, 1_000_000, SLOW.work, SLOW.formats, 10.0, SLOW.memory_mib, 0)


def encode(image, form, **settings):
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *extra):
    """A black PNG of one bit, with more chunks before its pixels."""
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(*segments):
    """A JPEG with more segments in its head."""
    whole = encode(NOISE, "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def in_container(inner):
    """An icon that holds a PNG."""
    return b"icns" + struct.pack(">I", 16 + len(inner)) + b"icp4" + struct.pack(">I", 8 + len(inner)) + inner


def answer(body, **settings):
    status, content = _answer(body, "", dataclasses.replace(SETTINGS, **settings))
    return status, content if status == 200 else content.decode()


FINE = {
    "JPEG": encode(NOISE, "JPEG"),
    "progressive JPEG": encode(NOISE, "JPEG", progressive=True),
    "CMYK": encode(NOISE.convert("CMYK"), "JPEG"),
    "grey JPEG": encode(NOISE.convert("L"), "JPEG"),
    "two JPEGs in one": encode(NOISE, "MPO", save_all=True, append_images=[NOISE]),
    "JPEG with EXIF and a profile": encode(
        NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=bytes(70_000)
    ),
    "PNG": encode(NOISE, "PNG"),
    "PNG with transparency": encode(NOISE.convert("RGBA").quantize(16), "PNG", transparency=0),
    "PNG with texts and a profile": encode(NOISE, "PNG", icc_profile=bytes(1000)),
    "animated PNG": encode(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]),
    "16 bits": encode(Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9)), "PNG"),
    "WebP": encode(NOISE, "WEBP"),
    "lossless WebP": encode(NOISE, "WEBP", lossless=True),
    "animated WebP": encode(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]),
    "GIF": encode(NOISE.convert("P"), "GIF", save_all=True, append_images=[NOISE.rotate(90).convert("P")]),
    "BMP": encode(NOISE, "BMP"),
    "TIFF": encode(NOISE, "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", FINE)
def test_an_image_has_the_pixels_of_evaluation(kind):
    status, content = answer(FINE[kind])
    assert status == 200, content
    np.testing.assert_array_equal(
        np.frombuffer(content, np.uint8).reshape(SHAPE), to_batch([FINE[kind]], SHAPE, None)[0]
    )


TEXT = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20), 9))
PROFILE = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 20), 9))
WRONG = {
    "text": (b"no image", 422, "no image"),
    "an icon that holds a large PNG": (in_container(png(13_000, 13_000)), 422, "no image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", 422, "no image"),
    "too many pixels": (png(1001, 1000), 413, "1001 x 1000 pixels: at most 1000000"),
    "too long a side": (png(1, 100_000), 413, "65535"),
    "two sizes": (png(10, 10, chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))), 200, ""),
    "two sizes, the first too large": (
        png(9000, 9000)[:33] + png(10, 10)[8:],
        413,
        "9000 x 9000",
    ),
    "many chunks": (png(10, 10, chunk(b"teSt", b"") * 9000), 422, "8192 chunks"),
    "many texts": (png(10, 10, TEXT * 50), 422, "16 compressed texts"),
    "many profiles": (png(10, 10, PROFILE * 50), 422, "16 compressed texts"),
    "many segments": (jpeg(b"\xff\xfe\0\2" * 20_000), 422, "10000 steps"),
    "many fill bytes": (jpeg(b"\xff" * 20_000), 422, "10000 steps"),
    "much junk": (jpeg(b"\xff\xfe\0\2" + bytes(20_000)), 422, "steps"),
    "a truncated JPEG": (FINE["JPEG"][:300], 422, "cannot be decoded"),
    "a truncated PNG": (FINE["PNG"][:300], 422, "cannot be decoded"),
    "a truncated WebP": (FINE["WebP"][:100], 422, "cannot be decoded"),
    "a large WebP": (encode(Image.new("RGB", (2000, 2000)), "WEBP", lossless=True), 413, "2000 x 2000"),
    "a large GIF": (encode(Image.new("P", (2000, 2000)), "GIF"), 413, "2000 x 2000"),
    "a large BMP": (encode(Image.new("1", (2000, 2000)), "BMP"), 413, "2000 x 2000"),
    "a large TIFF": (encode(Image.new("1", (2000, 2000)), "TIFF", compression="group4"), 413, "2000 x 2000"),
    "a large JPEG": (encode(Image.new("L", (2000, 2000)), "JPEG"), 413, "2000 x 2000"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_hostile_image_gets_a_reason(kind):
    body, expected, reason = WRONG[kind]
    status, content = answer(body)
    assert status == expected and (status == 200 or reason in content), content


def test_texts_and_profiles_are_never_inflated():
    assert _strip_png(png(10, 10, TEXT * 10, PROFILE * 5)) == png(10, 10)
    assert len(_strip_jpeg(jpeg(b"\xff\xe2\xff\xff" + bytes(65_533)))) == len(_strip_jpeg(jpeg())) < 65_000


def test_what_is_not_small_in_every_respect_goes_to_the_slow_lane():
    quick = {"work": QUICK.work, "formats": QUICK.formats, "pixels": 50_000_000}
    many_scans = encode(Image.new("L", (900, 900)), "JPEG", progressive=True)
    for body in (FINE["GIF"], FINE["BMP"], FINE["TIFF"], png(1001, 1000), many_scans):
        assert answer(body, **quick)[0] == 199
    for body in (FINE["JPEG"], FINE["progressive JPEG"], FINE["PNG"], FINE["WebP"], png(1000, 1000)):
        assert answer(body, **quick)[0] == 200


def repeated_scans(side, count):
    whole = encode(Image.new("L", (side, side)), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rfind(b"\xff\xda") : -2] * count + whole[-2:]


@pytest.fixture(scope="module")
def loop():
    """One event loop, so that the processes below start once."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def decoders(loop):
    quick = dataclasses.replace(QUICK, processes=1)
    slow = dataclasses.replace(SLOW, cpu_seconds=0.2, memory_mib=100)
    found = Decoders(SHAPE, None, pixels=50_000_000, lanes=(quick, slow))
    found.start()
    yield found
    found.close()


def decode(loop, decoders, body, client="a", seconds=60.0):
    return loop.run_until_complete(decoders.decode(body, "", client, time.monotonic() + seconds))


def test_an_image_beyond_the_limits_is_refused_and_others_go_on(loop, decoders):
    assert decode(loop, decoders, FINE["PNG"]).shape == SHAPE
    with pytest.raises(ContentError, match="more than 0.2 s to decode") as caught:
        decode(loop, decoders, repeated_scans(2000, 400))
    assert caught.value.status == 413
    with pytest.raises(ContentError, match="more than 100 MiB to decode") as caught:
        decode(loop, decoders, png(7000, 7000))
    assert caught.value.status == 413
    for kind in ("GIF", "JPEG"):
        np.testing.assert_array_equal(decode(loop, decoders, FINE[kind]), to_batch([FINE[kind]], SHAPE, None)[0])


def test_a_process_that_was_killed_is_replaced(loop, decoders):
    for pid in decoders.processes:
        os.kill(pid, signal.SIGKILL)
    for kind in ("PNG", "TIFF"):
        assert decode(loop, decoders, FINE[kind], "b").shape == SHAPE
    assert len(decoders.processes) == 2


def test_who_waits_too_long_is_told_so_and_forgotten(loop, decoders):
    with pytest.raises(TooLate):
        decode(loop, decoders, FINE["PNG"], "c", seconds=-1.0)
    assert decoders.waiting == 0 and decode(loop, decoders, FINE["PNG"], "c").shape == SHAPE


def test_the_client_who_has_used_least_is_next_and_a_greedy_one_waits_for_idle_time(loop, decoders):
    quick, _ = decoders._lanes
    decoders._usage.add("greedy", 10.0)
    decoders.greet("modest")
    assert decoders.is_excessive("greedy") and not decoders.is_excessive("modest")
    began, order = time.monotonic(), []

    async def one(client):
        await decoders.decode(FINE["PNG"], "", client, began + 60)
        order.append(client)

    async def both():
        held, quick._free[:] = list(quick._free), []  # As if all processes were busy.
        monkeys = [asyncio.create_task(one(client)) for client in ("d", "e")]
        await asyncio.sleep(0)
        decoders._usage.add("d", 1.0)
        quick._free[:] = held
        quick._begin()
        await asyncio.gather(*monkeys)

    loop.run_until_complete(both())
    assert order == ["e", "d"]


def test_nobody_gains_by_a_new_connection_for_each_request():
    def client(host, port):
        return clients.of(Request({"type": "http", "client": (host, port)}))

    clients = Clients()
    assert client("10.0.0.1", 1) == client("10.0.0.1", 2) == "10.0.0.1"
    assert {client("127.0.0.1", port) for port in range(5000)} == {"127.0.0.1"}
    assert client("127.0.0.1", 4999) == ("127.0.0.1", 4999) and client("127.0.0.1", 0) == "127.0.0.1"


def test_one_client_alone_is_never_greedy():
    decoders = Decoders(SHAPE, None, pixels=1)
    decoders._usage.add("a", 10.0)
    assert not decoders.is_excessive("a")
    decoders._usage.add("b", 9.0)
    assert not decoders.is_excessive("a") and not decoders.is_excessive("b")


def test_the_process_imports_no_jax_and_gets_no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("SDPOINT_TOKEN", "secret")
    found = Decoders(SHAPE, None, pixels=1000, lanes=(dataclasses.replace(QUICK, processes=1), SLOW))
    lane = found._lanes[0]
    lane.start()
    try:
        assert lane.processes[0].was_ready and READY
        (pid,) = found.processes
        with open(f"/proc/{pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
        with open(f"/proc/{pid}/maps") as file:
            assert "jaxlib" not in file.read()
        with open(f"/proc/{pid}/limits") as file:
            assert any(line.startswith("Max address space") and "unlimited" not in line.split()[3] for line in file)
    finally:
        found.close()
