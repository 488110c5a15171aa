"""What the body of a request is, by its content: an image file, an .npy array, or a form that holds one of them.

The Content-Type header does not decide, because clients set it without being asked: curl, wget and urllib send a photo
as `application/x-www-form-urlencoded`. Nothing here decodes an image.
"""

import re
from email.message import Message

import numpy as np

NPY = "NPY"
# What the service opens, by PIL's names. Not in the list is what starts another program (EPS starts Ghostscript), what
# holds an image of another format (ICO, ICNS), and what PIL decodes in Python loops (QOI, FITS, plain PPM).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXPECTED = "send a JPEG, PNG, WebP, GIF, BMP or TIFF file, or an .npy array of uint8 [H, W, C]"

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\x93NUMPY", NPY),
)
_MOST_PARTS, _LONGEST_PART_HEAD = 16, 8192
_LONGEST_NPY_HEADER = 10_000  # As in NumPy.
_NPY_HEADER = re.compile(
    rb"""\{\s*+(['"])descr\1\s*+:\s*+(['"])[|<>=]?u1\2\s*+,\s*+(['"])fortran_order\3\s*+:\s*+False\s*+,\s*+"""
    rb"""(['"])shape\4\s*+:\s*+\(\s*+(\d{1,9})\s*+,\s*+(\d{1,9})\s*+,\s*+(\d{1,9})\s*+,?\s*+\)\s*+,?\s*+\}\s*+"""
)


class ContentError(ValueError):
    """A body that is not answered.

    Attributes:
        status: of HTTP.
        reason: one line.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason


def format_of(body: bytes) -> str | None:
    """Return the format that the first bytes name: one of `FORMATS` or `NPY`; None for everything else."""
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if body.startswith(magic)), None)


def read_npy(body: bytes) -> np.ndarray:
    """Return the array of an .npy file: uint8 [H, W, C] in C order and nothing else, as a view of the body.

    `np.load` parses the header as Python and builds any dtype, and raises nearly every exception on hostile headers.

    Raises:
        ContentError: another type, order or rank, a header that NumPy would not write, or data of another length.
    """
    version = body[6:7]
    size = 2 if version == b"\1" else 4 if version in (b"\2", b"\3") else 0
    start = 8 + size
    end = start + int.from_bytes(body[8:start], "little")
    if not size or end > len(body) or end - start > _LONGEST_NPY_HEADER:
        raise ContentError(422, "not an .npy array: its header is damaged")
    header = _NPY_HEADER.fullmatch(body, start, end)
    if header is None:
        shown = " ".join(body[start:end].decode("latin1").split())[:100]
        raise ContentError(422, f"the .npy array {ascii(shown)}: needs uint8 of shape (H, W, C) in C order")
    shape = tuple(int(header[number]) for number in (5, 6, 7))
    count = shape[0] * shape[1] * shape[2]
    if count != len(body) - end or not count:
        raise ContentError(
            422, f"the .npy array {list(shape)}: needs {count} bytes after its header, has {len(body) - end}"
        )
    return np.frombuffer(body, np.uint8, count, end).reshape(shape)


def content_of_form(body: bytes, content_type: str) -> bytes:
    """Return the one file in a form of the type multipart/form-data.

    A part counts by its content, so the name of its field and a file name do not matter.

    Raises:
        ContentError: no form, or no file or several in it.
    """
    boundary = _boundary_of(content_type)
    # Every step is one pass of C over the body; parsers of forms make Python calls, for some bodies a call a byte.
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, _MOST_PARTS + 1)
    if len(parts) < 2:
        raise ContentError(400, "not a form: it does not hold the boundary that its Content-Type names")
    if len(parts) > _MOST_PARTS + 1:
        raise ContentError(400, f"a form of more than {_MOST_PARTS} parts: send one file, as image=@photo.jpg")
    contents, files = [], []
    for part in parts[1:]:
        if part.startswith(b"--"):
            break
        head = part.find(b"\r\n\r\n", 0, _LONGEST_PART_HEAD)
        if head < 0:
            raise ContentError(400, f"not a form: the head of a part does not end within {_LONGEST_PART_HEAD} bytes")
        content = part[head + 4 :]
        if format_of(content):
            contents.append(content)
        elif b"filename" in part[:head].lower():
            files.append(content)
    found = contents or files
    if len(found) != 1:
        count = f"{len(found)} files" if found else "no file"
        raise ContentError(400, f"the form holds {count}: send one, as image=@photo.jpg")
    return found[0]


def _boundary_of(content_type: str) -> bytes:
    # At most 70 characters (RFC 2046), so that no client makes the parsing of the header expensive.
    message = Message()
    message["Content-Type"] = content_type[:1000]
    boundary = message.get_boundary("")
    if not (0 < len(boundary) <= 70 and boundary.isascii()):
        raise ContentError(400, "not a form: its Content-Type names no boundary of 1 to 70 characters")
    return boundary.encode()
