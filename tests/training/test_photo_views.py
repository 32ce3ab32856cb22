"""Views that are cut from photos larger than the image size: their pixels, and trainings from them."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.decode import Decoder
from kd_accel.data.hashing import hash_words
from kd_accel.data.transforms import RandomResizedCrop
from tests.support import launching
from tests.support.in_process import cache, train
from tests.support.launching import losses
from tests.support.resuming import assert_same_run

TRANSFORM = {
    "random_resized_crop": {"scale": [0.3, 1.0]},
    "random_horizontal_flip": {},
    "rand_augment": {},
    "color_jitter": {"brightness": 0.4, "hue": 0.1},
    "random_erasing": {"p": 0.5},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Parts of photos as JPEG files: 2 classes, 40 for training and 10 for testing each, some on their side."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, photo in zip(("flower", "temple"), load_sample_images().images, strict=True):
        for split, count in (("train", 40), ("test", 10)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                width, height = generator.integers(70, 120, 2)
                left, top = generator.integers(0, 640 - width), generator.integers(0, 427 - height)
                image = Image.fromarray(photo).crop((left, top, left + width, top + height))
                exif = image.getexif()
                exif[0x0112] = 6 if number % 5 == 0 else 1
                image.save(folder / split / label / f"{number:02}.jpg", quality=90, exif=exif)
    return folder


def flags(photos, **settings):
    return [
        f"--data.source=imagefolder:{photos}",
        f"--data.transform={settings.pop('transform', TRANSFORM)}".replace("'", ""),
        "--data.image_size=32",
        "--data.views=2",
        *(f"--{name}={value}" for name, value in settings.items()),
    ]


def test_photos_are_cut_from_their_originals(photos):
    source, scale = f"imagefolder:{photos}", [0.3, 1.0]
    data = load_data(DataConfig(source=source, transform={"random_resized_crop": {"scale": scale}}, view_seed=5, num_workers=1))
    assert not data.train.is_in_memory
    assert load_data(DataConfig(source=source, transform="crop_flip")).train.is_in_memory
    indices = data.splits.train[:20]
    words = hash_words((11, 5, 1, 0), indices, RandomResizedCrop.num_words)
    files = sorted(photos.glob("train/*/*.jpg"))
    expected = [
        Decoder(32).decode(files[index].read_bytes(), crop)
        for index, crop in zip(indices, RandomResizedCrop(scale=scale).crops(words), strict=True)
    ]
    batch = data.view_batch(indices, 1)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected)
    (from_worker,) = data.batches("train", [(indices, 1)])
    assert from_worker.images.equal(batch.images)
    data.batch_loader.close()


def test_images_of_the_image_size_stay_in_memory(photos, tmp_path):
    for file in photos.glob("*/*/*.jpg"):
        path = tmp_path / file.relative_to(photos)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((32, 32)).save(path, quality=90)
    config = DataConfig(source=f"imagefolder:{tmp_path}", transform="resized_crop_flip", image_size=32)
    data = load_data(config)
    assert data.train.is_in_memory
    lazy = load_data(config.model_copy(update={"memory_limit_mib": 0}))
    assert not lazy.train.is_in_memory
    indices = data.splits.train
    assert data.view_batch(indices, 3).images.equal(lazy.view_batch(indices, 3).images)


@pytest.mark.slow
def test_trainings_from_photos_are_exact(photos, teacher_run, tmp_path):
    """Cached equals live, a training that is resumed within an epoch equals one that is not, and 2 processes equal 1."""
    train(tmp_path / "teacher", *flags(photos), "--role=teacher", "--model.arch=import:tests.support.models:teacher")
    common = [*flags(photos), f"--teacher.run={tmp_path / 'teacher'}", "--teacher.min_accuracy=null", "--train.epochs=2"]
    common += ["--distill.features={mse: {weight: 0.1, layers: [layer1, layer2], args: {direction: both, pca_images: 64}}}"]
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path / 'cache'}", "--teacher.cache.dtype=float32"]
    train(tmp_path / "live", *common)
    cache("build", *common, *stored)
    train(tmp_path / "cached", *common, *stored, "--data.num_workers=1")
    assert_same_run(tmp_path / "live", tmp_path / "cached")
    train(tmp_path / "resumed", *common, *stored, "--checkpoint.stop_after_steps=2")
    train(tmp_path / "resumed", *common, *stored)
    assert_same_run(tmp_path / "cached", tmp_path / "resumed")
    launching.train(tmp_path / "two", *common, *stored, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "cached"), rel=1e-4)
