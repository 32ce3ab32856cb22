"""Tests of the conversion to 8-bit RGB: value ranges against float64 NumPy, transparency against the definition."""

import struct

import numpy as np
import pytest
from PIL import Image

from kd_accel.data.color import UnknownRangeError
from kd_accel.data.decode import Decoder
from tests.support.image_files import encoded, png, tiff

S = 8
BACKGROUNDS = {"black": 0, "white": 255}


def decoded(data, **settings):
    return Decoder(S, **settings).decode(data)


def values(low, high, dtype):
    """Return 64 pixels that include both ends."""
    return np.linspace(low, high, S * S).astype(dtype).reshape(S, S)


def mapped(levels, low, high):
    """Return the linear map of levels to 0..255, rounded and clipped, as gray RGB."""
    scaled = np.clip(np.rint((levels.astype(np.float64) - low) / (high - low) * 255), 0, 255)
    return np.repeat(scaled.astype(np.uint8)[:, :, None], 3, axis=2)


def saved(levels, kind="TIFF"):
    return encoded(Image.fromarray(levels), kind)


def signed_tiff(levels):
    return tiff(levels.astype("<i2").tobytes(), (S, S), 16, sample_format=2)


@pytest.mark.parametrize(
    ("data", "levels", "pixel_range"),
    [
        (saved(values(0, 1, np.float32)), values(0, 1, np.float32), (0, 1)),
        (saved(values(-3, 2.5, np.float32)), values(-3, 2.5, np.float32), (-1, 2)),
        (saved(values(0, 1, np.float32), "PPM"), values(0, 1, np.float32), (0, 2)),
        (saved(values(0, 70_000, np.int32)), values(0, 70_000, np.int32), (0, 65_535)),
        (signed_tiff(values(-1000, 3000, np.int16)), values(-1000, 3000, np.int16), (-160, 240)),
        (saved(values(0, 4095, np.uint16)), values(0, 4095, np.uint16), (0, 4095)),
        (saved(values(0, 4095, np.uint16), "PNG"), values(0, 4095, np.uint16), (300, 3000)),
        (saved(values(0, 65_535, np.uint16), "PNG"), values(0, 65_535, np.uint16), (10_000, 20_000)),
        (saved(values(0, 4095, np.uint16), "JPEG2000"), values(0, 4095, np.uint16), (0, 4095)),
    ],
    ids=["float", "float, clipped", "pfm", "int32", "int16", "12 bits", "window", "16 bits", "jpeg 2000"],
)
def test_a_given_range_is_mapped_linearly(data, levels, pixel_range):
    assert np.array_equal(decoded(data, pixel_range=pixel_range), mapped(levels, *pixel_range))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (saved(values(0, 1, np.float32)), "float values from 0 to 1, .*pixel_range: .low, high., such as .0, 1."),
        (saved(values(0, 200, np.float32)), "float values from 0 to 200, .* such as .0, 255."),
        (saved(values(-5, 900, np.float32)), "float values from -5 to 900, .* such as the smallest and the largest value"),
        (saved(values(0, 70_000, np.int32)), "32-bit integer values from 0 to 70000"),
        (signed_tiff(values(-1000, 3000, np.int16)), "signed 16-bit values from -1000 to 3000"),
        (saved(values(3, 4095, np.uint16)), r"16-bit values from 3 to 4095, .* \[0, 4095\] for 12-bit values, or \[0, 65535\]"),
        (saved(values(0, 1, np.uint16), "PNG"), "16-bit values from 0 to 1,"),
        (png(np.full((S, S, 3), 900), 16, 2), "16-bit values from 900 to 900"),
        (png(np.full((S, S, 4), 900), 16, 6), "16-bit values from 900 to 900"),
        (png(np.full((S, S, 2), 900), 16, 4), "16-bit values from 900 to 900"),
    ],
)
def test_a_range_that_the_type_does_not_define_is_refused(data, problem):
    with pytest.raises(UnknownRangeError, match=problem):
        decoded(data)


def test_16_bits_are_scaled_by_their_type():
    every = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(Decoder(256).decode(saved(every, "PNG"))[..., 0], np.rint(every / 257).astype(np.uint8))
    assert np.array_equal(Decoder(256, pixel_range=(0, 65_535)).decode(saved(every)), Decoder(256).decode(saved(every)))


def test_the_smallest_16_bit_maximum_that_is_not_ambiguous_is_4096():
    levels = values(0, 4096, np.uint16)
    assert np.array_equal(decoded(saved(levels)), mapped(levels, 0, 65_535))


def test_black_16_bit_images_are_black_in_any_range():
    assert not decoded(saved(np.zeros((S, S), dtype=np.uint16))).any()
    assert not decoded(png(np.zeros((S, S, 3)), 16, 2)).any()


def test_12_bits_per_sample_are_scaled_by_their_type():
    levels = np.arange(S * S).reshape(S, S) * 65
    pairs = levels.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = tiff(packed.astype(np.uint8).tobytes(), (S, S), 12)
    assert np.array_equal(decoded(data), mapped(levels, 0, 4095))
    assert np.array_equal(decoded(data, pixel_range=(0, 2000)), mapped(levels, 0, 2000))


def test_pgm_is_scaled_by_the_maximum_in_the_file():
    levels = values(0, 4095, np.uint16)
    data = b"P5 8 8 4095\n" + levels.astype(">u2").tobytes()
    difference = decoded(data).astype(int) - mapped(levels, 0, 4095)
    assert np.abs(difference).max() <= 1
    assert np.array_equal(decoded(data, pixel_range=(0, 1)), decoded(data))


def test_tiff_in_which_the_smallest_value_is_white_is_inverted():
    levels = values(0, 65_535, np.uint16)
    data = tiff(levels.astype("<u2").tobytes(), (S, S), 16, photometric=0)
    assert np.array_equal(decoded(data), 255 - mapped(levels, 0, 65_535))


@pytest.mark.parametrize("kind", [2, 4, 6], ids=["rgb", "gray-alpha", "rgba"])
@pytest.mark.parametrize("depth", [12, 16])
def test_16_bit_color_is_mapped_with_all_its_bits(kind, depth):
    channels = {2: 3, 4: 2, 6: 4}[kind]
    levels = np.random.default_rng(kind).integers(0, 2**depth, (S, S, channels))
    if channels in (2, 4):
        levels[..., -1] = 65_535
    color = levels[..., :3] if channels > 2 else np.repeat(levels[..., :1], 3, axis=2)
    expected = np.rint(color / (2**depth - 1) * 255)
    assert np.array_equal(decoded(png(levels, 16, kind), pixel_range=(0, 2**depth - 1)), expected)


@pytest.mark.parametrize("compression", [1, 8], ids=["raw", "deflate"])
def test_16_bit_color_of_a_tiff_is_mapped_with_all_its_bits(compression):
    levels = np.random.default_rng(0).integers(0, 4096, (S, S, 3))
    data = tiff(levels.astype("<u2").tobytes(), (S, S), 16, samples=3, photometric=2, compression=compression)
    assert np.array_equal(decoded(data, pixel_range=(0, 4095)), np.rint(levels / 4095 * 255))
    with pytest.raises(UnknownRangeError, match="16-bit values"):
        decoded(data)


def test_8_bit_images_are_not_affected_by_the_range():
    gray, color = (np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) for shape in ((S, S), (S, S, 3)))
    for image in (gray, color):
        assert np.array_equal(decoded(saved(image), pixel_range=(0, 4095)), decoded(saved(image)))


def test_pixels_that_are_not_a_number_are_refused():
    levels = values(0, 1, np.float32)
    levels[3, 4] = np.nan
    with pytest.raises(ValueError, match="not a number"):
        decoded(saved(levels), pixel_range=(0, 1))
    levels[3, 4] = np.inf
    assert decoded(saved(levels), pixel_range=(0, 1))[3, 4].tolist() == [255] * 3


def test_pil_images_are_converted_like_files():
    levels = values(0, 1, np.float32)
    decoder = Decoder(S, pixel_range=(0, 1))
    assert np.array_equal(decoder.fit_image(Image.fromarray(levels)), decoder.decode(saved(levels)))
    with pytest.raises(UnknownRangeError, match="float values"):
        Decoder(S).fit_image(Image.fromarray(levels))


def composited(color, alpha, background):
    """Return the color over the background by the definition, unrounded."""
    alpha = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return alpha * np.asarray(color) + (1 - alpha) * BACKGROUNDS[background]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGBA-WEBP", "RGBA-TIFF", "LA-JPEG2000", "RGBA-AVIF"])
def test_alpha_is_composited_over_the_background(mode, background):
    alpha = np.linspace(0, 255, S * S).astype(np.uint8).reshape(S, S)
    gray = np.full((S, S), 90, dtype=np.uint8)
    kind = mode.partition("-")[2] or "PNG"
    if mode.startswith("RGBA"):
        image = Image.fromarray(np.dstack([gray, gray + 50, gray // 2, alpha]))
        color = [90, 140, 45]
    elif mode.startswith("LA"):
        image, color = Image.merge("LA", (Image.fromarray(gray), Image.fromarray(alpha))), [90] * 3
    else:
        image = Image.fromarray(np.arange(S * S, dtype=np.uint8).reshape(S, S), "L")
        image.putpalette([90, 140, 45] * S * S)
        color = [90, 140, 45]
    if mode == "PA":
        image, kind = Image.merge("PA", (image, Image.fromarray(alpha))), "TIFF"
        image.putpalette([90, 140, 45] * S * S)
    options = {"transparency": alpha.tobytes()} if mode == "P" else {}
    options |= {"WEBP": {"lossless": True, "exact": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    pixels = decoded(encoded(image, kind, **options), background=background)
    assert np.abs(pixels - composited(color, alpha, background)).max() <= (3 if kind == "AVIF" else 1)


def keyed(depth, kind, levels, key):
    return png(levels, depth, kind, (b"tRNS", struct.pack(f">{len(key)}H", *key)))


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(
    ("depth", "kind", "opaque", "key", "expected"),
    [
        (1, 0, [1], [0], [255] * 3),
        (1, 0, [0], [1], [0] * 3),
        (2, 0, [1], [2], [85] * 3),
        (4, 0, [3], [10], [51] * 3),
        (8, 0, [77], [90], [77] * 3),
        (16, 0, [51 * 257], [52 * 257], [51] * 3),
        (16, 0, [52 * 257 + 1], [52 * 257], [52] * 3),
        (8, 2, [9, 8, 7], [9, 8, 6], [9, 8, 7]),
        (16, 2, [9000, 8000, 7001], [9000, 8000, 7000], [35, 31, 27]),
        (16, 2, [300, 40000, 300], [300, 300, 300], [1, 156, 1]),
    ],
)
def test_a_transparent_color_is_treated_as_alpha(depth, kind, opaque, key, expected, background):
    levels = np.array([key if column % 2 else opaque for column in range(S)] * S).reshape(S, S, -1)
    pixels = decoded(keyed(depth, kind, levels, key), background=background)
    assert pixels[:, ::2].reshape(-1, 3).tolist() == [expected] * (S * S // 2)
    assert (pixels[:, 1::2] == BACKGROUNDS[background]).all()


def test_black_ink_on_transparency_is_seen_on_white():
    ink = np.zeros((S, S, 4), dtype=np.uint8)
    ink[2:6, 2:6, 3] = 255
    assert not decoded(saved(ink, "PNG")).any()
    white = decoded(saved(ink, "PNG"), background="white")
    assert not white[2:6, 2:6].any()
    assert (white.sum(axis=2) == 0).sum() == 16
    assert (white[0] == 255).all()


def test_a_transparent_color_of_16_bits_is_mapped_with_the_range():
    levels = np.array([[[1000, 2000, 4095], [5, 6, 7]] * 4] * S)
    pixels = decoded(keyed(16, 2, levels, [5, 6, 7]), background="white", pixel_range=(0, 4095))
    assert pixels[:, ::2].reshape(-1, 3).tolist() == [[62, 125, 255]] * 32
    assert (pixels[:, 1::2] == 255).all()
