"""A folder of photos with every oddity of a user's own data, through all commands: each oddity is read right, or named."""

import json
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.datamodule import load_data
from tests.support.image_files import encoded, noise, png, tiff
from tests.support.launching import run, summary

pytestmark = [pytest.mark.usefixtures("own_home"), pytest.mark.slow, pytest.mark.proof]

SETTINGS = {"image_size": 16, "background": "white", "pixel_range": [0, 4095], "on_error": "skip", "memory_limit_mib": 1}
SIDE = 12
COLORS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "__fox__": (30, 30, 200), "caf\xe9": (190, 190, 20)}
COLORS |= {"cafe\u0301": (20, 190, 190), "wolf": (190, 20, 190)}
LINKED, NESTED = "wolf", {"dog": "2023/may"}


def photo(generator, name):
    """Return noise around the color of a class."""
    pixels = generator.integers(-30, 30, (SIDE, SIDE, 3)) + COLORS[name]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_classes(root, generator):
    """Write 20 training and 8 test photos of each class; one class is a link, and one has nested directories."""
    for split, count in (("train", 20), ("test", 8)):
        for name in COLORS:
            place = root.parent / "elsewhere" / split / name if name == LINKED else root / split / name / NESTED.get(name, "")
            place.mkdir(parents=True)
            for number in range(count):
                photo(generator, name).save(place / f"{number:03}.png")
        (root / split / LINKED).symlink_to(root.parent / "elsewhere" / split / LINKED)


def write_left_out(root):
    """Write files that are not read, each for another reason, and a class of which none is read."""
    train = root / "train"
    for folder in ("bird", "empty", ".hidden", "__MACOSX"):
        (train / folder).mkdir()
    for path in ("bird/1.heic", "cat/2.heic", "cat/README", ".hidden/1.png", "__MACOSX/1.png", "cat/.DS_Store", "notes.txt"):
        (train / path).write_text("x")


def with_segment(image, content):
    """Return a JPEG with one more segment of metadata."""
    data = encoded(image, "JPEG", quality=95, subsampling=0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + data[2:]


def odd_files(generator):
    """Return {name of a file: (its content, the color at its upper left corner)} of images that need care."""
    red = photo(generator, "cat")
    ink = np.zeros((SIDE, SIDE, 4), np.uint8)
    ink[4:, 4:, 3] = 255
    turned = Image.fromarray(np.repeat(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), 6, axis=1).repeat(SIDE, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 3
    deep = np.full((SIDE, SIDE), 4095.0, np.float32)
    deep[6:] = generator.integers(0, 4095, (6, SIDE))
    huge = Image.linear_gradient("L").resize((8600, 8200))
    keyed = np.zeros((SIDE, SIDE, 3), np.uint8)
    keyed[6:] = 200
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>caf\xe9 \xff</x:xmpmeta>"
    return {
        "float.tif": (encoded(Image.fromarray(deep), "TIFF"), (255, 255, 255)),
        "12bits.png": (encoded(Image.fromarray(deep.astype(np.uint16))), (255, 255, 255)),
        "32bits.tif": (tiff(deep.astype("<i4").tobytes(), (SIDE, SIDE), 32, sample_format=2), (255, 255, 255)),
        "ink.png": (encoded(Image.fromarray(ink)), (255, 255, 255)),
        "keyed.png": (png(keyed, 8, 2, (b"tRNS", struct.pack(">HHH", 0, 0, 0))), (255, 255, 255)),
        "turned.jpg": (encoded(turned, "JPEG", quality=100, subsampling=0, exif=exif), (0, 0, 255)),
        "printed.jpg": (encoded(red.convert("CMYK"), "JPEG", quality=100), red),
        "gray.png": (encoded(red.convert("L")), red.convert("L")),
        "wrong_ending.jpg": (encoded(red.rotate(90), "PNG"), red.rotate(90)),
        "camera.avif": (encoded(red.rotate(180), "AVIF", quality=100), red.rotate(180)),
        "xmp.jpg": (with_segment(red, xmp), red),
        "huge.jpg": (encoded(huge, "JPEG", quality=30), (11, 11, 11)),
    }


@pytest.fixture
def photos(tmp_path):
    """Write a folder with every oddity."""
    generator, root = np.random.default_rng(0), tmp_path / "photos"
    write_classes(root, generator)
    write_left_out(root)
    cat, dog = root / "train/cat", root / "train/dog/2023/may"
    for name, (content, _) in odd_files(generator).items():
        (cat / f"odd_{name}").write_bytes(content)
    Image.new("RGB", (SIDE, SIDE), (9, 9, 9)).save(cat / "constant.png")
    noise(generator, SIDE).save(cat / "two_labels.png")
    shutil.copy(cat / "two_labels.png", dog / "two_labels.png")
    shutil.copy(cat / "003.png", cat / "repeated.png")
    shutil.copy(cat / "004.png", root / "test/cat/leak.png")
    (dog / "005.png").write_bytes((dog / "005.png").read_bytes()[:90])
    (root / "test/cat/006.png").write_bytes(b"")
    return root


OF_FILES = [
    "train: 1 file left out (files of type .heic)",
    "train: 1 file left out (files without an ending)",
    "train: 1 file left out (in folders whose name begins with a dot)",
    "train: 1 file left out (in __MACOSX)",
    "train: 1 file left out (outside of the class folders)",
    "train: 1 file left out (their name, or that of a folder, begins with a dot)",
    "train: class folders without files left out: 'empty'",
    r"the class names 'cafe\u0301', 'caf\xe9' look alike but differ",
    "1 of 48 test samples and 1 of 13 validation samples are also training samples",
    "1 image of the training samples occurs under two labels",
]


def test_every_oddity_is_named_by_the_check_and_at_each_start(photos, tmp_path):
    flags = [f"--data.{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--data.source=imagefolder:{photos}", "--data.val_fraction=0.1", "--data.views=2", "--data.transform=crop_flip"]
    refused = run("data", "check", *flags, code=2).stderr
    assert "none of the files of the classes 'bird' is read" in refused and "(files of type .heic)" in refused
    shutil.rmtree(photos / "train/bird")

    checked = run("data", "check", *flags, code=2)
    for line in [*OF_FILES, "1 of one color: samples", "2 repeat an earlier image", "may/005.png, cannot be decoded"]:
        assert line in checked.stdout
    assert "test/cat/006.png, cannot be decoded" in checked.stdout
    assert "2 of 185 images cannot be decoded" in checked.stderr

    trained = ["--optim.lr=0.05", "--train.batch_size=16", "--tracking.wandb=disabled"]
    teacher = ["--role=teacher", "--model.arch=import:tests.support.models:teacher", "--train.epochs=6"]
    student = ["--model.arch=import:tests.support.models:student", "--train.epochs=2", f"--teacher.run={tmp_path}/teacher"]
    student += ["--distill.features.mse={weight: 0.1, layers: [layer1], args: {pca_images: 64}}"]
    student += ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache", "--teacher.cache.dtype=float32"]
    starts = {
        "teacher": run("train", f"--run_dir={tmp_path}/teacher", *flags, *trained, *teacher),
        "cache": run("cache", "build", *flags, *trained, *student),
        "student": run("train", f"--run_dir={tmp_path}/student", *flags, *trained, *student),
    }
    for done in starts.values():
        for line in [*OF_FILES, "skip leaves out 1 of ", "may/005.png, cannot be decoded"]:
            assert line in done.stdout + done.stderr
    assert "6, with " in starts["teacher"].stdout and "0 empty" in starts["teacher"].stdout
    assert "% on the test samples" in starts["student"].stdout

    evaluated = run("evaluate", tmp_path / "student")
    assert "data.on_error: skip leaves out 1 of 49 test samples" in evaluated.stderr
    result = json.loads(evaluated.stdout)
    assert result["samples"] == 48 and result["accuracy"] == summary(tmp_path / "student")["accuracy"]
    run("report", tmp_path / "teacher", tmp_path / "student", "--out", tmp_path / "report")
    table = (tmp_path / "report/results.md").read_text()
    assert all(f"| {100 * summary(tmp_path / name)['accuracy']:.2f} |" in table for name in ("teacher", "student"))


def test_every_odd_image_has_its_colors(tmp_path):
    files = odd_files(np.random.default_rng(0))
    for split in ("train", "test"):
        (tmp_path / split / "odd").mkdir(parents=True)
        for name, (content, _) in files.items():
            (tmp_path / split / "odd" / name).write_bytes(content)
    data = load_data(DataConfig(source=f"imagefolder:{tmp_path}", **{**SETTINGS, "image_size": SIDE}))
    for name, pixels in zip(sorted(files), data.train.pixels(np.arange(len(files))).astype(int), strict=True):
        expected = files[name][1]
        if isinstance(expected, tuple):
            assert pixels.std() > 1 and np.abs(pixels[0, 0] - expected).max() <= 3, name
        else:
            mean = np.asarray(expected.convert("RGB")).mean((0, 1))
            assert np.abs(pixels.mean((0, 1)) - mean).max() < 6, name
