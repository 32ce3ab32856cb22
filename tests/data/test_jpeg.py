"""Tests of plain JPEG files: their size is read without Pillow, and every unusual file is left to Pillow."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import resized_crop as resized_crop_of_planes

from kd_accel.data import decode as decode_module
from kd_accel.data.decode import Crop, Decoder
from kd_accel.data.jpeg import plain_jpeg_size
from kd_accel.data.resize import resized_crop
from tests.support.image_files import encoded

PHOTO = Image.fromarray(load_sample_images().images[0]).crop((0, 0, 120, 90))
PLAIN = encoded(PHOTO, "JPEG", quality=90)
FRAME, SCAN = PLAIN.index(b"\xff\xc0"), PLAIN.index(b"\xff\xda")
CROP = Crop(lambda width, height: (10, 20, 70, 50), "bilinear")


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def turned(orientation, at=2):
    """Return the plain file with an EXIF orientation at a position."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return PLAIN[:at] + segment(0xE1, exif.tobytes()) + PLAIN[at:]


def changed(at, content):
    return PLAIN[:at] + content + PLAIN[at + len(content) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"comment": b"text"},
        {"icc_profile": bytes(300)},
        {"restart_marker_rows": 1},
    ],
    ids=str,
)
def test_the_size_of_a_plain_file_is_read(options):
    assert plain_jpeg_size(encoded(PHOTO, "JPEG", **options)) == (120, 90)


UNUSUAL = {
    "gray": encoded(PHOTO.convert("L"), "JPEG"),
    "cmyk": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "png": encoded(PHOTO, "PNG"),
    "exif": turned(6),
    "exif before the frame": turned(6, FRAME),
    "exif after the frame": turned(6, SCAN),
    "xmp": PLAIN[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>") + PLAIN[2:],
    "fill byte": PLAIN[:FRAME] + b"\xff" + PLAIN[FRAME:],
    "no marker": changed(FRAME, b"\0"),
    "arithmetic coding": changed(FRAME + 1, b"\xc9"),
    "12 bits": changed(FRAME + 4, b"\x0c"),
    "no height": changed(FRAME + 5, b"\0\0"),
    "no width": changed(FRAME + 7, b"\0\0"),
    "two frames": PLAIN[:SCAN] + segment(0xC0, PLAIN[FRAME + 4 : FRAME + 19]) + PLAIN[SCAN:],
    "empty": b"",
}


@pytest.mark.parametrize("data", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_any_other_file_is_left_to_pillow(data):
    assert plain_jpeg_size(data) is None


def test_a_header_that_is_cut_off_is_left_to_pillow():
    assert {plain_jpeg_size(PLAIN[:end]) for end in range(SCAN + 2)} == {None}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("at", [2, FRAME, SCAN])
def test_a_crop_is_cut_from_the_upright_image(at, orientation):
    data = turned(orientation, at)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    expected = resized_crop_of_planes(torch.from_numpy(upright).permute(2, 0, 1), 20, 10, 50, 70, [32, 32])
    assert np.array_equal(Decoder(32).decode(data, CROP), expected.permute(1, 2, 0).numpy())


def test_pillow_opens_only_files_that_it_must_convert_turn_or_reduce(monkeypatch):
    def refuse(data):
        raise ValueError("opened")

    monkeypatch.setattr(decode_module, "_open", refuse)
    Decoder(32).decode(PLAIN, CROP)
    for image_size, data, crop in ((32, turned(1), CROP), (64, PLAIN, None), (25, PLAIN, CROP)):
        with pytest.raises(ValueError, match="opened"):
            Decoder(image_size).decode(data, crop)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_a_resized_crop_is_contiguous(interpolation):
    """So that its copy to a batch needs no transposition, which takes as long as the resizing."""
    image = np.array(PHOTO)
    for source in (torch.from_numpy(image), PHOTO):
        assert resized_crop(source, (10, 20, 70, 50), 32, interpolation).flags.c_contiguous
