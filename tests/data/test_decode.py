"""Tests of image decoding: files of every kind become RGB [S, S, 3], and files that cannot be read are refused by reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional, v2

from kd_accel.data import decode as decode_module
from kd_accel.data.decode import MAX_JPEG_PIXELS, MAX_PIXELS, Crop, Decoder, jpeg_scale
from tests.support.image_files import color, encoded, png, png_chunk, tiff

RED_LEFT = np.zeros((8, 8, 3), dtype=np.uint8)
RED_LEFT[:, :4, 0] = 255
RED_LEFT[:2, :, 1] = 200


def filled(mode, value):
    return Image.new(mode, (8, 8), value)


def photo(factor=1):
    """Return a photo of 640x427 pixels, enlarged by a factor."""
    image = Image.fromarray(load_sample_images().images[0])
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS) if factor > 1 else image


PALETTE = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(filled("L", 77)), (77, 77, 77)),
        (encoded(filled("1", 1)), (255, 255, 255)),
        (encoded(filled("1", 1), "TIFF", compression="group4"), (255, 255, 255)),
        (encoded(PALETTE), (10, 200, 30)),
        (encoded(filled("CMYK", (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (encoded(filled("CMYK", (255, 0, 0, 0)), "JPEG", quality=100), (0, 255, 255)),
        (encoded(filled("YCbCr", (128, 128, 128)), "TIFF", compression="jpeg"), (128, 128, 128)),
        (tiff(bytes([200, 100, 50]) * 64, (8, 8), 8, samples=3, photometric=2, compression=8), (200, 100, 50)),
        (b"P6 8 8 255\n" + bytes([1, 2, 3]) * 64, (1, 2, 3)),
    ],
    ids=["gray", "1-bit", "fax", "palette", "cmyk", "cmyk jpeg", "ycbcr", "deflate", "ppm"],
)
def test_every_mode_is_converted_to_rgb(data, expected):
    assert (Decoder(8).decode(data) == np.array(expected)).all()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "WEBP", "AVIF"])
def test_every_format_is_read_by_its_content(kind):
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    pixels = Decoder(8).decode(encoded(Image.fromarray(RED_LEFT), kind, **lossless))
    assert np.abs(pixels.astype(int) - RED_LEFT).max() <= (3 if kind == "AVIF" else 0)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"progressive": True})])
def test_pixels_equal_those_of_torchvision(kind, options):
    image = photo().crop((0, 0, 200, 200))
    data = encoded(image, kind, **options)
    expected = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    assert np.array_equal(Decoder(200).decode(data), expected.permute(1, 2, 0).numpy())


def test_other_sizes_are_center_cropped_and_resized():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    # The outer two columns are excluded because the resize filter overlaps the edge of the crop.
    assert (Decoder(10).decode(encoded(wide))[:, 2:-2] == np.array([0, 0, 255])).all()
    assert Decoder(10).decode(encoded(color(1, (3, 5)))).shape == (10, 10, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(kind, orientation):
    image = photo().crop((0, 0, 90, 60))
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(Decoder(24).decode(data), Decoder(24).fit_array(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 427), (637, 421)])
def test_orientation_of_a_reduced_jpeg_is_applied(orientation, size):
    image = photo(2).resize(size)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", quality=95, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    for crop in (None, Crop(lambda width, height: (width / 3, height / 5, width / 2, height / 2))):
        full, reduced = Decoder(48).fit_array(upright, crop), Decoder(48).decode(data, crop)
        difference = np.abs(full.astype(int) - reduced)
        assert difference.max() > 0 and difference.mean() < 2, (orientation, difference.mean())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
@pytest.mark.parametrize("box", [(0, 0, 90, 60), (13, 7, 30, 41), (60, 30, 30, 30), (0, 0, 32, 32)])
@pytest.mark.parametrize("interpolation", [None, "nearest", "bilinear", "bicubic"])
def test_a_crop_is_cut_from_the_original_image(kind, box, interpolation):
    data = encoded(photo().crop((0, 0, 90, 60)), kind)
    original = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    left, top, width, height = box
    crop = Crop(lambda *size: box if size == (90, 60) else None, interpolation)
    if interpolation is None:
        edges = (left, top, left + width, top + height)
        expected = np.asarray(Image.fromarray(original).resize((32, 32), Image.Resampling.BICUBIC, box=edges))
    else:
        mode = functional.InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)
        tensor = torch.from_numpy(original).permute(2, 0, 1)
        expected = v2.functional.resized_crop(tensor, top, left, height, width, [32, 32], mode).permute(1, 2, 0).numpy()
    assert np.array_equal(Decoder(32).decode(data, crop), expected)
    assert np.array_equal(Decoder(32).fit_array(original, crop), expected)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"quality": 30}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_crop_of_a_jpeg_is_the_same_with_both_decoders(mode, options, monkeypatch):
    data = encoded(photo().convert(mode), "JPEG", **{"quality": 90, **options})
    crop = Crop(lambda width, height: (50, 60, 130, 99), "bilinear")
    expected = Decoder(64).decode(data, crop)
    monkeypatch.setattr(decode_module, "decode_plain_jpeg", lambda data: None)
    assert np.array_equal(Decoder(64).decode(data, crop), expected)


@pytest.mark.parametrize("cut", [2, 500, 20_000])
def test_a_crop_of_a_truncated_jpeg_is_refused(cut):
    data = encoded(photo(), "JPEG", quality=90)
    with pytest.raises(ValueError, match="truncated"):
        Decoder(64).decode(data[:-cut], Crop(lambda width, height: (0, 0, 64, 64), "bilinear"))


@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 1.0])
def test_the_central_square_is_that_of_resize_and_center_crop(crop_pct):
    image = photo().resize((448, 448))
    # These sizes divide each other, so that torchvision rounds no position.
    resized = functional.resize(image, round(112 / crop_pct), functional.InterpolationMode.BICUBIC)
    actual = Decoder(112, crop_pct=crop_pct).decode(encoded(image, "PNG"))
    assert np.abs(actual.astype(int) - np.asarray(functional.center_crop(resized, 112))).max() <= 1


def with_segment(content):
    """Return a red JPEG with an APP1 segment after its first marker."""
    data = encoded(filled("RGB", (255, 0, 0)), "JPEG", quality=100)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


@pytest.mark.parametrize(
    "content",
    [
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>caf\xe9 \xa8\xff</x:xmpmeta>",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
        b"Exif\0\0not a TIFF header",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0",
    ],
    ids=["xmp", "entries", "header", "offset", "empty"],
)
def test_damaged_metadata_is_ignored(content):
    assert (np.abs(Decoder(8).decode(with_segment(content)) - np.array([254, 0, 0])) <= 1).all()


def test_the_orientation_in_xmp_that_is_not_utf_8_is_applied():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta caf\xe9 tiff:Orientation="3"></x:xmpmeta>'
    data = encoded(Image.fromarray(RED_LEFT), "JPEG", quality=100, subsampling=0)
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    assert np.array_equal(Decoder(8).decode(turned), np.rot90(Decoder(8).decode(data), 2))


@pytest.mark.parametrize("place", ["before the pixels", "after the pixels"])
@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_large_texts_and_profiles_of_a_png_are_skipped(name, place):
    compressed = zlib.compress(bytes(3 * 2**20))
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[name]
    chunk = png_chunk(name, head + compressed)
    data = encoded(Image.fromarray(RED_LEFT))
    at = 33 if place == "before the pixels" else len(data) - 12
    assert np.array_equal(Decoder(8).decode(data[:at] + chunk + data[at:]), RED_LEFT)


def test_many_texts_of_a_png_are_skipped():
    texts = PngInfo()
    for number in range(70):
        texts.add_text(f"key {number}", "x" * 2**20, zip=True)
    assert np.array_equal(Decoder(8).decode(encoded(Image.fromarray(RED_LEFT), pnginfo=texts)), RED_LEFT)


def test_color_profiles_are_ignored():
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    plain, tagged, damaged = (
        Decoder(32).decode(encoded(photo(), "JPEG", **options))
        for options in ({}, {"icc_profile": bytes(profile)}, {"icc_profile": b"damaged"})
    )
    assert np.array_equal(tagged, plain)
    assert np.array_equal(damaged, plain)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_is_used(kind):
    frames = [Image.fromarray(frame) for frame in (RED_LEFT, 255 - RED_LEFT)]
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100, "subsampling": 0}}.get(kind, {})
    pixels = Decoder(8).decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(pixels.astype(int) - RED_LEFT).max() <= (3 if kind == "MPO" else 0)


def test_a_bitmap_with_alpha_is_composited():
    alpha = np.repeat(np.array([0, 255], dtype=np.uint8), 32).reshape(8, 8)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 56, 8, -8, 1, 32, 3, 256, 0, 0, 0, 0) + masks
    pixels = np.dstack([RED_LEFT[..., ::-1], alpha]).tobytes()
    data = b"BM" + struct.pack("<IHHI", 70 + len(pixels), 0, 0, 70) + header + pixels
    assert np.array_equal(Decoder(8).decode(data), np.where(alpha[..., None] == 255, RED_LEFT, 0))


def test_premultiplied_alpha_of_a_tiff_is_composited():
    pixels = bytes([100, 50, 0, 128]) * 64
    data = encoded(Image.frombytes("RGBA", (8, 8), pixels), "TIFF")
    # Value 2 of the tag ExtraSamples is straight alpha, 1 is premultiplied.
    straight, premultiplied = (struct.pack("<HHIHH", 338, 3, 1, value, 0) for value in (2, 1))
    assert data.count(straight) == 1
    over_black = Decoder(8).decode(data.replace(straight, premultiplied))
    assert np.abs(over_black - np.array([100, 50, 0])).max() <= 1


def test_interlaced_png_is_read():
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, step_y, step_x in passes for row in levels[y::step_y, x::step_x] if row.size
    )
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    assert np.array_equal(Decoder(8).decode(data), levels)


def test_ycck_jpeg_is_read():
    data = encoded(filled("CMYK", (40, 90, 160, 20)), "JPEG", quality=100)
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    y, cb, cr, k = (255 - value for value in (40, 90, 160, 20))
    # The last byte of the segment declares YCCK, in which files store inverted ink.
    red, green, blue = y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    inks = [np.clip(value, 0, 255) for value in (red, green, blue)]
    expected = [(255 - ink) * k / 255 for ink in inks]
    pixels = Decoder(8).decode(data[: marker + 11] + b"\2" + data[marker + 12 :])
    assert np.abs(pixels - np.array(expected)).max() <= 3


def test_lab_equals_the_definition():
    lab = np.random.default_rng(0).integers([100, 118, 118], [200, 138, 138], (8, 8, 3)).astype(np.uint8)
    stored = lab.copy()
    stored[..., 1:] ^= 128
    pixels = Decoder(8).decode(tiff(stored.tobytes(), (8, 8), 8, samples=3, photometric=8))
    assert np.abs(pixels - lab_to_srgb(lab.astype(np.float64) - [0, 128, 128])).max() <= 2


def lab_to_srgb(lab):
    """Convert CIELAB under D50, lightness in 0..255, to sRGB in 0..255 (IEC 61966-2-1, Bradford adaptation)."""
    lightness = lab[..., 0] * 100 / 255
    y = (lightness + 16) / 116
    xyz = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(xyz > 6 / 29, xyz**3, 3 * (6 / 29) ** 2 * (xyz - 4 / 29)) * [0.96422, 1, 0.82521]
    to_rgb = [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    linear = np.clip(xyz @ np.array(to_rgb).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(photo(), "JPEG")[:-5000], "truncated"),
        (encoded(photo())[:-5000], "truncated"),
        (encoded(photo(), "WEBP")[:-5000], ""),
        (encoded(photo(), "TIFF")[:-5000], ""),
        (b"<html>404 Not Found</html>", "not an image file of a supported format"),
        (b"", "not an image file of a supported format"),
        (png(np.zeros((8, 8, 1)), 8, 0)[:-30] + bytes(30), ""),
    ],
    ids=["jpeg", "png", "webp", "tiff", "html", "empty", "zeros"],
)
def test_truncated_and_damaged_files_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason or None):
        Decoder(8).decode(data)


@pytest.mark.parametrize(
    ("size", "image_size", "scale"),
    [
        ((32, 32), 32, 1),
        ((500, 375), 224, 1),
        ((500, 375), 32, 4),
        ((4000, 3000), 224, 4),
        ((4000, 3000), 751, 1),
        ((4000, 3000), 750, 2),
        ((16320, 12240), 224, 8),
        ((16320, 12240), 4096, 2),
        ((30000, 3000), 4096, 1),
    ],
)
def test_a_jpeg_is_reduced_to_at_least_twice_the_image_size(size, image_size, scale):
    assert jpeg_scale(*size, min(size), image_size) == scale


@pytest.mark.parametrize(("side", "scale"), [(447, 1), (448, 2), (895, 2), (896, 4), (1792, 8), (3000, 8)])
def test_a_jpeg_is_reduced_to_at_least_the_image_size_for_a_random_crop(side, scale):
    assert jpeg_scale(4000, 3000, side, 224, is_random=True) == scale


@pytest.mark.parametrize("crop", [(0, 0, 640, 427), (0, 0, 427, 427), (3, 0, 404, 427)])
@pytest.mark.parametrize("image_size", [32, 48, 64, 100])
def test_a_reduced_jpeg_is_nearly_equal_to_a_full_one(image_size, crop, monkeypatch):
    data = encoded(photo().crop(crop), "JPEG", quality=92)
    assert jpeg_scale(crop[2] - crop[0], crop[3], min(crop[2] - crop[0], crop[3]), image_size) > 1
    reduced = Decoder(image_size).decode(data).astype(float)
    monkeypatch.setattr(decode_module, "jpeg_scale", lambda *sizes, **options: 1)
    full = Decoder(image_size).decode(data)
    # 1.0 to 3.4 without the fractions of a pixel by which a reduction rounds the sides up.
    assert np.abs(reduced - full).mean() < 1.1


def png_header(width, height):
    chunk = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def jpeg_of_declared_size(width, height):
    data = encoded(filled("RGB", 0), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (png_header(13_378, 13_378), MAX_PIXELS),
        (png_header(60_000, 60_000), "decompression bomb"),
        (jpeg_of_declared_size(65_500, 65_500), MAX_JPEG_PIXELS),
        (jpeg_of_declared_size(16_385, 16_384), MAX_JPEG_PIXELS),
    ],
    ids=["png", "large png", "large jpeg", "jpeg"],
)
def test_a_decompression_bomb_is_refused_before_its_memory_is_allocated(data, limit):
    with pytest.raises(ValueError, match=f"{limit}"):
        Decoder(8).decode(data)


def test_a_jpeg_beyond_the_limit_of_pillow_is_read(monkeypatch):
    data = encoded(photo(), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    pixels = Decoder(64).decode(data)
    monkeypatch.undo()
    assert np.array_equal(pixels, Decoder(64).decode(data))


@pytest.mark.slow
def test_a_photo_of_200_megapixels_is_read():
    gray = photo().convert("L")
    data = encoded(gray.resize((16_320, 12_240), Image.Resampling.BILINEAR), "JPEG", quality=60)
    assert jpeg_scale(16_320, 12_240, 12_240, 64) == 8
    small = Decoder(64).fit_image(gray.resize((1632, 1224), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(Decoder(64).decode(data) - small).mean() < 1


def test_a_large_image_with_alpha_is_averaged_before_it_is_composited(monkeypatch):
    alpha = Image.radial_gradient("L").resize((640, 427))
    data = encoded(Image.merge("RGBA", (*photo().split(), alpha)))
    full = Decoder(32, background="white").decode(data).astype(float)
    monkeypatch.setattr(decode_module, "_LARGE_PIXELS", 100_000)
    assert 0 < np.abs(Decoder(32, background="white").decode(data) - full).mean() < 1
