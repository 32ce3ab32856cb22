"""Tests of `data.background` and `data.pixel_range` from the files of a source to the fingerprints and the saved model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import kd_accel as kd
from kd_accel.cache.compatibility import data_fields
from kd_accel.cache.differences import differing_fields
from kd_accel.config.data_schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.decode import Decoder
from kd_accel.errors import UserError
from tests.support.image_files import encoded
from tests.support.launching import train

STATISTICS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def ink(sample):
    """Return a black bar on transparency, with another width for each sample."""
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[:, : sample + 4, 3] = 255
    return pixels


def depth(sample):
    """Return a gradient of 12-bit values."""
    return np.linspace(sample, 4095 - sample, 32 * 32).astype(np.uint16).reshape(32, 32)


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes an image folder of two classes with ten and two images per class."""

    def write(make, kind="png"):
        for split, count in (("train", 10), ("test", 2)):
            for place, name in enumerate(("cat", "dog")):
                (tmp_path / split / name).mkdir(parents=True)
                for number in range(count):
                    Image.fromarray(make(2 * number + place)).save(tmp_path / split / name / f"{number}.{kind}")
        return f"imagefolder:{tmp_path}"

    return write


def loaded(source, **settings):
    return load_data(DataConfig(source=source, **STATISTICS, **settings))


def test_black_ink_on_transparency_is_visible_on_white(folder):
    source = folder(ink)
    assert not loaded(source).train.pixels(np.arange(20)).any()
    white = loaded(source, background="white").train.pixels(np.arange(20))
    assert [int((image == 0).all(axis=2).sum()) for image in white[:10]] == [32 * (2 * number + 4) for number in range(10)]


@pytest.mark.parametrize("memory_limit_mib", [1, 4096])
def test_12_bit_images_are_refused_by_name_with_the_range_as_remedy(folder, memory_limit_mib):
    source = folder(depth, "tif")
    with pytest.raises(UserError, match=r"sample 0 of the train split, .*cat/0\.tif, .* set data\.pixel_range: \[low, high\]"):
        load_data(DataConfig(source=source, image_size=32, memory_limit_mib=memory_limit_mib))
    data = loaded(source, pixel_range=[0, 4095], memory_limit_mib=memory_limit_mib)
    assert np.array_equal(data.train.pixels(np.arange(1))[0, ..., 0], np.rint(depth(0) / 4095 * 255))


def test_without_the_range_no_image_is_read_as_black(folder):
    data = loaded(folder(depth, "tif"), pixel_range=[0, 4095])
    assert np.mean(data.train.pixels(np.arange(20))) == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("settings", [{"background": "white"}, {"pixel_range": [0, 4095]}])
def test_a_cache_and_a_run_of_other_pixels_are_refused_by_the_setting(folder, settings):
    source = folder(ink)
    default, changed = loaded(source), loaded(source, **settings)
    ((name, value),) = settings.items()
    shown = {"background": "black in the cache, white now", "pixel_range": "not set in the cache, [0.0, 4095.0] now"}[name]
    assert differing_fields(data_fields(default), data_fields(changed)) == [f"data.{name}: {shown}"]
    assert default.fingerprint_fields()["pixels"] != changed.fingerprint_fields()["pixels"]
    assert changed.fingerprint_fields()["pixels"][name] == value


def test_the_version_of_the_decoding_is_part_of_the_fingerprint(folder, monkeypatch):
    data = loaded(folder(ink))
    before = data_fields(data)
    monkeypatch.setattr("kd_accel.data.decode.DECODE_VERSION", 99)
    (line,) = differing_fields(before, data_fields(data))
    assert line.startswith("version (of kd_accel's image decoding, not a setting):")


def test_a_saved_model_decodes_as_in_training(folder, tmp_path):
    source, run = folder(ink), tmp_path / "run"
    flags = [f"--data.source={source}", "--data.background=white", "--data.pixel_range=[0, 4095]", "--data.transform=none"]
    train(run, *flags, "--train.max_steps=1", "--train.batch_size=4", "--data.mean=[0,0,0]", "--data.std=[1,1,1]")
    card = json.loads((run / "model.json").read_text())
    assert (card["background"], card["pixel_range"]) == ("white", [0, 4095])

    model = kd.load_model(run)
    deep = tmp_path / "deep.png"
    Image.fromarray(depth(0)).save(deep)
    inputs = []
    model.network.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    model.predict([tmp_path / "test/cat/0.png", deep, Image.fromarray(ink(0))])
    decoder = Decoder(32, "white", (0, 4095))
    expected = [decoder.decode(path.read_bytes()) for path in (tmp_path / "test/cat/0.png", deep)]
    assert torch.equal((inputs[0][0] * 255).round(), torch.from_numpy(expected[0]).permute(2, 0, 1).float())
    assert torch.equal((inputs[0][1] * 255).round(), torch.from_numpy(expected[1]).permute(2, 0, 1).float())
    assert torch.equal(inputs[0][2], inputs[0][0])

    data = loaded(source, background="white", pixel_range=[0, 4095])
    assert np.array_equal(data.test.pixels(np.arange(1))[0], expected[0])


def test_a_resumed_training_refuses_another_background(folder, tmp_path):
    flags = [f"--data.source={folder(ink)}", "--data.background=white", "--train.batch_size=4", "--train.epochs=2"]
    train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=2")
    message = train(tmp_path / "run", *flags, "--data.background=black", code=2).stderr
    assert "data.background: 'white' in the run, 'black' now" in message


@pytest.mark.parametrize(("name", "value"), [("background", "white"), ("pixel_range", [0, 1])])
def test_opaque_8_bit_digits_refuse_the_settings(name, value):
    with pytest.raises(UserError, match=f"data.{name}: .* has no effect with source digits"):
        load_data(DataConfig(source="digits", **{name: value}))


def test_datasets_of_pil_images_use_the_settings():
    images = [Image.fromarray(ink(sample)) for sample in range(10)]
    pairs = [(image, sample % 2) for sample, image in enumerate(images)]
    data = kd.ImageDataset(pairs, image_size=32, background="white", **STATISTICS)
    assert np.array_equal(data[0]["image"].permute(1, 2, 0), Decoder(32, "white").fit_image(images[data[0]["index"]]))
    floats = [(Image.fromarray(np.full((8, 8), sample / 8, dtype=np.float32)), sample % 2) for sample in range(9)]
    with pytest.raises(ValueError, match="item 0: the image cannot be converted to RGB .it has float values from 0 to 0, "):
        kd.ImageDataset(floats, image_size=8, **STATISTICS)
    data = kd.ImageDataset(floats, image_size=8, val_fraction=0, pixel_range=[0, 1], **STATISTICS)
    assert [int(item["image"].max()) for item in data] == [round(255 / 8 * sample) for sample in range(9)]


@pytest.mark.parametrize(
    ("channels", "named"),
    [
        (
            (0, 1, 2),
            "0 for red and green and blue, because all 20 training images have one value there .red 0.498, green 0.498,",
        ),
        (
            (2,),
            "0 for blue, because all 20 training images have one value there .blue 0.498., and normalization divides by it; ",
        ),
    ],
)
def test_a_constant_channel_is_an_error_that_names_it(folder, channels, named):
    def image(sample):
        pixels = np.random.default_rng(sample).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels[..., channels] = 127
        return pixels

    source = folder(image)
    with pytest.raises(UserError, match=f"data.std: {named}.*set data.mean and data.std"):
        load_data(DataConfig(source=source, image_size=8, val_fraction=0))
    data = loaded(source, image_size=8)
    assert data.std == [0.5] * 3


def test_a_file_is_read_by_its_content_not_by_its_ending(folder, tmp_path):
    source = folder(ink)
    photo = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    (tmp_path / "train/cat/0.png").write_bytes(encoded(photo, "WEBP", lossless=True))
    assert np.array_equal(loaded(source).train.pixels(np.arange(1))[0], np.asarray(photo))
