"""Default name of a run: architecture, data and role, safe as the name of a directory."""

import re
from pathlib import Path

import pytest
import yaml

from kd_accel.config.parsing import build_config, load_config_file, save_config
from kd_accel.config.schema import RunConfig
from tests.support.parsing import LOSSES, parse


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "resnet18-digits-student"),
        (["--data.source=hub:uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2"], "resnet18-cifar10-student"),
        (["--data.source=parquet:/data/cifar10/", "--role=teacher"], "resnet18-cifar10-teacher"),
        (["--data.source=imagefolder:photos", "--teacher.run=x"], "resnet18-photos-distilled"),
        (["--data.source=import:my.module:my_images"], "resnet18-my_images-student"),
        (["--model.arch=timm/vit_tiny_patch16_224.augreg_in21k"], "vit_tiny_patch16_224.augreg_in21k-digits-student"),
        (["--model.arch=import:my.models:Net", "--data.source=imagefolder:."], "Net-imagefolder-student"),
        (["--data.source=imagefolder:../.."], "resnet18-imagefolder-student"),
        (["--data.source=imagefolder:données d'été"], "resnet18-donnees-d-ete-student"),
        (["--data.source=imagefolder:图片"], "resnet18-imagefolder-student"),
        (["--data.source=parquet:a\\b"], "resnet18-b-student"),
        (["--name=mine"], "mine"),
        (["--name=mine", "--name=auto"], "resnet18-digits-student"),
    ],
)
def test_default_name_consists_of_architecture_data_and_role(flags, name):
    config = parse(*flags)
    assert config.name == name and config.directory == Path("runs") / name
    assert parse(*flags, "--run_dir=x").directory == Path("x")


@pytest.mark.parametrize(
    "place", ["x" * 300, "a b/c;d&e|f", "-rf", "...", "a/..", "~", "$HOME", "x\u202ey", "%s", "a:b", "..a", ""]
)
def test_default_name_is_a_short_and_safe_file_name(place):
    name = build_config(RunConfig, {"data": {"source": f"imagefolder:{place}"}}, {}, losses=LOSSES).name
    assert re.fullmatch(r"resnet18-[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?-student", name) and len(name) < 100


def test_default_name_is_saved_and_follows_an_override(tmp_path):
    config = RunConfig()
    save_config(config, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["name"] == "resnet18-digits-student"
    assert load_config_file(RunConfig, tmp_path / "config.yaml") == config
    override = {"data.source": "imagefolder:photos"}
    assert build_config(RunConfig, config, override, losses=LOSSES).name == "resnet18-photos-student"
    assert build_config(RunConfig, RunConfig(name="mine"), override, losses=LOSSES).name == "mine"
