"""Tests of image decoding: every mode and size becomes RGB [S, S, 3]."""

import numpy as np
import pytest
from PIL import Image

from kd_accel.data.decode import MAX_PIXELS, decode
from tests.support.image_files import color, encoded


def filled(mode, value):
    return Image.new(mode, (8, 8), value)


PALETTE = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
DEEP = Image.fromarray(np.full((8, 8), 51 * 257, dtype=np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(filled("L", 77)), (77, 77, 77)),
        (encoded(filled("1", 1)), (255, 255, 255)),
        (encoded(PALETTE), (10, 200, 30)),
        (encoded(filled("RGBA", (200, 100, 50, 0))), (0, 0, 0)),
        (encoded(filled("RGBA", (200, 100, 50, 255))), (200, 100, 50)),
        (encoded(filled("LA", (90, 255))), (90, 90, 90)),
        (encoded(filled("CMYK", (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (encoded(DEEP), (51, 51, 51)),
    ],
    ids=["gray", "1-bit", "palette", "transparent", "opaque", "gray-alpha", "cmyk", "16-bit"],
)
def test_every_mode_is_converted_to_rgb(data, expected):
    assert (decode(data, 8) == np.array(expected)).all()


def test_other_sizes_are_center_cropped_and_resized():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    # The outer two columns are excluded because the resize filter overlaps the edge of the crop.
    assert (decode(encoded(wide), 10)[:, 2:-2] == np.array([0, 0, 255])).all()
    assert decode(encoded(color(1, (3, 5))), 10).shape == (10, 10, 3)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 3
    rotated = decode(encoded(image, exif=exif), 8)
    assert rotated[7].min() == 255
    assert rotated[0].max() == 0


def test_a_huge_image_is_refused():
    side = int(MAX_PIXELS**0.5) + 2
    with pytest.raises(ValueError, match="pixels exceed the limit of"):
        decode(encoded(Image.new("1", (side, side))), 8)
