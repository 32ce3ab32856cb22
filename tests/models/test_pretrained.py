"""Classes and preprocessing of pretrained weights, as the libraries state them, without network access."""

import dataclasses

import pytest
import timm
from torchvision import models

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.pretrained import WeightsInfo, random_weights_notices, weights_info
from kd_accel.models.weights import ModelCard, save_model

CARD = ModelCard("import:tests.support.models:student", "imagenet", {}, list("abcd"), [0.1, 0.2, 0.3], [0.7] * 3, 64)


@pytest.mark.parametrize(
    ("name", "weights"), [("resnet50", "IMAGENET1K_V2"), ("resnet50", "DEFAULT"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")]
)
def test_torchvision_weights_are_described_by_their_transforms(name, weights):
    expected = models.get_model_weights(name)[weights]
    info = weights_info(weights, f"torchvision/{name}")
    assert (info.mean, info.std, info.image_size) == (
        expected.transforms().mean,
        expected.transforms().std,
        expected.transforms().crop_size[0],
    )
    assert info.class_names == tuple(expected.meta["categories"]) and info.num_classes == 1000 and not info.is_of_run
    assert info.interpolation == expected.transforms().interpolation.value
    assert int(info.image_size / info.crop_pct) == expected.transforms().resize_size[0]
    assert (100 * info.accuracy, info.data) == (pytest.approx(expected.meta["_metrics"]["ImageNet-1K"]["acc@1"]), "ImageNet-1K")


def test_torchvision_weights_without_a_classifier_have_neither_classes_nor_an_accuracy():
    info = weights_info("IMAGENET1K_FEATURES", "torchvision/vgg16")
    assert (info.num_classes, info.class_names, info.accuracy, info.image_size) == (None, None, None, 224)


@pytest.mark.parametrize(
    ("name", "weights"), [("resnet18", "pretrained"), ("resnet18", "a1_in1k"), ("vit_tiny_patch16_224", "augreg_in21k")]
)
def test_timm_weights_are_described_by_their_pretrained_cfg(name, weights):
    expected = timm.get_pretrained_cfg(name if weights == "pretrained" else f"{name}.{weights}")
    info = weights_info(weights, f"timm/{name}")
    assert (tuple(info.mean), tuple(info.std), info.num_classes, info.image_size) == (
        expected.mean,
        expected.std,
        expected.num_classes,
        expected.input_size[1],
    )
    assert (info.interpolation, info.crop_pct, info.accuracy) == (expected.interpolation, expected.crop_pct, None)


@pytest.mark.parametrize(
    ("weights", "arch"),
    [
        ("IMAGENET1K_V9", "torchvision/resnet50"),
        ("DEFAULT", "torchvision/resnet5000"),
        ("nope", "timm/resnet18"),
        ("pretrained", "timm/resnet5000"),
        ("other.safetensors", "torchvision/resnet50"),
        ("best", "import:tests.support.models:student"),
    ],
)
def test_nothing_is_known_about_other_weights(weights, arch):
    assert weights_info(weights, arch) == WeightsInfo()


def test_weights_of_a_run_are_described_by_its_card(tmp_path):
    save_model(tmp_path, build_model(CARD.arch, num_classes=4), card=CARD)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        info = weights_info(str(weights), CARD.arch)
        known = {"mean": CARD.mean, "std": CARD.std, "num_classes": 4, "class_names": tuple("abcd"), "image_size": 64}
        network = {"arch": CARD.arch, "stem": CARD.stem, "arch_args": CARD.arch_args}
        assert info == WeightsInfo(**known, interpolation="bicubic", is_of_run=True, network=network)
        assert dataclasses.replace(info, accuracy=0.75) == with_summary(tmp_path, weights, '{"accuracy": 0.75}')
        for text in ('{"accuracy": null}', '{"accuracy": 75.0}', '{"accuracy": "high"}', "[]", "{"):
            assert with_summary(tmp_path, weights, text) == info
        (tmp_path / "summary.json").unlink()


def with_summary(directory, weights, text):
    """Return what is known of weights of a run with a summary.json of this text."""
    (directory / "summary.json").write_text(text)
    return weights_info(str(weights), CARD.arch)


@pytest.mark.parametrize(
    ("arch", "notices"),
    [
        (
            "torchvision/resnet18",
            [
                "model.weights: null, so that torchvision/resnet18 starts from random weights; torchvision has IMAGENET1K_V1 "
                "for model.weights"
            ],
        ),
        (
            "timm/resnet18",
            [
                "model.weights: null, so that timm/resnet18 starts from random weights; timm has a1_in1k, a2_in1k, a3_in1k, "
                "... for model.weights"
            ],
        ),
        ("import:tests.support.models:student", []),
    ],
)
def test_random_weights_of_a_library_model_are_noticed(arch, notices):
    assert random_weights_notices(arch) == notices


def test_the_best_weights_of_a_run_that_is_not_finished_are_refused(tmp_path):
    """Mean and std of the run would be missing without a word."""
    (tmp_path / "model_best.safetensors").touch()
    with pytest.raises(UserError, match=r"model_best\.safetensors: belongs to a run that is not finished"):
        weights_info(str(tmp_path / "model_best.safetensors"), "torchvision/resnet18")
