"""Folder for the Hub: loaded by timm alone or by kd_accel, with equal logits; a wrong folder is refused."""

import json

import pytest
import torch

import kd_accel as kd
from kd_accel.deploy import folder
from kd_accel.deploy.folder import write_folder
from kd_accel.deploy.samples import ParitySamples
from kd_accel.errors import UserError
from kd_accel.models.card import ModelCard
from kd_accel.models.factory import build_model

FILES = {"README.md", "config.json", "model.json", "model.safetensors"}
SMALL = "import:tests.support.models:student_with_everything"


def built(arch, size, *, classes=3, stem="imagenet", **arch_args):
    names = [f"class {index}" for index in range(classes)]
    card = ModelCard(arch, stem, arch_args, names, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], size, crop_pct=0.875)
    network = build_model(arch, num_classes=classes, stem=stem, arch_args=arch_args, seed=3).eval()
    images = torch.randint(256, (9, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return network, card, ParitySamples(images, "random images")


@pytest.mark.slow  # timm is imported
@pytest.mark.parametrize(
    ("arch", "size", "arch_args"),
    [
        ("timm/resnet10t", 32, {}),
        ("timm/vit_tiny_patch16_224", 32, {"img_size": 32}),
        ("timm/vit_tiny_patch16_384", 64, {"dynamic_img_size": True}),
    ],
)
def test_timm_loads_the_folder(tmp_path, arch, size, arch_args):
    import timm

    network, card, samples = built(arch, size, **arch_args)
    parity = write_folder(network, card, tmp_path / "out", readme="text", samples=samples)
    assert parity.largest_difference < 1e-6 and {path.name for path in (tmp_path / "out").iterdir()} == FILES
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    data = timm.data.resolve_model_data_config(loaded)
    numbers = {name: list(data[name]) for name in ("input_size", "mean", "std")}
    assert numbers == {"input_size": [3, size, size], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.875)
    assert loaded.pretrained_cfg["label_names"] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    ("arch", "stem"), [(SMALL, "imagenet"), pytest.param("timm/resnet18", "cifar", marks=pytest.mark.slow)]
)
def test_other_networks_are_loaded_by_kd_accel(tmp_path, arch, stem):
    network, card, samples = built(arch, 16, stem=stem)
    write_folder(network, card, tmp_path / "out", readme="text", samples=samples)
    model = kd.load_model(tmp_path / "out")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.network(images), network(images))
    assert model.class_names == card.label_names
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["library_name"], config["architecture"]) == ("kd_accel", arch)


def test_a_wrong_folder_is_refused_and_the_earlier_files_are_kept(tmp_path, monkeypatch):
    network, card, samples = built(SMALL, 16)
    write_folder(network, card, tmp_path / "out", readme="first", samples=samples)
    (tmp_path / "out/.git").mkdir()
    write_folder(network, card, tmp_path / "out", readme="second", samples=samples)
    save = folder.save_model

    def save_permuted(directory, model, *, card):
        wrong, _, _ = built(SMALL, 16)
        wrong.fc.load_state_dict({name: tensor.flip(0) for name, tensor in model.fc.state_dict().items()})
        save(directory, wrong, card=card)

    monkeypatch.setattr(folder, "save_model", save_permuted)
    with pytest.raises(UserError, match="does not compute the network's logits: largest difference"):
        write_folder(network, card, tmp_path / "out", readme="third", samples=samples)
    assert (tmp_path / "out/README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/.git").is_dir()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    network, card, samples = built(SMALL, 16)
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="--out: .* is a file; give the path of a directory"):
        write_folder(network, card, tmp_path / "out", readme="", samples=samples)
