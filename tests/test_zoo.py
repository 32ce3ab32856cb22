"""What a user can get wrong about a network, its arguments and its files, and what a write must survive."""

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

from kd_accel import disk
from kd_accel.models.files import ModelCard, load_card, load_run_model, load_weights, save_model
from kd_accel.models.zoo import build_model
from kd_accel.types import UserError

CARD = ModelCard("import:tests.own_models:student", "imagenet", {}, list("abcd"), [0.5] * 3, [0.2] * 3, 32)


def small(num_classes=4, seed=0):
    return build_model(CARD.arch, num_classes=num_classes, seed=seed)


@pytest.mark.parametrize(
    ("arch", "settings", "said"),
    [
        ("resnet18", {}, "bench.arch: 'resnet18' must start with torchvision/.*did you mean torchvision/resnet18"),
        ("keras/zzz", {}, "must start with torchvision/.*such as torchvision/resnet18"),
        ("timm/resnet18.nope", {}, "bench.arch: timm/resnet18.nope cannot be built .*nope"),
        ("torchvision/resnet18", {"arch_args": {"num_classes": 5}}, "bench.arch_args: num_classes is set by the data"),
        ("torchvision/resnet18", {"arch_args": {"width_per_group": 128}}, "bench.arch_args: .* does not take .*base_width=64"),
        ("timm/resnet18", {"arch_args": {"wings": 2}}, "bench.arch_args: .* does not take .'wings': 2"),
        ("import:tests.own_models:student", {"arch_args": {"wings": 2}}, "does not take the arguments wings, num_classes"),
        ("import:builtins:dict", {"stem": "cifar"}, "gave dict, not a torch.nn.Module"),
        ("timm/resnet18d", {"stem": "cifar"}, "is for ResNets"),
    ],
)
def test_what_cannot_be_built(arch, settings, said):
    with pytest.raises(UserError, match=said):
        build_model(arch, num_classes=10, field="bench", **settings)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="needs timm; pip install 'kd-accel.timm.'"):
        build_model("timm/resnet18", num_classes=10)


def broken_model(num_classes):
    raise TypeError("a fault inside the user's own code")


def test_a_fault_inside_own_code_keeps_its_traceback():
    with pytest.raises(TypeError, match="inside the user's own code"):
        build_model(f"import:{__name__}:broken_model", num_classes=10)


def test_building_leaves_the_generators_of_gpus_alone(monkeypatch):
    def moved(seed):
        raise AssertionError("moved")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", moved)
    small(seed=3)


@pytest.mark.parametrize(
    "change",
    [
        {"arch": 3},
        {"stem": "odd"},
        {"arch_args": [1]},
        {"label_names": None},
        {"label_names": []},
        {"label_names": [1, 2]},
        {"mean": "grey"},
        {"mean": [0.1, 0.2]},
        {"std": [0.1, 0.2, 0.0]},
        {"std": [0.1, 0.2, float("nan")]},
        {"image_size": "32"},
        {"image_size": 0},
    ],
)
def test_a_card_with_a_damaged_value_names_it(tmp_path, change):
    (tmp_path / "model.json").write_text(json.dumps({**dataclasses.asdict(CARD), **change}))
    with pytest.raises(UserError, match=rf"model.json: damaged \({next(iter(change))} wrong or missing\)"):
        load_card(tmp_path)


def test_a_card_that_is_no_mapping(tmp_path):
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged .no JSON object"):
        load_card(tmp_path)


def test_a_run_without_its_weights(tmp_path):
    save_model(tmp_path, small(), card=CARD)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.weights: no file .*model.safetensors; check the path, or train the run again"):
        load_run_model(tmp_path)


def test_a_run_of_another_architecture_is_named(tmp_path):
    save_model(tmp_path, small(), card=CARD)
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        model = build_model("torchvision/resnet18", num_classes=4)
        with pytest.raises(
            UserError, match="does not fit torchvision/resnet18.*import:tests.own_models:student, stem imagenet$"
        ):
            load_weights(model, str(weights), arch="torchvision/resnet18", is_exact=False)


def test_a_teachers_stem_must_fit_and_is_not_taken_for_its_classes(tmp_path):
    save_file(build_model("torchvision/resnet18", num_classes=10).state_dict(), tmp_path / "w.safetensors")
    model = build_model("torchvision/resnet18", num_classes=10, stem="cifar")
    with pytest.raises(UserError, match="teacher.weights: .* 1 of another shape .conv1.weight"):
        load_weights(model, str(tmp_path / "w.safetensors"), arch="torchvision/resnet18", is_exact=True, field="teacher")


def test_weights_by_name_of_a_library_that_has_none():
    with pytest.raises(UserError, match="'best' is no run directory and no .safetensors file"):
        load_weights(small(), "best", arch=CARD.arch, is_exact=False)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Puts a state dict where torchvision keeps the weights that it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def put(name, tensors):
        path = tmp_path / "hub/checkpoints" / Path(models.get_model_weights(name).DEFAULT.url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, path)

    return put


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_with_auxiliary_heads_by_name(name, downloaded, tmp_path):
    arch, needed = f"torchvision/{name}", {"transform_input": True}
    whole = models.get_model(name, weights=None, init_weights=False, aux_logits=True, transform_input=True).eval()
    downloaded(name, whole.state_dict())
    model = build_model(arch, num_classes=1000, arch_args=needed).eval()
    state = torch.get_rng_state()
    assert load_weights(model, "DEFAULT", arch=arch, is_exact=True) == []
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(model(images), whole(images))
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    other = build_model(arch, num_classes=4)
    (notice,) = load_weights(other, str(tmp_path / "w.safetensors"), arch=arch, is_exact=False)
    assert notice.startswith("fc: starts from random weights")
    with pytest.raises(UserError, match=r"model.weights: DEFAULT .* set model.arch_args: \{transform_input: true\}"):
        load_weights(other, "DEFAULT", arch=arch, is_exact=False)


def test_weights_by_name_under_the_keys_of_older_files(downloaded):
    whole = {name: tensor for name, tensor in models.densenet121().state_dict().items() if "tracked" not in name}
    old_key = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    downloaded("densenet121", {old_key.sub(r"\1.\2", name): tensor for name, tensor in whole.items()})
    model = build_model("torchvision/densenet121", num_classes=1000, seed=1)
    assert load_weights(model, "DEFAULT", arch="torchvision/densenet121", is_exact=True) == []
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.items())


def test_batch_counters_may_be_missing(tmp_path):
    arch = "import:tests.own_models:student_with_everything"
    source = build_model(arch, num_classes=4, seed=1)
    kept = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "w.safetensors")
    model = build_model(arch, num_classes=4)
    assert load_weights(model, str(tmp_path / "w.safetensors"), arch=arch, is_exact=True) == []
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def test_tensors_that_two_modules_share_are_saved_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    save_model(tmp_path, model, card=CARD)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["1.weight"], model[0].weight)


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    save_model(tmp_path, small(seed=1), card=CARD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full_disk)
    with pytest.raises(UserError, match="cannot write the model to .*No space left"):
        save_model(tmp_path, small(seed=2), card=CARD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_both_files_and_the_directory_reach_the_disk(tmp_path, monkeypatch):
    flushed = []
    flush = os.fsync

    def record(descriptor):
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".tmp")[0])
        flush(descriptor)

    monkeypatch.setattr(disk.os, "fsync", record)
    save_model(tmp_path, small(), card=CARD)
    assert flushed == [".model.safetensors", tmp_path.name, ".model.json", tmp_path.name]


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot write the model"):
        save_model(tmp_path / "nowhere", small(), card=CARD)
