"""Model card: it holds the preprocessing in full, an older card has that of its version, and other pixels are refused."""

import dataclasses
import json
import re

import pytest

from kd_accel.errors import UserError
from kd_accel.models.card import ModelCard, load_card
from kd_accel.models.factory import build_model
from kd_accel.models.predictor import load_model
from kd_accel.models.weights import load_run_model, save_model

ARCH = "import:tests.support.models:student"
CARD = ModelCard(ARCH, "imagenet", {}, ["cat", "dog"], [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 32)
DECODING = {"interpolation": "bicubic", "exif_orientation": True, "decode_version": 1}


@pytest.fixture
def run(tmp_path):
    """Return a directory with a model, and a function that changes its card; None removes a field."""
    save_model(tmp_path, build_model(ARCH, num_classes=2), card=CARD)

    def change(**fields):
        content = {**json.loads((tmp_path / "model.json").read_text()), **fields}
        (tmp_path / "model.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return tmp_path, change


def test_a_card_holds_the_preprocessing_in_full(run):
    content = json.loads((run[0] / "model.json").read_text())
    preprocessing = {name: content[name] for name in list(content)[4:]}
    assert preprocessing == {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "image_size": 32,
        "background": "black",
        "pixel_range": None,
        "crop_pct": 1.0,
        **DECODING,
    }


def test_a_card_without_the_fields_is_one_of_0_1_0(run):
    directory, change = run
    change(**dict.fromkeys(["background", "crop_pct", *DECODING]))
    assert set(json.loads((directory / "model.json").read_text())).isdisjoint(DECODING)
    assert load_card(directory) == CARD == load_model(directory).card


@pytest.mark.parametrize("field", [{"interpolation": "lanczos"}, {"exif_orientation": False}, {"decode_version": 2}])
def test_pixels_that_this_version_does_not_make_are_refused(run, field):
    directory, change = run
    change(**field)
    ((name, value),) = field.items()
    assert load_run_model(directory)[1] == dataclasses.replace(CARD, **field), "its weights are not refused"
    message = (
        f"{directory}/model.json: {name} is {value!r}, but this version of kd_accel decodes images with {DECODING[name]!r}"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(directory)


@pytest.mark.parametrize(
    "field", [{"interpolation": 3}, {"exif_orientation": 1}, {"decode_version": True}, {"image_size": True}]
)
def test_damaged_fields_are_named(run, field):
    directory, change = run
    change(**field)
    with pytest.raises(UserError, match=rf"model.json: is damaged \({next(iter(field))} wrong or missing\)"):
        load_card(directory)
