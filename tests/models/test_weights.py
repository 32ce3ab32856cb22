"""Tests of model files and weights: a saved model loads unchanged, and weights that do not fit are refused."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from kd_accel.errors import UserError
from kd_accel.io import files
from kd_accel.models.factory import build_model
from kd_accel.models.weights import ModelCard, load_card, load_run_model, load_weights, save_model

CARD = ModelCard("import:tests.support.models:student_with_everything", "imagenet", {}, list("abcd"), [0.5] * 3, [0.2] * 3, 32)


def small(num_classes=4, seed=0):
    return build_model(CARD.arch, num_classes=num_classes, seed=seed)


def test_a_saved_model_is_the_same_model(tmp_path):
    model = small(seed=5).eval()
    save_model(tmp_path, model, card=CARD)
    loaded, card = load_run_model(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert card == CARD
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_shared_tensors_are_saved_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    save_model(tmp_path, model, card=CARD)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["1.weight"], model[0].weight)


def test_a_classifier_of_other_classes_is_reset_in_a_student_and_refused_in_a_teacher(tmp_path):
    save_file(small(num_classes=7).state_dict(), tmp_path / "w.safetensors")
    target = small(num_classes=4, seed=9)
    head = target.fc.weight.clone()
    notices = load_weights(target, str(tmp_path / "w.safetensors"), arch="x", is_exact=False)
    assert len(notices) == 1
    assert notices[0].startswith("fc: starts from random weights")
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.layer1[0].weight, small(num_classes=7).layer1[0].weight)
    with pytest.raises(UserError, match="teacher.weights: .*has 7 classes .*expected 4; use weights"):
        load_weights(small(), str(tmp_path / "w.safetensors"), arch="x", is_exact=True, field="teacher")


def test_a_stem_of_another_shape_keeps_its_random_weights(tmp_path):
    save_file(build_model("torchvision/resnet18", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    target = build_model("torchvision/resnet18", num_classes=10, stem="cifar")
    assert [
        notice.split(":")[0] for notice in load_weights(target, str(tmp_path / "w.safetensors"), arch="x", is_exact=False)
    ] == ["conv1"]


def test_a_vision_transformer_of_another_image_size_keeps_its_position_embedding_alone(tmp_path):
    pytest.importorskip("timm")
    arguments = {"depth": 1, "embed_dim": 12, "num_heads": 3, "patch_size": 8}
    arch = "timm/vit_tiny_patch16_224"
    source = build_model(arch, num_classes=4, arch_args={"img_size": 64, **arguments}, seed=1)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = build_model(arch, num_classes=4, arch_args={"img_size": 32, **arguments}, seed=2)
    before = target.pos_embed.clone()
    notices = load_weights(target, str(tmp_path / "w.safetensors"), arch=arch, is_exact=False)
    assert notices == ["pos_embed: starts from random weights, because the loaded weights do not match its shape"]
    assert torch.equal(target.pos_embed, before) and torch.equal(target.cls_token, source.cls_token)
    assert torch.equal(target.patch_embed.proj.weight, source.patch_embed.proj.weight)
    with pytest.raises(UserError, match=r"1 of another shape .pos_embed"):
        load_weights(target, str(tmp_path / "w.safetensors"), arch=arch, is_exact=True)


def test_a_stem_of_another_shape_is_refused_in_a_teacher(tmp_path):
    save_file(build_model("torchvision/resnet18", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    model = build_model("torchvision/resnet18", num_classes=10, stem="cifar")
    with pytest.raises(UserError, match="teacher.weights: .* 1 of another shape .conv1.weight"):
        load_weights(model, str(tmp_path / "w.safetensors"), arch="torchvision/resnet18", is_exact=True, field="teacher")


def test_half_precision_files_are_loaded_as_float32(tmp_path):
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in small().state_dict().items()}, tmp_path / "w.safetensors"
    )
    model = small(seed=3)
    load_weights(model, str(tmp_path / "w.safetensors"), arch="x", is_exact=True)
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, small().fc.weight.half().float())


def test_batch_counters_may_be_missing(tmp_path):
    source = small(seed=1)
    kept = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "w.safetensors")
    model = small()
    assert load_weights(model, str(tmp_path / "w.safetensors"), arch=CARD.arch, is_exact=True) == []
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_file(build_model("torchvision/resnet50", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit torchvision/resnet18.*; tensors: .* unexpected .*; set arch and stem"):
        load_weights(
            build_model("torchvision/resnet18", num_classes=10),
            str(tmp_path / "w.safetensors"),
            arch="torchvision/resnet18",
            is_exact=False,
        )


def test_the_architecture_of_another_run_is_reported(tmp_path):
    save_model(tmp_path, small(), card=CARD)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        model = build_model("torchvision/resnet18", num_classes=4)
        with pytest.raises(
            UserError,
            match="does not fit torchvision/resnet18.*import:tests.support.models:student_with_everything, stem imagenet$",
        ):
            load_weights(model, str(weights), arch="torchvision/resnet18", is_exact=False)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere.safetensors", "model.weights: file nowhere.safetensors not found; check the path"),
        ("model.pth", "model.weights: model.pth is a pickle.*safetensors.torch.save_file"),
        ("runs/nowhere", "model.weights: run directory 'runs/nowhere' not found; train it first"),
        ("IMAGENET1K_V9", "has no weights 'IMAGENET1K_V9'; use one of IMAGENET1K_V1"),
    ],
)
def test_missing_weights_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        load_weights(build_model("torchvision/resnet18", num_classes=10), weights, arch="torchvision/resnet18", is_exact=False)


def test_user_code_has_no_weights_by_name():
    with pytest.raises(UserError, match="model.weights: 'best' is neither a run directory nor a .safetensors file"):
        load_weights(small(), "best", arch=CARD.arch, is_exact=False)


@pytest.fixture
def put_download(tmp_path, monkeypatch):
    """Return a function that puts a state dict into torchvision's download directory."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def put(name, tensors):
        path = tmp_path / "hub/checkpoints" / Path(models.get_model_weights(name).DEFAULT.url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, path)

    return put


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_with_auxiliary_heads_by_name(name, put_download, tmp_path):
    arch, needed = f"torchvision/{name}", {"transform_input": True}
    complete = models.get_model(name, weights=None, init_weights=False, aux_logits=True, transform_input=True).eval()
    put_download(name, complete.state_dict())
    model = build_model(arch, num_classes=1000, arch_args=needed).eval()
    state = torch.get_rng_state()
    assert load_weights(model, "DEFAULT", arch=arch, is_exact=True) == []
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(model(images), complete(images))
    save_file(complete.state_dict(), tmp_path / "w.safetensors")
    other = build_model(arch, num_classes=4)
    (notice,) = load_weights(other, str(tmp_path / "w.safetensors"), arch=arch, is_exact=False)
    assert notice.startswith("fc: starts from random weights")
    with pytest.raises(UserError, match=r"model.weights: DEFAULT .* set model.arch_args: \{transform_input: true\}"):
        load_weights(other, "DEFAULT", arch=arch, is_exact=False)


@pytest.mark.slow
def test_weights_by_name_with_keys_of_older_files(put_download):
    tensors = {name: tensor for name, tensor in models.densenet121().state_dict().items() if "tracked" not in name}
    old_key = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    put_download("densenet121", {old_key.sub(r"\1.\2", name): tensor for name, tensor in tensors.items()})
    model = build_model("torchvision/densenet121", num_classes=1000, seed=1)
    assert load_weights(model, "DEFAULT", arch="torchvision/densenet121", is_exact=True) == []
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_damaged_files_are_reported(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        load_card(tmp_path)
    save_model(tmp_path, small(), card=CARD)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-7])
    with pytest.raises(UserError, match="damaged"):
        load_run_model(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"arch": "x"}))
    with pytest.raises(UserError, match="stem, arch_args.* missing"):
        load_card(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="model.json: is damaged"):
        load_card(tmp_path)


def test_the_tensor_with_values_that_are_not_finite_is_named(tmp_path):
    tensors = small().state_dict()
    tensors["fc.bias"][2] = float("nan")
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"model.weights: fc\.bias in .*w\.safetensors contains values that are not finite"):
        load_weights(small(), str(tmp_path / "w.safetensors"), arch="x", is_exact=False)


@pytest.mark.parametrize(
    "change",
    [
        {"arch": 3},
        {"stem": "odd"},
        {"arch_args": [1]},
        {"label_names": None},
        {"label_names": []},
        {"label_names": [1, 2]},
        {"mean": "gray"},
        {"mean": [0.1, 0.2]},
        {"std": [0.1, 0.2, 0.0]},
        {"std": [0.1, 0.2, float("nan")]},
        {"image_size": "32"},
        {"image_size": 0},
    ],
)
def test_damaged_values_of_a_card_are_reported(tmp_path, change):
    (tmp_path / "model.json").write_text(json.dumps({**dataclasses.asdict(CARD), **change}))
    with pytest.raises(UserError, match=rf"model.json: is damaged \({next(iter(change))} wrong or missing\)"):
        load_card(tmp_path)


def test_a_card_that_is_not_a_mapping_is_refused(tmp_path):
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(UserError, match="model.json: is damaged"):
        load_card(tmp_path)


def test_a_run_without_weights_is_refused(tmp_path):
    save_model(tmp_path, small(), card=CARD)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"model.weights: file .*model.safetensors not found; check the path, or train the run again"
    ):
        load_run_model(tmp_path)


def test_a_failed_write_keeps_the_old_files_and_leaves_no_temporary_files(tmp_path, monkeypatch):
    save_model(tmp_path, small(seed=1), card=CARD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(UserError, match="cannot write the model to .*No space left"):
        save_model(tmp_path, small(seed=2), card=CARD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_both_files_and_the_directory_are_flushed_to_disk(tmp_path, monkeypatch):
    flushed = []
    flush = os.fsync

    def record(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".tmp")[0])
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", record)
    save_model(tmp_path, small(), card=CARD)
    assert flushed == [".model.safetensors", tmp_path.name, ".model.json", tmp_path.name]


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot write the model"):
        save_model(tmp_path / "nowhere", small(), card=CARD)
