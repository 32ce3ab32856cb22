"""Predictions of a saved model: equal for each form of an image, and those of the plain network; wrong images are named."""

import numpy as np
import pytest
import torch
from PIL import Image

from kd_accel.models.factory import build_model
from kd_accel.models.predictor import load_model
from kd_accel.models.weights import ModelCard, save_model

ARCH = "import:tests.support.models:teacher"
CARD = ModelCard(ARCH, "imagenet", {}, ["red", "green", "blue", "olive"], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 32)
PICTURES = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, build_model(ARCH, num_classes=4, seed=3), card=CARD)
    return load_model(str(directory))


def test_every_form_of_an_image_has_the_same_prediction(tmp_path, model):
    files = [tmp_path / f"{number}.png" for number in range(len(PICTURES))]
    for file, picture in zip(files, PICTURES, strict=True):
        Image.fromarray(picture).save(file)
    tensors = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)
    pil = list(map(Image.fromarray, PICTURES))
    predictions = model.predict(files)
    assert len(predictions) == 9 and len({prediction.score for prediction in predictions}) == 9
    for images in (list(map(str, files)), pil, tuple(pil), PICTURES, list(PICTURES), tensors, list(tensors)):
        assert model.predict(images) == predictions
    assert model.predict([]) == []


def test_predictions_are_those_of_the_network(model):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CARD.mean, CARD.std))
    with torch.no_grad():
        expected = model.network((torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1)
    assert not model.network.training and len(set(expected.argmax(1).tolist())) > 1
    for prediction, probabilities in zip(model.predict(PICTURES), expected, strict=True):
        assert prediction.label == model.class_names[int(probabilities.argmax())]
        assert prediction.score == prediction.probabilities[prediction.label] == max(prediction.probabilities.values())
        assert list(prediction.probabilities) == model.class_names == CARD.label_names
        assert list(prediction.probabilities.values()) == pytest.approx(probabilities.tolist(), abs=1e-6)
    for one, all_at_once in zip(model.predict(PICTURES, batch_size=2), model.predict(PICTURES), strict=True):
        assert one.label == all_at_once.label and one.score == pytest.approx(all_at_once.score, abs=1e-6)


def test_images_of_another_size_are_fitted_as_in_training(model):
    wide = Image.new("RGB", (64, 32))
    wide.paste(Image.fromarray(PICTURES[0]), (16, 0))
    assert model.predict([wide, wide.convert("RGBA"), np.asarray(wide)]) == model.predict([PICTURES[0]] * 3)


@pytest.mark.parametrize(
    ("images", "arguments", "error", "message"),
    [
        ("a.png", {}, TypeError, "images: must be a list of images, not str; put a single image in a list"),
        (PICTURES[0], {}, TypeError, "images: must be a list of images, not ndarray"),
        (Image.fromarray(PICTURES[0]), {}, TypeError, "images: must be a list of images, not Image"),
        (iter(PICTURES), {}, TypeError, "images: must be a list of images, not generator|iterator"),
        ([3], {}, TypeError, "images: the image must be .*, not int"),
        ([PICTURES[0].astype(float)], {}, TypeError, "images: the image must be .*, not float64 array"),
        (PICTURES, {"batch_size": 0}, ValueError, "batch_size: 0 must be at least 1"),
        (["absent.png"], {}, ValueError, "images: cannot read absent.png .No such file or directory"),
        (["pyproject.toml"], {}, ValueError, "images: cannot decode pyproject.toml .not an image file"),
    ],
)
def test_wrong_images_are_refused(model, images, arguments, error, message):
    with pytest.raises(error, match=message):
        model.predict(images, **arguments)
