"""Images of the comparison: the test samples of the run, or random ones with the reason."""

import numpy as np
import torch

from kd_accel.config.data_schema import DataConfig
from kd_accel.deploy import samples
from kd_accel.deploy.samples import parity_samples
from kd_accel.models.card import ModelCard
from tests.support import models

NAMES = ["red", "green", "blue", "olive"]
SOURCE = "import:tests.support.models:images"


def card(names=NAMES, size=16):
    return ModelCard("torchvision/resnet18", "imagenet", {}, names, [0.5] * 3, [0.25] * 3, size)


def test_test_samples_of_the_run():
    found = parity_samples(card(), DataConfig(source=SOURCE, image_size=16))
    expected = models.images("test", 16)["images"]
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), expected) and found.images.is_contiguous()
    assert found.origin == "41 test samples"


def test_a_limit_of_the_run_and_that_of_the_comparison(monkeypatch):
    assert len(parity_samples(card(), DataConfig(source=SOURCE, image_size=16, limit_test=5)).images) == 5
    assert samples.MAX_SAMPLES == 200
    monkeypatch.setattr(samples, "MAX_SAMPLES", 10)
    for limit in (None, 30):
        found = parity_samples(card(), DataConfig(source=SOURCE, image_size=16, limit_test=limit))
        assert found.images.shape == (10, 3, 16, 16) and found.origin == "10 test samples"


def test_random_images_without_the_data(tmp_path):
    lost = parity_samples(card(), DataConfig(source=f"imagefolder:{tmp_path / 'lost'}"))
    assert "random images (seed 0)" in lost.origin and "lost" in lost.origin and lost.images.shape == (200, 3, 16, 16)
    other_classes = parity_samples(card(["a", "b"]), DataConfig(source=SOURCE))
    assert torch.equal(other_classes.images, lost.images) and "the classes differ from" in other_classes.origin
    assert "no config" in parity_samples(card(), None, "no config").origin
