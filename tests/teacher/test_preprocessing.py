"""A teacher with its own image size: the resized view, its defaults, and the same outputs live and from a cache."""

import dataclasses
import math
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

import kd_accel as kd
from kd_accel.builders.header import described_teacher
from kd_accel.builders.layers import with_layers
from kd_accel.cache.manifest import read_spec
from kd_accel.config.teacher_schema import TeacherConfig
from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.preprocess import Normalize
from kd_accel.models.pretrained import WeightsInfo
from kd_accel.models.weights import ModelCard, save_model
from kd_accel.teacher import loading
from kd_accel.teacher.loading import (
    Preprocessing,
    _shortened,
    load_own_teacher,
    load_run_teacher,
    own_image_size,
    teacher_notices,
)
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from tests.support.caches import FEATURE, RAW
from tests.support.in_process import cache, say, train
from tests.support.launching import SMALL, losses, summary
from tests.support.parsing import parse
from tests.support.pixels import noise, pillow

CPU = torch.device("cpu")
ARCH = "import:tests.support.models:teacher"
NAMES = ["red", "green", "blue", "olive"]
STATISTICS = ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
VIT = {"img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2}


def network():
    return build_model(ARCH, num_classes=4, seed=3).eval()


class Operators(TorchDispatchMode):
    """Recorder of the operators of a block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_teacher_of_the_size_of_the_views_is_that_without_a_size():
    plain = Teacher(network(), *STATISTICS)
    same = dataclasses.replace(plain, image_size=32, interpolation="bicubic")
    assert same.for_images(32).fingerprint_fields() == plain.for_images(32).fingerprint_fields() == plain.fingerprint_fields()
    recorded = []
    for teacher in (plain, same):
        _, normalize = teacher.on_device(CPU, image_size=32)
        with Operators() as operators:
            normalize(noise(32))
        recorded.append(operators.names)
    assert recorded[0] == recorded[1] and "aten.to.dtype_layout" not in recorded[0]
    assert torch.equal(same(noise(32)).logits, plain(noise(32)).logits)


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"image_size": 48}, {"image_size": 48, "interpolation": "bilinear"}),
        ({"image_size": 48, "interpolation": "bicubic"}, {"image_size": 48, "interpolation": "bicubic"}),
        ({"crop_pct": 0.875}, {"image_size": 32, "interpolation": "bilinear", "crop_pct": 0.875}),
    ],
)
def test_a_resized_view_is_a_part_of_the_fingerprint(settings, fields):
    plain = Teacher(network(), *STATISTICS)
    resized = dataclasses.replace(plain, **settings).for_images(32)
    assert resized.fingerprint_fields() == {**plain.fingerprint_fields(), **fields}
    assert resized.fingerprint != plain.fingerprint and resized.for_images(32).fingerprint == resized.fingerprint
    assert dataclasses.replace(resized, image_size=None, crop_pct=1.0).fingerprint == plain.fingerprint


def test_the_outputs_are_those_of_the_network_for_resized_images():
    teacher, images = Teacher(network(), *STATISTICS, image_size=48, interpolation="bicubic", crop_pct=0.9), noise(32)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in STATISTICS)
    pixels = torch.from_numpy(pillow(images, 48, "bicubic", 0.9, np.float32)).double()
    reference = network().double()
    features = reference.layer1((pixels / 255 - mean) / std)
    expected = reference((pixels / 255 - mean) / std)
    output = teacher(images, layers=["layer1"])
    assert output.features["layer1"].shape == (2, 16, 12, 12)
    torch.testing.assert_close(output.features["layer1"].double(), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits.double(), expected, rtol=1e-4, atol=1e-4)
    copy, normalize = teacher.on_device(CPU, image_size=32)
    torch.testing.assert_close(copy(normalize(images)).double(), expected, rtol=1e-4, atol=1e-4)
    assert normalize.output_size(32) == 48 and Normalize(*STATISTICS).output_size(32) == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size: 0 must be at least 1"),
        ({"interpolation": "nearest"}, "interpolation: 'nearest' must be one of bilinear, bicubic"),
        ({"crop_pct": 0.0}, "crop_pct: 0.0 must be above 0 and at most 1"),
        ({"crop_pct": 1.15}, "crop_pct: 1.15 must be above 0 and at most 1"),
    ],
)
def test_wrong_settings_are_refused_by_the_python_api(settings, message):
    with pytest.raises(ValueError, match=message):
        Teacher(network(), *STATISTICS, **settings)


class Flat(nn.Module):
    """Network for images of 48 pixels alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=16), nn.BatchNorm2d(4)
        self.fc = nn.Linear(36, 4)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).flatten(1))


def test_a_network_for_one_size_is_prepared_with_images_of_that_size():
    """BatchNorm is fused, and weights are cast, only if outputs on random images agree."""
    teacher = Teacher(Flat().eval(), *STATISTICS, image_size=48)
    switches = {"precision": "float32", "channels_last": None, "compiled": False, "tf32": True}
    assert teacher.numerics(CPU, layers=[], image_size=32, **switches)["conv_bn"] == "fused"
    copy, normalize = teacher.on_device(CPU, image_size=32)
    live = LiveTeacher(copy, normalize, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16), image_size=32)
    assert live.network is not copy and live.network.fc.weight.dtype == torch.bfloat16
    live.close()
    exact = LiveTeacher(copy, normalize, autocast=nullcontext, image_size=32)
    assert exact.network is copy
    exact.close()


def run_of(directory, arch=ARCH, image_size=48, **arch_args):
    """Save a random network as the model of a run."""
    directory.mkdir()
    model = build_model(arch, num_classes=4, arch_args=arch_args, seed=5)
    save_model(directory, model, card=ModelCard(arch, "imagenet", arch_args, NAMES, *STATISTICS, image_size))
    return directory


def preprocessing_of(teacher):
    return teacher.image_size, teacher.interpolation, teacher.crop_pct


def test_the_size_of_a_run_is_the_default_and_settings_override_it(tmp_path):
    run = run_of(tmp_path / "run")
    assert preprocessing_of(kd.Teacher.from_run(run)) == (48, "bicubic", 1.0)
    assert preprocessing_of(load_own_teacher(ARCH, str(run), class_names=NAMES)) == (48, "bicubic", 1.0)
    other = Preprocessing(24, "bilinear", 0.9)
    assert preprocessing_of(load_run_teacher(run, preprocessing=other)) == (24, "bilinear", 0.9)
    assert preprocessing_of(load_own_teacher(ARCH, str(run), class_names=NAMES, preprocessing=other)) == (24, "bilinear", 0.9)


@pytest.mark.parametrize(
    ("arch", "weights", "arch_args", "expected"),
    [
        ("torchvision/resnet18", "IMAGENET1K_V1", {}, (224, "bilinear", 1.0)),
        ("torchvision/vit_b_16", "IMAGENET1K_SWAG_E2E_V1", {"image_size": 384}, (384, "bicubic", 1.0)),
        ("timm/resnet18", "a1_in1k", {}, (224, "bicubic", 1.0)),
        ("timm/vit_tiny_patch16_224", "augreg_in21k_ft_in1k", {}, (224, "bicubic", 1.0)),
        ("timm/vit_tiny_patch16_224", "augreg_in21k_ft_in1k", {"img_size": 64}, (64, "bicubic", 1.0)),
    ],
)
def test_the_card_of_pretrained_weights_is_the_default(monkeypatch, arch, weights, arch_args, expected):
    """The weights are not downloaded: their card is a part of the library."""
    monkeypatch.setattr(loading, "load_weights", lambda *args, **settings: [])
    monkeypatch.setattr(loading, "build_model", lambda *args, **settings: nn.Identity())
    teacher = load_own_teacher(arch, weights, class_names=["a"] * 1000, arch_args=arch_args)
    assert preprocessing_of(teacher) == expected
    assert own_image_size(WeightsInfo(), {}) is None


def test_the_crop_of_a_card_is_named_but_not_used(monkeypatch):
    monkeypatch.setattr(loading, "load_weights", lambda *args, **settings: [])
    monkeypatch.setattr(loading, "build_model", lambda *args, **settings: nn.Identity())
    names = ["a"] * 1000
    card = timm.get_pretrained_cfg("resnet18.a1_in1k")
    teacher = load_own_teacher("timm/resnet18", "a1_in1k", class_names=names)
    resized, cropped = teacher_notices(teacher, names, image_size=64)
    start = "teacher.image_size: 224, so that the views of 64 pixels are resized for the teacher"
    assert resized == f"{start} (bicubic); 64 shows them as they are"
    assert cropped.startswith(
        f"teacher.crop_pct: 1, but the card of the weights states {card.crop_pct}, for photos that are not"
    )
    (resized,) = teacher_notices(dataclasses.replace(teacher, crop_pct=card.crop_pct), names, image_size=64)
    side = int(224 / card.crop_pct)
    assert resized == f"{start} to {side}, of which it sees the central 224 (bicubic); 64 shows them as they are"


def test_another_size_than_that_of_the_training_is_noticed(tmp_path):
    run = run_of(tmp_path / "run")
    assert teacher_notices(load_run_teacher(run), NAMES, image_size=48) == []
    assert teacher_notices(load_run_teacher(run, preprocessing=Preprocessing(32)), NAMES, image_size=32) == [
        "teacher.image_size: 32, but the teacher was trained on images of 48 pixels, and may be less accurate at another size; "
        "set it to 48, or use a teacher that was trained at 32"
    ]


@pytest.mark.parametrize(
    ("teacher", "ending"),
    [
        (
            {"arch": "torchvision/resnet50", "weights": "IMAGENET1K_V2"},
            " (80.86 % on ImageNet-1K, as the card of its weights states)",
        ),
        ({"arch": "timm/resnet18", "weights": "a1_in1k"}, ""),
        ({"arch": ARCH, "weights": "teacher.safetensors"}, ""),
    ],
)
def test_the_stated_accuracy_is_next_to_the_measured_one_where_it_is_known(teacher, ending):
    line = described_teacher(TeacherConfig(**teacher), 0.5)
    assert line == f"{teacher['arch']}, live, accuracy 50.00 % on the test samples{ending}"
    stated = models.ResNet50_Weights.IMAGENET1K_V2.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert not ending or f"{stated:.2f} %" in ending


SMALL_VIEWS = [
    "--data.image_size=16",
    "--data.views=2",
    "--train.channels_last=true",
    "--train.epochs=2",
    "--data.limit_train=64",
]


def flags_of(run, directory=None, *more):
    """Return the flags of a distillation on views of 16 pixels; directory: that of a cache; None = live."""
    stored = [] if directory is None else ["--teacher.outputs=cached", f"--teacher.cache.dir={directory}"]
    return [*SMALL_VIEWS, f"--teacher.run={run}", *stored, *more]


@pytest.mark.parametrize(
    "more",
    [[RAW], [FEATURE, "--teacher.interpolation=bilinear", "--teacher.crop_pct=0.9"], ["--data.transform={mixup: {}}"]],
    ids=["raw", "projected", "mixed"],
)
def test_a_cached_training_with_a_teacher_of_another_size_equals_a_live_one(tmp_path, teacher_run, more):
    exact = flags_of(teacher_run, tmp_path / "cache", *more, "--teacher.cache.dtype=float32")
    cache("build", *exact)
    train(tmp_path / "cached", *exact)
    train(tmp_path / "live", *flags_of(teacher_run, None, *more))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cached", "live")]
    assert weights[0] == weights[1]
    assert summary(tmp_path / "cached")["teacher_accuracy"] == summary(tmp_path / "live")["teacher_accuracy"] > 0.9
    spec = read_spec(tmp_path / "cache")
    assert more != [RAW] or spec.tensors["layer1"].shape == (16, 8, 8)
    # The comparison can fail: the view as it is gives another loss.
    without = [flag for flag in more if not flag.startswith("--teacher")]
    train(tmp_path / "other", *flags_of(teacher_run, None, *without, "--teacher.image_size=16"), "--train.max_steps=1")
    assert abs(losses(tmp_path / "other")[0] - losses(tmp_path / "live")[0]) > 1e-3


def test_a_cache_of_another_preprocessing_is_refused_by_setting(tmp_path, teacher_run):
    flags = flags_of(teacher_run, tmp_path / "cache")
    text = cache("build", *flags)
    assert "teacher.image_size: 32, so that the views of 16 pixels are resized for the teacher (bicubic)" in text
    for more, message in (
        (["--teacher.interpolation=bilinear"], "teacher.interpolation: bicubic in the cache, bilinear now"),
        (["--teacher.image_size=24"], "teacher.image_size: 32 in the cache, 24 now"),
        (["--teacher.crop_pct=0.9"], "teacher.crop_pct: 1.0 in the cache, 0.9 now"),
        (
            ["--teacher.image_size=16"],
            "teacher.image_size: 32 in the cache, data.image_size now; teacher.interpolation: bicubic",
        ),
    ):
        assert message in train(tmp_path / "run", *flags, *more, code=2)
    views = kd.ViewDataset(
        kd.ImageDataset("import:tests.support.models:images", image_size=16), kd.transforms.CropFlip(16), num_views=1
    )
    teacher = kd.Teacher.from_run(teacher_run)
    built = kd.TeacherCache.build(tmp_path / "api", teacher, views, layers=["layer1"])
    assert built.shapes["layer1"] == (16, 8, 8)
    kd.TeacherCache.open(tmp_path / "api", teacher)
    with pytest.raises(UserError, match=r"teacher.interpolation: bicubic in the cache, bilinear now"):
        kd.TeacherCache.open(tmp_path / "api", dataclasses.replace(teacher, interpolation="bilinear"))


def test_an_interpolation_without_a_resizing_is_refused(tmp_path, teacher_run):
    for more in ([], ["--teacher.image_size=28", "--teacher.crop_pct=0.875"]):
        flags = [f"--teacher.run={teacher_run}", "--teacher.interpolation=bicubic", *more]
        text = train(tmp_path / "run", *flags, code=2)
        assert "teacher.interpolation: has no effect (views of 32 pixels are not resized for it); leave it out" in text


def test_a_crop_of_less_than_a_pixel_is_refused(tmp_path, teacher_run):
    text = train(tmp_path / "run", *flags_of(teacher_run), "--teacher.crop_pct=0.99", code=2)
    assert "teacher.crop_pct: 0.99 has no effect, because it cuts off less than a pixel; lower it" in text
    train(tmp_path / "run", *flags_of(teacher_run), "--teacher.crop_pct=1.0", "--train.max_steps=1")


@pytest.mark.parametrize(("side", "size", "stated"), [(236, 224, 0.949), (256, 224, 0.875), (342, 299, 0.874)])
def test_the_stated_crop_gives_the_size_of_the_card(side, size, stated):
    assert _shortened(size / side, size) == stated and math.floor(size / stated) == side


def test_another_preprocessing_is_refused_on_resume(tmp_path, teacher_run):
    flags = flags_of(teacher_run)
    train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=3")
    text = train(tmp_path / "run", *flags, "--teacher.image_size=24", code=2)
    assert "use the same teacher with the same mean, std, class_map and image_size" in text
    text = train(tmp_path / "run", *flags, "--teacher.image_size=32")
    assert "teacher.image_size: None in the run, 32 now" in text and summary(tmp_path / "run")["steps"] == 8


def test_a_transformer_for_one_size_teaches_students_of_another(tmp_path):
    """Layers are chosen and recorded at the teacher's size: 48 pixels are 3x3 tokens."""
    run = run_of(tmp_path / "vit", "timm/vit_tiny_patch16_224", **VIT)
    flags = [f"--teacher.run={run}", "--distill.features.mse={layers: auto, args: {direction: student_to_teacher}}"]
    flags += ["--teacher.min_accuracy=null", "--train.max_steps=2", "--data.views=1"]
    text = train(tmp_path / "run", *flags)
    assert "teacher.image_size: 48, so that the views of 32 pixels are resized for the teacher (bicubic)" in text
    assert "layer2: blocks.3" in text
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path / 'cache'}"]
    cache("build", *flags, *stored)
    assert read_spec(tmp_path / "cache").tensors["blocks.3"].shape == (24, 3, 3)
    with pytest.raises(UserError, match="teacher.image_size: VisionTransformer does not accept images of 64x64 pixels"):
        with_layers(parse(*SMALL, *flags, "--teacher.image_size=64"))
    for some in (flags, [flags[0], *flags[2:]]):
        text = train(tmp_path / "other", *some, "--teacher.image_size=64", code=2)
        assert "teacher.image_size: VisionTransformer does not accept images of 64x64 pixels" in text
        assert "set it to the size for which the network is built, or teacher.arch_args: {img_size: 64}" in text


@pytest.mark.slow
def test_digits_at_16_pixels_learn_from_a_teacher_of_32(tmp_path):
    digits = ["--data.source=digits", "--data.limit_train=300", "--data.limit_test=100", "--data.val_fraction=0"]
    train(tmp_path / "teacher", *digits, "--data.image_size=32", f"--model.arch={ARCH}", "--train.epochs=6", "--role=teacher")
    flags = flags_of(tmp_path / "teacher", tmp_path / "cache", *digits)
    cache("build", *flags)
    text = train(tmp_path / "run", *flags)
    (line,) = [line for line in text.splitlines() if line.startswith("teacher ")]
    accuracy = f"{100 * summary(tmp_path / 'teacher')['accuracy']:.2f} %"
    assert line.endswith(f" % on the test samples ({accuracy} in its own run)")
    assert summary(tmp_path / "run")["teacher_accuracy"] > 0.3
    assert '"agreement"' in say("evaluate", tmp_path / "run")
    assert '"agreement"' in say("evaluate", tmp_path / "run", "--teacher.outputs=live")
    estimate = say("plan", *flags)
    assert "live" in estimate and "cached" in estimate
