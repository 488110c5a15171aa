"""Encoded image files to uint8 arrays, with the pixels that PIL would show.

OpenCV decodes ordinary JPEG and PNG files, nearly all there are, to the same pixels as PIL and about 1.5 times faster.
PIL decodes everything else (CMYK, palettes, 16 bits, WebP, ...), as in torchvision's `ImageFolder`. Like there, the
EXIF orientation is ignored and an alpha channel is dropped. Unlike there, grey images of 16 bits are scaled to 8.
"""

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sdpoint_jax.data.opencv import opencv


class BadImageError(ValueError):
    """An example that cannot be used; the message is one line.

    Attributes:
        reason: what is wrong.
        place: the file, or the data set with the index; empty where it is not known.
    """

    def __init__(self, reason: str, place: str = ""):
        super().__init__(reason, place)
        self.reason, self.place = reason, place

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" if self.place else self.reason


def decode(data: bytes, channels: int, formats: Sequence[str] | None = None) -> np.ndarray:
    """Decodes an image file's bytes to uint8 [H, W, channels], with 1 (grey) or 3 (RGB) channels.

    Args:
        data: The file.
        channels: 1 or 3.
        formats: Formats that are tried, by PIL's names; by default all.

    Raises:
        BadImageError: the bytes are no image, or not a whole one. The message names no place: the caller knows it.
    """
    if not data:
        raise BadImageError("empty file")
    image = _decode_cv2(data, channels) if _is_ordinary(data, channels) else None
    return _decode_pil(data, channels, formats) if image is None else image


def _is_ordinary(data: bytes, channels: int) -> bool:
    """Whether OpenCV and PIL agree on the pixels of this kind of file; on RGB made grey they do not."""
    if data.startswith(b"\xff\xd8"):
        components, pixels = _jpeg_frame(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 26:
        width, height, bit_depth, colour_type = struct.unpack_from(">IIBB", data, 16)
        components, pixels = {0: 1, 2: 3}.get(colour_type, 0) if bit_depth == 8 else 0, width * height
    else:
        return False
    # PIL warns of more pixels, and refuses twice as many: a file of 0.4 MB may become 400 million of them.
    return components in (1, channels) and pixels <= (Image.MAX_IMAGE_PIXELS or pixels)


def _jpeg_frame(data: bytes) -> tuple[int, int]:
    """Return the components in a JPEG's frame header, 1 grey, 3 YCbCr, 4 CMYK, and its pixels; zeros without one."""
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            return components, height * width
        position += 2 + length
    return 0, 0


def _decode_cv2(data: bytes, channels: int) -> np.ndarray | None:
    cv2 = opencv()
    if cv2 is None:
        return None
    colour = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(np.frombuffer(data, np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)
    return image.reshape(*image.shape[:2], channels) if image is not None else None


def from_pil(image: Image.Image, channels: int) -> np.ndarray:
    """Converts a PIL image to uint8 [H, W, channels], as `decode` does with the file that it comes from.

    Raises:
        BadImageError: the file that it is read from is damaged.
    """
    try:
        image.load()
        image.info.pop("transparency", None)  # PIL would warn that it is dropped.
        pixels = np.asarray(_eight_bits(image).convert("RGB" if channels == 3 else "L"))
    except BadImageError:
        raise
    except Exception as error:  # PIL's decoders raise nearly every type there is.
        raise _undecodable(error) from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bits(image):
    """Return an image with 8 bits a value: PIL would clip wider ones at 255, which leaves one colour."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    bits = _depth(image)
    if image.mode == "F" and values.size and 0 <= values.min() and values.max() <= 1:
        values = np.round(255 * values)
    elif values.size and bits in range(9, 17) and values.max() > 255:  # Else 8 bits in a wider file: they are kept.
        values = np.asarray(values, np.uint16) >> (bits - 8)  # As PIL does with 16 bits of three colours.
    elif not values.size or not (0 <= values.min() and values.max() <= 255):  # So of values that are not finite.
        low, high = (values.min(), values.max()) if values.size else (0, 0)
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise BadImageError(f"{kind} from {low:g} to {high:g}, whose white is not known: save it with 8 or 16 bits")
    return Image.fromarray(values.astype(np.uint8))


def _depth(image):
    """Return the bits of a value of a grey image; 0 where they do not say what is white."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # Of TIFF: PIL reads 12 bits into 16.
        return tags.get(258, (16,))[0]
    return 16 if image.mode == "I" and image.format in ("PNG", "PPM") else 0


def _decode_pil(data: bytes, channels: int, formats: Sequence[str] | None) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=None if formats is None else tuple(formats))
    except Exception as error:  # Likewise.
        raise _undecodable(error) from None
    return from_pil(image, channels)


def _undecodable(error):
    reason = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in reason:
        reason = "not an image"
    return BadImageError(f"cannot be decoded ({reason})")
