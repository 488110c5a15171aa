"""Decoded pixels are those that PIL shows, whoever decodes; what is no image is said to be none."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdpoint_jax.data import decode, opencv

RGB = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)


def encoded(mode, format, **options):
    image = Image.fromarray(RGB).convert(mode)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_with_gamma():
    chunks = PngInfo()
    chunks.add(b"gAMA", (100_000).to_bytes(4, "big"))
    return encoded("RGB", "PNG", pnginfo=chunks)


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("RGB", "JPEG", exif=exif)


FILES = {
    "jpeg": encoded("RGB", "JPEG"),
    "jpeg without subsampling": encoded("RGB", "JPEG", subsampling=0),
    "progressive jpeg": encoded("RGB", "JPEG", progressive=True),
    "grey jpeg": encoded("L", "JPEG"),
    "cmyk jpeg": encoded("CMYK", "JPEG"),
    "jpeg rotated by exif": rotated_by_exif(),
    "png": encoded("RGB", "PNG"),
    "png with gamma": png_with_gamma(),
    "grey png": encoded("L", "PNG"),
    "one-bit png": encoded("1", "PNG"),
    "alpha png": encoded("RGBA", "PNG"),
    "grey alpha png": encoded("LA", "PNG"),
    "palette png": encoded("P", "PNG"),
    "palette png with transparency": encoded("P", "PNG", transparency=bytes(range(200))),
    "rgb png with transparency": encoded("RGB", "PNG", transparency=(1, 2, 3)),
    "webp": encoded("RGB", "WEBP"),
    "alpha webp": encoded("RGBA", "WEBP"),
    "gif": encoded("P", "GIF"),
    "bmp": encoded("RGB", "BMP"),
    "tiff": encoded("RGB", "TIFF"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("with_opencv", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pil(name, mode, with_opencv, monkeypatch):
    if not with_opencv:
        monkeypatch.setattr(decode, "opencv", lambda: None)
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert(mode), np.int32)
    image = decode.decode(FILES[name], 3 if mode == "RGB" else 1)
    assert image.dtype == np.uint8 and image.shape == (13, 17, 3 if mode == "RGB" else 1)
    assert np.abs(image.reshape(expected.shape) - expected).max() == 0


@pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "png", "webp", "cmyk jpeg"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused(name, share):
    data = FILES[name]
    with pytest.raises(decode.BadImageError):
        decode.decode(data[: int(len(data) * share)], 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x10", b"\x89PNG\r\n\x1a\n", b"\0" * 99],
)
def test_what_is_no_image_is_refused_in_one_line(data):
    with pytest.raises(decode.BadImageError) as error:
        decode.decode(data, 3)
    assert str(error.value) and "\n" not in str(error.value)


def test_opencv_leaves_the_threads_to_the_pipeline():
    cv2 = opencv.opencv()
    if cv2 is None:
        pytest.skip("OpenCV is not installed")
    assert cv2.getNumThreads() == 1


def encode_grey(values, **kwargs):
    file = io.BytesIO()
    Image.fromarray(values).save(file, **kwargs)
    return file.getvalue()


RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_sixteen_bits_keep_their_shades(form, channels):
    image = decode.decode(encode_grey(RAMP, format=form), channels)
    np.testing.assert_array_equal(image[..., 0], RAMP >> 8)
    assert image.shape == (32, 32, channels)


def test_twelve_bits_in_a_tiff_are_twelve():
    data = encode_grey(RAMP >> 4, format="TIFF", tiffinfo={258: 16})
    image = Image.open(io.BytesIO(data))
    image.tag_v2[258] = (12,)
    np.testing.assert_array_equal(decode.from_pil(image, 1)[..., 0], RAMP >> 8)


def test_floating_point_images_from_0_to_1_keep_their_shades():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    np.testing.assert_array_equal(decode.decode(encode_grey(values, format="TIFF"), 1)[..., 0], np.round(255 * values))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_wide_values_up_to_255_are_what_they_are(kind):
    values = np.arange(0, 256, 4).reshape(8, 8)
    np.testing.assert_array_equal(decode.decode(encode_grey(values.astype(kind), format="TIFF"), 1)[..., 0], values)


@pytest.mark.parametrize("value", [300, -1, 70000])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_whose_white_is_not_known_are_refused(kind, value):
    values = np.full((4, 4), value, kind)
    values[0] = 0
    with pytest.raises(decode.BadImageError, match=f"{value}.*, whose white is not known"):
        decode.decode(encode_grey(values, format="TIFF"), 3)


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(decode.BadImageError, match="nan"):
        decode.decode(encode_grey(np.full((4, 4), np.nan, np.float32), format="TIFF"), 3)


@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "png", "webp"])
def test_more_pixels_than_pil_allows_are_refused_before_they_are_decoded(monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RGB[..., 0].size // 2 - 1)
    monkeypatch.setattr(decode, "_decode_cv2", lambda *_: pytest.fail("decoded"))
    with pytest.raises(decode.BadImageError, match="exceeds limit"):
        decode.decode(FILES[kind], 3)
