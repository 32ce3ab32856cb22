"""Paths among the settings: their absolute form in a run, and a run that is resumed from elsewhere, or with moved data."""

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from kd_accel.builders.run import run_directory
from kd_accel.config.fields import flatten
from kd_accel.config.paths import absolute_paths, is_path_of_weights, moved_paths
from kd_accel.config.schema import RunConfig
from tests.support import in_process
from tests.support.launching import ROOT

OWN_DATA = ["--data.transform=none", "--data.image_size=16", "--train.max_steps=6"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data.source", "imagefolder:photos", "imagefolder:{cwd}/photos"),
        ("data.source", "imagefolder:../photos/", "imagefolder:{parent}/photos"),
        ("data.source", "parquet:data/*.parquet", "parquet:{cwd}/data/*.parquet"),
        ("data.source", "parquet:/data", "parquet:/data"),
        ("data.source", "parquet:~/data", "parquet:{home}/data"),
        ("data.source", "hub:./clone", "hub:{cwd}/clone"),
        ("data.source", "hub:own", "hub:{cwd}/own"),
        ("data.source", "hub:uoft-cs/cifar10@main", "hub:uoft-cs/cifar10@main"),
        ("data.source", "import:package.module:function", "import:package.module:function"),
        ("data.source", "digits", "digits"),
        ("model.weights", "runs/teacher", "{cwd}/runs/teacher"),
        ("model.weights", "w.safetensors", "{cwd}/w.safetensors"),
        ("model.weights", "own", "{cwd}/own"),
        ("model.weights", "IMAGENET1K_V2", "IMAGENET1K_V2"),
        ("teacher.weights", "a1_in1k", "a1_in1k"),
        ("teacher.weights", None, None),
        ("teacher.run", "runs/teacher", "{cwd}/runs/teacher"),
        ("teacher.cache.dir", "caches/x", "{cwd}/caches/x"),
        ("run_dir", "elsewhere", "{cwd}/elsewhere"),
        ("name", "runs/x", "runs/x"),
    ],
)
def test_only_paths_become_absolute(tmp_path, monkeypatch, name, value, expected):
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = value
    for key in reversed(name.split(".")):
        settings = {key: settings}
    places = {"cwd": tmp_path, "parent": tmp_path.parent, "home": Path.home()}
    absolute = absolute_paths(settings)
    assert flatten(absolute)[name] == (expected.format(**places) if expected else None)
    monkeypatch.chdir(tmp_path.parent)
    assert absolute_paths(absolute) == absolute, "an absolute path does not depend on the working directory"


def test_a_run_without_paths_stores_its_settings_unchanged():
    config = RunConfig()
    assert run_directory(config).settings == config.model_dump(mode="json")


def test_the_names_of_a_library_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_path_of_weights("IMAGENET1K_V1")
    (tmp_path / "IMAGENET1K_V1").mkdir()
    assert is_path_of_weights("IMAGENET1K_V1"), "a directory of this name is read instead, as by load_weights"


@pytest.mark.parametrize(
    ("before", "now", "is_moved"),
    [
        ("imagefolder:{p}/old/photos", "imagefolder:{p}/here/photos", True),
        ("imagefolder:{p}/here/photos", "imagefolder:{p}/there/photos", False),  # the old place still exists
        ("imagefolder:{p}/old/photos", "imagefolder:{p}/here/other", False),
        ("imagefolder:{p}/old/photos", "parquet:{p}/here/photos", False),
        ("imagefolder:{p}/old/photos", "digits", False),
    ],
)
def test_a_moved_directory_has_left_its_old_place(tmp_path, before, now, is_moved):
    for place in ("here/photos", "there/photos", "here/other"):
        (tmp_path / place).mkdir(parents=True)
    old, new = ({"data": {"source": text.format(p=tmp_path)}} for text in (before, now))
    assert moved_paths(old, new) == ({"data.source"} if is_moved else set())


@pytest.fixture
def photos(tmp_path):
    """Write a project with an image folder of 20 training and 10 test images in two classes."""
    for split, count in (("train", 10), ("test", 5)):
        for label, level in (("dark", 20), ("light", 200)):
            (tmp_path / "project/photos" / split / label).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (16, 16), (level, level + number, 3 * number))
                image.save(tmp_path / "project/photos" / split / label / f"{number}.png")
    return tmp_path / "project"


def test_a_run_is_resumed_from_another_directory(photos, monkeypatch):
    flags = [*OWN_DATA, "--train.batch_size=4"]
    monkeypatch.chdir(photos)
    in_process.train("straight", "--data.source=imagefolder:photos", *flags)
    in_process.train("run", "--data.source=imagefolder:photos", *flags, "--checkpoint.stop_after_steps=3")
    stored = yaml.safe_load((photos / "run/config.yaml").read_text())
    assert (stored["data"]["source"], stored["run_dir"]) == (f"imagefolder:{photos}/photos", str(photos / "run"))
    monkeypatch.chdir(ROOT)
    shutil.move(photos / "run", photos.parent / "elsewhere")
    monkeypatch.chdir(photos.parent)
    text = in_process.train("elsewhere", "--data.source=imagefolder:project/photos", *flags)
    assert "data.source" not in text, "the same directory is not a change"
    weights = [(run / "model.safetensors").read_bytes() for run in (photos / "straight", photos.parent / "elsewhere")]
    assert weights[0] == weights[1]


def test_a_moved_project_is_resumed_with_the_same_command(photos, monkeypatch):
    flags = ["--data.source=imagefolder:photos", *OWN_DATA, "--train.batch_size=4"]
    monkeypatch.chdir(photos)
    in_process.train("first", *flags)
    flags.append("--model.weights=first")
    in_process.train("straight", *flags)
    in_process.train("run", *flags, "--checkpoint.stop_after_steps=3")
    monkeypatch.chdir(ROOT)
    photos.rename(photos.parent / "moved")
    monkeypatch.chdir(photos.parent / "moved")
    text = in_process.train("run", *flags)
    assert f"data.source: 'imagefolder:{photos}/photos' in the run, 'imagefolder:{photos.parent}/moved/photos' now" in text
    assert Path("run/model.safetensors").read_bytes() == Path("straight/model.safetensors").read_bytes()
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"]["weights"] == f"{photos.parent}/moved/first"
    assert "finished already" in in_process.train("run", *flags)


def test_moved_data_with_other_images_are_refused(photos):
    flags = [*OWN_DATA, "--train.batch_size=4"]
    in_process.train(photos / "run", f"--data.source=imagefolder:{photos}/photos", *flags, "--checkpoint.stop_after_steps=3")
    (photos / "new").mkdir()
    (photos / "photos").rename(photos / "new/photos")
    Image.new("RGB", (16, 16), (1, 2, 3)).save(photos / "new/photos/train/dark/0.png")
    text = in_process.train(photos / "run", f"--data.source=imagefolder:{photos}/new/photos", *flags, code=2)
    assert "was trained on other data (digest:" in text


def test_a_config_with_relative_paths_of_an_earlier_version_is_the_same(photos, monkeypatch):
    flags = ["--data.source=imagefolder:photos", *OWN_DATA, "--train.batch_size=4"]
    monkeypatch.chdir(photos)
    in_process.train("run", *flags)
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    stored["data"]["source"] = "imagefolder:photos"
    Path("run/config.yaml").write_text(yaml.safe_dump(stored))
    assert "finished already" in in_process.train("run", *flags)
