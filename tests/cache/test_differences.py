"""Messages about a cache that does not match: each field of the fingerprint is named by the settings that decide it."""

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch

from kd_accel.cache.compatibility import data_fields
from kd_accel.cache.differences import (
    CONTENTS,
    FIELDS,
    TargetSettings,
    describe_views,
    differing_fields,
    differing_targets,
    differing_types,
    find_field,
    settings_of_contents,
    settings_of_samples,
)
from kd_accel.cache.spec import SPLITS, TensorSpec
from kd_accel.config.fields import flatten, leaves
from kd_accel.config.schema import DataConfig, RunConfig
from kd_accel.config.transform_schema import Preset
from kd_accel.data.datamodule import load_data
from kd_accel.losses.targets import PCA, Identity
from kd_accel.models.factory import build_model
from kd_accel.teacher.teacher import Teacher

UNUSUAL = {
    "color_jitter": {"hue": 0.1},
    "rand_augment": {},
    "random_erasing": {},
    "random_crop": {"padding": 1},
    "mixup": {"p": 0.5},
    "cutmix": {"p": 0.5},
}
SETTINGS = {".".join(keys) for keys, _ in leaves(RunConfig)}
MSE = TargetSettings(
    "distill.features.mse.layers", tuple(f"distill.features.mse.args.{arg}" for arg in ("direction", "pca_images"))
)


def fingerprints():
    """Yield the fingerprint fields of caches that together have every field that a build can record."""
    network = build_model("import:tests.support.models:teacher", num_classes=4)
    described = {"arch": "torchvision/resnet18", "arch_args": {"zero_init_residual": True}, "class_map": [1, 0, 3, 2]}
    resized = {"image_size": 48, "interpolation": "bicubic", "crop_pct": 0.9}
    teacher = Teacher(network, [0.5] * 3, [0.2] * 3, **described, **resized).for_images(32)
    for device, cpu_kernels in (("cpu", "auto"), ("cpu", "never"), ("cuda", "always")):
        switches = {"precision": "bf16", "channels_last": None, "compiled": False, "tf32": True, "cpu_kernels": cpu_kernels}
        numerics = teacher.numerics(torch.device(device), layers=["layer1"], image_size=32, **switches)
        for transform in (*get_args(Preset), UNUSUAL):
            unlabeled = {"unlabeled": "import:tests.support.models:unlabeled_images"}
            source = {"source": "import:tests.support.models:images", "val_split": "val", **unlabeled}
            data = load_data(DataConfig(**source, transform=transform))
            # With `data.on_error: skip`, samples that cannot be decoded.
            for images in (data.train, data.val, data.test, data.unlabeled):
                images.unreadable = {3: "sample 3 cannot be decoded"}
            fields = data_fields(data)
            contents = {"contents": dict.fromkeys(SPLITS, "0" * 32)}
            yield {
                "teacher": teacher.fingerprint_fields(),
                "numerics": numerics,
                **{**fields, "data": {**fields["data"], **contents}},
            }


@pytest.fixture(scope="module")
def recorded():
    """Value of every field that a build can record, by its dotted name."""
    return {key: value for fields in fingerprints() for key, value in flatten(fields).items()}


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_every_field_of_a_fingerprint_has_its_settings(recorded):
    """A new field of the fingerprint needs an entry in FIELDS."""
    found = {key: find_field(key)[0] for key in recorded}
    assert [key for key, field in found.items() if field not in FIELDS.values()] == []
    assert [name for name, field in FIELDS.items() if not any(field is each for each in found.values())] == []


def test_settings_of_fields_exist():
    named = {setting for field in FIELDS.values() for setting in field.settings}
    assert named <= SETTINGS and len(named) > 15
    assert [name for name, field in FIELDS.items() if not field.settings] == ["pixels.version", "views.version"]
    samples = {setting for split in SPLITS for setting in settings_of_samples(split).split(" or ")}
    contents = {setting for split in SPLITS for setting in settings_of_contents(split).split(" or ")}
    assert samples | contents <= SETTINGS


def test_a_difference_of_any_field_names_its_settings_and_both_values(recorded):
    for key, value in recorded.items():
        if key.startswith(CONTENTS):
            continue
        field, _ = find_field(key)
        (line,) = differing_fields(nested(key, value), nested(key, "something else"))
        assert "something else now" in line
        assert re.search(r".+ in the cache, .+ now", line)
        for setting in field.settings:
            assert setting in line
        internal = re.findall(r"\b(?:numerics|pixels|views|data\.contents|data\.label_names|targets)\.\w+|conv_bn", line)
        assert internal == [], line


@pytest.mark.parametrize(
    ("stored", "now", "line"),
    [
        (
            {"numerics": {"precision": "float32"}},
            {"numerics": {"precision": "bf16"}},
            "train.precision: float32 in the cache, bf16 now",
        ),
        (
            {"teacher": {"class_map": [0, 2, 1]}},
            {"teacher": {"class_map": [0, 1, 2]}},
            "teacher.class_map: class 1 is 2 in the cache, 1 now (index of the teacher's logit for each class)",
        ),
        (
            {"teacher": {}},
            {"teacher": {"class_map": [1, 0]}},
            "teacher.class_map: null in the cache, [1, 0] now (index of the teacher's logit for each class)",
        ),
        (
            {"numerics": {"channels_last": True}},
            {"numerics": {"channels_last": False}},
            "train.channels_last: true in the cache, false now",
        ),
        (
            {"numerics": {}},
            {"numerics": {"tf32": True}},
            "train.tf32: false in the cache, true now (always false on CPUs, which have no TF32)",
        ),
        ({"numerics": {"cpu_kernels": "never"}}, {"numerics": {}}, "train.cpu_kernels: never in the cache, auto now"),
        (
            {"teacher": {"arch_args": {}}},
            {"teacher": {"arch_args": {"width": 2}}},
            "teacher.run or teacher.arch_args.width: not set in the cache, 2 now",
        ),
        (
            {"data": {"label_names": ["cat", "dog"]}},
            {"data": {"label_names": ["cat", "cow"]}},
            "data.source or data.labels: class 1 is dog in the cache, cow now (class names)",
        ),
        (
            {"data": {"label_names": ["cat", "dog"]}},
            {"data": {"label_names": ["cat"]}},
            "data.source or data.labels: 2 classes in the cache, 1 now (class names)",
        ),
        (
            {"views": {"version": 1}},
            {"views": {"version": 2}},
            "version (of kd_accel's augmentations, not a setting): 1 in the cache, 2 now",
        ),
        (
            {"numerics": {"later": 1}},
            {"numerics": {}},
            "later (recorded by another version of kd_accel): 1 in the cache, not set now",
        ),
        (
            {"views": {"transform": {"random_crop": {"padding": 4}}, "view_seed": 3}},
            {"views": {"transform": {}}},
            "data.transform.random_crop.padding: 4 in the cache, not set now",
        ),
        (
            {"views": {"transform": {"random_crop": {"padding": 4}}}},
            {"views": {"transform": {"random_crop": {"padding": 4}}, "view_seed": 3}},
            "data.view_seed: not set in the cache, 3 now",
        ),
        (
            {"views": {"transform": {"random_crop": {"padding": 4}}, "order": ["random_erasing", "random_crop"]}},
            {"views": {"transform": {"random_crop": {"padding": 4}}}},
            "data.transform: ['random_erasing', 'random_crop'] in the cache, the usual order now (order of the transforms)",
        ),
    ],
)
def test_a_difference_is_worded_as_a_config_has_it(stored, now, line):
    assert differing_fields(stored, now) == [line]
    assert differing_fields(now, now) == differing_fields(stored, stored) == []


def test_fused_batchnorm_is_explained_by_the_layers():
    stored, now = {"numerics": {"conv_bn": "fused"}}, {"numerics": {"conv_bn": "separate"}}
    (line,) = differing_fields(stored, now, layers=["distill.features.mse.layers", "distill.features.at.layers"])
    assert line == (
        "distill.features.mse.layers or distill.features.at.layers or teacher.outputs: BatchNorm fused into the teacher's "
        "convolutions in the cache, BatchNorm separate now (separate if a cached layer ends between a convolution and its "
        "BatchNorm)"
    )
    assert differing_fields(stored, now)[0].startswith("distill.features.NAME.layers or teacher.outputs: ")


def test_another_memory_format_is_no_difference_where_any_is_accepted():
    stored, now = {"numerics": {"channels_last": True}}, {"numerics": {"channels_last": False}}
    assert differing_fields(stored, now, any_memory_format=True) == []


def raw(channels=16):
    return TensorSpec((channels, 8, 8), "float16", Identity().description(), raw_channels=channels)


def projected(channels=8, images=64):
    return TensorSpec((channels, 8, 8), "float16", PCA(channels, images=images).description(), "0" * 32, raw_channels=16)


@pytest.mark.parametrize(
    ("settings", "spec", "target", "line"),
    [
        (MSE, projected(), PCA(8, images=65), "distill.features.mse.args.pca_images: 64 in the cache, 65 now"),
        (MSE, projected(), Identity(), "distill.features.mse.args.direction: pca in the cache, identity now"),
        (
            MSE,
            projected(),
            PCA(12, images=64),
            "model.arch or distill.features.mse.layers (channels of the student's layer): 8 in the cache, 12 now",
        ),
        (
            TargetSettings("x.layers", ("x.args.k", "x.args.p")),
            raw(),
            PCA(4),
            "x.args.k or x.args.p: identity in the cache, pca now",
        ),
        (TargetSettings("x.layers"), raw(), PCA(4), "x.layers: identity in the cache, pca now"),
        (TargetSettings(), raw(), PCA(4), "layers: identity in the cache, pca now"),
        (TargetSettings(), projected(), PCA(8, images=9), "layers (images): 64 in the cache, 9 now"),
    ],
)
def test_a_target_is_named_by_the_settings_of_its_loss(settings, spec, target, line):
    assert differing_targets({"layer1": spec}, {"layer1": target}, {"layer1": settings}) == [f"{line} (target of layer1)"]


def test_equal_differences_of_several_layers_are_one_line():
    targets = {layer: PCA(8, images=65) for layer in ("layer1", "layer2", "layer3")}
    specs = {"layer1": projected(), "layer2": projected()}
    assert differing_targets(specs, targets, dict.fromkeys(targets, MSE)) == [
        "distill.features.mse.args.pca_images: 64 in the cache, 65 now (target of layer1, layer2)"
    ]
    assert differing_targets(specs, {"layer1": PCA(8, images=64)}, {"layer1": MSE}) == []
    assert differing_types(specs, {"layer1": "int8", "layer2": "int8", "layer3": "int8"}) == [
        "teacher.cache.dtype: float16 in the cache, int8 now (layer1, layer2)"
    ]


def test_a_description_of_views_has_the_names_of_settings():
    data = load_data(DataConfig(source="import:tests.support.models:images", transform="crop", view_seed=3))
    shown = describe_views(data.transform.fingerprint_fields())
    assert shown == "transform={random_crop: {padding: 4}}, image_size=32, view_seed=3"
    identity = replace(data.transform, operations=())
    assert describe_views(identity.fingerprint_fields()) == "transform={}, image_size=32"
