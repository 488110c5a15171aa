"""The process that decodes the images of requests: it has limits of its own and can be ended. Imports no JAX.

`decoders` starts it and speaks with it over a socket. Image libraries bound neither time nor memory: 20 KB of PNG
become 169 million pixels, a JPEG of 60 scans takes seconds, a TIFF of 128 x 128 pixels may have one tile of 0.8 GB.
Here the kernel bounds both: SIGPROF ends the process after its CPU time, and allocations beyond its limit fail.
"""

import dataclasses
import io
import json
import os
import signal
import socket
import struct
import sys
import time
import warnings

# All plugins that are used: `Image.open` would otherwise import every plugin when it first meets one of these.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from sdpoint_jax.data.augment.crop import resize_and_center_crop
from sdpoint_jax.data.decode import BadImageError, decode
from sdpoint_jax.data.opencv import opencv
from sdpoint_jax.serving.contents import EXPECTED, FORMATS, NPY, ContentError, content_of_form, format_of, read_npy

REQUEST, RESPONSE = (
    struct.Struct("<II"),
    struct.Struct("<HdI"),
)  # Lengths of type and body; status, CPU seconds, length.
DONE, TOO_LARGE = 200, 199  # Beside the status codes of `ContentError`.
READY = b"r"

_MOST_CHUNKS = 8192  # Of a PNG: one of 16 MiB in IDAT chunks of 4 KiB has 4096.
_LONGEST_SIDE = 65_535  # As of a JPEG. PIL needs 1 GiB for a PNG of 1 x 40 million pixels.
_MOST_STEPS = 10_000  # Of PIL's Python loop over the head of a JPEG: it makes one for each segment and each junk byte.
_PNG_COMPRESSED, _MOST_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP"), 16  # Photo software writes about three of them.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class DecoderSettings:
    """What a decoder makes of a body, and its limits.

    Attributes:
        image_shape: (H, W, C) of the result.
        resize: (height, width) that the image just covers before its centre is cut out; None for (H, W).
        pixels: Most pixels of an image.
        work: Most pixels to decode; those of a progressive JPEG count more with each scan.
        formats: Those that are decoded; others are answered with `TOO_LARGE`, as images beyond `work` are.
        cpu_seconds: Most CPU time for an image.
        memory_mib: Most memory for an image, beside what the process has when it starts.
        niceness: Added to that of the service.
    """

    image_shape: tuple[int, int, int]
    resize: tuple[int, int] | None
    pixels: int
    work: int
    formats: tuple[str, ...]
    cpu_seconds: float
    memory_mib: int
    niceness: int


class _TooLarge(Exception):
    """An image for a decoder with higher limits."""


def run() -> None:
    """Answer requests on the socket of the first argument, until the other end is closed."""
    number, text = sys.argv[1:]
    values = json.loads(text)
    resize = None if values["resize"] is None else tuple(values["resize"])
    settings = DecoderSettings(
        **values | {"image_shape": tuple(values["image_shape"]), "resize": resize, "formats": tuple(values["formats"])}
    )
    connection = socket.socket(fileno=int(number))
    _limit(settings)
    connection.sendall(READY)
    with connection, connection.makefile("rb") as requests:
        while head := requests.read(REQUEST.size):
            type_size, body_size = REQUEST.unpack(head)
            content_type, body = requests.read(type_size).decode("latin1"), requests.read(body_size)
            start = time.thread_time()  # While ITIMER_PROF runs, Linux counts the process's time in ticks of some ms.
            status, content = _answer(body, content_type, settings)
            connection.sendall(RESPONSE.pack(status, time.thread_time() - start, len(content)) + content)


def _limit(settings):
    os.nice(settings.niceness)
    opencv()
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # `_check_size` refuses at the limit, PIL at twice the limit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries write a line there for each damaged file.
    try:
        import resource
    except ImportError:  # Not on Windows.
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    limit = used + settings.memory_mib * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(body: bytes, content_type: str, settings: DecoderSettings) -> tuple[int, bytes]:
    """Return the status, and the pixels or the reason."""
    signal.setitimer(signal.ITIMER_PROF, settings.cpu_seconds)  # CPU time. SIGPROF ends the process, also within C.
    try:
        return DONE, _decode(body, content_type, settings).tobytes()
    except _TooLarge:
        return TOO_LARGE, b""
    except ContentError as error:
        return error.status, error.reason.encode()
    except MemoryError:
        return 413, f"the image takes more than {settings.memory_mib} MiB to decode".encode()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _decode(body, content_type, settings):
    """Return uint8 [H, W, C]."""
    name = format_of(body)
    if name is None and content_type:
        body = content_of_form(body, content_type)
        name = format_of(body)
    height, width, channels = settings.image_shape
    if name == NPY:
        pixels = read_npy(body)
        if pixels.shape[-1] != channels:
            raise ContentError(422, f"the .npy array {list(pixels.shape)}: needs {channels} channels")
        return resize_and_center_crop(pixels, settings.resize or (height, width), (height, width))
    if name not in FORMATS:
        raise ContentError(422, f"the body is no image: {EXPECTED}")
    if name not in settings.formats:
        raise _TooLarge
    if name == "PNG":
        body = _strip_png(body)
    elif name == "JPEG":
        body = _strip_jpeg(body)
    _check_size(body, name, settings)
    try:
        pixels = decode(body, channels, formats=[name])
        return resize_and_center_crop(pixels, settings.resize or (height, width), (height, width))
    except MemoryError:
        raise
    except BadImageError as error:
        if "MemoryError" in error.reason:
            raise MemoryError from None
        raise ContentError(422, f"the image {error.reason}") from None
    except Exception as error:  # OpenCV and PIL raise nearly every type there is.
        raise ContentError(422, f"the image cannot be decoded ({' '.join(str(error).split())[:100]})") from None


def _check_size(body, name, settings):
    """Check the pixels to decode, by the header alone."""
    width, height = _size_of_webp(body) if name == "WEBP" else _size_by_pil(body, name)
    if width * height > settings.pixels or max(width, height) > _LONGEST_SIDE:
        most = f"at most {settings.pixels}, and {_LONGEST_SIDE} a side"
        raise ContentError(413, f"image of {width} x {height} pixels: {most}")
    # A scan of a progressive JPEG costs about a third of decoding a JPEG of one scan.
    scans = body.count(b"\xff\xda") if name == "JPEG" else 1
    if width * height * (2 + scans) > 3 * settings.work:
        raise _TooLarge


def _size_by_pil(body, name):
    try:
        with Image.open(io.BytesIO(body), formats=[name]) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:
        raise ContentError(422, f"the image cannot be decoded (not a {name} file)") from None


def _size_of_webp(body):
    """Return (width, height) of the canvas. PIL would allocate the canvas twice when it opens the file."""
    kind = body[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[24:27], "little"), 1 + int.from_bytes(body[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(body[26:28], "little") & 0x3FFF, int.from_bytes(body[28:30], "little") & 0x3FFF
    raise ContentError(422, "the image cannot be decoded (not a WebP file)")


def _strip_png(body: bytes) -> bytes:
    """Return the PNG without what its pixels do not need.

    Compressed texts and colour profiles become up to a thousand times their size, and PIL inflates them all.
    """
    kept, position, seen, compressed = [body[:8]], 8, set(), 0
    for _ in range(_MOST_CHUNKS):
        head = body[position : position + 8]
        kind, end = head[4:], position + 12 + int.from_bytes(head[:4], "big")
        if kind == b"IDAT" or kind in _PNG_PIXELS and kind not in seen:  # A second IHDR would change the size.
            kept.append(body[position:end])
        seen.add(kind)
        compressed += kind in _PNG_COMPRESSED
        if compressed > _MOST_COMPRESSED:  # Nobody needs them, so that this client is not an ordinary one.
            raise ContentError(422, f"the image has more than {_MOST_COMPRESSED} compressed texts and profiles")
        if kind == b"IEND" or end > len(body) or len(head) < 8:
            return b"".join(kept)
        position = end
    raise ContentError(422, f"the image has more than {_MOST_CHUNKS} chunks")


def _strip_jpeg(body: bytes) -> bytes:
    """Return the JPEG without comments, profiles, EXIF, previews and further images; they do not change its pixels."""
    kept, position, steps = [body[:2]], 2, 0
    while steps < _MOST_STEPS:
        start = body.find(b"\xff", position)
        if start < 0:
            break
        steps += 1 + start - position
        marker = body[start + 1] if start + 1 < len(body) else 0xD9
        if marker in (0xDA, 0xD9):  # The pixels follow, or there are none.
            kept.append(body[start:])
            return b"".join(kept)
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            position = start + 1
            continue
        position = start + 2 + max(2, int.from_bytes(body[start + 2 : start + 4], "big"))
        if not (0xE1 <= marker <= 0xEF and marker != 0xEE or marker == 0xFE):  # JFIF and Adobe's segment tell colours.
            kept.append(body[start:position])
    raise ContentError(422, f"the image cannot be decoded (no pixels after {steps} steps through its head)")
