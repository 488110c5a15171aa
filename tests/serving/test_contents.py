"""Bodies count by their content, and hostile ones get a reason in a bounded number of steps."""

import io

import numpy as np
import pytest

from sdpoint_jax.serving.contents import ContentError, content_of_form, format_of, read_npy

FORM = "multipart/form-data; boundary=x"
HEAD = b'Content-Disposition: form-data; name="image"; filename="a.png"'


def npy(array, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def with_header(header, data=bytes(300), version=1):
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_array_is_read_as_numpy_wrote_it(version):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(read_npy(npy(array, version)), array)


@pytest.mark.parametrize("descr", ["'u1'", "'>u1'", '"|u1"'])
def test_other_writers_headers_are_read(descr):
    header = f"{{ 'descr': {descr},\n 'fortran_order':False , 'shape': (10,10,3) }}".encode()
    assert read_npy(with_header(header)).shape == (10, 10, 3)


ARRAY = "{'descr': '|u1', 'fortran_order': False, 'shape': (10, 10, 3), }"


@pytest.mark.parametrize(
    "body",
    [
        b"\x93NUMPY",
        b"\x93NUMPY\1\0\xff\xff",
        b"\x93NUMPY\x09\0" + bytes(100),
        b"\x93NUMPY\3\0\xff\xff\xff\xff" + bytes(100),
        with_header(ARRAY.encode(), bytes(299)),
        with_header(ARRAY.encode(), bytes(301)),
        with_header(ARRAY.encode() + b" " * 20_000),
        with_header(ARRAY.replace("|u1", "<u2").encode()),
        with_header(ARRAY.replace("|u1", "|O").encode()),
        with_header(ARRAY.replace("'|u1'", "('|u1', (3,))").encode()),
        with_header(ARRAY.replace("'|u1'", "()").encode()),
        with_header(ARRAY.replace("False", "True").encode()),
        with_header(ARRAY.replace("10, 10", "-10, -10").encode()),
        with_header(ARRAY.replace("10, 10, 3", "300").encode()),
        with_header(ARRAY.replace("10, 10, 3", "10, 10, 3, 1").encode()),
        with_header(ARRAY.replace("10, 10", "4294967296, 4294967296").encode()),
        with_header(ARRAY.replace("(10, 10, 3)", "[10, 10, 3]").encode()),
        with_header(ARRAY.replace("10", "9" * 5000).encode()),
        with_header(ARRAY.replace("10, 10, 3", "0, 10, 3").encode(), b""),
        with_header(b"(" * 5000),
        with_header(b"{'descr': ("),
        with_header(b"-" * 9000 + b"1"),
        with_header(ARRAY.encode()[:-6] + b" " * 9000),
        with_header(b"\0\xff"),
    ],
    ids=str,
)
def test_any_other_array_is_refused(body):
    with pytest.raises(ContentError) as caught:
        read_npy(body)
    assert caught.value.status == 422 and len(caught.value.reason) < 300 and "\n" not in caught.value.reason


def test_formats_are_told_by_their_first_bytes():
    assert format_of(b"\xff\xd8\xff\xe0") == "JPEG" and format_of(b"RIFF\0\0\0\0WEBPVP8 ") == "WEBP"
    for other in (b"%!PS-Adobe-3.0 EPSF", b"icns", b"\0\0\1\0", b"qoif", b"P3\n1 1", b"<svg", b"PK\3\4", b"", b"RIFF"):
        assert format_of(other) is None


def form(*parts):
    return b"".join(b"--x\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + b"--x--\r\n"


def test_a_forms_file_is_found_by_its_content():
    image = npy(np.zeros((2, 2, 1), np.uint8))
    note = (b'Content-Disposition: form-data; name="note"', b"hello")
    assert content_of_form(form((HEAD, image)), FORM) == image
    assert content_of_form(form(note, (b'Content-Disposition: form-data; name="a"', image)), FORM) == image
    assert content_of_form(form((HEAD, b"text")), FORM) == b"text"
    assert content_of_form(b"\r\n" * 1000 + form((HEAD, image)) + b"a" * 1000, FORM + '; charset="utf\t8"') == image


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (form((HEAD, b"a"), (HEAD, b"b")), FORM, "2 files"),
        (form((b'Content-Disposition: form-data; name="a"', b"text")), FORM, "no file"),
        (form((HEAD, b"")) * 100, FORM, "more than 16 parts"),
        (form((HEAD + b"\r\nX: " + b"a" * 10_000, b"a")), FORM, "8192"),
        (b"x", FORM, "boundary"),
        (b"--", "multipart/form-data", "boundary"),
        (b"--", "multipart/form-data; boundary=", "boundary"),
        (b"--", "multipart/form-data; boundary=" + "y" * 100, "boundary"),
        (b"--", 'multipart/form-data; a="' + '\\"' * 20_000, "boundary"),
    ],
    ids=str,
)
def test_a_bad_form_gets_a_reason(body, content_type, reason):
    with pytest.raises(ContentError, match=reason) as caught:
        content_of_form(body, content_type)
    assert caught.value.status == 400
