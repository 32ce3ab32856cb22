"""Tests of the predictor: equal predictions for all types of images, equal to those of the network; invalid images."""

import numpy as np
import pytest
import torch
from PIL import Image

from kd_accel.models.factory import build_model
from kd_accel.models.predictor import load_model
from kd_accel.models.weights import ModelCard, save_model

ARCH = "import:tests.support.models:teacher"
CARD = ModelCard(ARCH, "imagenet", {}, ["red", "green", "blue", "olive"], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 32)
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, build_model(ARCH, num_classes=4, seed=3), card=CARD)
    return load_model(str(directory))


def test_predictions_are_equal_for_all_types_of_images(tmp_path, model):
    files = [tmp_path / f"{number}.png" for number in range(len(IMAGES))]
    for file, image in zip(files, IMAGES, strict=True):
        Image.fromarray(image).save(file)
    tensors = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    pil = list(map(Image.fromarray, IMAGES))
    predictions = model.predict(files)
    assert len(predictions) == 9 and len({prediction.score for prediction in predictions}) == 9
    for images in (list(map(str, files)), pil, tuple(pil), IMAGES, list(IMAGES), tensors, list(tensors)):
        assert model.predict(images) == predictions
    assert model.predict([]) == []


def test_predictions_equal_those_of_the_network(model):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CARD.mean, CARD.std))
    with torch.no_grad():
        expected = model.network((torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1)
    assert not model.network.training and len(set(expected.argmax(1).tolist())) > 1
    for prediction, probabilities in zip(model.predict(IMAGES), expected, strict=True):
        assert prediction.label == model.class_names[int(probabilities.argmax())]
        assert prediction.score == prediction.probabilities[prediction.label] == max(prediction.probabilities.values())
        assert list(prediction.probabilities) == model.class_names == CARD.label_names
        assert list(prediction.probabilities.values()) == pytest.approx(probabilities.tolist(), abs=1e-6)
    for actual, expected in zip(model.predict(IMAGES, batch_size=2), model.predict(IMAGES), strict=True):
        assert actual.label == expected.label and actual.score == pytest.approx(expected.score, abs=1e-6)


def test_images_of_another_size_are_resized_as_in_training(model):
    wide = Image.new("RGB", (64, 32))
    wide.paste(Image.fromarray(IMAGES[0]), (16, 0))
    assert model.predict([wide, wide.convert("RGBA"), np.asarray(wide)]) == model.predict([IMAGES[0]] * 3)


@pytest.mark.parametrize(
    ("images", "arguments", "error", "message"),
    [
        ("a.png", {}, TypeError, "images: must be a list of images, not str; put a single image in a list"),
        (IMAGES[0], {}, TypeError, "images: must be a list of images, not ndarray"),
        (Image.fromarray(IMAGES[0]), {}, TypeError, "images: must be a list of images, not Image"),
        (iter(IMAGES), {}, TypeError, "images: must be a list of images, not generator|iterator"),
        ([3], {}, TypeError, "images: the image must be .*, not int"),
        ([IMAGES[0].astype(float)], {}, TypeError, "images: the image must be .*, not float64 array"),
        (IMAGES, {"batch_size": 0}, ValueError, "batch_size: 0 must be at least 1"),
        (["absent.png"], {}, ValueError, "images: cannot read absent.png .No such file or directory.; check the path"),
        (["pyproject.toml"], {}, ValueError, "images: cannot decode pyproject.toml .not an image file"),
    ],
)
def test_invalid_images_are_refused(model, images, arguments, error, message):
    with pytest.raises(error, match=message):
        model.predict(images, **arguments)
