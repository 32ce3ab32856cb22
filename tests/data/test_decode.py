"""Whatever kind of image file there is, it becomes RGB of one size."""

import numpy as np
import pytest
from PIL import Image

from kd_accel.data.decode import MAX_PIXELS, decode
from tests.support.image_files import colour, encoded


def rgb(mode, value, **info):
    image = Image.new(mode, (8, 8), value)
    image.info.update(info)
    return image


PALETTE = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
DEEP = Image.fromarray(np.full((8, 8), 51 * 257, dtype=np.uint16))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(rgb("L", 77)), (77, 77, 77)),
        (encoded(rgb("1", 1)), (255, 255, 255)),
        (encoded(PALETTE), (10, 200, 30)),
        (encoded(rgb("RGBA", (200, 100, 50, 0))), (0, 0, 0)),
        (encoded(rgb("RGBA", (200, 100, 50, 255))), (200, 100, 50)),
        (encoded(rgb("LA", (90, 255))), (90, 90, 90)),
        (encoded(rgb("CMYK", (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (encoded(DEEP), (51, 51, 51)),
    ],
    ids=["gray", "1-bit", "palette", "transparent", "opaque", "gray-alpha", "cmyk", "16-bit"],
)
def test_every_kind_becomes_rgb(data, expected):
    assert (decode(data, 8) == np.array(expected)).all()


def test_other_sizes_are_scaled_and_cut_at_the_center():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    assert (decode(encoded(wide), 10)[:, 2:-2] == np.array([0, 0, 255])).all()  # the filter reaches over the edge
    assert decode(encoded(colour(1, (3, 5))), 10).shape == (10, 10, 3)


def test_orientation_is_applied():
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 3
    turned = decode(encoded(image, exif=exif), 8)
    assert turned[7].min() == 255
    assert turned[0].max() == 0


def test_a_huge_image_is_refused():
    side = int(MAX_PIXELS**0.5) + 2
    with pytest.raises(ValueError, match="pixels are more than"):
        decode(encoded(Image.new("1", (side, side))), 8)
