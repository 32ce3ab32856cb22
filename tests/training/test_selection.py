"""Independence of a training from the test split: the same weights, and the same metrics except the last line."""

import torch

from tests.support import models
from tests.support.in_process import train
from tests.support.launching import metrics


def other_test_images(split, image_size):
    """Return the same training images, and as test images noise with labels in another order."""
    content = models.images(split, image_size)
    if split == "train":
        return content
    noise = torch.randint(256, content["images"].shape, generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return {**content, "images": noise.numpy(), "labels": content["labels"][::-1]}


def test_other_test_images_give_the_same_training(tmp_path, distilled):
    other = "--data.source=import:tests.training.test_selection:other_test_images"
    unchecked = "--teacher.min_accuracy=null"
    train(tmp_path / "one", *distilled, unchecked)
    train(tmp_path / "other", *distilled, unchecked, other)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    for split in ("train", "val"):
        assert metrics(tmp_path / "one", split) == metrics(tmp_path / "other", split) != []
    (one,), (another,) = (metrics(tmp_path / name, "test") for name in ("one", "other"))
    assert one["loss"] != another["loss"]
    assert metrics(tmp_path / "one")[-1] == one
