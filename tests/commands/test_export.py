"""`kd-accel export`: the folder and its messages; mistakes are found before the work."""

import builtins
import sys

import pytest

import kd_accel as kd
from kd_accel.io.user_code import VARIABLE
from kd_accel.models.factory import build_model
from kd_accel.models.weights import ModelCard, save_model
from tests.support.in_process import say

SMALL = "import:tests.support.models:student"
NAMES = ["red", "green", "blue", "olive"]


@pytest.fixture
def run(tmp_path):
    """The files of a run on the images of tests/support/models.py."""
    directory = tmp_path / "run"
    directory.mkdir()
    card = ModelCard(SMALL, "imagenet", {}, NAMES, [0.4] * 3, [0.3] * 3, 16)
    save_model(directory, build_model(SMALL, num_classes=4), card=card)
    source = "import:tests.support.models:images"
    (directory / "config.yaml").write_text(f"name: shapes\ndata: {{source: '{source}'}}\nmodel: {{arch: '{SMALL}'}}\n")
    return directory


def test_folder_of_a_run(run, tmp_path):
    said = say("export", run, "--format=hub")
    assert said.startswith(
        f"Written to {run / 'export/hub'}; compared with the network on 41 test samples, in batches of 1 and 7"
    )
    assert kd.load_model(run / "export/hub").class_names == NAMES
    text = (run / "export/hub/README.md").read_text()
    assert "\n# shapes\n" in text and "| source | import:tests.support.models:images |" in text and str(tmp_path) not in text
    say("export", run, "--format=hub", f"--out={tmp_path / 'other/place'}")
    assert (tmp_path / "other/place/README.md").read_text() == text


def test_a_run_without_its_config_is_compared_on_random_images(run):
    (run / "config.yaml").unlink()
    said = say("export", run, "--format=hub")
    assert "200 random images (seed 0), because the test samples cannot be read (" in said and "config.yaml: is missing" in said
    assert "\n# run\n" in (run / "export/hub/README.md").read_text()


def test_user_code_in_a_run_needs_permission(run, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert "code that was not typed on this command line" in say("export", run, "--format=hub", code=2)
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "missing: --format"),
        (["--format=tflite"], "--format: invalid choice: 'tflite'"),
        (["--format=hub", "--normalize"], "--normalize: has no effect on --format hub"),
        (["--format=torch", "--normalise"], "--normalise: no such option; did you mean --normalize?"),
    ],
)
def test_mistakes(run, flags, message):
    assert message in say("export", run, *flags, code=2)
    assert not (run / "export").exists()


def test_a_directory_without_a_run(tmp_path):
    assert "no finished run in this directory" in say("export", tmp_path, "--format=onnx", code=2)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_before_the_export(run, monkeypatch, package):
    original = builtins.__import__

    def without_package(name, *arguments, **named):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", without_package)
    said = say("export", run, "--format=onnx", code=2)
    assert f'export: ONNX needs {package}, which is not installed; pip install "kd-accel[export]"' in said
    assert not (run / "export").exists()
